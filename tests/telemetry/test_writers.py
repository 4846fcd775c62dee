import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax import registry
from inception_jax.config import Config, Log, validate
from inception_jax.errors import ConfigError, UserError, WriteError
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import RunWriter, read_metrics
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


def test_line_contains_step_epoch_split_and_values(tmp_path: pathlib.Path) -> None:
    with RunWriter(Workdir(tmp_path), Log(), resume_step=0) as writer:
        writer.write(3, epoch=0.3, split="train", values={"loss": 2.5, "learning_rate": 0.1})
        writer.write(3, epoch=0.3, split="validation", values={"top1": 12.5, "count": 10_000})
    assert _lines(tmp_path) == [
        {"step": 3, "epoch": 0.3, "split": "train", "loss": 2.5, "learning_rate": 0.1},
        {"step": 3, "epoch": 0.3, "split": "validation", "top1": 12.5, "count": 10_000},
    ]
    assert isinstance(_lines(tmp_path)[1]["count"], int)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 2**53 + 1.0])
def test_floats_round_trip(tmp_path: pathlib.Path, value: float) -> None:
    with RunWriter(Workdir(tmp_path), Log(), resume_step=0) as writer:
        writer.write(1, epoch=value, split="train", values={"loss": value})
    assert _lines(tmp_path)[0]["loss"] == value == _lines(tmp_path)[0]["epoch"]


def test_array_scalars_are_numbers_and_nonfinite_ones_null(tmp_path: pathlib.Path) -> None:
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


def test_written_lines_survive_a_kill(tmp_path: pathlib.Path) -> None:
    child = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)])
    assert child.returncode == -signal.SIGKILL
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 26))


def test_resuming_removes_later_and_incomplete_lines(tmp_path: pathlib.Path) -> None:
    _write(tmp_path, range(1, 10))
    before = _lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "split": "tr')
    _write(tmp_path, range(7, 12), resume_step=6)
    after = _lines(tmp_path)
    assert after[:6] == before[:6]
    assert [line["step"] for line in after] == list(range(1, 12))


def test_new_run_removes_all_lines(tmp_path: pathlib.Path) -> None:
    # Removes even step 0 and a line that a resume would reject.
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
def test_corrupt_line_is_reported_with_its_number(tmp_path: pathlib.Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line 2: .*delete this line"):
        RunWriter(Workdir(tmp_path), Log(), resume_step=2)
    assert path.read_text().count("\n") == 3


def test_failed_write_is_a_user_error(tmp_path: pathlib.Path) -> None:
    # A file size limit makes writes fail like a full disk. It would also affect the output of the
    # tests if that is a file, hence the separate process.
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


def test_removed_workdir_is_a_user_error(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    # Also on exit, because a line is missing.
    with (
        pytest.raises(UserError, match="removed"),
        RunWriter(Workdir(workdir), Log(), resume_step=0) as writer,
    ):
        shutil.rmtree(workdir)
        with pytest.raises(UserError, match="removed"):
            writer.flush()
        with pytest.raises(UserError, match="removed"):
            writer.write(1, epoch=0.0, split="train", values={"loss": 1.0})


def test_retrying_writer_keeps_rows_while_the_disk_is_full(tmp_path: pathlib.Path) -> None:
    def write(steps: range) -> None:
        for step in steps:
            writer.write(step, epoch=0.0, split="train", values={"loss": 3.14159 * step})

    with disks.mounted(tmp_path / "disk", kilobytes=64) as disk:
        with RunWriter(Workdir(disk / "run"), Log(), resume_step=0, retry_on_error=True) as writer:
            write(range(1, 11))
            writer.flush()
            # Only parts of the last pages are left, so lines are cut.
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free))
            write(range(11, 201))
            with pytest.raises(WriteError, match=r"cannot write metrics: .*No space left"):
                writer.flush()
            assert 10 < len(read_metrics(disk / "run" / "metrics.jsonl")) < 200
            (disk / "other").unlink()
            write(range(201, 211))
        assert [line["step"] for line in _lines(disk / "run")] == list(range(1, 211))


