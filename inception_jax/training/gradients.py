"""The gradient that a step hands to its update rule: of the batch, in parts, or of a neighbour."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from inception_jax.models.layers import ModelOutput
from inception_jax.runtime import sharding
from inception_jax.training.state import Variables


class GradOutput(NamedTuple):
    """What comes of one batch of B examples.

    Attributes:
      grads: of the mean loss, float32, shaped like the parameters.
      batch_stats: BatchNorm's running statistics after the batch.
      loss: float32 [B].
      logits: float32 [B, K].
    """

    grads: Variables
    batch_stats: Variables
    loss: jax.Array
    logits: jax.Array


# Of each example, float32 [B], from what the network returns and targets float32 [B, K].
Loss = Callable[[ModelOutput, jax.Array], jax.Array]
# (params, batch_stats, images float32 [B, H, W, 3], targets float32 [B, K], key of the dropout)
GradientFunction = Callable[[Variables, Variables, jax.Array, jax.Array, jax.Array], GradOutput]


def make_gradient(
    model: nn.Module, loss: Loss, *, num_microbatches: int, sam_rho: float, mesh: Mesh
) -> GradientFunction:
    """Returns the gradient of training: in micro-batches and sharpness-aware where asked for.

    Args:
      model: the network.
      loss: of each example.
      num_microbatches: in how many parts a batch is computed, one after another.
      sam_rho: radius of `sam_gradient`; 0: the plain gradient.
      mesh: the devices that share a batch.
    """

    def objective(
        params: Variables,
        batch_stats: Variables,
        images: jax.Array,
        targets: jax.Array,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[Variables, jax.Array, jax.Array]]:
        output, updated = model.apply(
            {"params": params, "batch_stats": batch_stats},
            images,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        of_each = loss(output, targets)
        return of_each.mean(), (updated.get("batch_stats", {}), of_each, output.logits)

    def plain(params: Variables, *rest: Any) -> GradOutput:
        grads, found = jax.grad(objective, has_aux=True)(params, *rest)
        return GradOutput(grads, *found)

    gradient: GradientFunction = plain
    if num_microbatches > 1:
        gradient = accumulate_gradients(plain, num_microbatches, mesh)
    return sam_gradient(gradient, sam_rho) if sam_rho else gradient


def accumulate_gradients(
    gradient: GradientFunction, num_microbatches: int, mesh: Mesh
) -> GradientFunction:
    """Returns the mean gradient over equal parts of the batch, computed one after another.

    Only one part's activations are in memory at a time. BatchNorm normalises each part by its own
    statistics (over all devices), and its running statistics follow the parts in turn. Part i holds
    the rows i, i + N, i + 2 N, ... of N parts, so that each device has its share of every part
    already; its key is fold_in(key, i).

    Args:
      gradient: of one part.
      num_microbatches: how many; the batch must be divisible by them times the devices.
      mesh: the devices that share each part.
    """

    def divide(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, num_microbatches, *x.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(x, sharding.microbatch_sharding(mesh))

    def join(x: jax.Array) -> jax.Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def mean(
        params: Variables,
        batch_stats: Variables,
        images: jax.Array,
        targets: jax.Array,
        key: jax.Array,
    ) -> GradOutput:
        def add(
            carry: tuple[Variables, Variables], part: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[tuple[Variables, Variables], tuple[jax.Array, jax.Array]]:
            total, batch_stats = carry
            index, images, targets = part
            found = gradient(params, batch_stats, images, targets, jax.random.fold_in(key, index))
            return (optax.tree.add(total, found.grads), found.batch_stats), found[2:]

        (total, batch_stats), (loss, logits) = jax.lax.scan(
            add,
            (optax.tree.zeros_like(params), batch_stats),
            (jnp.arange(num_microbatches), divide(images), divide(targets)),
        )
        return GradOutput(
            optax.tree.scale(1 / num_microbatches, total), batch_stats, join(loss), join(logits)
        )

    return mean


def sam_gradient(gradient: GradientFunction, rho: float) -> GradientFunction:
    """Returns the gradient of SAM (Foret et al. 2021, arXiv:2010.01412, algorithm 1).

    With g the gradient at the parameters p, it is the gradient at p + rho * g / ||g||, the norm
    taken over all parameters, on the same batch with the same dropout. Loss, logits and BatchNorm's
    running statistics are those of the first pass, at p itself. Experimental: no recorded run has
    used it.

    Args:
      gradient: of the loss; with micro-batches, the mean over all of them.
      rho: radius of the neighbourhood, in the norm of all parameters together.
    """

    def at_neighbour(params: Variables, *rest: Any) -> GradOutput:
        here = gradient(params, *rest)
        # A gradient of zeros leaves the parameters where they are.
        factor = rho / (optax.tree.norm(here.grads) + 1e-12)
        neighbour = optax.tree.add_scale(params, factor, here.grads)
        return here._replace(grads=gradient(neighbour, *rest).grads)

    return at_neighbour
