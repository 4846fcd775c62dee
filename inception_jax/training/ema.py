"""Exponential moving average of parameters and BatchNorm statistics, for evaluation.

Two pure functions, so that the average is one more tree in the training state: saved, restored and
sharded with the rest.
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
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(1 - 1 / time_constant_steps, (1 + step) / (10 + step))


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
