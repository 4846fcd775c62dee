"""Averages of parameters and BatchNorm statistics, used for evaluation.

Pure functions, so that an average is one more tree in the training state, saved, restored and
sharded with the rest. The bias towards the start is corrected by a decay that depends on the step
alone, so the correction needs no state.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp

Tree = TypeVar("Tree")


def decay(step: int | jax.Array, time_constant_steps: int) -> jax.Array:
    """Returns the decay of a moving average, min(1 - 1 / T, (1 + step) / (10 + step)).

    The second term lets the average forget the initial values within the first steps; a constant
    decay would carry them for about T steps (TensorFlow's ExponentialMovingAverage with
    num_updates).

    Args:
      step: number of previous updates of the average.
      time_constant_steps: T, at least 1; after T updates the weight of a value has fallen to 1/e.

    Returns:
      float32 [], the weight of the old average.

    >>> [round(float(decay(step, 100)), 2) for step in (0, 10, 10_000)]
    [0.1, 0.55, 0.99]
    """
    return jnp.minimum(1 - 1 / time_constant_steps, _starting_decay(step))


def _starting_decay(step: int | jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    return (1 + step) / (10 + step)


def update(average: Tree, values: Tree, decay: jax.Array) -> Tree:
    """Returns decay * average + (1 - decay) * values, leaf by leaf.

    Args:
      average: tree of float32 arrays.
      values: tree of the same structure, shapes and dtypes.
      decay: float32 [], from the function `decay`.

    Returns:
      The new average.
    """
    return jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, values)


def correct_start(before: Tree, after: Tree, step: jax.Array, momentum: float) -> Tree:
    """Corrects BatchNorm's running statistics after a step for the start of training.

    A constant momentum of 0.9 carries the initial zeros and ones, and the statistics of the first
    and fastest-changing parameters, for tens of steps. Here the weight of the old statistics
    follows `decay` instead: it rises from 0.1 to the momentum, which it reaches after 80 steps for
    0.9. From then on the statistics are returned unchanged.

    Args:
      before: running statistics before the step, float32.
      after: momentum * before + (1 - momentum) * batch statistics, as returned by the network.
      step: number of steps finished before, int32 [].
      momentum: weight of the old statistics in `after`, below 1.

    Returns:
      d * before + (1 - d) * batch statistics, with d = min(momentum, (1 + step) / (10 + step)).
    """
    keep = _starting_decay(step)
    # Relative to the network's own update.
    scale = (1 - keep) / (1 - momentum)
    return jax.tree.map(
        lambda old, new: jnp.where(keep < momentum, old + scale * (new - old), new), before, after
    )