class Rows:
    """A writer that records its rows, and fails on demand."""

    def __init__(self, fails: Callable[[str, int], bool] = lambda method, step: False) -> None:
        self.rows: list[tuple[int, float, str, dict[str, float]]] = []
        self.calls: list[str] = []
        self._fails = fails

    def _do(self, method: str, step: int = 0) -> None:
        if self._fails(method, step):
            raise ValueError("service unavailable")
        self.calls.append(method)

    def resume(self, resume_step: int) -> None:
        self._do(f"resume {resume_step}")

    def write(self, step: int, epoch: float, split: str, values: dict[str, float]) -> None:
        self._do("write", step)
        self.rows.append((step, epoch, split, dict(values)))
        values.clear()

    def flush(self) -> None:
        self._do("flush")

    def close(self) -> None:
        self._do("close")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Log]:
    """Registers a writer for one test, and returns settings that use it."""
    monkeypatch.setattr(registry.WRITERS, "_parts", dict(registry.WRITERS._parts))

    def register(build: Callable[[Log, Workdir], Any], **options: Any) -> Log:
        registry.WRITERS.names()
        registry.register_writer("mine", options=options)(build)
        return Log(writers=("mine", "tensorboard"), options={"project": "x"} if options else {})

    return register


def test_custom_writer_gets_every_row(
    registered: Callable[..., Log], tmp_path: pathlib.Path
) -> None:
    rows, given = Rows(), list[Any]()

    def mine(settings: Log, workdir: Workdir) -> Rows:
        given.extend([settings.options, workdir.path])
        return rows

    settings = registered(mine, project="p", token="t")
    with RunWriter(Workdir(tmp_path), settings, resume_step=6) as writer:
        values: dict[str, Any] = {"loss": jnp.float32(0.5), "top1": float("nan")}
        writer.write(np.int64(7), epoch=0.7, split="train", values=values)
        writer.write(7, epoch=0.7, split="validation", values={"count": 10})
        writer.flush()
    assert given == [{"project": "x", "token": "t"}, tmp_path]
    assert rows.calls == ["resume 6", "write", "write", "flush", "flush", "close"]
    (one, other) = rows.rows
    assert one[:3] == (7, 0.7, "train") and one[3]["loss"] == 0.5 and math.isnan(one[3]["top1"])
    assert [type(value) for value in one[3].values()] == [float, float]
    assert list(other) == [7, 0.7, "validation", {"count": 10}]
    assert list((tmp_path / "tensorboard").iterdir())


def test_writers_get_separate_copies_of_a_row(
    registered: Callable[..., Log], tmp_path: pathlib.Path
) -> None:
    rows = Rows()
    settings = registered(lambda settings, workdir: rows)
    settings = dataclasses.replace(settings, writers=("mine", "mine"))
    with RunWriter(Workdir(tmp_path), settings, resume_step=0) as writer:
        writer.write(1, epoch=0.1, split="train", values={"loss": 1.0})
    assert rows.rows == [(1, 0.1, "train", {"loss": 1.0})] * 2


def test_metrics_jsonl_is_written_without_other_writers(tmp_path: pathlib.Path) -> None:
    with RunWriter(Workdir(tmp_path), Log(writers=()), resume_step=0) as writer:
        writer.write(1, epoch=0.1, split="train", values={"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_the_lead_process_opens_writers(
    registered: Callable[..., Log], tmp_path: pathlib.Path
) -> None:
    settings = registered(lambda settings, workdir: pytest.fail("opened"))
    with RunWriter(Workdir(tmp_path), settings, resume_step=0, is_lead=False) as writer:
        writer.write(1, epoch=0.1, split="train", values={"loss": 1.0})


def test_failing_writer_is_named(registered: Callable[..., Log], tmp_path: pathlib.Path) -> None:
    rows = Rows(lambda method, step: method == "write" and step == 2)
    settings = registered(lambda settings, workdir: rows)
    with (
        pytest.raises(WriteError, match="writer 'mine'"),
        RunWriter(Workdir(tmp_path), settings, resume_step=0) as writer,
    ):
        writer.write(1, epoch=0.1, split="train", values={"loss": 1.0})
        expected = (
            r"writer 'mine': cannot write the train row of step 2: ValueError: service "
            r"unavailable \(.*test_writers\.py, line \d+\)\. .*config\.log\.writers"
        )
        with pytest.raises(WriteError, match=expected):
            writer.write(2, epoch=0.2, split="train", values={"loss": 2.0})
    # The other writers have all rows and are closed.
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2]
    assert rows.calls[-1] == "close"


