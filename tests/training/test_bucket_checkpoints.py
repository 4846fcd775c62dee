"""Checkpoints in a bucket keep the promises of those on disk, though its server fails."""

import contextlib
import gc
import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pytest

from inception_jax.errors import CheckpointError, RunError, WriteError
from inception_jax.inference import load
from inception_jax.storage import buckets, integrity, paths
from inception_jax.storage.workdir import Workdir
from inception_jax.training.checkpoints import Checkpoints
from tests import command
from tests.gcs import Call, CutRequest, CutResponse, FlipBit, Proxy, Status
from tests.saved import check_restores, save, state

if TYPE_CHECKING:
    from etils import epath

# Orbax and TensorStore leave coroutines that never ran, which are reported on garbage collection.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = {2: 50.0, 4: 90.0, 6: 80.0}
FIXTURE = command.ROOT / "tests" / "fixtures" / "56edb8b"


@pytest.fixture(autouse=True)
def short_retries() -> Iterator[None]:
    # The pauses between them stay at a second. With 0.05 s, one of 12 runs of the tests of failed
    # writes crashed during garbage collection, while TensorStore's threads were still busy.
    before = buckets.retry_seconds()
    buckets.set_retry_seconds(0.5)
    yield
    buckets.set_retry_seconds(before)


@pytest.fixture
def collected() -> Iterator[None]:
    """Collects unfinished tasks of failed reads while Python's reports about them are ignored."""
    yield
    gc.collect()


@pytest.fixture
def empty(bucket: str) -> "epath.Path":
    """A folder in a bucket without objects."""
    folder = paths.user_path(f"{bucket}/run/checkpoints", "test")
    assert not paths.is_local(folder)
    return folder


