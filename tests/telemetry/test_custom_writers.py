"""Custom writers as in the documentation, each in a file outside the package."""

import csv
import json
import pathlib
import runpy
import sys
import types
from typing import Any

import pytest

from inception_jax import registry
from inception_jax.config import Config, Log, to_dict, validate
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import RunWriter

CSV = """
import csv
from inception_jax.registry import register_writer

@register_writer("csv", options={"file": "metrics.csv"})
class Csv:
    def __init__(self, settings, workdir):
        self.path = workdir.path / settings.options["file"]

    def resume(self, resume_step):
        kept = []
        if resume_step:
            with self.path.open(newline="") as file:
                kept = [row for row in csv.reader(file) if int(row[0]) <= resume_step]
        self.file = self.path.open("w", newline="")
        csv.writer(self.file).writerows(kept)

    def write(self, step, epoch, split, values):
        csv.writer(self.file).writerows((step, epoch, split, *each) for each in values.items())

    def flush(self):
        self.file.flush()

    def close(self):
        self.file.close()
"""

WANDB = """
import json, wandb
from inception_jax.registry import register_writer
@register_writer("wandb", options={"project": "inception"})
class WeightsAndBiases:
    def __init__(self, settings, workdir):
        config = json.loads(workdir.config.read_text())["config"]
        self.run = wandb.init(project=settings.options["project"], dir=workdir.path, config=config)
    def write(self, step, epoch, split, values):
        self.run.log({f"{split}/{name}": value for name, value in values.items()}, step=step)
    def flush(self): pass
    def close(self): self.run.finish()
"""

MLFLOW = """
import mlflow
from inception_jax.registry import register_writer
@register_writer("mlflow", options={"experiment": "inception"})
class MLflow:
    def __init__(self, settings, workdir):
        mlflow.set_experiment(settings.options["experiment"])
        mlflow.start_run(run_name=workdir.path.name)
    def write(self, step, epoch, split, values):
        mlflow.log_metrics({f"{split}/{name}": value for name, value in values.items()}, step=step)
    def flush(self): pass
    def close(self): mlflow.end_run()
"""


@pytest.fixture(autouse=True)
def own_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the writers that a test registered."""
    registry.WRITERS.names()
    monkeypatch.setattr(registry.WRITERS, "_parts", dict(registry.WRITERS._parts))


def settings_of(text: str, name: str, folder: pathlib.Path, **options: Any) -> Log:
    """Runs a file that registers a writer, and returns settings that use it."""
    assert len(text.strip().splitlines()) <= (25 if name == "csv" else 11)
    (folder / "mine.py").write_text(text)
    runpy.run_path(str(folder / "mine.py"))
    settings = Log(writers=("tensorboard", name), options=options)
    validate(Config(log=settings))
    return settings


def run(workdir: Workdir, settings: Log, *, resume_step: int, last: int) -> None:
    with RunWriter(workdir, settings, resume_step=resume_step) as writer:
        for step in range(resume_step + 1, last + 1):
            values = {"loss": 1 / step, "top1": float(resume_step)}
            writer.write(step, epoch=step / 2, split="train", values=values)


def test_csv_has_each_step_once_after_a_resume(tmp_path: pathlib.Path) -> None:
    settings = settings_of(CSV, "csv", tmp_path, file="curves.csv")
    workdir = Workdir(tmp_path / "run")
    run(workdir, settings, resume_step=0, last=5)
    run(workdir, settings, resume_step=3, last=6)
    with (workdir.path / "curves.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["1", "0.5", "train", "loss", "1.0"]
    assert [int(row[0]) for row in rows] == [step for step in range(1, 7) for _ in range(2)]
    assert [float(row[4]) for row in rows if row[3] == "top1"] == [0, 0, 0, 3, 3, 3]
    # A new run in the same workdir.
    run(workdir, settings, resume_step=0, last=1)
    assert (workdir.path / "curves.csv").read_text().count("\n") == 2


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[Any, ...], Any]]:
    """Replaces the services' libraries by fakes, and returns the calls of them."""
    recorded: list[tuple[str, tuple[Any, ...], Any]] = []

    def record_calls(name: str, returned: Any = None) -> Any:
        def called(*args: Any, **more: Any) -> Any:
            recorded.append((name, args, more))
            return returned

        return called

    a_run = types.SimpleNamespace(log=record_calls("log"), finish=record_calls("finish"))
    for name, members in (
        ("wandb", {"init": record_calls("init", a_run)}),
        (
            "mlflow",
            {n: record_calls(n) for n in ("set_experiment", "start_run", "log_metrics", "end_run")},
        ),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    return recorded


def test_weights_and_biases_get_settings_and_rows(
    tmp_path: pathlib.Path, calls: list[tuple[str, tuple[Any, ...], Any]]
) -> None:
    settings = settings_of(WANDB, "wandb", tmp_path, project="p")
    workdir = Workdir(tmp_path / "run")
    workdir.path.mkdir()
    workdir.config.write_text(json.dumps({"config": to_dict(Config(name="n"))}))
    run(workdir, settings, resume_step=0, last=2)
    (init, one, two, finish) = calls
    assert init[2]["project"] == "p" and init[2]["config"]["name"] == "n"
    assert one == ("log", ({"train/loss": 1.0, "train/top1": 0.0},), {"step": 1})
    assert (two[2], finish[0]) == ({"step": 2}, "finish")


def test_mlflow_gets_rows(
    tmp_path: pathlib.Path, calls: list[tuple[str, tuple[Any, ...], Any]]
) -> None:
    settings = settings_of(MLFLOW, "mlflow", tmp_path)
    run(Workdir(tmp_path / "run"), settings, resume_step=0, last=1)
    assert calls == [
        ("set_experiment", ("inception",), {}),
        ("start_run", (), {"run_name": "run"}),
        ("log_metrics", ({"train/loss": 1.0, "train/top1": 0.0},), {"step": 1}),
        ("end_run", (), {}),
    ]
