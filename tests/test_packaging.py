"""What can be installed: the declared dependencies, and the pinned versions of each Python."""

import ast
import importlib.metadata
import pathlib
import re
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
PYTHONS = ("3.11", "3.12")


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def pins_file(python: str) -> pathlib.Path:
    return ROOT / "requirements" / f"python{python}.txt"


def pins(python: str) -> dict[str, Version]:
    """Returns the pinned version of every package, by its canonical name."""
    lines = pins_file(python).read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_are_exact_versions_and_nothing_else(python: str) -> None:
    """No address of a package index, no hash, no option, no local version that an index lacks."""
    lines = pins_file(python).read_text(encoding="utf-8").splitlines()
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), line
    assert len(pins(python)) == len(lines), "a package is pinned twice"


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_satisfy_the_declared_dependencies(python: str) -> None:
    pinned = pins(python)
    declared = project()["dependencies"] + project()["optional-dependencies"]["dev"]
    for requirement in map(Requirement, declared):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not pinned: make pins"
        assert version in requirement.specifier, f"{requirement} is pinned as {version}: make pins"


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_leave_out_other_frameworks(python: str) -> None:
    unwanted = {"tensorflow", "tensorflow-cpu", "keras", "torch", "torchvision", "inception-jax"}
    assert not unwanted & set(pins(python))


def test_the_pins_of_this_python_need_nothing_more() -> None:
    """Every requirement of a pinned package, as far as it is installed here, is pinned too."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pinned = pins(python)
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
    """Those that pyproject.toml allows are those with pins."""
    files = {path.stem.removeprefix("python") for path in (ROOT / "requirements").glob("*.txt")}
    allowed = Requirement(f"python{project()['requires-python']}").specifier
    assert set(PYTHONS) == {f"3.{minor}" for minor in range(20) if f"3.{minor}" in allowed}
    assert files == set(PYTHONS)


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
        Requirement(text).name for name in ("onnx", "reference", "serve") for text in extras[name]
    }
    for name in names - set(sys.stdlib_module_names) - {"inception_jax"} - optional:
        found = {canonicalize_name(distribution) for distribution in distributions.get(name, [])}
        assert found & declared, f"import {name}: its package {found or ''} is not declared"
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


def test_make_refuses_another_python(tmp_path: pathlib.Path) -> None:
    other = tmp_path / "python3.9"
    # A Python that says it is 3.9: the version check runs in the real one, told another version.
    other.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 99\n'
        f'exec "{sys.executable}" -c "import sys; sys.version_info = (3, 9, 0); $2"\n'
    )
    other.chmod(0o755)
    command = ["make", "setup", f"PYTHON={other}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "Python 3.9; must be 3.11 or 3.12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_make_says_when_there_is_no_such_python(tmp_path: pathlib.Path) -> None:
    command = ["make", "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no-such-python not found" in done.stderr
