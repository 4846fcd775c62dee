"""Exports StableHLO with `jax.export`: one file for CPUs, CUDA GPUs and TPUs."""

import traceback

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from inception_jax.errors import UserError
from inception_jax.export.program import LogitsFunction, pixels_to_logits
from inception_jax.models.weights import Weights

EXPORT_PLATFORMS = ("cpu", "cuda", "tpu")


def export(weights: Weights) -> bytes:
    """Returns a network serialized by `jax.export`, for CPUs, CUDA GPUs and TPUs in one file.

    Raises:
      UserError: if the network cannot be traced with a symbolic batch size.
    """
    size = weights.image_size
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    try:
        exported = jax.export.export(
            jax.jit(pixels_to_logits(weights)), platforms=EXPORT_PLATFORMS
        )(pixels)
    except TypeError as error:
        # Raised in a custom network that treats the number of images as an integer.
        if "_DimExpr" not in str(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"{frame.filename}, line {frame.lineno}: does not support a symbolic batch size "
            f"({error}); use images.shape[0] instead of len(images)"
        ) from error
    return bytes(exported.serialize())


def load(data: bytes) -> LogitsFunction:
    """Returns an exported network as a function of NumPy arrays."""
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)
    return lambda pixels: np.asarray(call(pixels))