@pytest.fixture(scope="module")
def template(
    _gcs: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[pathlib.Path, dict[str, bytes]]:
    """A local folder with checkpoints, and the objects of the same ones in a bucket."""
    _gcs[0].create_bucket("template")
    remote = paths.user_path("gs://template/checkpoints", "test")
    local = tmp_path_factory.mktemp("run") / "checkpoints"
    for folder in (local, remote):
        with Checkpoints(folder, keep_last=9) as checkpoints:
            for step, top1 in STEPS.items():
                save(checkpoints, step, top1=top1)
    return local, contents(remote)


@pytest.fixture
def folder(template: tuple[pathlib.Path, dict[str, bytes]], empty: "epath.Path") -> "epath.Path":
    """A folder in a bucket with checkpoints of steps 2, 4 (the best) and 6, to be damaged."""
    for name, data in template[1].items():
        buckets.write_bytes(empty / name, data)
    return empty


def contents(folder: paths.Path) -> dict[str, bytes]:
    assert not paths.is_local(folder)
    return {name: buckets.read_bytes(folder / name) for name in buckets.list_files(folder)}


def of_step(files: dict[str, bytes], step: str) -> dict[str, bytes]:
    prefix = f"{step}/"
    return {n.removeprefix(prefix): data for n, data in files.items() if n.startswith(prefix)}


def names(folder: "epath.Path") -> set[str]:
    return {name.partition("/")[0] for name in buckets.list_files(folder)}


def largest(checkpoint: "epath.Path") -> "epath.Path":
    files = buckets.list_files(checkpoint)
    return checkpoint / max(files, key=lambda name: files[name].size)


def delete_object(checkpoint: "epath.Path") -> None:
    buckets.delete(largest(checkpoint))


def truncate(checkpoint: "epath.Path") -> None:
    path = largest(checkpoint)
    buckets.write_bytes(path, buckets.read_bytes(path)[:-100])


def overwrite(checkpoint: "epath.Path") -> None:
    path = largest(checkpoint)
    data = buckets.read_bytes(path)
    buckets.write_bytes(path, data[:99] + bytes([data[99] ^ 1]) + data[100:])


def break_metrics(checkpoint: "epath.Path") -> None:
    buckets.write_bytes(checkpoint / "metrics" / "metrics", b'{"top1": ')


def lose_manifest_and_item(checkpoint: "epath.Path") -> None:
    for name in buckets.list_files(checkpoint):
        if name == integrity.MANIFEST or name.startswith("training/"):
            buckets.delete(checkpoint / name)


DAMAGES = {
    delete_object: "is missing",
    truncate: "bytes instead of",
    overwrite: "has changed (MD5 mismatch)",
    break_metrics: "metrics/metrics has 9 bytes instead of",
    lose_manifest_and_item: "training is missing",
}
by_name = pytest.mark.parametrize(
    ("damage", "words"), DAMAGES.items(), ids=lambda case: getattr(case, "__name__", "")
)


# Saving and restoring.


def test_checkpoint_restores_like_local_one(
    template: tuple[pathlib.Path, dict[str, bytes]], folder: "epath.Path"
) -> None:
    local, _ = template
    with (
        Checkpoints(folder, read_only=True) as remote,
        Checkpoints(local, read_only=True) as reference,
    ):
        for which in ("best", "last", "2"):
            step = remote.resolve(which)
            assert step == reference.resolve(which)
            assert remote.roles(step) == reference.roles(step)
            assert remote.metrics(step) == reference.metrics(step)
            jax.tree.map(
                np.testing.assert_array_equal,
                remote.restore(step, state(0)),
                reference.restore(step, state(0)),
            )
        jax.tree.map(
            np.testing.assert_array_equal,
            remote.restore_model(4, state(0).model_item()),
            state(4).model_item(),
        )


def test_manifest_lists_what_the_service_stores(folder: "epath.Path") -> None:
    listed = json.loads(buckets.read_bytes(folder / "6" / integrity.MANIFEST))["files"]
    stored = buckets.list_files(folder / "6")
    unlisted = {integrity.MANIFEST, integrity.COMMITTED, "_CHECKPOINT_METADATA"}
    assert listed == {
        name: {"size": stat.size, "md5": stat.md5}
        for name, stat in stored.items()
        if name not in unlisted
    }


def test_verification_downloads_only_the_manifest(folder: "epath.Path", gcs: Proxy) -> None:
    gcs.requests.clear()
    assert integrity.find_corruption(folder / "6") == ""
    assert [request.operation for request in gcs.requests] == ["list", "read"]


def test_checkpoint_with_unknown_md5_is_read(
    folder: "epath.Path", monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of objects that were composed of several."""
    list_files = buckets.list_files

    def without_md5(folder: "epath.Path") -> dict[str, buckets.Stat]:
        return {name: stat._replace(md5="") for name, stat in list_files(folder).items()}

    monkeypatch.setattr(buckets, "list_files", without_md5)
    assert integrity.find_corruption(folder / "6") == ""
    overwrite(folder / "6")
    assert "MD5 mismatch" in integrity.find_corruption(folder / "6")


def put(local: pathlib.Path, folder: paths.Path) -> None:
    for path in filter(pathlib.Path.is_file, local.rglob("*")):
        buckets.write_bytes(folder / path.relative_to(local).as_posix(), path.read_bytes())


def test_checkpoints_are_valid_when_copied(
    template: tuple[pathlib.Path, dict[str, bytes]], empty: "epath.Path", tmp_path: pathlib.Path
) -> None:
    local, objects = template
    put(local, empty)
    copy = tmp_path / "checkpoints"
    for name, data in objects.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    folders: list[paths.Path] = [empty, copy]
    for each in folders:
        assert [integrity.find_corruption(each / str(step)) for step in STEPS] == ["", "", ""]
        with Checkpoints(each, keep_last=2) as checkpoints:
            check_restores(checkpoints, 6)
            save(checkpoints, 8)
        with Checkpoints(each, read_only=True) as checkpoints:
            check_restores(checkpoints, checkpoints.resolve("last"))
            assert checkpoints.resolve("best") == 4
    overwrite(empty / "6")
    assert "SHA-256 mismatch" in integrity.find_corruption(empty / "6")


def test_copied_checkpoint_that_arrives_damaged_is_read_again(
    template: tuple[pathlib.Path, dict[str, bytes]], empty: "epath.Path", gcs: Proxy
) -> None:
    buckets.set_retry_seconds(20)  # The first pause is random, up to a second.
    put(template[0], empty)
    rule = gcs.inject(FlipBit(20), operation="read", name="*/6/*ocdbt*", times=1)
    assert integrity.find_corruption(empty / "6") == "" and rule.applied == 1


def test_checkpoints_of_old_version_are_restored_from_bucket(empty: "epath.Path") -> None:
    workdir = Workdir(FIXTURE / "runs" / "digits")
    expected = load.from_checkpoint(workdir, "best", lambda line: None)
    local = FIXTURE / "runs" / "digits" / "checkpoints"
    put(local, empty)
    workdir.checkpoints = empty
    loaded = load.from_checkpoint(workdir, "best", lambda line: None)
    assert loaded.step == expected.step
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected.variables)


def test_newest_and_best_are_kept(empty: "epath.Path") -> None:
    with Checkpoints(empty, keep_last=2, keep_best=1) as checkpoints:
        for step, top1 in {1: 10.0, 2: 90.0, 3: 20.0, 4: 30.0, 5: 40.0}.items():
            save(checkpoints, step, top1=top1)
    assert names(empty) == {"2", "4", "5"}
    assert [integrity.find_corruption(empty / step) for step in names(empty)] == ["", "", ""]


def test_only_permissions_for_objects_are_needed(folder: "epath.Path", gcs: Proxy) -> None:
    gcs.inject(Status(403), operation="bucket")
    overwrite(folder / "6")
    buckets.delete(folder / "2" / integrity.COMMITTED)
    with Checkpoints(folder, log=lambda _: None) as checkpoints:
        save(checkpoints, 6)
        save(checkpoints, 8)
    assert integrity.list_steps(folder) == [4, 8]


def test_action_runs_before_checkpoint_counts(folder: "epath.Path") -> None:
    seen: list[list[int]] = []
    with Checkpoints(
        folder, keep_last=9, before_commit=lambda: seen.append(integrity.list_steps(folder))
    ) as checkpoints:
        save(checkpoints, 8)
    assert seen == [[2, 4, 6]]
    assert integrity.list_steps(folder) == [2, 4, 6, 8]


def test_checkpoint_does_not_count_if_action_fails(folder: "epath.Path") -> None:
    failures = iter([True])

    def fail_once() -> None:
        if next(failures, False):
            raise buckets.BucketError("gs://b/metrics.jsonl: permission denied")

    with Checkpoints(folder, before_commit=fail_once) as checkpoints:
        save(checkpoints, 8)
        with pytest.raises(WriteError, match=r"metrics\.jsonl: permission denied\. Earlier check"):
            checkpoints.wait()
        assert integrity.list_steps(folder) == [2, 4, 6]
        save(checkpoints, 8)
    assert integrity.list_steps(folder) == [4, 8]


# Damage.


# The others are recognized in the next test too.
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        pytest.param(damage, words, marks=() if "is missing" in words else pytest.mark.slow)
        for damage, words in DAMAGES.items()
    ],
)
def test_corrupt_checkpoint_is_set_aside_and_its_step_saved_again(
    folder: "epath.Path", damage: Callable[["epath.Path"], None], words: str
) -> None:
    damage(folder / "6")
    before = of_step(contents(folder), "6")
    lines: list[str] = []
    with Checkpoints(folder, keep_last=2, log=lines.append) as checkpoints:
        (line,) = lines
        assert line.startswith(f"{folder / '6'}: corrupt checkpoint: ")
        assert words in line and "6.damaged" in line and "of step 4" in line
        assert checkpoints.latest_step() == 4
        check_restores(checkpoints, 4)
        save(checkpoints, 6)
        checkpoints.wait()
        check_restores(checkpoints, 6)
        save(checkpoints, 8)
    assert of_step(contents(folder), "6.damaged") == before
    assert names(folder) == {"4", "6", "6.damaged", "8"}
    # And once more.
    damage(folder / "8")
    damage(folder / "6")
    with Checkpoints(folder, keep_last=2, log=lines.append) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert of_step(contents(folder), "6.damaged") == before
    assert names(folder) == {"4", "6.damaged", "6.damaged-2", "8.damaged"}


@by_name
def test_read_only_uses_previous_checkpoint_and_changes_nothing(
    folder: "epath.Path", damage: Callable[["epath.Path"], None], words: str, gcs: Proxy
) -> None:
    damage(folder / "4")
    damage(folder / "6")
    buckets.write_bytes(folder / "8" / "unfinished", b"")
    before = contents(folder)
    gcs.clear()
    gcs.make_read_only()
    lines: list[str] = []
    with Checkpoints(folder, read_only=True, log=lines.append) as checkpoints:
        assert checkpoints.resolve("last") == 2
        assert words in lines[0] and len(lines) == 2
        assert checkpoints.resolve("best") == 2
        with pytest.raises(CheckpointError, match=r"no intact checkpoint '6' found; .* 2, 4, 6"):
            checkpoints.resolve("6")
        check_restores(checkpoints, 2)
    assert contents(folder) == before
    assert gcs.find("write|delete") == []


def test_nothing_is_changed_without_an_intact_checkpoint(folder: "epath.Path") -> None:
    for step in STEPS:
        overwrite(folder / str(step))
    before = contents(folder)
    with pytest.raises(CheckpointError, match="no checkpoint is intact; nothing was changed"):
        Checkpoints(folder)
    assert contents(folder) == before


def test_interrupted_quarantine_is_completed(folder: "epath.Path", gcs: Proxy) -> None:
    """At any request: the damaged files are neither lost nor copied twice."""
    overwrite(folder / "6")
    before = of_step(contents(folder), "6")
    for done in itertools.count(0, 7):
        rule = gcs.inject(Status(403), operation="write|delete", skip=done)
        with contextlib.suppress(WriteError):
            integrity.quarantine_corrupt(folder, lambda line: None)
        gcs.clear()
        integrity.quarantine_corrupt(folder, lambda line: None)
        integrity.delete_unfinished(folder)
        assert of_step(contents(folder), "6.damaged") == before
        assert names(folder) == {"2", "4", "6.damaged"}
        if not rule.applied:
            break
        for name, data in before.items():
            buckets.delete(folder / "6.damaged" / name)
            buckets.write_bytes(folder / "6" / name, data)
    assert done > len(before)


# Kills.


def start_worker(folder: "epath.Path", steps: str, *arguments: str) -> subprocess.Popen:
    """Starts a process that saves steps; the first one is the best."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.checkpoint_worker", str(folder), steps, *arguments],
        cwd=command.ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "4" if arguments else "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


# Operation and name of a request, how many of them come first, and the steps after a kill there.
MOMENTS: dict[str, tuple[str, str, int, list[int]]] = {
    "first file": ("write", "*/8/_CHECKPOINT_METADATA", 0, [2, 4, 6]),
    "arrays": ("write", "*/8/*ocdbt*", 3, [2, 4, 6]),
    "merged arrays": ("write", "*/8/model/manifest.ocdbt", 0, [2, 4, 6]),
    "manifest": ("write", "*/8/manifest.json", 0, [2, 4, 6]),
    "commit": ("write", "*/8/commit_success.txt", 0, [2, 4, 6]),
    # Orbax also deletes a commit file before it writes it. The proxy still forwards this request.
    "deletion": ("delete", "*/4/commit_success.txt", 1, [2, 6, 8]),
    "deletion of other files": ("delete", "*/4/*ocdbt*", 1, [2, 6, 8]),
}
QUICK = ("commit", "deletion of other files")


@pytest.mark.parametrize(
    "moment",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MOMENTS],
)
def test_killed_process_leaves_whole_checkpoints(
    moment: str, empty: "epath.Path", gcs: Proxy
) -> None:
    operation, name, skip, steps = MOMENTS[moment]
    worker = start_worker(empty, "2,4,6,8")

    def kill() -> None:
        worker.kill()
        worker.wait()
        # Nothing that the process has sent is still on its way.
        gcs.inject(CutRequest())

    gcs.inject(Call(kill), operation=operation, name=name, skip=skip, times=1)
    done = command.finish(worker)
    assert done.returncode == -signal.SIGKILL, done.stderr
    gcs.clear()
    # The proxy may still be forwarding the request at which it has killed the process.
    for _ in range(100):
        if integrity.list_steps(empty) == steps:
            break
        time.sleep(0.1)
    assert integrity.list_steps(empty) == steps
    assert [integrity.find_corruption(empty / str(step)) for step in steps] == [""] * len(steps)
    check_continues(empty, steps)


