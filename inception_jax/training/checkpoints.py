"""Saves and restores checkpoints; the only module that uses Orbax.

A checkpoint is a directory named by its step, with three items: `model` (parameters, BatchNorm
statistics and their averages: everything that evaluation needs), `training` (step, optimizer state,
metric sums) and `progress` (JSON: seconds spent so far). Orbax writes it under a temporary name in
the background; then its manifest is written, and it is renamed. In a bucket, where folders cannot
be renamed, a commit file is written instead. A kill at any moment leaves the previous checkpoint
intact, and a finished checkpoint has checksums of all its files. They are verified before a
restore; a corrupt checkpoint is logged, and the previous one used.
"""

import contextlib
import gc
import json
import logging
import pathlib
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from inception_jax import advice, console
from inception_jax.errors import CheckpointError, RunError, UserError, WriteError
from inception_jax.storage import buckets, integrity, paths
from inception_jax.storage.space import check_space, disk_failure
from inception_jax.training import _orbax_private
from inception_jax.training.state import TrainState

_managers = ocp.checkpoint_managers
_YEAR_SECONDS, _TWENTY_MINUTES_SECONDS = 365 * 24 * 3600, 1200
# Errors of TensorStore about contents that it cannot decode.
_UNDECODABLE = re.compile(r"Error (reading|opening|decoding) |error while reading array")


