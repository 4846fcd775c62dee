"""What can be installed: the declared dependencies, and the pinned versions of each Python."""

import ast
import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import inception_jax

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PINS = [*(f"python{python}" for python in PYTHONS), "lowest"]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def declared() -> list[Requirement]:
    """Returns what `make setup` installs: the dependencies, and the extra for development."""
    texts = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    return [Requirement(text) for text in texts]


def pins_file(name: str) -> pathlib.Path:
    return ROOT / "requirements" / f"{name}.txt"


def pins(name: str) -> dict[str, Version]:
    """Returns the pinned version of every package, by its canonical name."""
    lines = pins_file(name).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("name", PINS)
def test_pins_are_exact_versions_and_nothing_else(name: str) -> None:
    """No address of a package index, no hash, no option, no local version that an index lacks."""
    lines = pins_file(name).read_text(encoding="utf-8").splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert len(pins(name)) == len(lines), "a package is pinned twice"


@pytest.mark.parametrize("name", PINS)
def test_pins_satisfy_the_declared_dependencies(name: str) -> None:
    pinned = pins(name)
    builds = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    for requirement in [*declared(), *map(Requirement, builds["requires"])]:
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned: make pins"
        assert version in requirement.specifier, f"{requirement} is pinned as {version}: make pins"


def test_lowest_pins_are_the_lower_bounds() -> None:
    pinned = pins("lowest")
    for requirement in declared():
        bounds = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
        assert len(bounds) == 1, f"{requirement} has no lower bound"
        found = pinned[canonicalize_name(requirement.name)]
        assert found == Version(bounds[0]), f"{requirement} is pinned as {found}: make pins"


@pytest.mark.parametrize("name", PINS)
def test_pins_leave_out_other_frameworks(name: str) -> None:
    unwanted = {"tensorflow", "tensorflow-cpu", "keras", "torch", "torchvision", "inception-jax"}
    assert not unwanted & set(pins(name))


def test_the_pins_of_this_python_need_nothing_more() -> None:
    """Every requirement of a pinned package, as far as it is installed here, is pinned too."""
    pinned = pins(f"python{sys.version_info.major}.{sys.version_info.minor}")
    for name, version in pinned.items():
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if Version(distribution.version) != version:
            continue
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                found = pinned.get(canonicalize_name(requirement.name))
                assert found is not None, f"{name} needs {requirement}, which is not pinned"
                assert requirement.specifier.contains(found, prereleases=True), f"{name}: {text}"


def test_the_python_versions_agree() -> None:
    """Those that pyproject.toml allows are those with pins, and those that it lists."""
    files = {path.stem for path in (ROOT / "requirements").glob("*.txt")}
    listed = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    allowed = Requirement(f"python{project()['requires-python']}").specifier
    assert set(PYTHONS) == {f"3.{minor}" for minor in range(20) if f"3.{minor}" in allowed}
    assert files == {*PINS, "tpu"}
    assert listed == list(PYTHONS)


def test_the_compiler_for_tpus_is_the_one_of_the_pinned_jax() -> None:
    """CI installs it alone, for the tests of compiled programs."""
    ((name, version),) = pins("tpu").items()
    assert name == "libtpu"
    newest = max(pins(environment)["jax"] for environment in PINS)
    if Version(importlib.metadata.version("jax")) != newest:
        pytest.skip(f"only jax {newest} itself says which compiler it needs")
    wanted = [
        requirement
        for requirement in map(Requirement, importlib.metadata.requires("jax") or [])
        if requirement.name == "libtpu"
    ]
    assert [version in each.specifier for each in wanted] == [True], wanted


def test_extras_for_development_have_the_bounds_of_the_others() -> None:
    extras = project()["optional-dependencies"]
    for name in ("gcs", "onnx", "serve"):
        assert set(extras[name]) <= set(extras["dev"]), name