def check_continues(folder: "epath.Path", steps: list[int]) -> None:
    """Restores the newest checkpoint of a killed process, and saves the next."""
    with Checkpoints(folder, keep_last=2) as checkpoints:
        check_restores(checkpoints, steps[-1])
        save(checkpoints, 8 if steps[-1] < 8 else 10, top1=1)
    left = integrity.list_steps(folder)
    assert len(left) == 3 and left[:2] == [2, steps[-1]]
    assert names(folder) == set(map(str, left))


@pytest.mark.parametrize(
    "count",
    [60, 180, *(pytest.param(count, marks=pytest.mark.slow) for count in range(0, 300, 25))],
)
def test_connection_lost_at_any_moment_leaves_whole_checkpoints(
    count: int, folder: "epath.Path", gcs: Proxy
) -> None:
    """As a kill, seen from the bucket; and in the process that survives it."""
    with contextlib.suppress(WriteError), Checkpoints(folder, keep_last=2) as checkpoints:
        gcs.inject(CutRequest(), skip=count)
        save(checkpoints, 8)
        checkpoints.wait()
    gcs.clear()
    steps = integrity.list_steps(folder)
    assert steps in ([2, 4, 6], [2, 4, 6, 8], [4, 6, 8])
    assert [integrity.find_corruption(folder / str(step)) for step in steps] == [""] * len(steps)
    with Checkpoints(folder, keep_last=2) as checkpoints:
        check_restores(checkpoints, steps[-1])
        save(checkpoints, 10)
    assert integrity.list_steps(folder) == sorted({4, steps[-1], 10})


