"""Training and evaluation from the command line, on a small archive in the official layout."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from inception_jax.telemetry.writers import NONDETERMINISTIC_FIELDS, read_metrics
from tests import archives, command

CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS = 4, 24, 6
STEPS = 30


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for the archive and the directory where it is prepared."""
    folder = tmp_path_factory.mktemp("data")
    source = folder / "archive.zip"
    archives.write_tiny_imagenet(source, CLASSES, TRAIN_PER_CLASS, VAL_PER_CLASS, 3)
    return [
        "--config=experiments/tiny_base.py",
        "--config.data.name=tiny_imagenet_subset",
        f"--config.data.source={source}",
        f"--config.data.directory={folder / 'prepared'}",
    ]


@pytest.fixture(scope="module")
def training(data: list[str]) -> list[str]:
    """Flags of a run that takes seconds, with an event at most of its 30 steps."""
    return [
        *data,
        "--config.data.image_size=16",
        "--config.model.name=mini_googlenet",
        "--config.model.width=0.125",
        "--config.train.batch_size=16",
        f"--config.train.duration={STEPS} steps",
        "--config.train.ema=5 steps",
        "--config.schedule.warmup=3 steps",
        "--config.evaluation.batch_size=10",
        "--config.checkpoint.every=3 steps",
        "--config.log.every=4 steps",
    ]


@pytest.fixture(scope="module")
def finished(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The workdir of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    command.check("main", *training, f"--workdir={folder}")
    return folder


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if name not in NONDETERMINISTIC_FIELDS}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def test_archive_is_prepared_once(data: list[str]) -> None:
    output = command.check("tools.prepare", *data)
    assert "train: 96 images of 64 px" in output
    assert "validation: 24 images" in output
    # A second call does nothing.
    assert command.check("tools.prepare", *data) == output


