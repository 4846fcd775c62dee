"""Runs and weights written by revision 56edb8b give the same results as with that revision.

tests/fixtures/56edb8b/README.md describes how they were created; expected.json contains the
results. With the same versions, flags and CPU, evaluation, prediction and the steps of the resumed
training are bit-identical. Others sum in a different order: a forward pass then differs in the
sixth digit, and training steps in the third, because rounding errors accumulate. Evaluations of the
resumed run differ more, because BatchNorm statistics are now re-estimated for the averaged
parameters.
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
# Relative tolerances of a forward pass, and of a report of the resumed training, whose steps
# amplify the differences in rounding between the programs of that revision and today's.
FORWARD, TRAINED = 1e-4, 3e-2


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the fixture, because reading prepares data and training changes the runs."""
    return shutil.copytree(FIXTURE, tmp_path / "old")


def main(folder: pathlib.Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """Runs main in the directory of the recorded relative paths; returns result and log."""
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
    """Changes config.json as if an older version had written it."""
    path = workdir / "config.json"
    record = json.loads(path.read_text())
    for group, values in settings.items():
        record["config"].setdefault(group, {}).update(values)
    path.write_text(json.dumps(record))


def assert_evaluated(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in ("step", "epoch", "split", "count"):
        assert result[name] == expected[name], name
    for name in ("loss", "top1", *(["top5"] if "top5" in result else [])):
        assert result[name] == pytest.approx(expected[name], rel=FORWARD), name


@pytest.mark.parametrize("name", ["digits", pytest.param("image_folder", marks=pytest.mark.slow)])
def test_stopped_run_of_old_version_resumes(name: str, folder: pathlib.Path) -> None:
    workdir = folder / "runs" / name
    # Violates a newer rule, and adds a setting that no longer exists.
    change_settings(workdir, {"data": {"archive_encoding": "none"}, "watch": {"dogs": 2}})
    expected = EXPECTED[name]["resume"]
    result, log = main(folder, f"--workdir=runs/{name}")

    line = "config.watch.dogs = 2: ignored, because this version has no such setting"
    assert log.count(line) == 1
    words = "must be an encoding" if name == "image_folder" else "must be '' for 'digits'"
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
    # Lines written before the stop are kept.
    stopped = EXPECTED[name]["metrics_at_stop"]
    assert lines[: len(stopped)] == stopped
    record = json.loads((workdir / "config.json").read_text())
    assert "dogs" not in record["config"]["watch"]
    assert (workdir / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "which"),
    # The next test reads those of digits in this process.
    [pytest.param("digits", "best", marks=pytest.mark.slow), ("image_folder", "last")],
)
def test_old_checkpoint_evaluates_the_same(name: str, which: str, folder: pathlib.Path) -> None:
    result, log = main(folder, f"--workdir=runs/{name}", "--mode=eval", f"--checkpoint={which}")
    assert_evaluated(result, EXPECTED[name]["evaluate"][which]["result"])
    assert "ignored" not in log


def test_old_checkpoints_and_weights_evaluate_through_the_api(
    folder: pathlib.Path, data_directory: pathlib.Path
) -> None:
    workdir = Workdir(folder / "runs" / "digits")
    record = configs.read_record(workdir.config)
    assert not record.notes
    record.config.data.directory = str(data_directory)
    this = run.assemble(record.config, log=lambda _: None)
    expected = EXPECTED["digits"]["evaluate"]
    for which in ("best", "last"):
        result = evaluate.evaluate_checkpoint(this, workdir, which)
        assert_evaluated(result, expected[which]["result"])
    result = evaluate.evaluate_weights(this, weights.load(folder / "digits.safetensors"))
    assert_evaluated(result, expected["weights"]["result"])


@pytest.mark.parametrize("name", NAMES)
def test_old_runs_predict_the_same(name: str, folder: pathlib.Path) -> None:
    file = folder / EXPECTED[name]["export"]["file"]
    for which, expected in EXPECTED[name]["predict"].items():
        if which == "weights":
            weights_file = load.load(workdir=None, weights=file, checkpoint="", log=pytest.fail)
        else:
            weights_file = load.from_checkpoint(Workdir(folder / "runs" / name), which, pytest.fail)
        predictor = Predictor(weights_file, batch_size=len(expected["json"]))
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


def test_predict_command_output_is_unchanged(folder: pathlib.Path) -> None:
    """CSV and JSON rows have the same fields."""
    expected = EXPECTED["digits"]["predict"]["best"]
    files = [row["file"] for row in expected["json"]]
    output = command.check(
        "tools.predict",
        f"--workdir={folder / 'runs' / 'digits'}",
        "--top=10",
        "--csv",
        *(str(folder / file) for file in files),
    )
    rows = list(csv.DictReader(io.StringIO(output)))
    assert [row.keys() for row in rows] == [row.keys() for row in expected["csv"]]
    assert [row["name"] for row in rows] == [row["name"] for row in expected["csv"]]
