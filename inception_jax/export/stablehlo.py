"""StableHLO by `jax.export`: for CPUs, CUDA GPUs and TPUs in one file."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from inception_jax.export.program import Classify, pixels_to_logits
from inception_jax.models.weights import Weights

PLATFORMS = ("cpu", "cuda", "tpu")


def export(weights: Weights) -> bytes:
    """Returns a network as `jax.export` serialises it, for CPUs, CUDA GPUs and TPUs in one."""
    size = weights.image_size
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(pixels_to_logits(weights)), platforms=PLATFORMS)(pixels)
    return bytes(exported.serialize())


def load(data: bytes) -> Classify:
    """Returns an exported network as a function of NumPy arrays."""
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)
    return lambda pixels: np.asarray(call(pixels))