def test_run_writes_its_results(finished: pathlib.Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert (result["step"], result["split"], result["count"]) == (STEPS, "validation", 24)
    assert result["checkpoint"] == "last"
    # The classes differ in color; chance is 25.
    assert result["top1"] > 40
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["train"]["batch_size"] == 16
    assert config["dataset"]["classes"] == CLASSES
    for name in ("loss", "accuracy"):
        with Image.open(finished / "plots" / f"{name}.png") as image:
            assert min(image.size) > 300
    assert list((finished / "tensorboard").rglob("*tfevents*"))
    assert config["experiment"]["file"] == "experiments/tiny_base.py"
    assert config["experiment"]["own"]["train.batch_size"] == 128
    splits = {line["split"] for line in lines(finished)}
    assert splits == {"train", "validation"}


def test_top5_is_omitted_where_always_right(finished: pathlib.Path) -> None:
    """There are four classes."""
    for name, words in (("result.json", "top"), ("metrics.jsonl", "top"), ("report.html", "Top-")):
        text = (finished / name).read_text(encoding="utf-8")
        assert f"{words}1" in text and f"{words}5" not in text, name


@pytest.mark.parametrize("which", [pytest.param("best", marks=pytest.mark.slow), "last"])
def test_eval_mode_reproduces_the_evaluation_of_training(
    which: str, training: list[str], finished: pathlib.Path
) -> None:
    before = sorted(path.stat().st_mtime_ns for path in finished.rglob("*"))
    output = command.check(
        "main", *training, f"--workdir={finished}", "--mode=eval", f"--checkpoint={which}"
    )
    result = json.loads(output)
    during = [line for line in lines(finished) if line["split"] == "validation"]
    assert which in result.pop("checkpoint")
    assert result in during
    if which == "last":
        assert result == during[-1]
    assert sorted(path.stat().st_mtime_ns for path in finished.rglob("*")) == before


@pytest.mark.slow
def test_workdir_alone_can_be_evaluated_and_resumed(
    data: list[str], training: list[str], finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    expected = json.loads(command.check("main", *training, f"--workdir={finished}", "--mode=eval"))
    folder = tmp_path / "moved"
    shutil.copytree(finished, folder)
    moved = pathlib.Path(data[3].partition("=")[2])
    (tmp_path / "data").symlink_to(moved)
    alone = command.run("main", f"--workdir={folder}", "--mode=eval")
    assert json.loads(alone.stdout) == expected, alone.stderr
    # The experiment file also restores overridden settings, and the data may have moved.
    again = command.run(
        "main", data[0], f"--workdir={folder}", "--mode=eval",
        f"--config.data.directory={tmp_path / 'data'}",
    )  # fmt: skip
    assert json.loads(again.stdout) == expected, again.stderr
    assert "kept from this run's start, as not on this command line: " in again.stderr
    assert "config.model.width = 0.125" in again.stderr
    # --print_config names the run as the origin of what was overridden.
    shown = command.check("main", data[0], f"--workdir={folder}", "--print_config")
    origins = {line.split()[0]: line.split("  # ")[1] for line in shown.splitlines()}
    assert origins["--config.model.width=0.125"] == str(folder / "config.json")
    record = json.loads((folder / "config.json").read_text())
    longer = command.run(
        "main", f"--workdir={folder}", f"--config.train.duration={STEPS + 4} steps"
    )
    assert longer.returncode == 0, longer.stderr
    assert json.loads((folder / "result.json").read_text())["step"] == STEPS + 4
    assert f"config.train.duration: '{STEPS} steps' → '{STEPS + 4} steps'" in longer.stderr
    assert "warning: the learning rate rises from " in longer.stderr
    assert "Total: " not in longer.stderr
    resumed = json.loads((folder / "config.json").read_text())
    assert resumed["experiment"] == record["experiment"]
    refused = command.run("main", f"--workdir={folder}", "--config.model.width=0.2")
    assert refused.returncode == 2
    differing = [line for line in refused.stderr.splitlines() if line.startswith("  ")]
    assert differing == ["  config.model.width: 0.125 → 0.2"]


def test_exported_weights_match_the_checkpoint(
    training: list[str], finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "weights.safetensors"
    output = command.check(
        "tools.export", "--to=savedweights", f"--workdir={finished}", f"--output={path}"
    )
    assert "mini_googlenet, 4 classes" in output and "moving average" in output
    result = json.loads(command.check("main", *training, f"--weights={path}", "--mode=eval"))
    role = result.pop("checkpoint")
    assert "best" in role and f"({role} checkpoint)" in output
    assert result in [line for line in lines(finished) if line["split"] == "validation"]
    done = command.run("main", *training, f"--weights={path}")
    assert done.returncode == 2
    assert "--config.init.pretrained" in done.stderr


def test_report_needs_only_the_workdir(finished: pathlib.Path, tmp_path: pathlib.Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['top1']:.2f}<small>%</small>" in page
    right = round(result["top1"] * result["count"] / 100)
    images = min(right, 12) + min(result["count"] - right, 24)
    assert page.count('<img src="data:image/png;base64,') == images
    # The experiment's values of the overridden settings.
    assert "<code>train.batch_size</code></th><td>128</td><td><strong>16</strong>" in page
    for name in ("config.json", "metrics.jsonl", "result.json", "predictions.npz"):
        shutil.copy(finished / name, tmp_path / name)
    command.check("tools.report", str(tmp_path))
    again = (tmp_path / "report.html").read_text(encoding="utf-8")
    written = re.compile(r"Written [-\d: ]+ UTC")
    assert written.sub("", again) == written.sub("", page)


def test_plots_are_drawn_on_demand(finished: pathlib.Path) -> None:
    (finished / "plots" / "loss.png").unlink()
    output = command.check("tools.plot", str(finished))
    assert str(finished / "plots" / "loss.png") in output.splitlines()
    assert (finished / "plots" / "loss.png").stat().st_size > 1000


def test_workdir_of_another_run_is_rejected(training: list[str], finished: pathlib.Path) -> None:
    before = (finished / "config.json").read_text()
    done = command.run(
        "main", *training, f"--workdir={finished}", "--config.model.width=0.2", "--config.seed=3"
    )
    assert done.returncode == 2
    assert "config.model.width: 0.125 → 0.2" in done.stderr
    assert "config.seed: 0 → 3" in done.stderr
    assert (finished / "config.json").read_text() == before


def test_indivisible_batch_is_rejected(training: list[str], tmp_path: pathlib.Path) -> None:
    done = command.run(
        "main", *training, "--config.train.batch_size=12", f"--workdir={tmp_path}", devices=8
    )
    assert done.returncode == 2
    assert "must be a multiple of 8: 8 devices" in done.stderr


def test_bad_archive_is_rejected(training: list[str], tmp_path: pathlib.Path) -> None:
    source = tmp_path / "archive.zip"
    archives.write_tiny_imagenet(source, 2, 2, 1, 1)
    source.write_bytes(source.read_bytes()[:-200])
    done = command.run(
        "main",
        *training,
        f"--config.data.source={source}",
        f"--config.data.directory={tmp_path / 'prepared'}",
        "--config.data.name=tiny_imagenet_subset",
        f"--workdir={tmp_path / 'run'}",
    )
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(source) in errors[0]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_full_disk_stops_the_run_with_one_message(
    training: list[str], finished: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # A file size limit makes the same calls fail as a full disk.
    script = (
        "import resource, runpy, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
        "sys.argv[0] = 'main'; runpy.run_module('inception_jax.main', run_name='__main__')"
    )
    # The limit would corrupt entries of the tests' compilation cache, so entries are read from it
    # and new ones are written elsewhere.
    cache = tmp_path / "cache"
    cache.mkdir()
    for entry in pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"]).glob("*-cache"):
        (cache / entry.name).symlink_to(entry)
    workdir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", script, *training, f"--workdir={workdir}"],
        cwd=command.ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_COMPILATION_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1
    assert str(workdir) in messages[0] and "File too large" in messages[0]
