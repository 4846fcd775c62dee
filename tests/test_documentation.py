"""README.md and docs/: commands run, links resolve, settings, flags and files exist.

Every command in the pages is run by a test: by `test_the_documented_commands_run` in a smaller form
(slow), or by what `COMMANDS` names. What cannot run in a test is listed there with its reason.
"""

import ast
import dataclasses
import fnmatch
import functools
import importlib.util
import itertools
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

import inception_jax as ij
from inception_jax import config as configs
from inception_jax.config import reference
from inception_jax.errors import UserError
from tests import command, experiments
from tests.markdown import (
    PROGRAMS,
    anchors,
    commands_in,
    links_in,
    names_in,
    python_blocks,
    shell_lines,
    split,
    text_of,
)

ROOT = command.ROOT


def _markdown(*patterns: str) -> list[str]:
    paths = {path for pattern in patterns for path in ROOT.glob(pattern)}
    names = {path.relative_to(ROOT).as_posix() for path in paths}
    return sorted(name for name in names if not name.startswith("docs/build/"))


PAGES = _markdown("README.md", "CONTRIBUTING.md", "docs/*.md")
# The others record runs with their commands: their links, names and line lengths are checked.
ALL_PAGES = sorted({*PAGES, *_markdown("*.md", "docs/**/*.md", "results/**/*.md")})
# They also have names of earlier versions, and those that users mistake for ours.
HISTORY = {"CHANGELOG.md", "docs/notes/user_situations.md"}


# How a documented command is tested: a file, and the text in it that runs the command; or why it is
# not. The first matching pattern counts; '*' stands for any text.
@dataclasses.dataclass(frozen=True)
class RunBy:
    """A test, or CI, runs it."""

    file: str
    text: str


@dataclasses.dataclass(frozen=True)
class NotRun:
    """It cannot run in a test, for this reason."""

    reason: str


CI, SELF = ".ci/run", "tests/test_documentation.py"
LAUNCHER = "needs several hosts or a scheduler; tests/integration/test_hosts.py starts processes"
CLOUD = "needs a cloud account and a TPU"
ACCELERATOR = "needs an accelerator"
EXTENDING = RunBy("tests/test_extending.py", "test_experiments_and_settings_load")