def test_what_is_declared_is_what_is_imported() -> None:
    """A package that comes only with another one would be gone when that one drops it."""
    names: set[str] = set()
    for path in (ROOT / "inception_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.split(".")[0])
    distributions = importlib.metadata.packages_distributions()
    declared = {canonicalize_name(Requirement(text).name) for text in project()["dependencies"]}
    used = {"array-record", "flatbuffers"}  # By TFDS and by jax.export, for this package.
    extras = project()["optional-dependencies"]
    optional = {
        canonicalize_name(Requirement(text).name)
        for name in ("gcs", "onnx", "reference", "serve")
        for text in extras[name]
    }
    for name in names - set(sys.stdlib_module_names) - {"inception_jax"} - optional:
        found = {canonicalize_name(distribution) for distribution in distributions.get(name, [])}
        assert found & (declared | optional), f"import {name}: {found or 'it'} is not declared"
        used |= found
    assert declared <= used


def test_the_templates_of_the_report_are_installed() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    patterns = tomllib.loads(text)["tool"]["setuptools"]["package-data"]["inception_jax.reporting"]
    folder = ROOT / "inception_jax" / "reporting"
    installed = {path for pattern in patterns for path in folder.glob(pattern)}
    assert installed == {path for path in (folder / "templates").rglob("*") if path.is_file()}
    assert len(installed) >= 5


def test_the_version_is_that_of_the_package() -> None:
    assert "version" in project()["dynamic"]
    assert Version(inception_jax.__version__).release


@pytest.mark.parametrize("arguments", [["help"], ["-n", "setup"], ["-n", "demo"], ["-n", "pins"]])
def test_make_commands_parse(arguments: list[str]) -> None:
    done = subprocess.run(
        ["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip()


def python_of_version(version: str, path: pathlib.Path, *, ensurepip: bool = True) -> None:
    """Writes a command that runs -c as if it had that version, and else prints its arguments."""
    major, minor = version.split(".")
    hidden = "" if ensurepip else "import importlib.util as u; u.find_spec = lambda name: None; "
    claim = f"import sys; sys.version_info = ({major}, {minor}, 0); sys._base_executable = '{path}'"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '#!/bin/sh\nif [ "$1" != -c ]; then echo "$@" >&2; exit 99; fi\n'
        f'exec "{sys.executable}" -c "{claim}; {hidden}$2"\n'
    )
    path.chmod(0o755)


@pytest.fixture
def machine(tmp_path: pathlib.Path) -> dict[str, str]:
    """The environment variables of a machine without Python, except those that tests add."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("cat", "dirname", "head", "ls", "make", "sed", "sh", "sort", "tail"):
        found = shutil.which(name)
        assert found, name
        (commands / name).symlink_to(found)
    return {"PATH": str(commands), "HOME": str(tmp_path)}


def find_python(machine: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / ".ci" / "find_python"), *arguments]
    return subprocess.run(command, env=machine, capture_output=True, text=True, check=False)


def test_the_pythons_of_a_machine_are_found_newest_first(
    machine: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """Also where a command of that name fails, as pyenv's do for inactive versions."""
    shim = tmp_path / "bin" / "python3.14"
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    of_pyenv = tmp_path / ".pyenv" / "versions" / "3.14.2" / "bin" / "python"
    of_uv = tmp_path / ".local/share/uv/python/cpython-3.13.9-linux-x86_64-gnu/bin/python3"
    plain = tmp_path / "bin" / "python3"
    for version, path in (("3.14", of_pyenv), ("3.13", of_uv), ("3.11", plain)):
        python_of_version(version, path)
    python_of_version("3.10", tmp_path / "bin" / "python3.10")
    done = find_python(machine)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"3.14 {of_pyenv}", f"3.13 {of_uv}", f"3.11 {plain}"]


def test_a_machine_without_a_supported_python_is_told_two_ways(
    machine: dict[str, str], tmp_path: pathlib.Path
) -> None:
    python_of_version("3.10", tmp_path / "bin" / "python3")
    done = find_python(machine)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"Python {PYTHONS[0]} to {PYTHONS[-1]} not found" in done.stderr
    assert "uv python install" in done.stderr and "sudo apt install python3-venv" in done.stderr
    command = ["make", "setup", f"VENV={tmp_path / 'venv'}"]
    made = subprocess.run(
        command, cwd=ROOT, env=machine, capture_output=True, text=True, check=False
    )
    assert made.returncode == 2
    assert done.stderr in made.stderr
    assert not (tmp_path / "venv").exists()


def test_a_python_without_the_venv_package_is_passed_over(
    machine: dict[str, str], tmp_path: pathlib.Path
) -> None:
    python_of_version("3.13", tmp_path / "bin" / "python3.13", ensurepip=False)
    done = find_python(machine)
    assert done.returncode == 2
    assert "sudo apt install python3.13-venv" in done.stderr
    python_of_version("3.12", tmp_path / "bin" / "python3.12")
    assert find_python(machine).stdout == f"3.12 {tmp_path / 'bin' / 'python3.12'}\n"


@pytest.mark.parametrize(
    ("version", "ensurepip", "words"),
    [
        ("3.9", True, "is Python 3.9; must be 3.11 to 3.14"),
        ("3.15", True, "is Python 3.15; must be 3.11 to 3.14"),
        ("3.12", False, "cannot create environments; install python3.12-venv"),
    ],
)
def test_make_refuses_an_unsupported_python(
    version: str, ensurepip: bool, words: str, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other"
    python_of_version(version, other, ensurepip=ensurepip)
    command = ["make", "setup", f"PYTHON={other}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"PYTHON={other}: {words}" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_names_a_missing_python(tmp_path: pathlib.Path) -> None:
    command = ["make", "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "PYTHON=no-such-python: not found" in done.stderr


def setup_with(machine: dict[str, str], venv: pathlib.Path) -> tuple[str, str]:
    """Returns the message of `make setup`, and the arguments with which Python was called."""
    command = ["make", "setup", f"VENV={venv}"]
    done = subprocess.run(
        command, cwd=ROOT, env=machine, capture_output=True, text=True, check=False
    )
    return done.stdout.strip(), done.stderr.splitlines()[0]


def test_make_keeps_the_python_of_an_environment(
    machine: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """A newer Python that appears later is not mixed into it."""
    venv = tmp_path / "venv"
    python_of_version("3.12", venv / "bin" / "python")
    (venv / "pyvenv.cfg").touch()
    python_of_version("3.14", tmp_path / "bin" / "python3.14")
    message, arguments = setup_with(machine, venv)
    assert message == f"Using Python 3.12: {venv / 'bin' / 'python'}"
    assert arguments == f"-m venv {venv}"


@pytest.mark.parametrize(("is_environment", "option"), [(True, "--clear "), (False, "")])
def test_make_replaces_an_environment_of_another_python(
    is_environment: bool, option: str, machine: dict[str, str], tmp_path: pathlib.Path
) -> None:
    """But clears no folder that is not an environment."""
    venv, newest = tmp_path / "venv", tmp_path / "bin" / "python3.13"
    python_of_version("3.10", venv / "bin" / "python")
    if is_environment:
        (venv / "pyvenv.cfg").touch()
    python_of_version("3.13", newest)
    python_of_version("3.11", tmp_path / "bin" / "python3.11")
    assert setup_with(machine, venv) == (f"Using Python 3.13: {newest}", f"-m venv {option}{venv}")
