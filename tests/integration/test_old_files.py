"""Runs and weights that revision 56edb8b wrote are used as that revision used them.

tests/fixtures/56edb8b/README.md says how they were made; expected.json holds the figures. With the
versions, flags and CPU that made them, evaluation, prediction and the steps of the resumed training
are equal to the last bit. Others add in another order: a forward pass then differs in the sixth
digit, and steps of training in the third, as each takes up what the one before it rounded. What the
resumed run's evaluations say differs more: since then they estimate the statistics of BatchNorm
anew for the averaged parameters.
"""

import csv
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from inception_jax import config as configs
from inception_jax.evaluation import evaluate
from inception_jax.inference import load
from inception_jax.inference.predictor import Predictor
from inception_jax.models import weights
from inception_jax.storage.workdir import Workdir
from inception_jax.training import run
from tests import command

FIXTURE = command.ROOT / "tests" / "fixtures" / "56edb8b"
EXPECTED = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))["runs"]
NAMES = ("digits", "image_folder")
# Relative to the figure: of a forward pass, and of a step of the resumed training.
FORWARD, TRAINED = 1e-4, 1e-2


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy, as reading prepares data and training changes the runs."""
    return shutil.copytree(FIXTURE, tmp_path / "old")


def main(folder: pathlib.Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs main where the recorded relative paths lead to the fixture; returns result and log."""
    environment = os.environ | {
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": os.pathsep.join([str(command.ROOT), *sys.path[1:]]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "inception_jax.main", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def change_settings(workdir: pathlib.Path, settings: dict[str, dict[str, Any]]) -> None:
    """Changes what config.json says, as if an older version had written it."""
    path = workdir / "config.json"
    record = json.loads(path.read_text())
    for group, values in settings.items():
        record["config"].setdefault(group, {}).update(values)
    path.write_text(json.dumps(record))


def assert_evaluated(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("step", "epoch", "split", "count"):
        assert found[name] == expected[name], name
    for name in ("loss", "top1", *(["top5"] if "top5" in found else [])):
        assert found[name] == pytest.approx(expected[name], rel=FORWARD), name


@pytest.mark.parametrize("name", NAMES)
def test_a_stopped_run_goes_on_to_the_same_end(name: str, folder: pathlib.Path) -> None:
    workdir = folder / "runs" / name
    # A rule that came later, and a setting that went away, are no hindrance.
    change_settings(workdir, {"data": {"archive_encoding": "none"}, "watch": {"dogs": 2}})
    expected = EXPECTED[name]["resume"]
    result, log = main(folder, f"--workdir=runs/{name}")

    line = "config.watch.dogs = 2: ignored, because this version has no such setting"
    assert log.count(line) == 1
    words = "must be an encoding" if name == "image_folder" else "only 'image_folder' has"
    assert f"config.data.archive_encoding = 'none': {words}" in log
    assert result["step"] == expected["output"]["step"]
    assert result["loss"] == pytest.approx(expected["output"]["loss"], abs=0.05)
    assert result["top1"] == pytest.approx(expected["output"]["top1"], abs=3)
    assert json.loads((workdir / "result.json").read_text())["loss"] == result["loss"]
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [
        (line["step"], line["split"]) for line in expected["metrics.jsonl"]
    ]
    for line, before in zip(lines, expected["metrics.jsonl"], strict=True):
        if line["split"] == "train":
            for metric in ("loss", "gradient_norm", "learning_rate"):
                assert line[metric] == pytest.approx(before[metric], rel=TRAINED), line["step"]
    # What was written before the stop is still there.
    stopped = EXPECTED[name]["metrics_at_stop"]
    assert lines[: len(stopped)] == stopped
    record = json.loads((workdir / "config.json").read_text())
    assert "dogs" not in record["config"]["watch"]
    assert (workdir / "report.html").exists()


@pytest.mark.parametrize(("name", "which"), [("digits", "best"), ("image_folder", "last")])
def test_a_checkpoint_is_evaluated_by_the_same_figures(
    name: str, which: str, folder: pathlib.Path
) -> None:
    found, log = main(folder, f"--workdir=runs/{name}", "--mode=eval", f"--checkpoint={which}")
    assert_evaluated(found, EXPECTED[name]["evaluate"][which]["result"])
    assert "left out" not in log


def test_checkpoints_and_weights_are_evaluated_in_a_program(
    folder: pathlib.Path, data_directory: pathlib.Path
) -> None:
    workdir = Workdir(folder / "runs" / "digits")
    record = configs.read_record(workdir.config)
    assert not record.notes
    record.config.data.directory = str(data_directory)
    this = run.assemble(record.config, log=lambda _: None)
    expected = EXPECTED["digits"]["evaluate"]
    for which in ("best", "last"):
        found = evaluate.evaluate_checkpoint(this, workdir, which)
        assert_evaluated(found, expected[which]["result"])
    found = evaluate.evaluate_weights(this, weights.load(folder / "digits.safetensors"))
    assert_evaluated(found, expected["weights"]["result"])


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_predicted_by_the_same_figures(name: str, folder: pathlib.Path) -> None:
    file = folder / EXPECTED[name]["export"]["file"]
    for which, expected in EXPECTED[name]["predict"].items():
        if which == "weights":
            found = load.load(workdir=None, weights=file, checkpoint="", log=pytest.fail)
        else:
            found = load.from_checkpoint(Workdir(folder / "runs" / name), which, pytest.fail)
        predictor = Predictor(found, batch_size=len(expected["json"]))
        files = [row["file"] for row in expected["json"]]
        pixels = [predictor.read((folder / each).read_bytes(), each) for each in files]
        for row, predictions in zip(
            expected["json"], predictor.predict(np.stack(pixels), 10), strict=True
        ):
            assert [each.label for each in predictions] == [g["label"] for g in row["guesses"]]
            assert [each.name for each in predictions] == [g["name"] for g in row["guesses"]]
            probabilities = [each.probability for each in predictions]
            assert probabilities == pytest.approx(
                [guess["probability"] for guess in row["guesses"]], rel=100 * FORWARD, abs=1e-5
            )


def test_the_command_predicts_as_it_did(folder: pathlib.Path) -> None:
    """The rows of CSV and JSON have the same fields."""
    expected = EXPECTED["digits"]["predict"]["best"]
    files = [row["file"] for row in expected["json"]]
    found = command.check(
        "tools.predict",
        f"--workdir={folder / 'runs' / 'digits'}",
        "--top=10",
        "--csv",
        *(str(folder / file) for file in files),
    )
    rows = list(csv.DictReader(io.StringIO(found)))
    assert [row.keys() for row in rows] == [row.keys() for row in expected["csv"]]
    assert [row["name"] for row in rows] == [row["name"] for row in expected["csv"]]