COMMANDS: dict[str, RunBy | NotRun] = {
    "make setup*": RunBy(CI, "make setup"),
    "make demo*": RunBy(CI, "make demo"),
    "make test-quick*": RunBy(CI, "make test-quick"),
    "make test-slow*": RunBy(CI, "make test-slow"),
    "make test*": RunBy(CI, "make test "),
    "make lint": RunBy(CI, "make lint"),
    "make docs": RunBy(CI, "make docs"),
    "make check": NotRun("runs this test; its parts are run by .ci/run"),
    "make hooks": RunBy(SELF, "test_the_hook_runs_the_checks"),
    "make format": NotRun("changes files; make lint, in .ci/run, says what it would change"),
    "make bench*": NotRun("takes four minutes on a quiet machine; tests/benchmarks has its parts"),
    "make pins*": NotRun("changes the pins; tests/test_packaging.py checks those that there are"),
    ". .venv/bin/activate": NotRun("changes the shell; the tests name the interpreter instead"),
    "pip install -e *": NotRun("changes the environment of the tests"),
    "pip install *": NotRun("changes the environment of the tests"),
    "pip wheel *": NotRun("writes a wheel, which is not part of the tests"),
    "python -m pytest *": RunBy(CI, "make test "),
    "tensorboard *": RunBy("tests/integration/test_bucket_runs.py", "tensorboard.main"),
    "tail -f *": NotRun("follows a file until it is stopped"),
    "tfds build *": NotRun("needs TensorFlow; tests/datasets/builders/test_tfds_prepared.py"),
    "srun *": NotRun(LAUNCHER),
    "mpirun *": NotRun(LAUNCHER),
    "ssh *": NotRun(LAUNCHER),
    "scontrol *": NotRun(LAUNCHER),
    "$all *": NotRun(CLOUD),
    "gcloud *": NotRun(CLOUD),
    "docker *": NotRun("needs a container engine; tests/test_deploy.py runs the build's steps"),
    "kubectl *": NotRun("needs a cluster; tests/test_deploy.py checks the manifests"),
    "sed *": RunBy("tests/test_deploy.py", "test_the_page_fills_in_the_jobset"),
    "python -m inception_jax.main *--coordinator_address*": RunBy(
        "tests/integration/test_hosts.py", "--coordinator_address"
    ),
    "git clone *": NotRun("needs a repository elsewhere"),
    "lscpu": NotRun("asks for the processor of the reader's machine"),
    "grep -o *": NotRun("filters what lscpu prints"),
    "python -m inception_jax.main --config photos.py *": RunBy("tests/test_api.py", "photos"),
    "python -m inception_jax.main *--platform=tpu*": NotRun(ACCELERATOR),
    "python -m inception_jax.tools.compile *": RunBy(
        "tests/programs/test_compile.py", "test_a_run_is_compiled_and_described_without_data"
    ),
    "python -c *": NotRun("writes files of a GPU, which the tests do not have"),
    "python -m inception_jax.tools.serve*": RunBy("tests/tools/test_serve.py", "tools.serve"),
    "python -m inception_jax.tools.import_weights *": RunBy(
        "tests/models/test_torchvision_weights.py", "import_weights"
    ),
    "curl *": RunBy("tests/inference/server/test_app.py", "/predict"),
    "python -m onnxruntime.*": NotRun("converts for ONNX Runtime's own format, which is not ours"),
    "nice -n 19 python -m benchmarks.frontier *": RunBy(
        "tests/benchmarks/test_frontier.py", "test_a_stopped_run_continues_with_the_same_command"
    ),
    "python -m benchmarks.*": NotRun("takes minutes; tests/benchmarks has its parts"),
}
# The pages whose Python code a test runs, and which.
SNIPPETS = {
    "README.md": RunBy(SELF, "FILES.items()"),
    "docs/compile.md": RunBy("tests/programs/test_compile.py", "docs/compile.md"),
    "docs/extending.md": RunBy("tests/test_extending.py", "extending.md"),
    "docs/export.md": RunBy("tests/tools/test_export.py", "export.md"),
    "docs/phones_and_browsers.md": RunBy("tests/test_pages.py", "phones_and_browsers.md"),
    "docs/python.md": RunBy("tests/test_api.py", '"python.md"'),
}
# Flags of other programs that the pages name in their text.
OTHER_FLAGS = {"boot-disk-size", "gpus-per-task", "ntasks-per-node", "signal"}

GROUPS = {field.name for field in dataclasses.fields(configs.Config)} - {"name", "seed"}
SETTING = re.compile(rf"(?:config\.)?((?:{'|'.join(sorted(GROUPS))})(?:\.[a-z][a-z_0-9]*)+)")
FOLDERS = ("inception_jax", "tests", "experiments", "docs", "benchmarks", "results", "requirements")
FILE_ENDINGS = {
    "csv",
    "json",
    "jsonl",
    "md",
    "npz",
    "onnx",
    "png",
    "py",
    "safetensors",
    "sbatch",
    "stablehlo",
    "svg",
    "tar",
    "txt",
    "zip",
}


@functools.cache
def documented() -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Returns each page with each command in it, once a page."""
    commands: dict[tuple[str, tuple[str, ...]], None] = {}
    for page in PAGES:
        for block in split(page)[0]:
            for line in shell_lines(block):
                commands.update(((page, words), None) for words in commands_in(line))
        for name in names_in(page):
            # The name of a module alone is not a command.
            if PROGRAMS.match(name) and not re.fullmatch(r"python -m [\w.]+|make|pip|git", name):
                commands.update(((page, words), None) for words in commands_in(name))
    return tuple(commands)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Returns whether a text is that of a pattern, in which '*' stands for any text."""
    parts = ".*".join(map(re.escape, pattern.split("*")))
    return lambda text: re.fullmatch(parts, text, re.DOTALL) is not None


