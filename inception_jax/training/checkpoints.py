"""Checkpoints, the only module that knows Orbax.

A checkpoint is a folder named by its step, with three items: `model` (parameters, BatchNorm
statistics and their averages: all that evaluation needs), `training` (step, optimizer state, metric
sums) and `progress` (JSON: seconds spent so far). Orbax writes it under a temporary name, in the
background; then its manifest is written, and it is renamed: a kill at any moment leaves the
checkpoint before it, and what bears its name has checksums of all its files. They are compared
before it is restored; a damaged one is named, and the one before it used.
"""

import contextlib
import gc
import logging
import pathlib
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from inception_jax import console
from inception_jax.errors import CheckpointError, UserError, WriteError
from inception_jax.storage import integrity, paths
from inception_jax.storage.space import check_space, disk_failure
from inception_jax.training import _orbax_private
from inception_jax.training.state import TrainState

_managers = ocp.checkpoint_managers
_YEAR, _MINUTES_20 = 365 * 24 * 3600, 1200


def _top1(metrics: Mapping[str, float]) -> float:
    return metrics["top1"]


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, which leaves JAX's preemption service to the training loop.

    The service notes the step that each process last asked about, and from those of all processes
    chooses where they stop. Orbax's asks about the step it has just written, from a thread of its
    own, when training is further: the step chosen could be one that has passed.
    """

    def reached_preemption(self, step: int) -> bool:
        """Says that there is none, without asking the service."""
        return False


class Checkpoints:
    """The checkpoints of one workdir; a context manager that waits for the last write.

    Args:
      directory: where they are; made if missing.
      keep_last: how many of the newest are kept.
      keep_best: how many of the best by validation top-1 are kept besides.
      read_only: never write, rename or delete anything.
      log: takes a line of text about each damaged checkpoint.

    Raises:
      CheckpointError: if there is nothing to read, or none of the checkpoints there is whole.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep_last: int = 1,
        keep_best: int = 1,
        read_only: bool = False,
        log: integrity.Log = console.log,
    ) -> None:
        self._directory = directory
        self._log = log
        if read_only and not directory.is_dir():
            raise CheckpointError(
                f"{directory}: there are no checkpoints here; train first, with the same --workdir"
            )
        if not read_only:
            # Before Orbax looks: what it reads of each checkpoint may be what is damaged.
            if jax.process_index() == 0:
                _merge_unmerged(directory)
                integrity.quarantine_corrupt(directory, log)
            _wait_for_all_processes("damaged checkpoints set aside")
            with _readable_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
        self._keep_last, self._keep_best, self._read_only = keep_last, keep_best, read_only
        self._cleanup = contextlib.ExitStack()
        self._write_failed = False
        self._manager = self._open()

    def _open(self) -> _Manager:
        with _readable_errors(self._directory):
            self._plain = paths.PlainPath(self._directory)
            return _Manager(self._plain.path, options=self._options(self._plain.path))

    def __enter__(self) -> Self:
        self._cleanup.enter_context(_without_leftovers())
        return self

    def __exit__(self, _: Any, error: BaseException | None, trace: Any) -> None:
        """Waits for a write under way. Its failure does not hide an error raised before."""
        try:
            with _readable_errors(self._directory):
                self._manager.close()
        except Exception:
            self._write_failed = True
            if error is None:
                raise
        finally:
            self._plain.close()
            if self._write_failed:
                gc.collect()  # What is left of the failed writes is not reported later, either.
            self._cleanup.close()

    def latest_step(self) -> int | None:
        """Returns the newest step, or None if there is no checkpoint."""
        return self._manager.latest_step()

    def resolve(self, which: str) -> int:
        """Returns the step that "best", "last" or a number stands for, of those that are whole.

        Raises:
          UserError: if it is none of them.
          CheckpointError: if there is no such checkpoint, or the one of that number is damaged.
        """
        steps = integrity.list_steps(self._directory)
        if which in ("best", "last"):
            candidates = self._ranked(which)
        elif which.isdecimal():
            candidates = [int(which)] if int(which) in steps else []
        else:
            raise UserError(f"--checkpoint={which}: must be best, last or the number of a step")
        for step in candidates:
            if not (found := integrity.find_corruption(self._directory / str(step))):
                return step
            self._log(f"{self._directory / str(step)}: this checkpoint is damaged: {found}")
        there = ", ".join(map(str, steps)) or "none"
        whole = "intact " if candidates else ""
        raise CheckpointError(
            f"{self._directory}: there is no {whole}checkpoint {which!r}; the steps there are: "
            f"{there}"
        )

    def roles(self, step: int) -> str:
        """Returns which of "best" and "last" a step is: "best", "last", "best and last" or ""."""
        return " and ".join(each for each in ("best", "last") if self._ranked(each)[:1] == [step])

    def _ranked(self, which: str) -> list[int]:
        """Returns all steps, the last first, or those that were evaluated, the best first."""
        steps = integrity.list_steps(self._directory)
        if which == "last":
            return steps[::-1]
        top1 = {step: _top1(found) for step in steps if (found := self.metrics(step))}
        # Of equally good ones the last.
        return sorted(top1, key=lambda step: (top1[step], step), reverse=True)

    def wait(self) -> None:
        """Waits for the write under way.

        Raises:
          WriteError: if it failed; the checkpoints before it are there.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def save(
        self, state: TrainState, *, progress: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Starts to write a checkpoint; it is copied from the devices when this returns.

        Args:
          state: to save; its step names the checkpoint.
          progress: what else to remember, as JSON.
          metrics: of an evaluation at this step, with "top1"; None if there was none.

        Raises:
          WriteError: if it cannot be written, or the one before could not: an error of this write
            shows at the next call, or at the end.
        """
        step = int(state.step)
        with self._writing():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
            check_space(self._directory, size, "a checkpoint")
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
                f"{self._directory}: step {step} was not saved; newer ones are already there: "
                f"{sorted(self._manager.all_steps())}"
            )

    def restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state and progress of a step.

        Args:
          step: of a checkpoint that is there.
          abstract_state: shapes, types and shardings; the devices may be others than those that
            saved it.
        """
        training = _training_item(abstract_state)
        with self._explained(step):
            # Metrics may have been added to the run since, or taken away.
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
        found = restored.training
        found["metrics"] = empty.with_item(found["metrics"])
        return abstract_state.replace(**restored.model, **found), restored.progress

    def _saved_metrics(self, step: int, abstract_metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the metrics that a step was saved with look like, by name.

        Args:
          step: of a checkpoint that is there.
          abstract_metrics: of the metrics that the run has now, by name.
        """
        placed = jax.tree.leaves(abstract_metrics)[0].sharding
        with contextlib.closing(_handler()) as handler:
            saved = handler.metadata(self._plain.path / str(step) / "training").tree["metrics"]
        others = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), saved
        )
        return {name: abstract_metrics.get(name, other) for name, other in others.items()}

    def restore_model(self, step: int, abstract_model: Mapping[str, Any]) -> dict[str, Any]:
        """Returns params, batch_stats and average of a step, and no more.

        Args:
          step: of a checkpoint that is there.
          abstract_model: shapes, types and shardings, as of `TrainState.model_item`.
        """
        with self._explained(step):
            args = ocp.args.Composite(model=ocp.args.StandardRestore(abstract_model))
            return self._manager.restore(step, args=args).model

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics that a step was saved with; empty if there are none to be read."""
        try:
            found = self._manager.metrics(step)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) and "top1" in found else {}

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Explains a failure to restore."""
        folder = self._directory / str(step)
        try:
            yield
        except Exception as error:
            if not (folder / integrity.MANIFEST).exists():
                raise CheckpointError(
                    f"{folder}: cannot be restored: {error}. An older version wrote this "
                    "checkpoint, without checksums: it is damaged, or of another model. To use the "
                    "one before it, move the folder elsewhere"
                ) from error
            if not isinstance(error, ValueError):
                raise
            # Orbax reports a tree or a shape that does not fit with a ValueError.
            raise CheckpointError(
                f"{folder}: the checkpoint does not fit this model: {error}"
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Explains a failure to write, after which the next write starts from what is on disk."""
        try:
            with _readable_errors(self._directory):
                yield
        except WriteError as error:
            self._write_failed = True
            if not self._directory.is_dir():
                raise WriteError(
                    f"{self._directory}: is gone: removed, renamed or unmounted while the run was "
                    "writing to it. Nothing was written in its place. Put it back, and start the "
                    "command again"
                ) from error
            # Other processes are in the midst of the failed write: they cannot start anew with us.
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    self._manager.close()
                # It also removes what the failed write left, which a full disk needs.
                self._manager = self._open()
            raise

    def _options(self, directory: pathlib.Path) -> ocp.CheckpointManagerOptions:
        kept = [_managers.LatestN(n=self._keep_last)]
        if self._keep_best:
            best = _managers.BestN(
                get_metric_fn=_top1, n=self._keep_best, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        return ocp.CheckpointManagerOptions(
            preservation_policy=_managers.AnyPreservationPolicy(kept),
            # Without best_fn, Orbax would not write the metrics that BestN compares.
            best_fn=_top1,
            best_mode="max",
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
            # Where damaged ones are left in their place, it is not to read their metrics.
            lightweight_initialize=self._read_only,
            async_options=ocp.AsyncOptions(
                # Where a folder cannot be made in the background, the threads that are to write
                # into it wait five minutes, and keep the process from ending.
                create_directories_asynchronously=False,
                # Orbax counts its limit by the wall clock, which may be set while it writes.
                # Several processes need one: they wait for each other.
                timeout_secs=_YEAR if jax.process_count() == 1 else _MINUTES_20,
                # In the background, in process 0.
                post_finalization_callback=_orbax_private.before_commit(directory, _seal),
            ),
        )


def _seal(folder: pathlib.Path) -> None:
    """Reads a checkpoint back that is to get its name, and writes its manifest."""
    _check_restorable(folder)
    integrity.write_manifest(folder, exclude=(_orbax_private.STEP_METADATA,))


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Returns what reads and merges arrays in this process alone; the others are elsewhere."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None)
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)


def _merge_unmerged(directory: pathlib.Path) -> None:
    """Finishes checkpoints that older versions left in a folder with brackets in its path."""
    for step in integrity.list_steps(directory):
        for item in integrity.unmerged_items(directory / str(step)):
            plain = paths.PlainPath(item)
            with contextlib.closing(plain), contextlib.closing(_handler()) as handler:
                handler.finalize(plain.path)


def _check_restorable(folder: pathlib.Path) -> None:
    """Reads a finished checkpoint as a restore would, array by array.

    Checksums say that the files are those that were written, not that anything can be made of them:
    where Orbax finds no files of its processes to merge, it leaves that out in silence.

    Raises:
      WriteError: if an array cannot be read.
    """
    try:
        with contextlib.closing(_handler()) as handler:
            for item in integrity.ARRAYS:
                arrays = handler.metadata(folder / item).tree
                as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), arrays)
                handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    except Exception as error:
        raise WriteError(
            f"{folder}: a checkpoint was written, but cannot be read back: "
            f"{str(error).partition('[')[0].strip()}. Earlier checkpoints are intact. Use another "
            "--workdir, on another file system if this happens again"
        ) from error


def _wait_for_all_processes(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _training_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "metrics": state.metrics.item()}


@contextlib.contextmanager
def _without_leftovers() -> Iterator[None]:
    """Keeps Python from reporting what Orbax leaves of a failed write, inside the `with` block.

    Orbax writes each array in a task of its own, and waits for the first that fails. When the
    garbage is collected, Python would report the errors of all others, and those that never ran,
    in pages of text behind the one message that says it. The threads' errors are raised again where
    they are waited for.
    """
    show_thread, show_unraisable = threading.excepthook, sys.unraisablehook
    tasks = logging.getLogger("asyncio")

    def show_other_threads(failure: threading.ExceptHookArgs) -> None:
        if not _is_disk_failure(failure.exc_value):
            show_thread(failure)

    def show_other_unraisable(failure: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(failure.exc_value):
            show_unraisable(failure)

    def is_other(record: logging.LogRecord) -> bool:
        return not (record.exc_info and disk_failure(record.exc_info[1]))

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        threading.excepthook, sys.unraisablehook = show_other_threads, show_other_unraisable
        tasks.addFilter(is_other)
        try:
            yield
        finally:
            threading.excepthook, sys.unraisablehook = show_thread, show_unraisable
            tasks.removeFilter(is_other)


def _is_disk_failure(error: BaseException | None) -> bool:
    return isinstance(error, OSError | WriteError) or bool(disk_failure(error))


@contextlib.contextmanager
def _readable_errors(directory: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write into a message that says what is safe and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_disk_failure(error):
            raise
        # Their local variables would keep what is left of the write.
        traceback.clear_frames(error.__traceback__)
        raise WriteError(
            f"{directory}: a checkpoint could not be written: {disk_failure(error) or error}. "
            "Earlier checkpoints are intact. Free disk space or fix the directory, and rerun the "
            "same command"
        ) from error
