"""Checkpoints on disks that corrupt, fill up and disappear; with a small state of a few arrays."""

import contextlib
import errno
import gc
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from inception_jax.errors import CheckpointError, WriteError
from inception_jax.storage import integrity
from inception_jax.training import _orbax_private
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.metrics import TrainMetrics
from tests import disks, names
from tests.saved import check_restores, save, state

# Orbax leaves coroutines that never ran, which are reported on garbage collection.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = {2: 50.0, 4: 90.0, 6: 80.0}


def metrics_of(*names: str) -> TrainMetrics:
    values = {name: jnp.arange(4.0) + len(name) for name in ("loss", *names)}
    scale = dict.fromkeys(names, 100)
    step = TrainMetrics.single_step(
        step=7, values=values, scale=scale, gradient_norm=jnp.float32(2.5)
    )
    return TrainMetrics.empty(scale).merge(step)


def test_restore_tolerates_added_and_removed_metrics(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = TrainMetrics.checkpoint_item
    # Revision 56edb8b wrote one more value.
    older = {"_reduction_counter": {"value": jnp.int32(1)}}
    monkeypatch.setattr(TrainMetrics, "checkpoint_item", lambda self: item(self) | older)
    saved = state(2).replace(metrics=metrics_of("top1", "top5"))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(saved, progress={}, metrics=None)
        checkpoints.wait()
        monkeypatch.undo()
        for names in (("top1", "top5"), ("top1",), ("top10", "top1")):
            target = state(0).replace(metrics=TrainMetrics.empty(dict.fromkeys(names, 100)))
            restored, _ = checkpoints.restore(2, target)
            expected = metrics_of(*names).averages
            if "top10" in names:
                expected["top10"] = TrainMetrics.empty(dict.fromkeys(names, 100)).averages["top10"]
            expected = {name: expected[name] for name in target.metrics.averages}
            jax.tree.map(lambda a, b: None, restored, target)  # Raises if structures differ.
            jax.tree.map(np.testing.assert_array_equal, restored.metrics.averages, expected)
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(restored))
            jax.tree.map(
                np.testing.assert_array_equal,
                (restored.params, restored.opt_state, restored.average),
                (saved.params, saved.opt_state, saved.average),
            )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "checkpoints"
    with Checkpoints(folder, keep_last=9) as checkpoints:
        for step, top1 in STEPS.items():
            save(checkpoints, step, top1=top1)
    return folder


