import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.config import Log
from inception_jax.errors import UserError, WriteError
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import RunWriter, read_lines
from tests import disks

_KILLED = """
import os, pathlib, signal, sys
from inception_jax.config import Log
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import RunWriter
writer = RunWriter(Workdir(pathlib.Path(sys.argv[1])), Log(), resume_step=0)
for step in range(1, 26):
    writer.write(step, epoch=step / 10, split="train", values={"loss": 1.5})
writer.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


def _lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (workdir / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def _write(workdir: pathlib.Path, steps: range, *, resume_step: int = 0) -> None:
    with RunWriter(Workdir(workdir), Log(), resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, epoch=step / 4, split="train", values={"loss": 1 / step})


def test_a_line_holds_step_epoch_split_and_values(tmp_path: pathlib.Path) -> None:
    with RunWriter(Workdir(tmp_path), Log(), resume_step=0) as writer:
        writer.write(3, epoch=0.3, split="train", values={"loss": 2.5, "learning_rate": 0.1})
        writer.write(3, epoch=0.3, split="validation", values={"top1": 12.5, "count": 10_000})
    assert _lines(tmp_path) == [
        {"step": 3, "epoch": 0.3, "split": "train", "loss": 2.5, "learning_rate": 0.1},
        {"step": 3, "epoch": 0.3, "split": "validation", "top1": 12.5, "count": 10_000},
    ]
    assert isinstance(_lines(tmp_path)[1]["count"], int)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 2**53 + 1.0])
def test_floats_read_back_the_same(tmp_path: pathlib.Path, value: float) -> None:
    with RunWriter(Workdir(tmp_path), Log(), resume_step=0) as writer:
        writer.write(1, epoch=value, split="train", values={"loss": value})
    assert _lines(tmp_path)[0]["loss"] == value == _lines(tmp_path)[0]["epoch"]


def test_array_scalars_are_numbers_and_non_finite_ones_null(tmp_path: pathlib.Path) -> None:
    values: dict[str, Any] = {
        "numpy": np.float32(0.1),
        "jax": jnp.float32(0.1),
        "nan": float("nan"),
        "inf": -np.inf,
        "jax_nan": jnp.float32(jnp.nan),
    }
    with RunWriter(Workdir(tmp_path), Log(), resume_step=0) as writer:
        writer.write(np.int64(1), epoch=0.0, split="train", values=values)
    (line,) = _lines(tmp_path)
    assert line["numpy"] == line["jax"] == float(np.float32(0.1))
    assert [line["nan"], line["inf"], line["jax_nan"]] == [None, None, None]


def test_what_was_written_outlives_a_kill(tmp_path: pathlib.Path) -> None:
    child = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)])
    assert child.returncode == -signal.SIGKILL
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 26))


def test_resuming_removes_later_lines_and_a_torn_one(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, range(1, 10))
    before = _lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "tr')
    _write(tmp_path, range(7, 12), resume_step=6)
    after = _lines(tmp_path)
    assert after[:6] == before[:6]
    assert [line["step"] for line in after] == list(range(1, 12))


def test_starting_anew_keeps_nothing(tmp_path: pathlib.Path) -> None:
    # Not even the state before the first step, nor a line that a resume would refuse.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\nnot json\n{"step": 1}\n')
    _write(tmp_path, range(0))
    assert _lines(tmp_path) == []


def test_resuming_without_earlier_metrics_starts_a_file(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, range(7, 9), resume_step=6)
    assert [line["step"] for line in _lines(tmp_path)] == [7, 8]


def test_only_the_lead_process_writes(tmp_path: pathlib.Path) -> None:
    with RunWriter(Workdir(tmp_path / "run"), Log(), resume_step=0, is_lead=False) as writer:
        writer.write(1, epoch=0.1, split="train", values={"loss": 1.0})
        writer.flush()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", ["not json", "[1]", '{"epoch": 1}', '{"step": "1"}'])
def test_a_damaged_line_is_reported_with_its_place(tmp_path: pathlib.Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line 2: .*Remove the line"):
        RunWriter(Workdir(tmp_path), Log(), resume_step=2)
    assert path.read_text().count("\n") == 3


def test_a_write_that_fails_is_the_users_error(tmp_path: pathlib.Path) -> None:
    # A limit on the size of files fails a write as a full disk does. It would fail the tests' own
    # output too, where that is a file, hence the process of its own.
    script = """
import pathlib, resource, sys
from inception_jax.errors import UserError
from inception_jax.config import Log
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import RunWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with RunWriter(Workdir(pathlib.Path(sys.argv[1])), Log(), resume_step=0) as writer:
        for step in range(1, 1000):
            writer.write(step, epoch=0.0, split="train", values={"loss": 3.14159})
