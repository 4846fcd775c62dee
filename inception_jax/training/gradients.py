"""Computes training gradients: plain, accumulated over micro-batches, or sharpness-aware (SAM)."""

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
    """Gradient and forward results of one batch of B examples.

    Attributes:
      grads: gradient of the mean loss, float32, shaped like the parameters.
      batch_stats: BatchNorm's running statistics after the batch.
      loss: float32 [B].
      logits: float32 [B, K].
    """

    grads: Variables
    batch_stats: Variables
    loss: jax.Array
    logits: jax.Array


# (network output, targets float32 [B, K]) → loss of each example, float32 [B]
Loss = Callable[[ModelOutput, jax.Array], jax.Array]
# (params, batch_stats, images float32 [B, H, W, 3], targets float32 [B, K], dropout key)
GradientFunction = Callable[[Variables, Variables, jax.Array, jax.Array, jax.Array], GradOutput]


def make_gradient(
    model: nn.Module, loss: Loss, *, num_microbatches: int, sam_rho: float, mesh: Mesh
) -> GradientFunction:
    """Returns the gradient function for training, with micro-batches and SAM if requested.

    Args:
      model: the network.
      loss: computes the loss of each example.
      num_microbatches: number of parts that a batch is split into, computed sequentially.
      sam_rho: radius of `sam_gradient`; 0 disables SAM.
      mesh: the devices that a batch is split over.
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
        with jax.named_scope("loss"):
            per_example_loss = loss(output, targets)
        return per_example_loss.mean(), (
            updated.get("batch_stats", {}),
            per_example_loss,
            output.logits,
        )

    def plain(params: Variables, *rest: Any) -> GradOutput:
        grads, aux = jax.grad(objective, has_aux=True)(params, *rest)
        return GradOutput(grads, *aux)

    gradient: GradientFunction = plain
    if num_microbatches > 1:
        gradient = accumulate_gradients(plain, num_microbatches, mesh)
    return sam_gradient(gradient, sam_rho) if sam_rho else gradient


def accumulate_gradients(
    gradient: GradientFunction, num_microbatches: int, mesh: Mesh
) -> GradientFunction:
    """Returns a function that averages gradients over N micro-batches, computed sequentially.

    Only one micro-batch's activations are in memory at a time. BatchNorm normalizes each by its own
    statistics (over all devices), and its running statistics are updated by each in turn.
    Micro-batch i consists of the rows i, i + N, i + 2 N, ..., so that each device already has its
    part of every micro-batch; its key is fold_in(key, i).

    Args:
      gradient: gradient function for one micro-batch.
      num_microbatches: N; the batch must be divisible by N times the number of devices.
      mesh: the devices that each micro-batch is split over.
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
            output = gradient(params, batch_stats, images, targets, jax.random.fold_in(key, index))
            return (optax.tree.add(total, output.grads), output.batch_stats), output[2:]

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
    """Returns the SAM gradient function (Foret et al. 2021, arXiv:2010.01412, algorithm 1).

    With g the gradient at the parameters p, it computes the gradient at p + rho * g / ||g||, using
    the global norm, on the same batch with the same dropout. Loss, logits and BatchNorm's running
    statistics come from the first pass, at p. Experimental: no recorded run has used it.

    Args:
      gradient: gradient function of the loss; with micro-batches, of their mean.
      rho: radius of the neighborhood in the global norm.
    """

    def perturbed(params: Variables, *rest: Any) -> GradOutput:
        output = gradient(params, *rest)
        # A zero gradient leaves the parameters unchanged.
        factor = rho / (optax.tree.norm(output.grads) + 1e-12)
        neighbor = optax.tree.add_scale(params, factor, output.grads)
        return output._replace(grads=gradient(neighbor, *rest).grads)

    return perturbed