def test_retrying_run_survives_a_temporary_writer_failure(
    registered: Callable[..., Log], tmp_path: pathlib.Path
) -> None:
    is_down, logged = [True], list[str]()
    rows = Rows(lambda method, step: is_down[0] and method == "write")
    settings = registered(lambda settings, workdir: rows)
    with RunWriter(
        Workdir(tmp_path), settings, resume_step=0, retry_on_error=True, log=logged.append
    ) as writer:
        for step in (1, 2):
            writer.write(step, epoch=0.1, split="train", values={"loss": 1.0})
        assert not logged
        # No error: a checkpoint only waits for metrics.jsonl.
        writer.flush()
        assert "'mine': cannot write the train row of step 1: ValueError" in logged.pop()
        assert not logged
        is_down[0] = False
        writer.write(3, epoch=0.1, split="train", values={"loss": 1.0})
    assert not logged
    assert [row[0] for row in rows.rows] == [1, 2, 3]
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_retrying_run_survives_a_permanent_writer_failure(
    registered: Callable[..., Log], tmp_path: pathlib.Path
) -> None:
    logged: list[str] = []
    settings = registered(lambda settings, workdir: Rows(lambda method, step: method != "resume 0"))
    with RunWriter(
        Workdir(tmp_path), settings, resume_step=0, retry_on_error=True, log=logged.append
    ) as writer:
        writer.write(1, epoch=0.1, split="train", values={"loss": 1.0})
    assert ["cannot write" in logged[0], "cannot close" in logged[1], len(logged)] == [
        True,
        True,
        2,
    ]
    assert "on_write_error = 'continue'" in logged[0]
    assert [line["step"] for line in _lines(tmp_path)] == [1]


def test_writer_that_cannot_be_opened_is_named(
    registered: Callable[..., Log], tmp_path: pathlib.Path
) -> None:
    def mine(settings: Log) -> Rows:
        return Rows()

    settings = registered(mine)
    with pytest.raises(
        WriteError, match=r"writer 'mine': cannot open: TypeError: .*1 pos"
    ) as raised:
        RunWriter(Workdir(tmp_path), settings, resume_step=0, retry_on_error=True)
    assert "on_write_error" not in str(raised.value), "it would not help"


def test_writer_that_cannot_be_resumed_is_not_closed(
    registered: Callable[..., Log], tmp_path: pathlib.Path
) -> None:
    """So that the message is about the first error."""
    settings = registered(lambda settings, workdir: Rows(lambda method, step: True))
    with pytest.raises(WriteError, match="writer 'mine': cannot open: ValueError: service unav"):
        RunWriter(Workdir(tmp_path), settings, resume_step=0)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, r"returned None without write\(\), flush\(\), close\(\); return an object "),
        (types.SimpleNamespace(write=print), r"returned .* without flush\(\), close\(\); "),
    ],
)
def test_object_without_writer_methods_is_rejected(
    registered: Callable[..., Log], tmp_path: pathlib.Path, returned: Any, words: str
) -> None:
    settings = registered(lambda settings, workdir: returned)
    place = r"writer 'mine' \(.*test_writers\.py, line \d+\): "
    with pytest.raises(ConfigError, match=place + words):
        RunWriter(Workdir(tmp_path), settings, resume_step=0)


def test_unknown_writer_or_option_is_a_config_error(
    registered: Callable[..., Log],
) -> None:
    settings = registered(lambda settings, workdir: Rows(), project="p")
    validate(Config(log=settings))
    with pytest.raises(ConfigError, match=r"config\.log\.writers = .*Did you mean tensorboard"):
        validate(Config(log=Log(writers=("tensorbord",))))
    with pytest.raises(ConfigError, match=r"log\.options\.projet: .*Did you mean project"):
        validate(Config(log=dataclasses.replace(settings, options={"projet": "x"})))


def test_registered_class_has_its_definition_place() -> None:
    registry.register_writer("a class")(Rows)
    try:
        part = registry.WRITERS.get("a class")
        assert part.file == __file__ and part.line > 1 and not part.is_builtin
    finally:
        del registry.WRITERS._parts["a class"]


def test_event_files_stay_ordered_if_the_clock_is_set_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    for now in (5_000, 4_000, 4_000, 6_000):
        monkeypatch.setattr(time, "time_ns", lambda now=now: now)
        RunWriter(Workdir(tmp_path), Log(), resume_step=0).close()
        names += {path.name for path in (tmp_path / "tensorboard").iterdir()} - {*names}
    assert [int(name.rpartition(".")[2]) for name in names] == [5_000, 5_001, 5_002, 6_000]


def test_workdir_that_is_a_file_is_a_user_error(tmp_path: pathlib.Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        RunWriter(Workdir(tmp_path / "run"), Log(), resume_step=0)


@pytest.fixture(params=["auto", "false"])
def tensorboard(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[str]:
    """Runs TensorBoard on `tmp_path` with each of its two loaders; yields its address."""
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
    """Waits until TensorBoard has read the last step, and returns the curve's (step, value)."""
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
    # A new run in the same workdir hides the old one.
    _run(tmp_path, resume=0, last=50, loss=3.0)
    expected = [(step, 3.0) for step in range(1, 51)]
    assert _curve(tensorboard, "train/loss", last_step=50) == expected
