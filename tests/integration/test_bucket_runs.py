"""Runs whose workdir is in a bucket, from start to end."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import inception_jax as ij
from benchmarks import fault_injection, killable_run
from inception_jax import experiment, session
from inception_jax.config import Bucket, Checkpoint, Config, Evaluation, Log, Train
from inception_jax.errors import CheckpointError, Preempted, RunError, UserError, WriteError
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.reporting import report
from inception_jax.storage import buckets, integrity, lock, mirror, paths
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import NONDETERMINISTIC_FIELDS
from inception_jax.training import workdir as workdirs
from inception_jax.training.run import Run
from tests import command, run_folders, small
from tests.gcs import Call, Proxy, Status
from tests.integration.test_hosts import free_port

if TYPE_CHECKING:
    from etils import epath

STEPS = 12


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(mirror, "_PAUSE_SECONDS", 0.01)
    yield
    buckets.set_retry_seconds(Bucket().retry_seconds)


@pytest.fixture
def location(bucket: str) -> "epath.Path":
    path = paths.user_path(f"{bucket}/runs/a", "--workdir")
    assert not paths.is_local(path)
    return path


def settings(directory: pathlib.Path, *, on_write_error: str = "stop") -> Config:
    return small.config(
        directory,
        train=Train(batch_size=64, duration=f"{STEPS} steps"),
        evaluation=Evaluation(batch_size=360, every="6 steps"),
        checkpoint=Checkpoint(every="3 steps", keep_last=20, on_write_error=on_write_error),
        log=Log(every="1 step"),
        bucket=Bucket(retry_seconds=0.5),
    )


@pytest.fixture(scope="module")
def run(data_directory: pathlib.Path) -> Run:
    this = small.build(settings(data_directory))
    return dataclasses.replace(this, model=small.Linear())


@pytest.fixture(scope="module")
def evaluator(run: Run) -> Evaluator:
    return Evaluator(run)


@pytest.fixture(scope="module")
def expected(
    run: Run, evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """Metrics and state of the same run in a local folder."""
    workdir = Workdir(tmp_path_factory.mktemp("local"))
    train(run, workdir, evaluator, reports=False)
    return rows(workdir.metrics.read_bytes()), arrays(run, workdir)


def train(
    this: Run, workdir: Workdir, evaluate: Any, *, reports: bool = True, **more: Any
) -> dict[str, Any]:
    """Trains in a workdir as the command does; maybe without its reports and plots."""
    buckets.set_retry_seconds(this.config.bucket.retry_seconds)
    workdir.download()

    def publish(result: dict[str, Any], evaluated: Any) -> None:
        report.publish(workdir, result, evaluated.predictions, this.dataset.evaluation)

    if reports:
        more["on_evaluation"] = publish
        more["on_end"] = lambda: report.finish(workdir, lambda line: None)
    return small.train(this, workdir, evaluate, **more)


def rows(data: bytes) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl without measurements."""
    lines = [json.loads(line) for line in data.splitlines()]
    return [{n: row[n] for n in row if n not in NONDETERMINISTIC_FIELDS} for row in lines]


def arrays(this: Run, workdir: Workdir) -> dict[str, bytes]:
    """Returns the state in the last checkpoint."""
    return killable_run.saved_arrays(this, workdir)


def stored_rows(location: "epath.Path") -> list[dict[str, Any]]:
    return rows(buckets.read_bytes(location / "metrics.jsonl"))


def small_files(location: "epath.Path") -> dict[str, buckets.Stat]:
    """Returns the objects of a run except its checkpoints and lock."""
    listed = buckets.list_files(location)
    return {n: listed[n] for n in listed if not n.startswith(("checkpoints/", "run.lock"))}


def check_equal(
    this: Run,
    location: "epath.Path",
    expected: tuple[list[dict[str, Any]], dict[str, bytes]],
) -> None:
    assert stored_rows(location) == expected[0]
    assert arrays(this, Workdir(location)) == expected[1]


