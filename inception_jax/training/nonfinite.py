"""Losses and gradients that are not finite: where they come from, and what a step does about them.

The devices note the first such step in the metrics (`FirstStep`), so that no step waits for the
host, which looks at it with each report and before each save. With `config.train.on_nonfinite` =
"skip" that note is the first step of the present streak of them instead: a good step clears it,
unless the streak has reached the limit, which is then never forgotten. So the state has the same
structure either way, and a resumed run counts on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inception_jax.training.metrics import NEVER, FirstStep
from inception_jax.training.state import TrainState


def finite_flags(loss: jax.Array, grads: Mapping[str, Any]) -> jax.Array:
    """Returns what is finite: bool [1 + M], the loss and the gradient of each of M modules.

    The sums of squares are those that the gradient's norm is made of, so they cost nothing more.

    Args:
      loss: float32 [B].
      grads: by the names of the top-level modules; in the order of the names.
    """
    squares = [optax.tree.norm(grads[name], squared=True) for name in sorted(grads)]
    return jnp.stack([jnp.all(jnp.isfinite(loss)), *map(jnp.isfinite, squares)])


def skip_if_nonfinite(
    before: TrainState, after: TrainState, good: jax.Array, limit: int
) -> TrainState:
    """Returns the state after a step that changes nothing where it is not good.

    Only the number of the step and the schedule's count rise then, as the batch and the learning
    rate are functions of the step.

    Args:
      before, after: state before the step, and after it if it is good.
      good: bool scalar.
      limit: steps in a row that may be skipped before the run is to stop.
    """

    def keep(new: Any, old: Any) -> Any:
        if isinstance(new, optax.ScaleByScheduleState):
            return new
        return jnp.where(good, new, old)

    kept = jax.tree.map(
        keep, after, before, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState)
    )
    streak_start = before.metrics.first_nonfinite_step.step
    reached = (streak_start != NEVER) & (after.step - streak_start >= limit)
    begins = jnp.where(streak_start == NEVER, after.step, streak_start)
    streak_start = jnp.where(reached, streak_start, jnp.where(good, NEVER, begins))
    metrics = kept.metrics.replace(first_nonfinite_step=FirstStep(streak_start))
    return kept.replace(step=after.step, metrics=metrics)


def describe(finite: np.ndarray, modules: Sequence[str]) -> str:
    """Returns what was not finite in a step, in words with their verb; '' if all was.

    Args:
      finite: bool [1 + M], of `finite_flags`.
      modules: M names, sorted.
    """
    bad = [name for name, good in zip(modules, finite[1:], strict=True) if not good]
    what = [] if finite[0] else ["the loss"]
    if bad and len(bad) == len(modules):
        what.append("the gradient of all modules")
    elif bad:
        what.append(f"the gradient of {', '.join(bad)}")
    return " and ".join(what) + (" were" if len(what) > 1 else " was") if what else ""