# Faults.


def test_short_faults_are_survived(folder: "epath.Path", gcs: Proxy) -> None:
    buckets.set_retry_seconds(20)
    rules = [
        gcs.inject(Status(429), operation="write", name="*ocdbt*", times=2),
        gcs.inject(Status(503), operation="write|stat|read", name="*/8/*", times=2, skip=20),
        gcs.inject(CutRequest(), operation="write", name="*manifest*", times=2),
        gcs.inject(CutResponse(), operation="write", name="*_METADATA", times=2),
        gcs.inject(CutResponse(), operation="delete", times=2),
    ]
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 8)
    assert [rule.applied for rule in rules] == [2, 2, 2, 2, 2]
    gcs.clear()
    rules = [
        gcs.inject(Status(503), operation="read", name="*manifest*", times=2),
        gcs.inject(CutResponse(5), operation="read", name="*/d/*", times=2),
        gcs.inject(CutResponse(5), operation="read", name="*_METADATA", times=2),
    ]
    with Checkpoints(folder) as checkpoints:
        check_restores(checkpoints, 8)
    assert [rule.applied for rule in rules] == [2, 2, 2]
    assert integrity.list_steps(folder) == [4, 8]


NO_ANSWER = r"did not answer within 0\.5 s \(config\.bucket\.retry_seconds\): .*Check the network"
FAULTS = {
    "writes of arrays": (Status(503), "write", "*ocdbt*", NO_ANSWER),
    "writes of JSON": (Status(429), "write", "*/progress/*", NO_ANSWER),
    "commit": (Status(500), "write", "*/commit_success.txt", NO_ANSWER),
    "manifest": (Status(503), "write", "*/manifest.json", NO_ANSWER),
    "connections": (CutRequest(), "", "*ocdbt*", NO_ANSWER),
    "read-only": (Status(403), "write|delete", "*", "permission denied; grant roles/storage.obj"),
    "denied arrays": (Status(403), "write", "*ocdbt*", "permission denied; grant roles/storage"),
    "credentials": (Status(401), "write", "*ocdbt*", "credentials are missing or have expired"),
    "deletion": (Status(403), "delete", "*/2/*", "permission denied; grant roles/storage.obj"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_failed_write_is_one_message_and_keeps_earlier_checkpoints(
    fault: str,
    folder: "epath.Path",
    gcs: Proxy,
    capfd: pytest.CaptureFixture,
) -> None:
    action, operation, name, words = FAULTS[fault]
    with Checkpoints(folder) as checkpoints:
        gcs.inject(action, operation=operation, name=name)
        with pytest.raises(WriteError, match=words + r"(.|\n)*\. Earlier checkpoints are intact"):
            save(checkpoints, 8)
            checkpoints.wait()
        # Also while the fault lasts.
        with pytest.raises(WriteError):
            save(checkpoints, 10)
            checkpoints.wait()
        gcs.clear()
        latest = checkpoints.latest_step()
        assert latest == (10 if fault == "deletion" else 6)
        check_restores(checkpoints, latest)
        save(checkpoints, 12)
    assert integrity.list_steps(folder) == [4, 12]
    # A failed write may have gone on for a moment; the next start deletes what it left.
    with Checkpoints(folder):
        assert names(folder) == {"4", "12"}
    assert "Traceback" not in capfd.readouterr().err


def test_fault_during_restore_is_one_message(folder: "epath.Path", gcs: Proxy) -> None:
    with Checkpoints(folder, read_only=True) as checkpoints:
        for operation, name in (("read", "*ocdbt*"), ("read|stat", "*_METADATA")):
            gcs.inject(Status(503), operation=operation, name=name)
            with pytest.raises(buckets.BucketError, match=NO_ANSWER):
                checkpoints.restore(6, state(0))
            gcs.clear()
        gcs.inject(Status(503), name="*/metrics/*")
        # Not as if there were no metrics.
        with pytest.raises(buckets.BucketError, match=NO_ANSWER):
            checkpoints.resolve("best")
        gcs.clear()
        check_restores(checkpoints, 6)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("*/6/training/manifest.ocdbt", 20),
        ("*/6/model/ocdbt.process_0/d/*", 3),
        ("*/6/training/_METADATA", 3),
        ("*/6/model/array_metadatas/*", 20),
    ],
)
@pytest.mark.usefixtures("collected")
def test_intact_checkpoint_that_arrives_damaged_is_one_message(
    name: str, at: int, folder: "epath.Path", gcs: Proxy
) -> None:
    before = contents(folder)
    with Checkpoints(folder) as checkpoints:
        gcs.inject(FlipBit(at), operation="read", name=name)
        with pytest.raises(RunError) as caught:
            checkpoints.restore(6, state(0))
        gcs.clear()
    message = str(caught.value)
    assert message.startswith(f"{folder}/6: the checkpoint is intact, but was damaged while ")
    assert message.endswith(". Rerun the command") and "\n" not in message
    # It is not set aside, and the same command succeeds.
    with Checkpoints(folder) as checkpoints:
        assert contents(folder) == before
        check_restores(checkpoints, 6)


