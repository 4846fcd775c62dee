"""Exponential moving averages that evaluation uses: of parameters, and BatchNorm's statistics.

Pure functions, so that an average is one more tree in the training state: saved, restored and
sharded with the rest. Each is corrected for its start by a decay that depends on the step alone, so
the correction needs no state of its own.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def decay(step: int | jax.Array, time_constant_steps: int) -> jax.Array:
    """Returns the share of the old average to keep: min(1 - 1 / T, (1 + step) / (10 + step)).

    The second term lets the average forget the initial values within the first steps, while a
    constant decay would carry them for some T steps (TensorFlow's ExponentialMovingAverage with
    num_updates).

    Args:
      step: updates of the average made before, from 0.
      time_constant_steps: T, at least 1; after T updates the weight of a value has fallen to 1/e.

    Returns:
      float32 [].
    """
    return jnp.minimum(1 - 1 / time_constant_steps, _starting_decay(step))


def _starting_decay(step: int | jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    return (1 + step) / (10 + step)


def update(average: Tree, values: Tree, decay: jax.Array) -> Tree:
    """Returns decay * average + (1 - decay) * values, leaf by leaf.

    Args:
      average: tree of float32 arrays.
      values: tree of the same structure, shapes and types.
      decay: float32 [], as the function `decay` gives it.

    Returns:
      The new average.
    """
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, values)


def correct_start(before: Tree, after: Tree, step: jax.Array, momentum: float) -> Tree:
    """Returns BatchNorm's running statistics after a step, corrected for the start of training.

    A constant momentum of 0.9 carries the initial zeros and ones, and the statistics of the first
    and fastest-changing parameters, for tens of steps. Here the share kept follows `decay` instead:
    it rises from 0.1 to the momentum, which it reaches after 80 steps for 0.9. From there on the
    statistics are returned as they are.

    Args:
      before: running statistics before the step, float32.
      after: momentum * before + (1 - momentum) * those of the batch, as the network returns them.
      step: steps finished before, int32 [].
      momentum: share of the old statistics that is left in `after`, below 1.

    Returns:
      d * before + (1 - d) * those of the batch, with d = min(momentum, (1 + step) / (10 + step)).
    """
    keep = _starting_decay(step)
    # How much further than the network's own update.
    scale = (1 - keep) / (1 - momentum)
    return jax.tree.map(
        lambda old, new: jnp.where(keep < momentum, old + scale * (new - old), new), before, after
    )
