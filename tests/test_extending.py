"""docs/extending.md: its files run outside the package; its messages and table are accurate."""

import ast
import csv
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

import inception_jax as ij
from inception_jax import registry
from inception_jax.errors import UserError
from tests import command
from tests.datasets.builders import test_tfds_prepared

PAGE = (command.ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```python (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE)
]
MESSAGES = [
    line
    for block in re.findall(r"^```text\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
]
MAX_LINES = {"inception_bn.py": 40, "to_wandb.py": 10, "to_mlflow.py": 10, "notebook.py": 15}
# Short runs; narrow layers unless the command sets them.
SHORT = {"train.duration": "", "train.batch_size": 20, "schedule.warmup": "0.01 epochs"}


@pytest.fixture(autouse=True)
def only_builtin_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unregisters the parts of other tests, as in a new process."""
    for known in registry.REGISTRIES.values():
        builtin = {name: part for name in known.names() if (part := known.get(name)).is_builtin}
        monkeypatch.setattr(known, "_parts", builtin)


# Fakes of the services' libraries that write their calls to a file.
WANDB = """
import types

def say(line):
    with open("wandb.txt", "a") as file:
        print(line, file=file)

def init(project, dir, config):
    say(f"{project} {config['model']['name']}")
    return types.SimpleNamespace(
        log=lambda values, step: say(f"{step} {sorted(values)}"), finish=lambda: say("finish")
    )
"""
MLFLOW = """
def say(*words):
    with open("mlflow.txt", "a") as file:
        print(*words, file=file)

def set_experiment(name): say(name)
def start_run(run_name): say("start", run_name)
def log_metrics(values, step): say(step, sorted(values))
def end_run(): say("end")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A user's folder with the files of the page and records of TFDS."""
    path = tmp_path_factory.mktemp("user").resolve()
    for name, text in (FILES | {"wandb.py": WANDB, "mlflow.py": MLFLOW}).items():
        (path / name).write_text(text, encoding="utf-8")
    test_tfds_prepared.build(path / "data")
    return path