@pytest.mark.usefixtures("collected")
def test_checkpoint_that_is_damaged_during_a_start_is_not_called_intact(
    folder: "epath.Path",
) -> None:
    with Checkpoints(folder) as checkpoints:
        buckets.write_bytes(folder / "6/training/manifest.ocdbt", bytes(114))
        with pytest.raises(CheckpointError, match="/6: corrupt checkpoint: training/manifest"):
            checkpoints.restore(6, state(0))


def test_checkpoint_of_another_model_is_reported(folder: "epath.Path") -> None:
    other = state(0).replace(params={"kernel": jax.numpy.zeros(7)})
    with (
        Checkpoints(folder, read_only=True) as checkpoints,
        pytest.raises(CheckpointError, match="does not match this model"),
    ):
        checkpoints.restore(6, other)


def test_checkpoint_that_cannot_be_read_back_does_not_count(
    folder: "epath.Path", gcs: Proxy
) -> None:
    gcs.inject(FlipBit(20), operation="read", name="*/8/model/manifest.ocdbt", times=9)
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 8)
        with pytest.raises(WriteError, match="cannot be read back"):
            checkpoints.wait()
        gcs.clear()
        check_restores(checkpoints, 6)
    assert integrity.list_steps(folder) == [2, 4, 6]


def test_missing_bucket_and_folder_are_reported(bucket: str) -> None:
    missing = paths.user_path("gs://no-such-bucket/run/checkpoints", "test")
    for read_only in (False, True):
        with pytest.raises(buckets.BucketError, match="checkpoints: bucket not found; correct"):
            Checkpoints(missing, read_only=read_only)
    with pytest.raises(CheckpointError, match="no checkpoints found; train first"):
        Checkpoints(paths.user_path(f"{bucket}/run/checkpoints", "test"), read_only=True)


# Several processes.


def test_processes_without_shared_disk_save_together(empty: "epath.Path", gcs: Proxy) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    workers = [start_worker(empty, "2,4,6,8", address, "2", str(index)) for index in range(2)]
    for done in map(command.finish, workers):
        assert done.returncode == 0, done.stderr
    writes = {name for request in gcs.find("write") for name in request.names}
    assert any("ocdbt.process_1" in name for name in writes)
    check_continues(empty, [2, 6, 8])