def how(page: str, words: tuple[str, ...]) -> RunBy | NotRun | None:
    """Returns how a command is tried, or None where `test_the_documented_commands_run` does it."""
    for pattern, answer in COMMANDS.items():
        if matcher(pattern)(" ".join(words)):
            return answer
    if page == "docs/extending.md":
        return EXTENDING
    return None


def is_ours(words: tuple[str, ...]) -> bool:
    return words[:2] == ("python", "-m") and words[2].startswith("inception_jax")


@functools.cache
def flags_of(module: str) -> dict[str, bool]:
    """Returns the flags of a command, and whether each is on or off, from its --help and source."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    names = re.findall(r"^  --(\w+)", done.stdout, re.MULTILINE)
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    source += text_of("inception_jax/cli.py")
    is_bool = {
        node.args[0].value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("DEFINE_bool", "DEFINE_boolean")
        and isinstance(node.args[0], ast.Constant)
    }
    return {name: name in is_bool for name in names} | {"help": True}


def parsed(words: tuple[str, ...]) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the flags of one of our commands with their values, and what is left."""
    known = flags_of(words[2])
    flags: list[tuple[str, str]] = []
    rest: list[str] = []
    remaining = iter(words[3:])
    for word in remaining:
        if not word.startswith("--"):
            rest.append(word)
            continue
        name, given, value = word[2:].partition("=")
        if not given and not known.get(name, name.startswith("config.")):
            value = next(remaining, "")
        flags.append((name, value))
    return flags, rest


def is_placeholder(text: str) -> bool:
    return "…" in text or "..." in text


# Commands


# Experiments that pages show, by the name in their first line.
FILES = {
    name[1]: code
    for code in python_blocks("README.md")
    if (name := re.match(r"# (\w+\.py)\n", code))
}
OURS = [(page, words) for page, words in documented() if is_ours(words)]


def test_every_command_is_run_or_says_why_not() -> None:
    unknown = {
        f"{page}: {' '.join(words)}"
        for page, words in documented()
        if not is_ours(words) and how(page, words) is None
    }
    assert not unknown, "add them to COMMANDS"


def test_every_pattern_is_of_a_documented_command() -> None:
    commands = [" ".join(words) for _, words in documented()]
    unused = [pattern for pattern in COMMANDS if not any(map(matcher(pattern), commands))]
    assert not unused, "no page shows these; remove them from COMMANDS"


@pytest.mark.parametrize(
    "runner",
    sorted(
        {each for each in COMMANDS.values() if isinstance(each, RunBy)}
        | {EXTENDING, *SNIPPETS.values()},
        key=str,
    ),
    ids=str,
)
def test_the_tests_named_in_the_tables_exist(runner: RunBy) -> None:
    assert runner.text in text_of(runner.file)


