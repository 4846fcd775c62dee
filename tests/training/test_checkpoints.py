"""Checkpoints on disks that lie, fill up and vanish; the state is a small one of a few arrays."""

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
from inception_jax.training.state import TrainState
from tests import disks, names

# Orbax leaves coroutines behind that never ran, which show whenever the garbage is collected.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

STEPS = {2: 50.0, 4: 90.0, 6: 80.0}


def state(step: int) -> TrainState:
    values = jnp.asarray(np.random.default_rng(step).normal(size=2000), jnp.float32)
    return TrainState(
        step=jnp.int32(step),
        params={"kernel": values},
        batch_stats={"mean": values[:3]},
        average={"params": {"kernel": values + 1}},
        opt_state={"trace": -values},
        metrics=TrainMetrics.empty({}),
    )


def save(checkpoints: Checkpoints, step: int, *, top1: float | None = 1.0) -> None:
    metrics = None if top1 is None else {"top1": top1}
    checkpoints.save(state(step), progress={"seconds": {"train": step}}, metrics=metrics)


def check_restores(checkpoints: Checkpoints, step: int) -> None:
    restored, progress = checkpoints.restore(step, state(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    assert progress == {"seconds": {"train": step}}


def metrics_of(*names: str) -> TrainMetrics:
    values = {name: jnp.arange(4.0) + len(name) for name in ("loss", *names)}
    scale = dict.fromkeys(names, 100)
    step = TrainMetrics.single_step(
        step=7, values=values, scale=scale, gradient_norm=jnp.float32(2.5)
    )
    return TrainMetrics.empty(scale).merge(step)


def test_metrics_may_be_added_to_a_run_and_taken_away(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = TrainMetrics.item
    # Revision 56edb8b wrote one value more.
    older = {"_reduction_counter": {"value": jnp.int32(1)}}
    monkeypatch.setattr(TrainMetrics, "item", lambda self: item(self) | older)
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
            jax.tree.map(lambda a, b: None, restored, target)  # Raises where structures differ.
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
    """Checkpoints of the steps 2, 4 (the best) and 6, to be damaged."""
    return pathlib.Path(shutil.copytree(template, tmp_path / "checkpoints"))


def files(folder: pathlib.Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


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
def test_training_goes_on_from_the_one_before_and_keeps_the_damaged_one(
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
    # A second time, too.
    damage(folder / "6")
    with Checkpoints(folder, keep_last=9, log=lines.append) as checkpoints:
        assert checkpoints.latest_step() == 4
    assert files(folder / "6.damaged") == before
    assert (folder / "6.damaged-2").is_dir()


@by_name
def test_reading_takes_the_one_before_and_changes_nothing(
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
        with pytest.raises(CheckpointError, match=r"no intact checkpoint '6'; .* 2, 4, 6"):
            checkpoints.resolve("6")
        check_restores(checkpoints, 2)
    assert files(folder) == before


# What Orbax writes after the manifest, and reads for no restore.
UNLISTED = {_orbax_private.STEP_METADATA, "commit_success.txt"}


def test_a_checkpoint_is_whole_without_what_its_manifest_does_not_list(
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


def test_a_flipped_bit_in_any_file_is_found(folder: pathlib.Path) -> None:
    found = sorted(
        name for name, content in files(folder / "6").items() if content and name not in UNLISTED
    )
    assert len(found) > 15
    for name in found:
        flip(folder / "6" / name)
        problem = integrity.find_corruption(folder / "6")
        # In the manifest itself it is another file's checksum that changes.
        assert name in problem or (name == integrity.MANIFEST and problem), name
        flip(folder / "6" / name)
    assert integrity.find_corruption(folder / "6") == ""


def test_nothing_is_changed_where_no_checkpoint_is_whole(folder: pathlib.Path) -> None:
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


def test_a_damaged_one_does_not_drive_out_a_whole_one(folder: pathlib.Path) -> None:
    for step in (4, 6):
        flip_bit(folder / str(step))
    with Checkpoints(folder, keep_last=2, keep_best=0, log=lambda _: None) as checkpoints:
        save(checkpoints, 3)
        save(checkpoints, 5)
    assert integrity.list_steps(folder) == [3, 5]
    assert {path.name for path in folder.iterdir()} == {"3", "5", "4.damaged", "6.damaged"}


def test_checkpoints_without_a_manifest_are_read(folder: pathlib.Path) -> None:
    for step in STEPS:
        (folder / str(step) / integrity.MANIFEST).unlink()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 6
        check_restores(checkpoints, 6)
    truncate(folder / "6")
    # TensorStore leaves a coroutine behind, of which Python warns when it is collected.
    with (
        Checkpoints(folder) as checkpoints,
        pytest.raises(CheckpointError, match=r"(?s)6: cannot be restored.*without checksums"),
    ):
        checkpoints.restore(6, state(0))
    gc.collect()


def test_a_checkpoint_bears_its_name_only_with_its_manifest(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = integrity.write_manifest
    seen: list[set[str]] = []

    def write(folder: pathlib.Path, **options: Any) -> None:
        seen.append({path.name for path in tmp_path.iterdir()})
        whole(folder, **options)

    monkeypatch.setattr(integrity, "write_manifest", write)
    with Checkpoints(tmp_path, keep_last=9) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
        checkpoints.wait()
    assert [{name for name in names if name.isdecimal()} for names in seen] == [set(), {"1"}]
    listed = json.loads((tmp_path / "2" / integrity.MANIFEST).read_text())["files"]
    assert set(listed) == set(files(tmp_path / "2")) - UNLISTED - {integrity.MANIFEST}


# Disks that are full, and worse.


def fail_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the next checkpoint fail when all of it but the manifest is written."""
    whole, failures = integrity.write_manifest, iter([True])

    def write(folder: pathlib.Path, **options: Any) -> None:
        if next(failures, False):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        whole(folder, **options)

    monkeypatch.setattr(integrity, "write_manifest", write)


def test_a_failed_write_shows_at_the_next_call_and_leaves_the_others(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder)
    with Checkpoints(folder, keep_last=1) as checkpoints:
        fail_once(monkeypatch)
        save(checkpoints, 8)
        with pytest.raises(WriteError, match=r"could not be written: No space left on device"):
            checkpoints.wait()
        # It is as if it had not been tried, and what came before counts again.
        assert checkpoints.latest_step() == 6
        check_restores(checkpoints, 6)
        # Orbax removes what is left of it in the background.
        while any("tmp" in path.name for path in folder.iterdir()):
            time.sleep(0.01)
        assert files(folder) == before
        save(checkpoints, 8)
        checkpoints.wait()
        check_restores(checkpoints, 8)
    # The newest and the best.
    assert integrity.list_steps(folder) == [4, 8]


def test_a_failure_of_the_last_write_shows_at_the_end(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once(monkeypatch)
    with pytest.raises(WriteError, match="No space left"), Checkpoints(folder) as checkpoints:
        save(checkpoints, 8)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest_step() == 6


def hooks() -> list[Any]:
    """Returns what of Python's reports of errors a library may have changed."""
    return [
        threading.excepthook,
        sys.unraisablehook,
        list(logging.getLogger("asyncio").filters),
        list(warnings.filters),
        warnings.showwarning,
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_reports_of_errors_are_as_before_when_it_is_closed(
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
        # A bug in a thread of the user's own is still reported.
        bug = threading.Thread(target=lambda: [][1])
        bug.start()
        bug.join()
    assert hooks() == before
    assert [type(error) for error in shown] == [IndexError]


def test_too_little_space_is_found_before_anything_is_written(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with Checkpoints(folder) as checkpoints:
        with pytest.raises(WriteError, match=r"needs up to 0\.0 MB, but only 0\.0 MB is free"):
            save(checkpoints, 8)
        assert files(folder) == before


def test_a_disk_that_is_full_and_then_is_not(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    with disks.mounted(tmp_path / "disk", kilobytes=1200) as disk:
        folder = disk / "checkpoints"
        with Checkpoints(folder, keep_last=9) as checkpoints:
            save(checkpoints, 2)
            checkpoints.wait()
            before = files(folder)
            # There is room for the numbers, as the check beforehand finds, but not for all.
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
    # Each array's own failure is said by none of asyncio's tasks, which it would be now.
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []


def test_a_disk_that_turns_read_only(tmp_path: pathlib.Path) -> None:
    with disks.mounted(tmp_path / "disk", kilobytes=4000) as disk:
        folder = disk / "checkpoints"
        with Checkpoints(folder) as checkpoints:
            save(checkpoints, 2)
            checkpoints.wait()
            threads = threading.active_count()
            disks.make_read_only(disk)
            with pytest.raises(WriteError, match="Read-only file system"):
                save(checkpoints, 4)
            # No thread is left that would keep the process from ending.
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


def test_a_folder_that_vanishes_is_not_made_anew(folder: pathlib.Path) -> None:
    elsewhere = folder.with_name("elsewhere")
    with Checkpoints(folder) as checkpoints:
        folder.rename(elsewhere)
        for _ in range(2):
            with pytest.raises(WriteError, match=r"checkpoints: is gone: removed, renamed or unm"):
                save(checkpoints, 8)
        assert not folder.exists()
        elsewhere.rename(folder)
        save(checkpoints, 8)
    with Checkpoints(folder) as checkpoints:
        check_restores(checkpoints, 8)


def test_a_clock_that_is_set_back_loses_nothing(
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


def test_the_metrics_of_a_step_are_those_it_was_saved_with(folder: pathlib.Path) -> None:
    with Checkpoints(folder, keep_last=9) as checkpoints:
        save(checkpoints, 8, top1=None)
    with Checkpoints(folder, read_only=True) as checkpoints:
        found: dict[int, Any] = {step: checkpoints.metrics(step) for step in (2, 4, 6, 8)}
        assert found == {step: {"top1": top1} for step, top1 in STEPS.items()} | {8: {}}
        assert checkpoints.resolve("best") == 4


@pytest.mark.parametrize("name", names.ODD, ids=ascii)
def test_a_folder_of_any_name_keeps_checkpoints(name: str, tmp_path: pathlib.Path) -> None:
    # Of the same pattern: another run's, which must not be mixed in.
    for neighbour in ("run1", "axb", "qx"):
        with Checkpoints(tmp_path / neighbour / "checkpoints") as checkpoints:
            save(checkpoints, 4)
    before = {folder.name for folder in tmp_path.iterdir()}
    folder = tmp_path / name / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        save(checkpoints, 4)
    with Checkpoints(folder) as checkpoints:
        check_restores(checkpoints, 4)
        save(checkpoints, 6)
    with Checkpoints(folder, read_only=True) as checkpoints:
        check_restores(checkpoints, checkpoints.resolve("last"))
    # Nor was anything written elsewhere.
    assert {folder.name for folder in tmp_path.iterdir()} - before == {name}


def test_a_checkpoint_that_cannot_be_read_back_is_none(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where Orbax finds none of the files that it is to merge, of which it says nothing."""
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
def test_what_older_versions_left_unmerged_is_merged(
    name: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """As they did where the path had brackets; a checkpoint was hashed and never read."""
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
