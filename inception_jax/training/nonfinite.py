"""Detects, locates and skips non-finite losses and gradients.

The devices record the first such step in the metrics (`FirstStep`), so that no step waits for the
host, which checks it with each report and before each save. With `config.train.on_nonfinite` =
"skip" they record the first step of the current streak instead: a finite step clears it, unless the
streak has reached the limit, which is then kept. So the state has the same structure either way,
and a resumed run continues the count.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inception_jax.training.metrics import NEVER, FirstStep, all_finite
from inception_jax.training.state import TrainState


def finite_flags(loss: jax.Array, grads: Mapping[str, Any]) -> jax.Array:
    """Returns whether the loss and the gradient of each of M modules are finite: bool [1 + M].

    The gradient norm uses the same sums of squares, so they cost nothing extra.

    Args:
      loss: float32 [B].
      grads: gradients by top-level module; the result follows the sorted names.
    """
    squares = [optax.tree.norm(grads[name], squared=True) for name in sorted(grads)]
    return jnp.stack([all_finite(loss), *map(jnp.isfinite, squares)])


def skip_if_nonfinite(
    before: TrainState, after: TrainState, finite: jax.Array, limit: int
) -> TrainState:
    """Returns `after` for a finite step, else `before` with only its counters incremented.

    The step number and the schedule's count advance in either case, as batch and learning rate are
    functions of the step.

    Args:
      before, after: state before and after the step.
      finite: bool scalar.
      limit: number of consecutive skipped steps at which the run must stop.
    """

    def keep(new: Any, old: Any) -> Any:
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jnp.where(finite, new, old)

    kept = jax.tree.map(
        keep, after, before, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState)
    )
    streak_start = before.metrics.first_nonfinite_step.step
    reached = (streak_start != NEVER) & (after.step - streak_start >= limit)
    begins = jnp.where(streak_start == NEVER, after.step, streak_start)
    streak_start = jnp.where(reached, streak_start, jnp.where(finite, NEVER, begins))
    metrics = kept.metrics.replace(first_nonfinite_step=FirstStep(streak_start))
    return kept.replace(step=after.step, metrics=metrics)


def describe(finite: np.ndarray, modules: Sequence[str]) -> str:
    """Describes what was not finite in a step, including the verb; '' if everything was.

    Args:
      finite: bool [1 + M], from `finite_flags`.
      modules: M names, sorted.

    >>> describe(np.array([False, True, False]), ["conv1", "conv2"])
    'the loss and the gradient of conv2 were'
    """
    bad = [name for name, good in zip(modules, finite[1:], strict=True) if not good]
    what = [] if finite[0] else ["the loss"]
    if bad and len(bad) == len(modules):
        what.append("the gradient of all modules")
    elif bad:
        what.append(f"the gradient of {', '.join(bad)}")
    return " and ".join(what) + (" were" if len(what) > 1 else " was") if what else ""