def test_run_in_a_bucket_equals_a_local_one(
    run: Run,
    evaluator: Evaluator,
    expected: tuple[list[dict[str, Any]], dict[str, bytes]],
    location: "epath.Path",
    gcs: Proxy,
) -> None:
    result = train(run, Workdir(location), evaluator)
    check_equal(run, location, expected)
    stored = set(small_files(location))
    assert stored >= {"config.json", "metrics.jsonl", "report.html", "predictions.npz"}
    assert stored >= {"diagnosis.json", "result.json", "plots/loss.png"}
    assert any(name.startswith("tensorboard/events") for name in stored)
    assert json.loads(buckets.read_bytes(location / "result.json")) == result
    # Its appearance means that the run is complete.
    written = [name.partition("/runs/a/")[2] or name for r in gcs.find("write") for name in r.names]
    small_writes = [n for n in written if "checkpoints/" not in n and "run.lock" not in n]
    assert small_writes[-1].endswith("result.json")
    assert sum(name.endswith("result.json") for name in small_writes) == 1


def test_stopped_run_resumes_on_an_empty_machine(
    run: Run,
    evaluator: Evaluator,
    expected: tuple[list[dict[str, Any]], dict[str, bytes]],
    location: "epath.Path",
) -> None:
    for step in (4, 9):
        first = Workdir(location)
        with pytest.raises(Preempted, match="the state is saved"):
            train(run, first, evaluator, reports=False, stop=lambda done, step=step: done == step)
        assert stored_rows(location)[-1]["step"] == step
        shutil.rmtree(first.path)
    train(run, Workdir(location), evaluator, reports=False)
    check_equal(run, location, expected)
    events = [name for name in small_files(location) if name.startswith("tensorboard/")]
    assert len(events) == 3


def test_rows_after_the_checkpoint_are_removed_at_a_resume(
    run: Run,
    evaluator: Evaluator,
    expected: tuple[list[dict[str, Any]], dict[str, bytes]],
    location: "epath.Path",
) -> None:
    def fail(step: int) -> bool:
        if step == 11:
            raise ZeroDivisionError
        return False

    with pytest.raises(ZeroDivisionError):
        train(run, Workdir(location), evaluator, reports=False, stop=fail)
    # Even those that no checkpoint needed, for the curves of a run that failed.
    assert stored_rows(location)[-1]["step"] == 10
    assert integrity.list_steps(location / "checkpoints")[-1] == 9
    train(run, Workdir(location), evaluator, reports=False)
    check_equal(run, location, expected)


def test_bucket_has_all_metrics_before_a_checkpoint_counts(
    run: Run, evaluator: Evaluator, location: "epath.Path", gcs: Proxy
) -> None:
    seen: dict[int, tuple[int, int]] = {}

    def look() -> None:
        files = buckets.list_files(location)
        events = sum(files[name].size for name in files if name.startswith("tensorboard/"))
        for step in integrity.list_steps(location / "checkpoints"):
            seen.setdefault(step, (stored_rows(location)[-1]["step"], events))

    # Also of the parts of a checkpoint, before and after the whole one counts.
    gcs.inject(Call(look, answered=True), operation="write", name="*/[0-9]*/commit_success.txt")
    train(run, Workdir(location), evaluator, reports=False)
    assert sorted(seen) == [3, 6, 9, 12]
    for step, (metrics, events) in seen.items():
        assert metrics >= step and events > 60 * step


@contextlib.contextmanager
def fault_until_step(gcs: Proxy, name: str, last: int) -> Iterator[Callable[[int], bool]]:
    """Fails all writes of some objects until a step; yields a function for `stop`."""
    gcs.inject(Status(503), operation="write", name=name)

    def repair(step: int) -> bool:
        if step == last:
            gcs.clear()
        return False

    yield repair


