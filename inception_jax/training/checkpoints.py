"""Checkpoints, the only module that knows Orbax.

A checkpoint is a folder named by its step, with three items: `model` (parameters, BatchNorm
statistics and their averages: all that evaluation needs), `training` (step, optimizer state, metric
sums) and `progress` (JSON: seconds spent so far). Orbax writes it under a temporary name, in the
background; then its manifest is written, and it is renamed: a kill at any moment leaves the
checkpoint before it, and what bears its name has checksums of all its files. They are compared
before it is restored; a damaged one is named, and the one before it used.
"""

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

from inception_jax.errors import CheckpointError, UserError, WriteError
from inception_jax.storage import integrity, manifest, paths
from inception_jax.training.state import TrainState

_managers = ocp.checkpoint_managers
_YEAR, _MINUTES_20 = 365 * 24 * 3600, 1200
_STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


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
        log: integrity.Log = integrity.say,
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
                integrity.set_aside_damaged(directory, log)
            _wait_for_all_processes("damaged checkpoints set aside")
            with _readable_errors(directory):
                directory.mkdir(parents=True, exist_ok=True)
        self._options = _options(keep_last, keep_best, read_only)
        self._manager = self._open()

    def _open(self) -> _Manager:
        with _readable_errors(self._directory):
            self._plain = paths.Plain(self._directory)
            return _Manager(self._plain.path, options=self._options)

    def __enter__(self) -> Self:
        self._excepthook = threading.excepthook
        threading.excepthook = self._thread_failed
        _silence_leftovers()
        return self

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Leaves out the traceback of a thread of Orbax's that could not write.

        Orbax raises the error again where it is waited for, and there it becomes one message.
        """
        if not (isinstance(failure.exc_value, OSError) or _storage_errors(failure.exc_value)):
            self._excepthook(failure)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for a write under way. Its failure does not hide an error raised before."""
        try:
            with _readable_errors(self._directory):
                self._manager.close()
        except Exception:
            if error is None:
                raise
        finally:
            threading.excepthook = self._excepthook
            self._plain.close()

    def latest_step(self) -> int | None:
        """Returns the newest step, or None if there is no checkpoint."""
        return self._manager.latest_step()

    def resolve(self, which: str) -> int:
        """Returns the step that "best", "last" or a number stands for, of those that are whole.

        Raises:
          UserError: if it is none of them.
          CheckpointError: if there is no such checkpoint, or the one of that number is damaged.
        """
        steps = integrity.steps(self._directory)
        if which in ("best", "last"):
            candidates = self._ranked(which)
        elif which.isdecimal():
            candidates = [int(which)] if int(which) in steps else []
        else:
            raise UserError(f"--checkpoint={which}: must be best, last or the number of a step")
        for step in candidates:
            if not (problem := integrity.problem(self._directory / str(step))):
                return step
            self._log(f"{self._directory / str(step)}: this checkpoint is damaged: {problem}")
        there = ", ".join(map(str, steps)) or "none"
        whole = "whole " if candidates else ""
        raise CheckpointError(
            f"{self._directory}: there is no {whole}checkpoint {which!r}; the steps there are: "
            f"{there}"
        )

    def roles(self, step: int) -> str:
        """Returns which of "best" and "last" a step is: "best", "last", "best and last" or ""."""
        return " and ".join(each for each in ("best", "last") if self._ranked(each)[:1] == [step])

    def _ranked(self, which: str) -> list[int]:
        """Returns all steps, the last first, or those that were evaluated, the best first."""
        steps = integrity.steps(self._directory)
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
            self._check_space(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
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

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state and progress of a step.

        Args:
          step: of a checkpoint that is there.
          like: shapes, types and shardings of the state; the devices may be others than those that
            saved it.
        """
        training = _training_item(like)
        with self._explained(step):
            # Metrics may have been added to the run since, or taken away.
            training["metrics"] = self._saved_metrics(step, training["metrics"])
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    model=ocp.args.StandardRestore(like.model_item()),
                    training=ocp.args.StandardRestore(training),
                    progress=ocp.args.JsonRestore(),
                ),
            )
        empty = jax.tree.map(
            lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
            like.metrics,
        )
        found = restored.training
        found["metrics"] = empty.with_item(found["metrics"])
        return like.replace(**restored.model, **found), restored.progress

    def _saved_metrics(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what the metrics that a step was saved with look like, by name.

        Args:
          step: of a checkpoint that is there.
          like: of the metrics that the run has now.
        """
        placed = jax.tree.leaves(like)[0].sharding
        with contextlib.closing(_handler()) as handler:
            saved = handler.metadata(self._plain.path / str(step) / "training").tree["metrics"]
        others = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed), saved
        )
        return {name: like.get(name, other) for name, other in others.items()}

    def restore_model(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Returns params, batch_stats and average of a step, and no more.

        Args:
          step: of a checkpoint that is there.
          like: shapes, types and shardings, as of `TrainState.model_item`.
        """
        with self._explained(step):
            args = ocp.args.Composite(model=ocp.args.StandardRestore(like))
            return self._manager.restore(step, args=args).model

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics that a step was saved with; empty if there are none to be read."""
        try:
            found = json.loads((self._directory / str(step) / "metrics" / "metrics").read_bytes())
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
            if not (folder / manifest.NAME).exists():
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

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if free < needed:
            raise WriteError(
                f"{self._directory}: a checkpoint could not be written: it takes up to "
                f"{needed / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free. The ones before it "
                "are whole. Make room, and start the command again"
            )


def _options(keep_last: int, keep_best: int, read_only: bool) -> ocp.CheckpointManagerOptions:
    kept = [_managers.LatestN(n=keep_last)]
    if keep_best:
        kept.append(
            _managers.BestN(
                get_metric_fn=_top1, n=keep_best, keep_checkpoints_without_metrics=False
            )
        )
    return ocp.CheckpointManagerOptions(
        preservation_policy=_managers.AnyPreservationPolicy(kept),
        # Without best_fn, Orbax would not write the metrics that BestN compares.
        best_fn=_top1,
        best_mode="max",
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
        # Where damaged ones are left in their place, it is not to read their metrics.
        lightweight_initialize=read_only,
        temporary_path_class=_ManifestedPath,
        async_options=ocp.AsyncOptions(
            # Where a folder cannot be made in the background, the threads that are to write into
            # it wait five minutes, and keep the process from ending.
            create_directories_asynchronously=False,
            # Orbax counts its limit by the wall clock, which may be set while it writes. Several
            # processes need one: they wait for each other.
            timeout_secs=_YEAR if jax.process_count() == 1 else _MINUTES_20,
        ),
    )


class _ManifestedPath(atomicity.AtomicRenameTemporaryPath):
    """Where a checkpoint is written until it is whole, was read back and has a manifest.

    Orbax gives the finished folder a second temporary name; it gets its own once the manifest is in
    it. So there is no moment at which a checkpoint bears its name and has none. Both temporary
    names have the ending by which Orbax knows what a killed process left.
    """

    @classmethod
    def from_final(cls, final_path: Any, **options: Any) -> Any:
        """Returns the place for a checkpoint, or for one of its items, which need no manifest."""
        if not final_path.name.isdecimal():
            return atomicity.AtomicRenameTemporaryPath.from_final(final_path, **options)
        staged = final_path.with_name(final_path.name + atomicity.TMP_DIR_SUFFIX)
        return super().from_final(staged, **options)

    def get_final(self) -> Any:
        """Returns where the checkpoint is once it is whole."""
        staged = super().get_final()
        return staged.with_name(staged.name.partition(atomicity.TMP_DIR_SUFFIX)[0])

    async def finalize(self) -> None:
        """Reads all back, writes the manifest and names the folder; in one process's background."""
        await super().finalize()
        staged = pathlib.Path(super().get_final())
        await asyncio.to_thread(_check_restorable, staged)
        await asyncio.to_thread(manifest.write, staged)
        staged.rename(self.get_final())


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Returns what reads and merges arrays in this process alone; the others are elsewhere."""
    alone = ocp.options.MultiprocessingOptions(primary_host=None)
    return ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)


def _merge_unmerged(directory: pathlib.Path) -> None:
    """Finishes checkpoints that older versions left in a folder with brackets in its path."""
    for step in integrity.steps(directory) if directory.is_dir() else []:
        for item in integrity.unmerged(directory / str(step)):
            plain = paths.Plain(item)
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
            f"{str(error).partition('[')[0].strip()}. The ones before it are whole. Give another "
            "--workdir, on another file system if this happens again"
        ) from error


def _wait_for_all_processes(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _training_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "metrics": state.metrics.item()}


@functools.cache
def _silence_leftovers() -> None:
    """Keeps Python from reporting what Orbax leaves of a failed write, for the rest of the process.

    Orbax writes each array in a task of its own, and waits for the first that fails. When the
    garbage is collected, Python would report the errors of all others, and those that never ran,
    in pages of text behind the one message that says it.
    """
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and _storage_errors(record.exc_info[1]))
    )
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    report = sys.unraisablehook

    def report_others(failure: "sys.UnraisableHookArgs") -> None:
        if "Event loop is closed" not in str(failure.exc_value):
            report(failure)

    sys.unraisablehook = report_others


def _storage_errors(error: BaseException | None) -> list[str]:
    """Returns which failures of storage an error tells of.

    Orbax and TensorStore report a full disk in several types, so the text decides.
    """
    return [text for text in map(os.strerror, _STORAGE_ERRORS) if text in str(error)]


@contextlib.contextmanager
def _readable_errors(directory: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write into a message that says what is safe and what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reasons = _storage_errors(error)
        if isinstance(error, OSError) or reasons:
            reason = reasons[0] if reasons else str(error)
            raise WriteError(
                f"{directory}: a checkpoint could not be written: {reason}. The ones "
                "before it are whole. Make room or mend the folder, and start the command again"
            ) from error
        raise
