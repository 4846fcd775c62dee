"""docs/extending.md: its files run outside the package, its messages and table are true."""

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
MOST_LINES = {"inception_bn.py": 40, "to_wandb.py": 10, "to_mlflow.py": 10, "notebook.py": 15}
# A run of a few steps, and of narrow layers where the command says nothing of them.
SHORT = {"train.duration": "", "train.batch_size": 20, "schedule.warmup": "0.01 epochs"}


@pytest.fixture(autouse=True)
def only_the_packages_own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user's process begins, whatever other tests have registered in this one."""
    for known in registry.REGISTRIES.values():
        own = {name: part for name in known.names() if (part := known.get(name)).is_own}
        monkeypatch.setattr(known, "_parts", own)


# Stand-ins for the services' libraries, which say in a file what they were called with.
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
    """A user's folder with the files of the page, and with records of TFDS."""
    path = tmp_path_factory.mktemp("user").resolve()
    for name, text in (FILES | {"wandb.py": WANDB, "mlflow.py": MLFLOW}).items():
        (path / name).write_text(text, encoding="utf-8")
    test_tfds_prepared.build(path / "data")
    return path


@pytest.fixture
def here(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """The user's folder, as the current one, of a test that forgets what it registers."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TFDS_DATA_DIR", str(folder / "data"))
    for known in registry.REGISTRIES.values():
        known.names()
        monkeypatch.setattr(known, "_parts", dict(known._parts))
    return folder


def run(
    folder: pathlib.Path, arguments: list[str], changes: Mapping[str, Any] | None = None
) -> str:
    """Runs a command of the page in the user's folder, with other settings, and returns its output.

    Its messages go on to the output as well, after what it prints.
    """
    assert arguments[0] == "python" and arguments in COMMANDS
    more = [f"--config.{name}={value}" for name, value in (changes or {}).items()]
    environment = {
        "PYTHONPATH": str(command.ROOT),
        "JAX_NUM_CPU_DEVICES": "1",
        # As a user has it; the package's own rules are those of its own tests.
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


def said(*words: str) -> list[str]:
    """Returns the last command of the page that has some words."""
    (*_, found) = (each for each in COMMANDS if set(words) <= set(each))
    return found


def settings(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """Returns the experiment that a command names, and its settings."""
    values = dict(each[len("--config.") :].split("=", 1) for each in arguments if "=" in each)
    return arguments[arguments.index("--config") + 1], {k: literal(v) for k, v in values.items()}


def literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.title() if text in ("true", "false") else text)
    except (SyntaxError, ValueError):
        return text


def test_every_file_is_short() -> None:
    for name, text in FILES.items():
        assert len(text.splitlines()) <= MOST_LINES.get(name, 25), name
        assert not set(re.findall(r"inception_jax\.(\w+)", text)), name


def test_the_table_counts_the_files() -> None:
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
def test_every_experiment_and_its_settings_are_understood(
    arguments: list[str], here: pathlib.Path
) -> None:
    assert arguments[:3] == ["python", "-m", "inception_jax.main"]
    path, overrides = settings(arguments)
    ij.load_config(path, overrides)


def test_parts_together_train_resume_and_are_used(folder: pathlib.Path) -> None:
    """A network, data set, optimizer, schedule, augmentation and three writers, in one run."""
    train = said("together.py")
    small = SHORT | {"model.options.width": 4, "data.options.count": 100, "log.every": "1 step"}
    run(folder, train, small | {"train.duration": "3 steps"})
    found = folder / "runs" / "together"
    first = json.loads((found / "result.json").read_text())
    # From the folder alone.
    resumed = run(folder, ["python", "-m", "inception_jax.main", "--workdir", "runs/together"])
    assert "signum.py, which registers the optimizer 'signum' of this run" in resumed
    # Further, by the same command.
    run(folder, train, small | {"train.duration": "5 steps"})
    result = json.loads((found / "result.json").read_text())
    assert (first["step"], result["step"], result["count"]) == (3, 5, 200)
    assert result["evaluations"]["mirrored"]["count"] == 200
    config = json.loads((found / "config.json").read_text())
    assert {(part["kind"], part["name"]) for part in config["parts"]} == {
        ("dataset", "shapes"),
        ("model", "inception_bn"),
        ("optimizer", "signum"),
        ("schedule", "triangle"),
        ("augmentation", "blur"),
        *(("writer", name) for name in ("csv", "wandb", "mlflow")),
    }
    with (found / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.reader(file) if row[2:4] == ["train", "loss"]]
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5]
    wandb = (folder / "wandb.txt").read_text().splitlines()
    mlflow = (folder / "mlflow.txt").read_text().splitlines()
    assert (wandb[0], wandb[-1]) == ("inception inception_bn", "finish")
    assert mlflow[:2] + mlflow[-1:] == ["inception", "start together", "end"]
    for lines in (wandb, mlflow):
        steps = [int(line.split()[0]) for line in lines if "'train/loss'" in line]
        assert steps == [1, 2, 3, 4, 5]

    evaluated = run(folder, said("--mode=eval"))
    assert json.loads(evaluated.splitlines()[0])["loss"] == pytest.approx(result["loss"])
    run(folder, said("--to=savedweights"))
    assert "name='square'" in run(folder, said("use_weights.py"))


def test_metrics_of_one_s_own_on_cifar100_from_tfds(folder: pathlib.Path) -> None:
    arguments = said("ranks.py", "--config.evaluations.mirrored.flip_tta=true")
    less = {"model.width": 0.125, "data.image_size": 16, "evaluations.seen.examples": 50}
    run(folder, arguments, SHORT | less | {"train.duration": "2 steps", "optimizer.name": "lion"})
    found = json.loads((folder / "runs" / "ranks" / "result.json").read_text())
    seen, mirrored = found["evaluations"]["seen"], found["evaluations"]["mirrored"]
    assert (found["count"], mirrored["count"], seen["count"]) == (100, 100, 50)
    for each in (found, seen, mirrored):
        assert {"loss", "top1", "top10", "macro"} <= set(each) and "top5" not in each
        assert each["top1"] <= each["top10"]
    # One test image of each class.
    assert found["macro"] == pytest.approx(found["top1"])


def test_a_program_of_one_s_own_trains(folder: pathlib.Path) -> None:
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
def test_the_messages_are_what_the_program_says(
    number: int, wrong: tuple[str, dict[str, Any]], here: pathlib.Path
) -> None:
    assert len(MESSAGES) == len(WRONG)
    path, overrides = wrong
    with pytest.raises(UserError) as found:
        setup = ij.assemble(ij.load_config(path, overrides))
        ij.make_train_step(setup)
        raise AssertionError("nothing was wrong")
    assert str(found.value).replace(f"{here}{os.sep}", "") == MESSAGES[number]


def test_every_file_of_the_page_is_run() -> None:
    imported = {
        f"{name}.py" for name in re.findall(r"\w+", FILES["together.py"].split("\n")[0][6:])
    }
    run = {"together.py", "ranks.py", "own_loop.py", "notebook.py", "use_weights.py"}
    assert set(FILES) == imported | run | {"again.py", "wrong.py"}