@pytest.fixture
def folder(template: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """Checkpoints of steps 2, 4 (the best) and 6, to be corrupted."""
    return pathlib.Path(shutil.copytree(template, tmp_path / "checkpoints"))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


def truncate(folder: pathlib.Path) -> None:
    path = largest(folder)
    os.truncate(path, path.stat().st_size // 2)


def empty_file(folder: pathlib.Path) -> None:
    os.truncate(largest(folder), 0)


def remove_file(folder: pathlib.Path) -> None:
    largest(folder).unlink()


def flip_bit(folder: pathlib.Path) -> None:
    flip(largest(folder))


def empty_folder(folder: pathlib.Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def remove_item(folder: pathlib.Path) -> None:
    (folder / integrity.MANIFEST).unlink()
    shutil.rmtree(folder / "training")


def break_metrics(folder: pathlib.Path) -> None:
    (folder / "metrics" / "metrics").write_text('{"top1": ')


DAMAGES = {
    truncate: "bytes instead of",
    empty_file: "has 0 bytes instead of",
    remove_file: "is missing",
    flip_bit: r"has changed \(SHA-256 mismatch\)",
    empty_folder: "model is missing, training is missing, progress is missing",
    remove_item: "training is missing",
    break_metrics: "metrics/metrics has 9 bytes instead of",
}
by_name = pytest.mark.parametrize(
    ("damage", "words"), DAMAGES.items(), ids=lambda case: getattr(case, "__name__", "")
)


@by_name
def test_training_quarantines_corrupt_checkpoint_and_resumes_from_previous(
    folder: pathlib.Path, damage: Callable[[pathlib.Path], None], words: str
) -> None:
    damage(folder / "6")
    before = files(folder / "6")
    lines: list[str] = []
    with Checkpoints(folder, keep_last=9, log=lines.append) as checkpoints:
        (line,) = lines
        assert line.startswith(f"{folder / '6'}: corrupt checkpoint: ")
        assert re.search(words, line), line
        assert "6.damaged" in line and "of step 4" in line
        assert checkpoints.latest_step() == 4
        check_restores(checkpoints, 4)
        save(checkpoints, 6)
        checkpoints.wait()
        check_restores(checkpoints, 6)
    assert files(folder / "6.damaged") == before
    assert integrity.find_corruption(folder / "6") == ""
    # And once more.
    damage(folder / "6")
    with Checkpoints(folder, keep_last=9, log=lines.append) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert files(folder / "6.damaged") == before
    assert (folder / "6.damaged-2").is_dir()


@by_name
def test_read_only_uses_previous_checkpoint_and_changes_nothing(
    folder: pathlib.Path, damage: Callable[[pathlib.Path], None], words: str
) -> None:
    damage(folder / "4")
    damage(folder / "6")
    before = files(folder)
    lines: list[str] = []
    with Checkpoints(folder, read_only=True, log=lines.append) as checkpoints:
        assert checkpoints.resolve("last") == 2
        assert [line.split(":")[0] for line in lines] == [str(folder / "6"), str(folder / "4")]
        assert checkpoints.resolve("best") == 2
        assert checkpoints.resolve("2") == 2
        with pytest.raises(CheckpointError, match=r"no intact checkpoint '6' found; .* 2, 4, 6"):
            checkpoints.resolve("6")
        check_restores(checkpoints, 2)
    assert files(folder) == before


# Files that Orbax writes after the manifest and does not read on restore.
UNLISTED = {_orbax_private.STEP_METADATA, "commit_success.txt"}


def test_checkpoint_is_intact_whatever_unlisted_files_contain(
    folder: pathlib.Path,
) -> None:
    for name in UNLISTED:
        (folder / "6" / name).write_bytes(b"\xff{")
    with Checkpoints(folder, read_only=True, log=print) as checkpoints:
        assert checkpoints.resolve("last") == 6 and checkpoints.metrics(6) == {"top1": 80.0}
        check_restores(checkpoints, 6)
    with Checkpoints(folder, log=print) as checkpoints:
        assert checkpoints.latest_step() == 6
        check_restores(checkpoints, 6)
        save(checkpoints, 8)


def test_flipped_bit_in_any_file_is_detected(folder: pathlib.Path) -> None:
    listed = sorted(
        name for name, content in files(folder / "6").items() if content and name not in UNLISTED
    )
    assert len(listed) > 15
    for name in listed:
        flip(folder / "6" / name)
        problem = integrity.find_corruption(folder / "6")
        # A flipped bit in the manifest changes another file's checksum.
        assert name in problem or (name == integrity.MANIFEST and problem), name
        flip(folder / "6" / name)
    assert integrity.find_corruption(folder / "6") == ""


def test_nothing_is_changed_without_an_intact_checkpoint(folder: pathlib.Path) -> None:
    for step in STEPS:
        flip_bit(folder / str(step))
    before = files(folder)
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is intact; nothing was changed(.|\n)*6: "
    ):
        Checkpoints(folder)
    with (
        Checkpoints(folder, read_only=True, log=lambda _: None) as checkpoints,
        pytest.raises(CheckpointError, match="no intact checkpoint 'best'"),
    ):
        checkpoints.resolve("best")
    assert files(folder) == before


def test_corrupt_checkpoint_does_not_displace_intact_one(folder: pathlib.Path) -> None:
    for step in (4, 6):
        flip_bit(folder / str(step))
    with Checkpoints(folder, keep_last=2, keep_best=0, log=lambda _: None) as checkpoints:
        save(checkpoints, 3)
        save(checkpoints, 5)
    assert integrity.list_steps(folder) == [3, 5]
    assert {path.name for path in folder.iterdir()} == {"3", "5", "4.damaged", "6.damaged"}


def test_checkpoint_without_manifest_is_restored(folder: pathlib.Path) -> None:
    for step in STEPS:
        (folder / str(step) / integrity.MANIFEST).unlink()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 6
        check_restores(checkpoints, 6)
    truncate(folder / "6")
    # TensorStore leaves a coroutine that Python warns about on garbage collection.
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=r"(?s)6: cannot be restored.*without checksums"),
    ):
        checkpoints.restore(6, state(0))
    gc.collect()


def test_checkpoint_is_renamed_after_its_manifest_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest = integrity.write_manifest
    seen: list[set[str]] = []

    def write(folder: pathlib.Path, **options: Any) -> None:
        seen.append({path.name for path in tmp_path.iterdir()})
        write_manifest(folder, **options)

    monkeypatch.setattr(integrity, "write_manifest", write)
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
        checkpoints.wait()
    assert [{name for name in names if name.isdecimal()} for names in seen] == [set(), {"1"}]
    listed = json.loads((tmp_path / "2" / integrity.MANIFEST).read_text())["files"]
    assert set(listed) == set(files(tmp_path / "2")) - UNLISTED - {integrity.MANIFEST}