def _top1(metrics: Mapping[str, float]) -> float:
    return metrics["top1"]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, leaving JAX's preemption service to the training loop.

    The service records the step that each process last queried, and chooses a common step to stop
    at. Orbax queries the step it has just written, from its own thread, when training is already
    further, so the chosen step could have passed.
    """

    def reached_preemption(self, step: int) -> bool:
        """Returns False without querying the service."""
        return False


def check_exists(directory: paths.Path, which: str) -> None:
    """Checks, without reading it, that there is a checkpoint given as "best", "last" or a number.

    Raises:
      UserError: if `which` is neither.
      CheckpointError: if there is none.
    """
    is_step = which.isdecimal()
    if not is_step and which not in ("best", "last"):
        raise UserError(f"--checkpoint={which}: must be best, last or a step number")
    steps = integrity.list_steps(directory)
    if not steps or (is_step and int(which) not in steps):
        raise _not_found(directory, which)


def _not_found(directory: paths.Path, which: str, state: str = "") -> CheckpointError:
    available = ", ".join(map(str, integrity.list_steps(directory))) or "none"
    if which == "best" and available != "none":
        available += ". None of them is intact and was evaluated; use --checkpoint=last"
    return CheckpointError(
        f"{directory}: no {state}checkpoint {which!r} found; available steps: {available}"
    )


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for the last write.

    Args:
      directory: their directory, local or in a bucket; created if missing.
      keep_last: number of newest checkpoints to keep.
      keep_best: number of best checkpoints to keep in addition, by validation top-1.
      read_only: whether to never write, rename or delete anything.
      before_commit: called in the background, in process 0, once a checkpoint is written and before
        it counts. If it raises, the save fails with that error.
      log: called with a line about each corrupt checkpoint.

    Raises:
      CheckpointError: if there is nothing to read, or no checkpoint is intact.
    """

    def __init__(
        self,
        directory: paths.Path,
        *,
        keep_last: int = 1,
        keep_best: int = 1,
        read_only: bool = False,
        before_commit: Callable[[], None] = lambda: None,
        log: integrity.Log = console.log,
    ) -> None:
        self._directory, self._before_commit = directory, before_commit
        self._log = log
        self._keep_last, self._keep_best, self._read_only = keep_last, keep_best, read_only
        if not paths.is_local(directory):
            buckets.configure_epath()
            _orbax_private.limit_retries(buckets.retry_seconds())
        if read_only and not _exists(directory):
            raise CheckpointError(
                f"{directory}: no checkpoints found; train first with the same --workdir"
            )
        if not read_only:
            # Before Orbax opens them: the files that it reads may be the corrupt ones.
            if jax.process_index() == 0:
                if paths.is_local(directory):
                    _finalize_unmerged(directory)
                integrity.quarantine_corrupt(directory, log)
            _wait_for_all_processes("corrupt checkpoints quarantined")
            if paths.is_local(directory):
                with _as_write_error(directory):
                    directory.mkdir(parents=True, exist_ok=True)
        self._cleanup = contextlib.ExitStack()
        self._write_failed = False
        self._plain: paths.PlainPath | None = None
        self._saving: int | None = None
        self._opened: _Manager | None = self._open()

    @property
    def _manager(self) -> _Manager:
        """Orbax's manager, reopened if a write has failed."""
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> _Manager:
        with _as_write_error(self._directory):
            self._folder: paths.Path = self._directory
            if paths.is_local(self._directory):
                self._plain = paths.PlainPath(self._directory)
                self._folder = self._plain.path
            if not self._read_only:
                if jax.process_index() == 0:
                    _delete_unfinished(self._folder)
                _wait_for_all_processes("unfinished checkpoints deleted")
            manager = _Manager(self._folder, options=self._options(self._folder))
            if not paths.is_local(self._directory):
                _orbax_private.set_delete(manager, self._delete)
            return manager

    def __enter__(self) -> Self:
        self._cleanup.enter_context(_silence_failed_writes())
        return self

    def __exit__(self, _: Any, error: BaseException | None, trace: Any) -> None:
        """Waits for a pending write. Its failure does not hide an earlier error."""
        try:
            with _as_write_error(self._directory):
                if self._opened:
                    self._opened.close()
        except Exception:
            self._write_failed = True
            if error is None:
                raise
        finally:
            if self._plain:
                self._plain.close()
            if self._write_failed:
                gc.collect()  # While errors of failed writes are still silenced.
            self._cleanup.close()

    def latest_step(self) -> int | None:
        """Returns the newest step, or None if there is no checkpoint."""
        return self._manager.latest_step()

    def resolve(self, which: str) -> int:
        """Returns the step of the intact checkpoint given as "best", "last" or a number.

        Raises:
          UserError: if `which` is neither.
          CheckpointError: if the checkpoint does not exist or is corrupt.
        """
        check_exists(self._directory, which)
        candidates = [int(which)] if which.isdecimal() else self._ranked(which)
        for step in candidates:
            if not (problem := integrity.find_corruption(self._directory / str(step))):
                return step
            self._log(f"{self._directory / str(step)}: corrupt checkpoint: {problem}")
        raise _not_found(self._directory, which, "intact " if candidates else "")

    def roles(self, step: int) -> str:
        """Returns whether a step is "best", "last", "best and last" or neither ("")."""
        return " and ".join(each for each in ("best", "last") if self._ranked(each)[:1] == [step])

    def _ranked(self, which: str) -> list[int]:
        """Returns all steps, newest first ("last"), or the evaluated ones, best first ("best")."""
        steps = integrity.list_steps(self._directory)
        if which == "last":
            return steps[::-1]
        top1 = {step: _top1(metrics) for step in steps if (metrics := self.metrics(step))}
        # Among ties, the last.
        return sorted(top1, key=lambda step: (top1[step], step), reverse=True)

    def wait(self) -> None:
        """Waits for a pending write.

        Raises:
          WriteError: if it failed; earlier checkpoints are intact.
        """
        with self._explain_write_errors():
            self._manager.wait_until_finished()

    def save(
        self, state: TrainState, *, progress: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Starts writing a checkpoint; the state is copied from the devices when this returns.

        Args:
          state: the state to save; its step names the checkpoint.
          progress: further values to save as JSON.
          metrics: metrics of an evaluation at this step, with "top1"; None if there was none.

        Raises:
          WriteError: if this write cannot start or the previous one failed: an error of this write
            is raised by the next call, or at the end.
        """
        step = int(state.step)
        with self._explain_write_errors():
            if paths.is_local(self._directory):
                size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
                check_space(self._directory, size, "a checkpoint")
            self._manager.wait_until_finished()  # The previous write uses the next value.
            self._saving = step
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardSave(state.model_item()),
                    training=ocp.args.StandardSave(_training_item(state)),
                    progress=ocp.args.JsonSave(dict(progress)),
                ),
                metrics=None if metrics is None else dict(metrics),
                force=True,
            )
        if not saved:
            raise CheckpointError(
                f"{self._directory}: step {step} was not saved because newer checkpoints exist: "
                f"{sorted(self._manager.all_steps())}"
            )

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state and progress of a step.

        Args:
          step: step of an existing checkpoint.
          abstract_state: shapes, dtypes and shardings; the devices may differ from those that saved
            the checkpoint.

        Raises:
          CheckpointError: if the checkpoint does not match the model.
          RunError: if it is intact, but was damaged on its way from the disk or bucket.
        """
        training = _training_item(abstract_state)
        with self._explain_restore_errors(step):
            # Metrics may have been added to or removed from the run since then.
            training["metrics"] = self._saved_metrics(step, training["metrics"])
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(abstract_state.model_item()),
                    training=ocp.args.StandardRestore(training),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        empty = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
            abstract_state.metrics,
        )
        values = restored.training
        values["metrics"] = empty.with_checkpoint_item(values["metrics"])
        return abstract_state.replace(**restored.model, **values), restored.progress

    def _saved_metrics(self, step: int, abstract_metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns shapes, dtypes and shardings of a checkpoint's metrics, given the run's own."""
        placed = jax.tree.leaves(abstract_metrics)[0].sharding
        with contextlib.closing(_local_handler()) as handler:
            saved = handler.metadata(self._folder / str(step) / "training").tree["metrics"]
        others = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), saved
        )
        return {name: abstract_metrics.get(name, other) for name, other in others.items()}

    def restore_model(self, step: int, abstract_model: Mapping[str, Any]) -> dict[str, Any]:
        """Returns only params, batch_stats and average of a step.

        Args:
          step: step of an existing checkpoint.
          abstract_model: shapes, dtypes and shardings, as in `TrainState.model_item`.

        Raises:
          CheckpointError, RunError: as `restore`.
        """
        with self._explain_restore_errors(step):
            args = ocp.args.Composite(model=ocp.args.StandardRestore(abstract_model))
            return self._manager.restore(step, args=args).model

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics saved with a step; empty if there are none or not readable."""
        try:
            with _translate_errors(self._directory / str(step)):
                metrics = self._manager.metrics(step)
        except (OSError, ValueError):
            return {}
        return metrics if isinstance(metrics, dict) and "top1" in metrics else {}

    @contextlib.contextmanager
    def _explain_restore_errors(self, step: int) -> Iterator[None]:
        """Turns a failure to restore into a CheckpointError or RunError."""
        folder = self._directory / str(step)
        try:
            with _translate_errors(folder):
                yield
        except buckets.BucketError:
            raise
        except Exception as error:
            if integrity.verify(folder) is None:
                raise CheckpointError(
                    f"{folder}: cannot be restored: {error}. An older version wrote this "
                    "checkpoint without checksums; it is corrupt or belongs to another model. To "
                    "use the previous checkpoint, move this directory elsewhere"
                ) from error
            if _is_undecodable(error):
                if problem := integrity.find_corruption(folder):
                    raise CheckpointError(
                        f"{folder}: corrupt checkpoint: {problem}. Rerun the command, which uses "
                        "the previous one"
                    ) from error
                raise RunError(
                    f"{folder}: the checkpoint is intact, but was damaged while it was read: "
                    f"{advice.first_line(error.__cause__ or error)}. Rerun the command"
                ) from error
            if not isinstance(error, ValueError):
                raise
            # Orbax raises a ValueError for a tree or a shape that does not match.
            raise CheckpointError(
                f"{folder}: the checkpoint does not match this model: {error}"
            ) from error

    @contextlib.contextmanager
    def _explain_write_errors(self) -> Iterator[None]:
        """Raises a WriteError for a failed write, and reopens the manager for the next one."""
        try:
            with _as_write_error(self._directory):
                yield
        except WriteError as error:
            self._write_failed = True
            if paths.is_local(self._directory) and not self._directory.is_dir():
                raise WriteError(
                    f"{self._directory}: was removed, renamed or unmounted while the run was "
                    "writing to it. Nothing was written in its place. Restore it and rerun the "
                    "same command"
                ) from error
            # Other processes are still in the failed write: they cannot reopen together.
            if jax.process_count() == 1:
                if self._opened:
                    with contextlib.suppress(Exception):
                        self._opened.close()
                    self._opened = None
                # This also deletes the partial files of the failed write, to free disk space. A
                # bucket may still be unreachable; a disk that fails here is tried once more when
                # the manager is used.
                if paths.is_local(self._directory):
                    with contextlib.suppress(WriteError):
                        self._opened = self._open()
            raise

    def _delete(self, step: int) -> None:
        """Deletes an old checkpoint in a bucket."""
        assert not paths.is_local(self._directory)
        if jax.process_index() == 0:
            integrity.delete_checkpoint(self._directory / str(step))

    def _prepare_commit(self, folder: paths.Path) -> None:
        """Reads a written checkpoint back and writes its manifest, before it is committed."""
        _check_restorable(folder)
        self._before_commit()
        integrity.write_manifest(folder, exclude=(_orbax_private.STEP_METADATA,))

    def _options(self, directory: paths.Path) -> ocp.CheckpointManagerOptions:
        kept = [_managers.LatestN(n=self._keep_last)]
        if self._keep_best:
            best = _managers.BestN(
                get_metric_fn=_top1, n=self._keep_best, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        is_local = paths.is_local(directory)
        before_commit = (
            _orbax_private.before_commit(directory, self._prepare_commit)
            if paths.is_local(directory)
            else lambda: self._prepare_commit(directory / str(self._saving))
        )
        return ocp.CheckpointManagerOptions(
            create=is_local,
            step_name_format=None if is_local else _orbax_private.BucketSteps(integrity.list_steps),
            preservation_policy=_managers.AnyPreservationPolicy(kept),
            # Without best_fn, Orbax would not write the metrics that BestN compares.
            best_fn=_top1,
            best_mode="max",
            read_only=self._read_only,
            # Corrupt checkpoints stay in place then, and their metrics must not be read.
            lightweight_initialize=self._read_only,
            async_options=ocp.AsyncOptions(
                # If a directory cannot be created in the background, the threads that should write
                # into it wait five minutes and keep the process from exiting.
                create_directories_asynchronously=False,
                # Orbax measures its timeout by the wall clock, which may be changed during a write.
                # Several processes need a timeout, as they wait for each other.
                timeout_secs=_YEAR_SECONDS if jax.process_count() == 1 else _TWENTY_MINUTES_SECONDS,
                # Runs in the background, in process 0.
                post_finalization_callback=before_commit,
            ),
        )


def _is_undecodable(error: Exception) -> bool:
    """Whether a failure to restore is due to contents that Orbax or TensorStore cannot decode."""
    # A key can be missing in Orbax's JSON files.
    is_json_error = isinstance(error, json.JSONDecodeError | UnicodeDecodeError | KeyError)
    return is_json_error or bool(_UNDECODABLE.search(str(error)))


def _local_handler() -> ocp.PyTreeCheckpointHandler:
    """Returns a handler that reads and merges arrays in this process only."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None)
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)


def _exists(directory: paths.Path) -> bool:
    if paths.is_local(directory):
        return directory.is_dir()
    return bool(buckets.list_files(directory))


def _delete_unfinished(directory: paths.Path) -> None:
    if paths.is_local(directory):
        _orbax_private.delete_unfinished(directory)
    else:
        integrity.delete_unfinished(directory)


def _finalize_unmerged(directory: pathlib.Path) -> None:
    """Finalizes checkpoints that older versions left unmerged in paths with brackets."""
    for step in integrity.list_steps(directory):
        checkpoint = directory / str(step)
        for item in integrity.unmerged_items(checkpoint):
            plain = paths.PlainPath(checkpoint / item)
            with contextlib.closing(plain), contextlib.closing(_local_handler()) as handler:
                handler.finalize(plain.path)


def _check_restorable(folder: paths.Path) -> None:
    """Reads a finished checkpoint as a restore would, array by array.

    Checksums prove that files are unchanged, not that they can be restored: if Orbax finds no
    per-process files to merge, it silently skips the merge.

    Raises:
      WriteError: if an array cannot be read.
    """
    try:
        with _translate_errors(folder), contextlib.closing(_local_handler()) as handler:
            for item in integrity.ARRAYS:
                arrays = handler.metadata(folder / item).tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays)
                handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except buckets.BucketError:
        raise
    except Exception as error:
        raise WriteError(
            f"{folder}: the checkpoint was written but cannot be read back: "
            f"{str(error).partition('[')[0].strip()}. Earlier checkpoints are intact. Use another "
            "--workdir, on another file system if this happens again"
        ) from error


def _wait_for_all_processes(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _training_item(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "opt_state": state.opt_state,
        "metrics": state.metrics.checkpoint_item(),
    }


@contextlib.contextmanager
def _silence_failed_writes() -> Iterator[None]:
    """Silences Python's reports about tasks and threads of failed Orbax writes in the block.

    Orbax writes each array in a separate task, and waits for the first failure. On garbage
    collection, Python would report the errors of all other tasks, and those that never ran, in
    pages of text after the one relevant message. Errors of threads are raised again where they are
    joined.
    """
    show_thread, show_unraisable = threading.excepthook, sys.unraisablehook
    tasks = logging.getLogger("asyncio")

    def show_other_threads(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError | WriteError) and not _is_write_failure(
            failure.exc_value
        ):
            show_thread(failure)

    def show_other_unraisable(failure: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(failure.exc_value):
            show_unraisable(failure)

    def is_other(record: logging.LogRecord) -> bool:
        return not (record.exc_info and _is_write_failure(record.exc_info[1]))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        threading.excepthook, sys.unraisablehook = show_other_threads, show_other_unraisable
        tasks.addFilter(is_other)
        try:
            yield
        finally:
            threading.excepthook, sys.unraisablehook = show_thread, show_unraisable
            tasks.removeFilter(is_other)


def _is_write_failure(error: BaseException | None) -> bool:
    return bool(disk_failure(error)) or (error is not None and buckets.is_failure(error))


def _translate_errors(folder: paths.Path) -> contextlib.AbstractContextManager[None]:
    """Turns errors of libraries into a BucketError if a folder is in a bucket."""
    return contextlib.nullcontext() if paths.is_local(folder) else buckets.translate_errors(folder)


@contextlib.contextmanager
def _as_write_error(directory: paths.Path) -> Iterator[None]:
    """Turns a failure to write into a WriteError that says what is intact and what to do."""
    try:
        with _translate_errors(directory):
            yield
    except buckets.BucketError as error:
        traceback.clear_frames(error.__traceback__)
        raise WriteError(f"{error}. Earlier checkpoints are intact") from error
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not disk_failure(error):
            raise
        # Local variables in its frames would keep the objects of the failed write alive.
        traceback.clear_frames(error.__traceback__)
        raise WriteError(
            f"{directory}: a checkpoint could not be written: {disk_failure(error) or error}. "
            "Earlier checkpoints are intact. Free disk space or fix the directory, then rerun the "
            "same command"
        ) from error