except UserError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert re.search(rf"{re.escape(str(tmp_path))}: .*File too large.*space", done.stdout)


def test_a_removed_folder_is_the_users_error(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    # At the end, too: a line is missing.
    with (
        pytest.raises(UserError, match="removed"),
        RunWriter(Workdir(workdir), Log(), resume_step=0) as writer,
    ):
        shutil.rmtree(workdir)
        with pytest.raises(UserError, match="removed"):
            writer.flush()
        with pytest.raises(UserError, match="removed"):
            writer.write(1, epoch=0.0, split="train", values={"loss": 1.0})


def test_a_patient_writer_keeps_what_a_full_disk_does_not_take(tmp_path: pathlib.Path) -> None:
    def write(steps: range) -> None:
        for step in steps:
            writer.write(step, epoch=0.0, split="train", values={"loss": 3.14159 * step})

    with disks.mounted(tmp_path / "disk", kilobytes=64) as disk:
        with RunWriter(Workdir(disk / "run"), Log(), resume_step=0, patient=True) as writer:
            write(range(1, 11))
            writer.flush()
            # What is left is a part of a page of each file: lines are torn.
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free))
            write(range(11, 201))
            with pytest.raises(WriteError, match=r"Cannot write metrics .*No space left"):
                writer.flush()
            assert 10 < len(read_lines(disk / "run" / "metrics.jsonl")) < 200
            (disk / "other").unlink()
            write(range(201, 211))
        assert [line["step"] for line in _lines(disk / "run")] == list(range(1, 211))


def test_event_files_keep_their_order_when_the_clock_is_set_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    for now in (5_000, 4_000, 4_000, 6_000):
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        RunWriter(Workdir(tmp_path), Log(), resume_step=0).close()
        names += {path.name for path in (tmp_path / "tensorboard").iterdir()} - {*names}
    assert [int(name.rpartition(".")[2]) for name in names] == [5_000, 5_001, 5_002, 6_000]


def test_a_workdir_that_is_a_file_is_the_users_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="Cannot write metrics"):
        RunWriter(Workdir(tmp_path / "run"), Log(), resume_step=0)


@pytest.fixture(params=["auto", "false"])
def tensorboard(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[str]:
    """Runs a TensorBoard of `tmp_path`, with each of its two loaders; gives its address."""
    pytest.importorskip("tensorboard")
    command = [sys.executable, "-m", "tensorboard.main", "--host=127.0.0.1", "--port=0"]
    command += [f"--logdir={tmp_path / 'tensorboard'}", f"--load_fast={request.param}"]
    command += ["--reload_interval=1"]
    log = tmp_path / "tensorboard.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, env={**os.environ, "PYTHONWARNINGS": ""})
    try:
        while not (address := re.search(r"http://127\.0\.0\.1:\d+", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield address.group()
    finally:
        process.terminate()
        process.wait()


def _curve(address: str, tag: str, *, last_step: int) -> list[tuple[int, float]]:
    """Returns (step, value) of a curve once TensorBoard, which reads on, has its last step."""
    while True:
        with urllib.request.urlopen(f"{address}/data/plugin/scalars/tags") as reply:
            tags = json.load(reply).get(".", {})
        if tag in tags:
            query = f"{address}/data/plugin/scalars/scalars?run=.&tag={tag}"
            with urllib.request.urlopen(query) as reply:
                points = [(step, value) for _, step, value in json.load(reply)]
            if points and points[-1][0] >= last_step:
                return points
        time.sleep(0.1)


def _run(workdir: pathlib.Path, *, resume: int, last: int, loss: float) -> None:
    with RunWriter(Workdir(workdir), Log(), resume_step=resume) as writer:
        for step in range(resume + 1, last + 1):
            writer.write(step, epoch=step / 10, split="train", values={"loss": loss})
            if step % 10 == 0:
                writer.write(step, epoch=step / 10, split="validation", values={"top1": loss})


def test_tensorboard_shows_each_step_once_after_resumes(
    tensorboard: str, tmp_path: pathlib.Path
) -> None:
    _run(tmp_path, resume=0, last=30, loss=1.0)
    _run(tmp_path, resume=20, last=40, loss=2.0)
    expected = [(step, 1.0 if step <= 20 else 2.0) for step in range(1, 41)]
    assert _curve(tensorboard, "train/loss", last_step=40) == expected
    assert _curve(tensorboard, "validation/top1", last_step=40) == expected[9::10]
    # A new run in the same folder hides all of the old one.
    _run(tmp_path, resume=0, last=50, loss=3.0)
    expected = [(step, 3.0) for step in range(1, 51)]
    assert _curve(tensorboard, "train/loss", last_step=50) == expected