# Retried uploads of events last longer than all steps: only saves wait for them.
@pytest.mark.parametrize(
    "name",
    [
        "*/metrics.jsonl",
        pytest.param("*/tensorboard/*", marks=pytest.mark.slow),
        pytest.param("*/checkpoints/3/*", marks=pytest.mark.slow),
    ],
)
def test_training_stops_with_one_message_if_a_save_fails(
    name: str,
    run: Run,
    evaluator: Evaluator,
    expected: tuple[list[dict[str, Any]], dict[str, bytes]],
    location: "epath.Path",
    gcs: Proxy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    gcs.inject(Status(503), operation="write", name=name)
    before = set(temporary_folders())
    with pytest.raises(WriteError, match=r"did not answer within 0\.5 s") as caught:
        train(run, Workdir(location), evaluator, reports=False)
    assert str(location) in str(caught.value)
    assert integrity.list_steps(location / "checkpoints") == []
    gcs.clear()
    if "checkpoints" not in name:
        # What was not uploaded is kept, and its path shown.
        (kept,) = set(temporary_folders()) - before
        assert f"they are in {kept}/a" in capsys.readouterr().err
        assert rows((kept / "a" / "metrics.jsonl").read_bytes())[0] == expected[0][0]
        shutil.rmtree(kept)
    train(run, Workdir(location), evaluator, reports=False)
    check_equal(run, location, expected)


@pytest.mark.parametrize(
    "name", ["*/checkpoints/[36]/*", pytest.param("*/metrics.jsonl", marks=pytest.mark.slow)]
)
def test_training_continues_after_a_failed_save_if_so_configured(
    name: str,
    run: Run,
    evaluator: Evaluator,
    expected: tuple[list[dict[str, Any]], dict[str, bytes]],
    location: "epath.Path",
    gcs: Proxy,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = settings(pathlib.Path(run.config.data.directory), on_write_error="continue")
    patient = dataclasses.replace(run, config=config)
    with fault_until_step(gcs, name, 8) as repair:
        train(patient, Workdir(location), evaluator, reports=False, stop=repair)
    check_equal(run, location, expected)
    messages = capsys.readouterr().err
    assert "Training continues (config.checkpoint.on_write_error = 'continue')" in messages
    assert 12 in integrity.list_steps(location / "checkpoints")


def test_outage_between_saves_is_logged_once(
    location: "epath.Path", gcs: Proxy, capsys: pytest.CaptureFixture[str]
) -> None:
    buckets.set_retry_seconds(0)
    logged: list[str] = []
    workdir = Workdir(location)
    rule = gcs.inject(Status(503), operation="write", name="*/metrics.jsonl")

    def wait_until(is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not is_true():
            assert time.monotonic() < deadline
            workdir.upload_soon()
            time.sleep(0.01)

    with workdir.uploading(lambda: None, logged.append):
        workdir.metrics.write_text("1\n")
        wait_until(lambda: rule.applied >= 3)
        assert len(logged) == 1
        assert f"{location}/metrics.jsonl: Google Cloud Storage did not answer" in logged[0]
        assert "Training continues" in logged[0]
        gcs.clear()
        wait_until(lambda: len(logged) == 2)
        assert buckets.read_bytes(location / "metrics.jsonl") == b"1\n"
    assert logged[1:] == [f"{location}: reachable again; all files are uploaded"]


def temporary_folders() -> list[pathlib.Path]:
    return list(pathlib.Path(tempfile.gettempdir()).glob(f"{mirror._PREFIX}*"))


def test_failure_of_the_last_upload_names_the_kept_files(
    run: Run, evaluator: Evaluator, location: "epath.Path", gcs: Proxy
) -> None:
    gcs.inject(Status(503), operation="write", name="*/result.json")
    workdir = Workdir(location)
    with pytest.raises(WriteError) as caught:
        train(run, workdir, evaluator)
    message = str(caught.value)
    assert message.startswith(f"{location}/result.json: Google Cloud Storage did not answer")
    assert f"not uploaded; they are in {workdir.path}" in message
    # The folder outlives its process, and later starts.
    path = workdir.path
    del workdir, caught
    Workdir(location)
    assert json.loads((path / "result.json").read_text())["step"] == STEPS
    shutil.rmtree(path.parent)
    gcs.clear()
    # Nothing is left to train; the results are written again.
    assert train(run, Workdir(location), evaluator)["step"] == STEPS
    assert "result.json" in small_files(location)


def test_process_that_lost_its_lock_writes_nothing_more(
    run: Run, evaluator: Evaluator, location: "epath.Path", monkeypatch: pytest.MonkeyPatch
) -> None:
    is_lost = False

    def check() -> None:
        if is_lost:
            raise RunError("another process took over")

    @contextlib.contextmanager
    def lock_workdir(*arguments: Any) -> Iterator[Callable[[], None]]:
        yield check

    workdir = Workdir(location)
    before: dict[str, buckets.Stat] = {}

    def lose(step: int) -> bool:
        nonlocal is_lost
        if step == 8:
            while 6 not in integrity.list_steps(location / "checkpoints"):
                time.sleep(0.01)
            workdir.upload()
            before.update(buckets.list_files(location))
            is_lost = True
        return False

    monkeypatch.setattr(lock, "lock_workdir", lock_workdir)
    with pytest.raises(RunError, match="took over"):
        train(run, workdir, evaluator, stop=lose)
    assert before and buckets.list_files(location) == before


def test_start_that_missed_another_one_is_refused(
    run: Run, evaluator: Evaluator, location: "epath.Path"
) -> None:
    workdir = Workdir(location)
    before = workdirs.load_previous_run(workdir)
    train(run, Workdir(location), evaluator, reports=False)
    stored = small_files(location)
    with pytest.raises(CheckpointError, match="another process has trained in this folder"):
        session.train_run(run, before, evaluator)
    assert small_files(location) == stored


@pytest.mark.parametrize("problem", ["missing", "read-only"])
def test_unusable_bucket_is_refused_with_a_remedy(
    problem: str, data_directory: pathlib.Path, location: "epath.Path", gcs: Proxy
) -> None:
    words = "permission denied; grant roles/storage.objectUser"
    if problem == "missing":
        path, words = "gs://no-such-bucket/a", "bucket not found; correct its name"
    else:
        path = str(location)
        gcs.make_read_only()
    with pytest.raises(UserError, match=f"^--workdir={path}.*: {words}"):
        ij.train(settings(data_directory), path)
    assert not buckets.list_files(location)


@pytest.mark.slow
def test_whole_run_in_python_and_its_evaluation(
    run: Run, location: "epath.Path", capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(pathlib.Path(run.config.data.directory))
    config.train.duration = "4 steps"
    result = ij.train(config, str(location))
    assert f"report: {location}/report.html" in capsys.readouterr().err
    assert not pathlib.Path("gs:").exists()
    # Its settings can be used from there.
    name = f"{location}/config.json"
    assert (
        experiment.load(name, "--config=") == workdirs.require_record(downloaded(location)).config
    )
    origin = session.Origin({"file": name, "own": {}})
    before = small_files(location)
    evaluated = session.evaluate_checkpoint(
        experiment.load(name),
        location,
        "best",
        origin=origin,
        join=lambda config: lambda step: False,
    )
    assert evaluated["checkpoint"] == "best and last" and evaluated["loss"] == result["loss"]
    assert small_files(location) == before
    # A finished run is not trained again.
    assert ij.train(config, str(location))["step"] == 4


def downloaded(location: "epath.Path") -> Workdir:
    workdir = Workdir(location)
    workdir.download()
    return workdir


def test_second_process_cannot_use_the_run_of_another_network(
    run: Run, evaluator: Evaluator, location: "epath.Path"
) -> None:
    train(run, Workdir(location), evaluator, reports=False)
    stored = buckets.list_files(location)
    other = settings(pathlib.Path(run.config.data.directory))
    other.model.width = 0.25
    with pytest.raises(CheckpointError, match=f"^--workdir={location}: belongs to another run"):
        ij.train(other, str(location))
    assert buckets.list_files(location) == stored


@pytest.mark.slow
def test_killed_run_in_a_bucket_ends_bit_identical(
    location: "epath.Path", tmp_path: pathlib.Path
) -> None:
    campaign = fault_injection.Campaign(tmp_path, steps=STEPS, seed=1, runs=location)
    results = fault_injection.kill(campaign, 3)
    assert results["kills"] == 3 and results["lines"] == 14 and results["arrays"] > 100


@pytest.fixture
def made_up(location: "epath.Path", tmp_path: pathlib.Path) -> "epath.Path":
    """A finished run without checkpoints."""
    folder = run_folders.write(tmp_path / "made_up")
    for path in folder.iterdir():
        buckets.write_bytes(location / path.name, path.read_bytes())
    return location


def test_reports_and_plots_are_written_to_the_bucket(
    made_up: "epath.Path", tmp_path: pathlib.Path
) -> None:
    before = small_files(made_up)
    assert report.write_page(made_up) == made_up / "report.html"
    written = report.plot(made_up)
    assert made_up / "plots" / "loss.png" in written
    assert report.write_diagnosis(made_up).lines()
    after = small_files(made_up)
    assert set(after) - set(before) == {
        "report.html",
        "diagnosis.json",
        *(f"plots/{path.name}" for path in written),
    }
    assert {name: after[name] for name in before} == before
    assert buckets.read_bytes(made_up / "plots" / "loss.png").startswith(b"\x89PNG")
    page = report.write_page(made_up, tmp_path / "page.html")
    assert page == tmp_path / "page.html" and page.read_text().startswith("<!doctype html>")


def test_runs_in_a_bucket_and_on_disk_are_compared(
    made_up: "epath.Path", tmp_path: pathlib.Path
) -> None:
    local = run_folders.write(tmp_path / "runs" / "b", skill=0.5)
    for place in (made_up, local):
        report.write_page(place)
    page = report.write_comparison([made_up, local], tmp_path / "both.html")
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert page == tmp_path / "both.html"
    browser = "https://storage.cloud.google.com/" + str(made_up).removeprefix("gs://")
    assert f'href="{browser}/report.html"' in text and 'href="runs/b/report.html"' in text
    remote = made_up.parent / "both.html"
    report.write_comparison([made_up, local], remote)
    text = buckets.read_bytes(remote).decode()
    assert 'href="a/report.html"' in text and "runs/b/report.html" not in text
    with pytest.raises(UserError, match="is the report of one of the compared runs"):
        report.write_comparison([made_up, local], made_up / "report.html")
    plots = report.plot_comparison([made_up, local], made_up.parent / "plots")
    assert made_up.parent / "plots" / "loss.png" in plots
    assert buckets.list_files(made_up.parent / "plots").keys() == {path.name for path in plots}


def test_reports_name_the_bucket_in_errors(location: "epath.Path") -> None:
    with pytest.raises(UserError, match=f"^{location}: not a run with metrics"):
        report.write_page(location)
    buckets.write_bytes(location / "metrics.jsonl", b"x\n")
    with pytest.raises(UserError, match=rf"^{location}/metrics\.jsonl, line 1: "):
        report.plot(location)
    buckets.write_bytes(location / "config.json", b"x")
    with pytest.raises(UserError, match=rf"^{location}/config\.json: not a valid record"):
        report.write_diagnosis(location)


def test_tensorboard_shows_a_run_in_a_bucket(
    run: Run, evaluator: Evaluator, location: "epath.Path", tmp_path: pathlib.Path
) -> None:
    with pytest.raises(Preempted):
        train(run, Workdir(location), evaluator, reports=False, stop=lambda step: step == 5)
    train(run, Workdir(location), evaluator, reports=False)
    logdir, port = f"{location}/tensorboard", free_port()
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tensorboard.main",
                f"--logdir={logdir}",
                f"--port={port}",
                "--load_fast=false",
                "--reload_interval=1",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=.&tag=train/loss"
        shown = _ask(url, lambda: server.poll() is None)
    finally:
        server.kill()
        server.wait()
    curve = [(row["step"], row["loss"]) for row in stored_rows(location) if row["split"] == "train"]
    assert [step for _, step, _ in shown] == [step for step, _ in curve]
    np.testing.assert_allclose([value for *_, value in shown], [loss for _, loss in curve], 1e-6)


def _ask(url: str, is_running: Callable[[], bool]) -> list[list[Any]]:
    """Returns TensorBoard's answer, once it has read all events."""
    deadline = time.monotonic() + command.TIMEOUT
    while True:
        assert is_running() and time.monotonic() < deadline
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
            points: list[list[Any]] = json.load(response)
            if len(points) == STEPS:
                return points
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("s3://b/run", "is a URL (s3:)"),
        ("http://b/run", "is a URL (http:)"),
        ("gs:/b/run", "must be written as gs://b/run"),
    ],
)
def test_other_places_are_refused_before_anything_is_written(typed: str, words: str) -> None:
    before = set(command.ROOT.iterdir())
    done = command.run("main", "--config=experiments/digits.py", f"--workdir={typed}")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"error: --workdir={typed}: {words}")
    assert done.stderr.count("\n") == 1 and set(command.ROOT.iterdir()) == before


WITHOUT_GCSFS = """
import runpy, sys
sys.modules["gcsfs"] = None
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


def test_missing_libraries_are_named_before_anything_is_written() -> None:
    arguments = ["inception_jax.main", "--config=experiments/digits.py", "--workdir=gs://bkt/run"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_GCSFS, *arguments],
        capture_output=True,
        text=True,
        cwd=command.ROOT,
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'inception-jax[gcs]'" in done.stderr and "Traceback" not in done.stderr


def start_host(
    index: int, count: int, port: int, top: pathlib.Path, bucket: str, steps: int
) -> subprocess.Popen[str]:
    """Starts one of several processes with 4 devices each, none of which share a folder."""
    host = top / f"host-{index}-{count}"
    (host / "tmp").mkdir(parents=True, exist_ok=True)
    processes = [
        f"--coordinator_address=127.0.0.1:{port}",
        f"--process_count={count}",
        f"--process_index={index}",
    ]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "inception_jax.main",
            *killable_run.FLAGS,
            f"--config.train.duration={steps} steps",
            f"--config.data.directory={bucket}/data",
            f"--workdir={bucket}/run",
            *(processes if count > 1 else []),
        ],
        cwd=command.ROOT,
        env={name: each for name, each in os.environ.items() if "CACHE" not in name}
        | {"HOME": str(host), "TMPDIR": str(host / "tmp"), "JAX_NUM_CPU_DEVICES": "4"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_hosts_without_a_shared_disk_train_and_one_of_them_resumes(
    bucket: str, tmp_path: pathlib.Path
) -> None:
    location = paths.user_path(f"{bucket}/run", "--workdir")
    assert not paths.is_local(location)
    port = free_port()
    hosts = [start_host(index, 2, port, tmp_path, bucket, 1_000_000) for index in range(2)]
    try:
        deadline = time.monotonic() + command.TIMEOUT
        while len(integrity.list_steps(location / "checkpoints")) < 2:
            failed = [host for host in hosts if host.poll() is not None]
            assert not failed, failed[0].communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        hosts[1].kill()
        hosts[0].communicate(timeout=command.TIMEOUT)  # JAX ends it once the other one is dead.
    finally:
        for host in hosts:
            host.kill()
            host.communicate()
    saved = max(integrity.list_steps(location / "checkpoints"))
    assert stored_rows(location)[-1]["step"] >= saved
    alone = command.finish(start_host(2, 1, 0, tmp_path, bucket, saved + 4))
    assert alone.returncode == 0, alone.stderr
    assert f"resumed at step {saved:,}" in alone.stderr
    trained = [row["step"] for row in stored_rows(location) if row["split"] == "train"]
    assert trained == list(range(1, saved + 5))
    assert all(math.isfinite(row["loss"]) for row in stored_rows(location))
    done = command.run("main", f"--workdir={location}", "--mode=eval", devices=4)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] in integrity.list_steps(location / "checkpoints")