# Disk failures.


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next checkpoint fail when everything but the manifest is written."""
    write_manifest, failures = integrity.write_manifest, iter([True])

    def write(folder: pathlib.Path, **options: Any) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_manifest(folder, **options)

    monkeypatch.setattr(integrity, "write_manifest", write)


def test_failed_write_is_raised_by_next_call_and_keeps_earlier_checkpoints(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder)
    with Checkpoints(folder, keep_last=1) as checkpoints:
        fail_once(monkeypatch)
        save(checkpoints, 8)
        with pytest.raises(WriteError, match=r"could not be written: No space left on device"):
            checkpoints.wait()
        # As if it had not been attempted: the previous checkpoint is the latest again.
        assert checkpoints.latest_step() == 6
        check_restores(checkpoints, 6)
        # Orbax deletes its partial files in the background.
        while any("tmp" in path.name for path in folder.iterdir()):
            time.sleep(0.01)
        assert files(folder) == before
        save(checkpoints, 8)
        checkpoints.wait()
        check_restores(checkpoints, 8)
    # The newest and the best.
    assert integrity.list_steps(folder) == [4, 8]


def test_failure_of_last_write_is_raised_at_the_end(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch)
    with pytest.raises(WriteError, match="No space left"), Checkpoints(folder) as checkpoints:
        save(checkpoints, 8)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 6


def hooks() -> list[Any]:
    """Returns the hooks and filters of Python's error reports that a library may change."""
    return [
        threading.excepthook,
        sys.unraisablehook,
        list(logging.getLogger("asyncio").filters),
        list(warnings.filters),
        warnings.showwarning,
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_error_hooks_are_restored_on_close(
    fails: bool,
    folder: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before, shown = hooks(), []
    monkeypatch.setattr(threading, "excepthook", lambda failure: shown.append(failure.exc_value))
    before[0] = threading.excepthook
    with contextlib.suppress(WriteError), Checkpoints(folder) as checkpoints:
        assert hooks() != before
        if fails:
            fail_once(monkeypatch)
        save(checkpoints, 8)
        # A bug in a user's thread is still reported.
        bug = threading.Thread(target=lambda: [][1])
        bug.start()
        bug.join()
    assert hooks() == before
    assert [type(error) for error in shown] == [IndexError]


def test_low_disk_space_is_detected_before_writing(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(WriteError, match=r"needs up to 0\.0 MB, but only 0\.0 MB is free"):
            save(checkpoints, 8)
        assert files(folder) == before


def test_full_disk_and_recovery(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    with disks.mounted(tmp_path / "disk", kilobytes=1200) as disk:
        folder = disk / "checkpoints"
        with Checkpoints(folder, keep_last=9) as checkpoints:
            save(checkpoints, 2)
            checkpoints.wait()
            before = files(folder)
            # Enough space for the arrays, which is checked beforehand, but not for everything.
            free = shutil.disk_usage(disk).free
            (disk / "other").write_bytes(bytes(free - 50_000))
            save(checkpoints, 4)
            with pytest.raises(WriteError, match="No space left on device"):
                checkpoints.wait()
            assert integrity.find_corruption(folder / "2") == ""
            check_restores(checkpoints, 2)
            (disk / "other").unlink()
            save(checkpoints, 4)
            checkpoints.wait()
            check_restores(checkpoints, 4)
        assert {n: c for n, c in files(folder).items() if n.startswith("2/")} == before
    # asyncio does not report the failure of each array's task, which it would do now.
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_disk_becomes_read_only(tmp_path: pathlib.Path) -> None:
    with disks.mounted(tmp_path / "disk", kilobytes=4000) as disk:
        folder = disk / "checkpoints"
        with Checkpoints(folder) as checkpoints:
            save(checkpoints, 2)
            checkpoints.wait()
            threads = threading.active_count()
            disks.make_read_only(disk)
            with pytest.raises(WriteError, match="Read-only file system"):
                save(checkpoints, 4)
            # No thread remains that would keep the process from exiting.
            deadline = time.monotonic() + 30
            while threading.active_count() > threads and time.monotonic() < deadline:
                time.sleep(0.01)
            assert threading.active_count() <= threads
        with Checkpoints(folder, read_only=True) as checkpoints:
            check_restores(checkpoints, checkpoints.resolve("last"))
        disks.make_writable(disk)
        with Checkpoints(folder) as checkpoints:
            save(checkpoints, 4)
    assert not (tmp_path / "disk" / "checkpoints").exists()


def test_removed_directory_is_not_recreated(folder: pathlib.Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    with Checkpoints(folder) as checkpoints:
        folder.rename(elsewhere)
        for _ in range(2):
            with pytest.raises(WriteError, match=r"checkpoints: was removed, renamed or unmounted"):
                save(checkpoints, 8)
        assert not folder.exists()
        elsewhere.rename(folder)
        save(checkpoints, 8)
    with Checkpoints(folder) as checkpoints:
        check_restores(checkpoints, 8)


def test_unfinished_checkpoints_are_deleted_before_the_first_save(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished = folder / "8.orbax-checkpoint-tmp"
    (unfinished / "model").mkdir(parents=True)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    # In the background, the error would appear in every save, the first of them hours later.
    with monkeypatch.context() as patch, pytest.raises(WriteError, match="Input/output error"):
        patch.setattr(shutil, "rmtree", fail)
        Checkpoints(folder)
    with Checkpoints(folder) as checkpoints:
        assert not unfinished.exists()
        save(checkpoints, 8)
    assert integrity.list_steps(folder)[-1] == 8


def test_clock_set_back_loses_no_checkpoint(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 1e6)
    monkeypatch.setattr(time, "time_ns", lambda: int((now - 1e6) * 1e9))
    with Checkpoints(folder, keep_last=2, keep_best=0) as checkpoints:
        save(checkpoints, 8)
    assert integrity.list_steps(folder) == [6, 8]
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.resolve("last") == 8


def test_metrics_are_saved_with_each_step(folder: pathlib.Path) -> None:
    with Checkpoints(folder, keep_last=9) as checkpoints:
        save(checkpoints, 8, top1=None)
    with Checkpoints(folder, read_only=True) as checkpoints:
        metrics: dict[int, Any] = {step: checkpoints.metrics(step) for step in (2, 4, 6, 8)}
        assert metrics == {step: {"top1": top1} for step, top1 in STEPS.items()} | {8: {}}
        assert checkpoints.resolve("best") == 4


@pytest.fixture(scope="module")
def neighbors(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Runs whose names match the glob patterns that some names look like."""
    folder = tmp_path_factory.mktemp("neighbors")
    for name in ("run1", "axb", "qx"):
        with Checkpoints(folder / name / "checkpoints") as checkpoints:
            save(checkpoints, 4)
    return folder


# Characters with a meaning in patterns, addresses and shells, or in no encoding; the others are
# tested where paths are (tests/storage/test_paths.py).
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if set(name) & set("*?[{%$~:\n\udcff") else pytest.mark.slow)
        for name in names.ODD
    ],
    ids=ascii,
)
def test_directory_names_with_special_characters(
    name: str, neighbors: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # They must not be mixed in.
    shutil.copytree(neighbors, tmp_path, dirs_exist_ok=True)
    before = {folder.name for folder in tmp_path.iterdir()}
    folder = tmp_path / name / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 4)
    with Checkpoints(folder) as checkpoints:
        check_restores(checkpoints, 4)
        save(checkpoints, 6)
    with Checkpoints(folder, read_only=True) as checkpoints:
        check_restores(checkpoints, checkpoints.resolve("last"))
    # Nothing was written elsewhere.
    assert {folder.name for folder in tmp_path.iterdir()} - before == {name}


def test_checkpoint_that_cannot_be_read_back_is_discarded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates that Orbax silently finds none of the files to merge."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        save(checkpoints, 2)
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(type(epath.Path("/")), "glob", lambda *_: iter(()))
            with pytest.raises(WriteError, match=r"cannot be read back: .* Earlier checkpoints"):
                save(checkpoints, 4)
                checkpoints.wait()
        save(checkpoints, 6)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.resolve("last") == 6
        check_restores(checkpoints, 6)
    assert integrity.list_steps(tmp_path / "checkpoints") == [6]


@pytest.mark.parametrize("name", ["run", "run[1]"])
def test_unmerged_checkpoints_of_older_versions_are_finalized(
    name: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """They left them unmerged if the path had brackets: checkpoints were hashed but not read."""
    damaged = folder.rename(tmp_path / name)
    for step in STEPS:
        for item in integrity.ARRAYS:
            (damaged / str(step) / item / "manifest.ocdbt").unlink()
            shutil.rmtree(damaged / str(step) / item / "d")
        (damaged / str(step) / integrity.MANIFEST).unlink()
        integrity.write_manifest(damaged / str(step))
    lines: list[str] = []
    with (
        Checkpoints(damaged, read_only=True, log=lines.append) as checkpoints,
        pytest.raises(CheckpointError, match="no intact checkpoint"),
    ):
        checkpoints.resolve("last")
    assert "not merged" in lines[0] and "rerun the training command" in lines[0]
    with Checkpoints(damaged, log=lines.append) as checkpoints:
        check_restores(checkpoints, checkpoints.resolve("last"))
    assert len(lines) == 3