@pytest.mark.parametrize(
    ("page", "words"), OURS, ids=lambda each: each if isinstance(each, str) else " ".join(each)
)
def test_the_flags_and_settings_of_a_command_exist(page: str, words: tuple[str, ...]) -> None:
    module = words[2]
    assert importlib.util.find_spec(module), f"no such module: {module}"
    flags, _ = parsed(words)
    overrides = {}
    for name, value in flags:
        if name.startswith("config."):
            path = name.removeprefix("config.")
            configs.check_path(path)
            if value and not is_placeholder(value):
                overrides[path] = value.replace("$BUCKET", "bucket")
        else:
            known = {*flags_of(module), "config"}
            assert name.removeprefix("no") in known or name in known, f"{module} has no --{name}"
    experiment = dict(flags).get("config", "")
    if overrides and (ROOT / experiment).is_file() and experiment.startswith("experiments/"):
        given = [f"--config.{path}={value}" for path, value in overrides.items()]
        experiments.load([f"--config={ROOT / experiment}", *given])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What the commands need: two runs of a few steps, their weights, and images."""
    path = tmp_path_factory.mktemp("documentation")
    for run in ("run", "other"):
        command.check(
            "main", "--config=experiments/digits.py", f"--workdir={path / run}", *small(path)
        )
    command.check(
        "tools.export",
        "--to=savedweights",
        f"--workdir={path / 'run'}",
        f"--output={path / 'weights.safetensors'}",
    )
    for name in ("image.png", "other.png"):
        Image.fromarray(np.full((20, 20, 3), 99, np.uint8)).save(path / name)
    for name, code in FILES.items():
        (path / name).write_text(code, encoding="utf-8")
    (path / "images").mkdir()
    Image.fromarray(np.full((20, 20, 3), 9, np.uint8)).save(path / "images" / "one.png")
    return path


def small(path: pathlib.Path) -> list[str]:
    """Returns settings of the digits that train in a moment."""
    settings = {
        "data.directory": path / "data",
        "model.width": 0.125,
        "train.duration": "2 steps",
        "schedule.warmup": "1 step",
    }
    return [f"--config.{name}={value}" for name, value in settings.items()]


def shortened(words: tuple[str, ...], folder: pathlib.Path, number: int) -> list[str]:
    """Returns a documented command on the digits, with its flags but without its settings."""
    module = words[2].removeprefix("inception_jax.")
    flags, rest = parsed(words)
    paths = {
        "workdir": folder / (f"new-{number}" if "config" in dict(flags) else "run"),
        "weights": folder / "weights.safetensors",
        "output": folder
        / f"output-{number}{pathlib.PurePath(dict(flags).get('output', '')).suffix}",
        "image": folder / "image.png",
        "explain": folder / f"explain-{number}",
    }
    names = {
        "layer": None,
        "calibration": "16",
        "steps": "20",
        "checkpoint": "last",
        "classes": "10",
    }
    out = [module]
    for name, value in flags:
        if name == "config":
            file = folder / value if value in FILES else "experiments/digits.py"
            out += [f"--config={file}", *small(folder)]
        elif name in paths:
            out.append(f"--{name}={paths[name]}")
        elif name in names:
            out += [f"--{name}={names[name]}"] if names[name] else []
        elif not name.startswith("config."):
            out.append(f"--{name}={value}" if value else f"--{name}")
    if module in ("tools.report", "tools.plot", "tools.diagnose"):
        out += [str(folder / name) for name in ("run", "other")[: len(rest)]]
    elif rest:
        out += [str(folder / ("images" if word.endswith("/") else "image.png")) for word in rest]
    return out


def shapes() -> list[tuple[str, ...]]:
    """Returns a command for each combination of flags that the pages use."""
    unique: dict[tuple[object, ...], tuple[str, ...]] = {}
    for page, words in OURS:
        if how(page, words) is not None:
            continue
        flags, rest = parsed(words)
        # Of these the value matters.
        kinds = {
            (name, value if name in ("to", "mode", "quantize") else "") for name, value in flags
        }
        own = frozenset(kind for kind in kinds if not kind[0].startswith("config."))
        unique.setdefault((words[2], own, min(len(rest), 2)), words)
    return list(unique.values())


@pytest.mark.slow
def test_the_documented_commands_run(folder: pathlib.Path) -> None:
    failed = []
    for number, words in enumerate(shapes()):
        done = command.run(*shortened(words, folder, number))
        # After so few steps, find_lr has no rate to propose.
        if done.returncode not in ((0, 2) if words[2].endswith("find_lr") else (0,)):
            failed.append(f"{' '.join(words)}\n{' '.join(done.args[2:])}\n{done.stderr}")
    assert not failed, "\n\n".join(failed)


def test_the_hook_runs_the_checks(tmp_path: pathlib.Path) -> None:
    for arguments in (["git", "init", "-q"], ["make", "-f", str(ROOT / "Makefile"), "hooks"]):
        outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        subprocess.run(arguments, cwd=tmp_path, check=True, env=outside)
    hook = tmp_path / ".git" / "hooks" / "pre-commit"
    assert "exec make check\n" in hook.read_text() and os.access(hook, os.X_OK)


# Python


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)])
def test_python_in_the_pages_is_run_and_uses_names_that_exist(page: str) -> None:
    assert page in SNIPPETS, "add the test that runs it to SNIPPETS"
    for code in python_blocks(page):
        compile(code, page, "exec")
        assert set(re.findall(r"\bij\.(\w+)", code)) <= set(ij.__all__)


# Links


@pytest.mark.parametrize("page", ALL_PAGES)
def test_links_lead_somewhere(page: str) -> None:
    broken = []
    for link in links_in(page):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (ROOT / page).parent.joinpath(place).resolve() if place else ROOT / page
        if not (target.is_relative_to(ROOT) and target.exists()) or (
            anchor and anchor not in anchors(target.relative_to(ROOT).as_posix())
        ):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_table_of_contents() -> None:
    entries = {
        f"docs/{line.strip()}"
        for block in split("docs/index.md")[0]
        if block.language == "{toctree}"
        for line in block.lines
        if line.strip() and not line.startswith(":")
    }
    pages = {page.removesuffix(".md") for page in ALL_PAGES if page.startswith("docs/")}
    pages.discard("docs/index")
    missing = {page for page in pages if not any(fnmatch.fnmatch(page, each) for each in entries)}
    assert not missing


# Names


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page not in HISTORY])
def test_settings_in_the_text_exist(page: str) -> None:
    wrong = []
    paths = set(re.findall(r"--(?:no)?config\.([a-z_0-9.]*[a-z_0-9])(?![\w…])", text_of(page)))
    for name in names_in(page):
        match = SETTING.fullmatch(name)
        if match and match[1].rpartition(".")[2] not in FILE_ENDINGS:
            paths.add(match[1])
    for path in sorted(paths - {"a.b", "a.b.c"}):
        try:
            configs.check_path(path)
        except UserError as error:
            if not is_group(path):
                wrong.append(str(error))
    assert not wrong


def is_group(path: str) -> bool:
    return any(known.startswith(f"{path}.") for known, _, _ in configs.leaves())


@functools.cache
def all_flags() -> frozenset[str]:
    tools = sorted((ROOT / "inception_jax" / "tools").glob("[a-z]*.py"))
    modules = ["inception_jax.main", *(f"inception_jax.tools.{path.stem}" for path in tools)]
    return frozenset(itertools.chain.from_iterable(map(flags_of, modules))) | {"config"}


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page not in HISTORY])
def test_flags_in_the_text_exist(page: str) -> None:
    named = {
        match[1]
        for name in names_in(page)
        if (match := re.match(r"--([a-z][\w-]*)(?![\w.-])", name))
    }
    others = {
        word[2:].partition("=")[0]
        for _, words in documented()
        if not is_ours(words)
        for word in words
        if word.startswith("--")
    }
    known = all_flags() | {f"no{name}" for name in all_flags()}
    unknown = named - known - others - OTHER_FLAGS
    assert not unknown


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page not in HISTORY])
def test_files_and_modules_in_the_text_exist(page: str) -> None:
    missing = set()
    for name in names_in(page):
        is_path = re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./-]+", name)
        module = re.match(r"python -m ((inception_jax|benchmarks)[\w.]*)", name)
        if is_path and not (ROOT / name).exists():
            missing.add(name)
        if module and importlib.util.find_spec(module[1]) is None:
            missing.add(name)
    assert not missing


def test_the_reference_of_settings_is_up_to_date() -> None:
    assert text_of("docs/configuration.md") == reference.page(), "make docs generates it"


# Form


@pytest.mark.parametrize("page", [page for page in ALL_PAGES if page != "docs/configuration.md"])
def test_lines_are_short(page: str) -> None:
    long = [
        line for line in split(page)[1] if len(line) > 120 and not line.lstrip().startswith("|")
    ]
    assert not [line for line in long if " " in line.strip()]


@pytest.mark.parametrize(("page", "most"), [("README.md", 120), ("BUILD_NOTES.md", 60)])
def test_the_first_pages_are_short(page: str, most: int) -> None:
    assert len(text_of(page).splitlines()) <= most


def test_the_architecture_names_every_package() -> None:
    packages = {
        path.stem
        for path in (ROOT / "inception_jax").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    } - {"__init__", "figures"}
    assert packages <= set(names_in("docs/architecture.md"))