@pytest.fixture
def here(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The user's folder as the current directory; parts are unregistered after the test."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "data"))
    for known in registry.REGISTRIES.values():
        known.names()
        monkeypatch.setattr(known, "_parts", dict(known._parts))
    return folder


def run(
    folder: pathlib.Path, arguments: list[str], changes: Mapping[str, Any] | None = None
) -> str:
    """Runs a command of the page in the user's folder with other settings; returns its output.

    stderr follows stdout in the result.
    """
    assert arguments[0] == "python" and arguments in COMMANDS
    more = [f"--config.{name}={value}" for name, value in (changes or {}).items()]
    environment = {
        "PYTHONPATH": str(command.ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        # As for a user; the stricter rules are only for the package's tests.
        "JAX_NUMPY_RANK_PROMOTION": "allow",
        "JAX_NUMPY_DTYPE_PROMOTION": "standard",
        "TFDS_DATA_DIR": str(folder / "data"),
    }
    done = subprocess.run(
        [sys.executable, *arguments[1:], *more],
        cwd=folder,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def quoted(*words: str) -> list[str]:
    """Returns the last command of the page that contains some words."""
    (*_, last) = (each for each in COMMANDS if set(words) <= set(each))
    return last


def settings(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Returns the experiment and the settings of a command."""
    values = dict(each[len("--config.") :].split("=", 1) for each in arguments if "=" in each)
    return arguments[arguments.index("--config") + 1], {k: literal(v) for k, v in values.items()}


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.title() if text in ("true", "false") else text)
    except (SyntaxError, ValueError):
        return text


def test_every_file_is_short() -> None:
    for name, text in FILES.items():
        assert len(text.splitlines()) <= MAX_LINES.get(name, 25), name
        assert not set(re.findall(r"inception_jax\.(\w+)", text)), name


def test_table_has_the_line_counts_of_the_files() -> None:
    rows = re.findall(r"\| (\d+), `(\S+)` \|$", PAGE, re.MULTILINE)
    assert {name: int(lines) for lines, name in rows} == {
        name: len(text.splitlines())
        for name, text in FILES.items()
        if name not in ("together.py", "use_weights.py", "again.py", "wrong.py")
    }


@pytest.mark.parametrize(
    "arguments",
    [each for each in COMMANDS if "--config" in each],
    ids=lambda each: each[each.index("--workdir") + 1],
)
def test_experiments_and_settings_load(arguments: list[str], here: pathlib.Path) -> None:
    assert arguments[:3] == ["python", "-m", "inception_jax.main"]
    path, overrides = settings(arguments)
    ij.load_config(path, overrides)


@pytest.mark.slow
def test_combined_parts_train_resume_and_export(folder: pathlib.Path) -> None:
    """A network, data set, optimizer, schedule, augmentation and three writers, in one run."""
    train = quoted("together.py")
    small = SHORT | {"model.options.width": 4, "data.options.count": 100, "log.every": "1 step"}
    run(folder, train, small | {"train.duration": "3 steps"})
    workdir = folder / "runs" / "together"
    first = json.loads((workdir / "result.json").read_text())
    # With only the folder.
    resumed = run(folder, ["python", "-m", "inception_jax.main", "--workdir", "runs/together"])
    assert "signum.py, which registers the optimizer 'signum' of this run" in resumed
    # Longer, with the same command.
    run(folder, train, small | {"train.duration": "5 steps"})
    result = json.loads((workdir / "result.json").read_text())
    assert (first["step"], result["step"], result["count"]) == (3, 5, 200)
    assert result["evaluations"]["mirrored"]["count"] == 200
    config = json.loads((workdir / "config.json").read_text())
    assert {(part["kind"], part["name"]) for part in config["parts"]} == {
        ("dataset", "shapes"),
        ("model", "inception_bn"),
        ("optimizer", "signum"),
        ("schedule", "triangle"),
        ("augmentation", "blur"),
        *(("writer", name) for name in ("csv", "wandb", "mlflow")),
    }
    with (workdir / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[2:4] == ["train", "loss"]]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5]
    wandb = (folder / "wandb.txt").read_text().splitlines()
    mlflow = (folder / "mlflow.txt").read_text().splitlines()
    assert (wandb[0], wandb[-1]) == ("inception inception_bn", "finish")
    assert mlflow[:2] + mlflow[-1:] == ["inception", "start together", "end"]
    for lines in (wandb, mlflow):
        steps = [int(line.split()[0]) for line in lines if "'train/loss'" in line]
        assert steps == [1, 2, 3, 4, 5]

    evaluated = run(folder, quoted("--mode=eval"))
    assert json.loads(evaluated.splitlines()[0])["loss"] == pytest.approx(result["loss"])
    run(folder, quoted("--to=savedweights"))
    assert "name='square'" in run(folder, quoted("use_weights.py"))


@pytest.mark.slow
def test_custom_metrics_on_cifar100_from_tfds(folder: pathlib.Path) -> None:
    arguments = quoted("ranks.py", "--config.evaluations.mirrored.flip_tta=true")
    less = {"model.width": 0.125, "data.image_size": 16, "evaluations.seen.examples": 50}
    run(folder, arguments, SHORT | less | {"train.duration": "2 steps", "optimizer.name": "lion"})
    result = json.loads((folder / "runs" / "ranks" / "result.json").read_text())
    seen, mirrored = result["evaluations"]["seen"], result["evaluations"]["mirrored"]
    assert (result["count"], mirrored["count"], seen["count"]) == (100, 100, 50)
    for each in (result, seen, mirrored):
        assert {"loss", "top1", "top10", "macro"} <= set(each) and "top5" not in each
        assert each["top1"] <= each["top10"]
    # One test image of each class.
    assert result["macro"] == pytest.approx(result["top1"])


@pytest.mark.slow
def test_custom_programs_train(folder: pathlib.Path) -> None:
    loop = run(folder, ["python", "own_loop.py"]).splitlines()
    assert [line.split()[0] for line in loop[:6]] == ["15", "30", "45", "60", "75", "90"]
    result = ast.literal_eval(loop[6])
    assert result["count"] == 359 and result["top1"] > 60
    top1 = run(folder, ["python", "notebook.py"]).splitlines()[0]
    assert float(top1) > 60
    assert (folder / "runs" / "notebook" / "report.html").exists()


WRONG: list[tuple[str, dict[str, Any]]] = [
    ("inception_bn.py", {"model.name": "inception_nb"}),
    ("blur.py", {"augment.options.probabilty": 0.2}),
    ("blur.py", {"augment.options.probability": "often"}),
    (
        "experiments/cifar10_mini.py",
        {"data.name": "tfds", "data.tfds": "cifar100", "data.directory": "elsewhere"},
    ),
    ("again.py", {}),
    ("wrong.py", {"model.name": "net"}),
    ("wrong.py", {"optimizer.name": "plain"}),
    ("wrong.py", {"schedule.name": "stairs"}),
    ("wrong.py", {"augment.extra": ("narrower",)}),
    ("wrong.py", {"evaluation.metrics": ("top1", "margin")}),
]


@pytest.mark.parametrize(("number", "wrong"), [*enumerate(WRONG)])
def test_quoted_messages_are_accurate(
    number: int, wrong: tuple[str, dict[str, Any]], here: pathlib.Path
) -> None:
    assert len(MESSAGES) == len(WRONG)
    path, overrides = wrong
    with pytest.raises(UserError) as error:
        setup = ij.assemble(ij.load_config(path, overrides))
        ij.make_train_step(setup)
        raise AssertionError("no error was raised")
    assert str(error.value).replace(f"{here}{os.sep}", "") == MESSAGES[number]


def test_every_file_of_the_page_is_used() -> None:
    imported = {
        f"{name}.py" for name in re.findall(r"\w+", FILES["together.py"].split("\n")[0][6:])
    }
    run = {"together.py", "ranks.py", "own_loop.py", "notebook.py", "use_weights.py"}
    assert set(FILES) == imported | run | {"again.py", "wrong.py"}
