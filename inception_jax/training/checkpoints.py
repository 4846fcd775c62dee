"""Checkpoints, the only module that knows Orbax.

A checkpoint is a folder named by its step, with three items: `model` (parameters, BatchNorm
statistics and their averages: all that evaluation needs), `training` (step, optimizer state, metric
sums) and `progress` (JSON: seconds spent so far). Orbax writes it under a temporary name, in the
background, and renames it when it is whole: a kill at any moment leaves the checkpoint before it.
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import orbax.checkpoint as ocp

from inception_jax.errors import CheckpointError, UserError
from inception_jax.training.state import TrainState

_managers = ocp.checkpoint_managers
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
      read_only: never write or delete anything.
    """

    def __init__(
        self,
        directory: pathlib.Path,
        *,
        keep_last: int = 1,
        keep_best: int = 1,
        read_only: bool = False,
    ) -> None:
        self._directory = directory
        if read_only and not directory.is_dir():
            raise CheckpointError(
                f"{directory}: there are no checkpoints here; train first, with the same --workdir"
            )
        kept = [_managers.LatestN(n=keep_last)]
        if keep_best:
            kept.append(
                _managers.BestN(
                    get_metric_fn=_top1, n=keep_best, keep_checkpoints_without_metrics=False
                )
            )
        with _readable_errors(directory):
            self._manager = _Manager(
                directory.absolute(),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=_managers.AnyPreservationPolicy(kept),
                    # Without best_fn, Orbax would not write the metrics that BestN compares.
                    best_fn=_top1,
                    best_mode="max",
                    cleanup_tmp_directories=not read_only,
                    read_only=read_only,
                ),
            )

    def __enter__(self) -> Self:
        return self

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

    def latest_step(self) -> int | None:
        """Returns the newest step, or None if there is no checkpoint."""
        return self._manager.latest_step()

    def resolve(self, which: str) -> int:
        """Returns the step that "best", "last" or a number stands for.

        Raises:
          UserError: if it is none of them.
          CheckpointError: if there is no such checkpoint.
        """
        steps = sorted(self._manager.all_steps())
        if which == "last":
            step = self._manager.latest_step()
        elif which == "best":
            step = self._manager.best_step()
        elif which.isdecimal():
            step = int(which) if int(which) in steps else None
        else:
            raise UserError(f"--checkpoint={which}: must be best, last or the number of a step")
        if step is None:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(
                f"{self._directory}: there is no checkpoint {which!r}; the steps there are: {there}"
            )
        return step

    def save(
        self, state: TrainState, *, progress: Mapping[str, Any], metrics: Mapping[str, float] | None
    ) -> None:
        """Starts to write a checkpoint; it is copied from the devices when this returns.

        Args:
          state: to save; its step names the checkpoint.
          progress: what else to remember, as JSON.
          metrics: of an evaluation at this step, with "top1"; None if there was none.
        """
        step = int(state.step)
        with _readable_errors(self._directory):
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
        restored = self._restore(
            step,
            model=ocp.args.StandardRestore(like.model_item()),
            training=ocp.args.StandardRestore(_training_item(like)),
            progress=ocp.args.JsonRestore(),
        )
        return like.replace(**restored.model, **restored.training), restored.progress

    def restore_model(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
        """Returns params, batch_stats and average of a step, and no more.

        Args:
          step: of a checkpoint that is there.
          like: shapes, types and shardings, as of `TrainState.model_item`.
        """
        return self._restore(step, model=ocp.args.StandardRestore(like)).model

    def metrics(self, step: int) -> dict[str, float]:
        """Returns the metrics that a step was saved with; empty if there were none."""
        return dict(self._manager.metrics(step) or {})

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as error:
            # Orbax reports a tree or a shape that does not fit with a ValueError.
            raise CheckpointError(
                f"{self._directory / str(step)}: the checkpoint does not fit this model: {error}"
            ) from error


def _training_item(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "metrics": state.metrics}


@contextlib.contextmanager
def _readable_errors(directory: pathlib.Path) -> Iterator[None]:
    """Turns a failure to write into a message that says what is safe and what to do.

    Orbax and TensorStore report a full disk in several types, so the text decides.
    """
    try:
        yield
    except Exception as error:
        reasons = [text for text in map(os.strerror, _STORAGE_ERRORS) if text in str(error)]
        if isinstance(error, OSError) or reasons:
            reason = reasons[0] if reasons else str(error)
            raise UserError(
                f"{directory}: a checkpoint could not be written: {reason}. The ones "
                "before it are whole. Make room or mend the folder, and start the command again"
            ) from error
        raise
