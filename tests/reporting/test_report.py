"""The files written for a run: diagnosis, plots and range test."""

import json
import math
import pathlib
import subprocess
import sys
import warnings

import pytest
from PIL import Image

from inception_jax import config as configs
from inception_jax.errors import UserError
from inception_jax.reporting import report
from inception_jax.storage.workdir import Workdir
from inception_jax.training import lr_range_test
from inception_jax.training.lr_range_test import Point, Proposal
from tests import command, run_folders

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """The workdir of a finished run of three real epochs on Tiny ImageNet."""
    config = configs.Config(name="three", train=configs.Train(duration="3 epochs"))
    config.schedule.name = "linear"
    dataset = {"name": "tiny_imagenet", "classes": 200, "training examples": 100_000}
    record = {"config": configs.to_dict(config), "dataset": dataset, "changes": []}
    (tmp_path / "config.json").write_text(json.dumps(record))
    lines = (HERE / "curves" / "three_epochs.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(lines)
    return tmp_path


def test_finish_writes_plots_and_diagnosis(folder: pathlib.Path) -> None:
    logged: list[str] = []
    report.finish(Workdir(folder), logged.append)
    assert logged[0].startswith("diagnosis: not measured: validation top-1 is 30.6%")
    assert logged[1].startswith(
        "  try, in a new workdir: --config.evaluation.train_eval_examples=1000"
    )
    assert (folder / "plots" / "loss.png").exists()
    stored = json.loads((folder / "diagnosis.json").read_text())
    assert stored["verdict"] == "not measured"
    assert stored["advice"]["setting"] == "evaluation.train_eval_examples"
    assert (stored["advice"]["before"], stored["advice"]["value"]) == (0, 1000)
    # NaN is stored as null, because JSON has no NaN.
    assert stored["evidence"]["nonfinite_step"] is None
    assert stored["evidence"]["top1"] == 30.56


def test_unusual_names_can_be_plotted_and_reported(tmp_path: pathlib.Path) -> None:
    names = (*run_folders.ODD_NAMES[:9], "</script><b>")
    settings = run_folders.config(name=r"$\frac{$ %s </script>")
    folder = run_folders.write(tmp_path / "$a_{%s}'\"", names=names, settings=settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written = report.plot(folder)
        page = report.write_page(folder)
        report.write_comparison([folder, folder], tmp_path / "both.html")
    assert {path.stem for path in written} >= {"classes", "confusion", "calibration", "time"}
    text = page.read_text(encoding="utf-8")
    assert "</script><b>" not in text and "%s &lt;/script&gt;" in text
    point = Point(step=1, rate=0.1, loss=1.0, smoothed_rate=0.1, smoothed_loss=1.0)
    report.write_range_test(tmp_path, lr_range_test.record(settings, [point, point], None, []))


def test_diagnose_command_prints_what_training_logged(folder: pathlib.Path) -> None:
    logged: list[str] = []
    report.finish(Workdir(folder), logged.append)
    assert logged.pop() == f"report: {folder / 'report.html'}"
    assert command.check("tools.diagnose", str(folder)).splitlines() == logged
    done = command.run("tools.diagnose", str(folder), str(folder / "none"))
    assert done.returncode == 2
    assert done.stdout.splitlines() == [str(folder), *logged, str(folder / "none")]
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_report_does_not_import_jax(tmp_path: pathlib.Path) -> None:
    """Importing JAX would take longer than everything else."""
    script = """
import pathlib, sys
from inception_jax.reporting import report
from inception_jax.storage.workdir import Workdir
report.finish(Workdir(pathlib.Path(sys.argv[1])), lambda line: None)
print(*sorted({"jax", "flax", "optax", "tensorflow_datasets"} & set(sys.modules)))
"""
    arguments = [sys.executable, "-c", script, str(run_folders.write(tmp_path))]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_all_plots_have_a_legible_size(tmp_path: pathlib.Path) -> None:
    names = [f"a rather long name of a class, {number}" for number in range(30)]
    paths = report.plot(run_folders.write(tmp_path, names=names))
    expected = ["loss", "accuracy", "learning_rate", "gradient_norm"]
    expected += ["classes", "confusion", "calibration", "time"]
    assert paths == [tmp_path / "plots" / f"{name}.png" for name in expected]
    for path in paths:
        with Image.open(path) as image:
            assert min(image.size) >= 400
            assert image.convert("L").getextrema() == (0, 255)


def test_missing_config_is_a_user_error(folder: pathlib.Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json not found"):
        report.write_diagnosis(folder)


def test_range_test_without_a_proposal_is_written(tmp_path: pathlib.Path) -> None:
    points = [
        Point(step=1, rate=0.1, loss=2.0, smoothed_rate=0.1, smoothed_loss=2.0),
        Point(step=2, rate=1.0, loss=math.inf, smoothed_rate=0.3, smoothed_loss=math.inf),
    ]
    values = lr_range_test.record(configs.Config(), points, None, [])
    paths = report.write_range_test(tmp_path, values)
    stored = json.loads(paths[0].read_text())
    assert (stored["proposal"], stored["doubts"]) == (None, [])
    assert [point["loss"] for point in stored["points"]] == [2.0, None]
    with Image.open(paths[1]) as image:
        assert min(image.size) > 300


def test_doubtful_proposal_is_not_written(tmp_path: pathlib.Path) -> None:
    points = [
        Point(step=1, rate=0.1, loss=2.0, smoothed_rate=0.1, smoothed_loss=2.0),
        Point(step=2, rate=1.0, loss=1.0, smoothed_rate=0.3, smoothed_loss=1.0),
    ]
    proposal = Proposal(rate=0.1, least=0.3, diverged=False)
    values = lr_range_test.record(configs.Config(), points, proposal, ["too few"])
    paths = report.write_range_test(tmp_path, values)
    stored = json.loads(paths[0].read_text())
    assert (stored["proposal"], stored["doubts"]) == (None, ["too few"])
