"""A trained network as one function of pixels, which every export format contains.

It maps pixels, uint8 [batch, S, S, 3] in RGB, of images cropped and resized as in evaluation, to
logits, float32 [batch, classes], for any batch size. It includes the normalization and, if
evaluation uses another size, the resizing to it. It returns logits because a softmax is one line
anywhere, but cannot be inverted exactly. BatchNorm is folded into the convolutions, and everything
is computed in float32 whatever dtype training used.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from inception_jax.errors import RunError
from inception_jax.inference.predictor import Predictor
from inception_jax.models import protocol
from inception_jax.models.layers import ConvUnit
from inception_jax.models.weights import Weights

# Names of the arrays in exported files.
INPUT, OUTPUT = "pixels", "logits"
# Trained networks' logits are in the tens; reordering float32 operations changes them by ~1e-5.
_TOLERANCE = 1e-2

# Maps pixels, uint8 [N, S, S, 3], to logits, float32 [N, classes].
LogitsFunction = Callable[[np.ndarray], np.ndarray]


def pixels_to_logits(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """Returns the network as a function of pixels alone, traced identically on every backend.

    Args:
      weights: of the network; their variables become constants.

    Returns:
      A pure function that maps uint8 [B, S, S, 3] to float32 [B, classes].
    """
    network, predictor = images_to_logits(weights), Predictor(weights)
    return lambda pixels: network(predictor.preprocess(pixels))


def images_to_logits(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """Returns the network as a function of float32 [B, H, W, 3], resized and normalized."""
    model = protocol.with_plain_ops(_in_float32(weights).network)

    def logits(images: jax.Array) -> jax.Array:
        with nn.intercept_methods(_fold_batch_norm):
            output: Any = model.apply(weights.variables, images, train=False)
        return output.logits

    return logits


def _in_float32(weights: Weights) -> Weights:
    """Returns weights whose network computes in float32."""
    return dataclasses.replace(weights, model=dataclasses.replace(weights.model, dtype="float32"))


def export_metadata(weights: Weights, *, precision: str = "float32") -> dict[str, Any]:
    """Returns the description stored with an exported file, as JSON-compatible values.

    Args:
      weights: of the network, with the metrics measured on the file.
      precision: "float32" or "int8".
    """
    size = weights.image_size
    return {
        "model": str(weights),
        "precision": precision,
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["batch", size, size, 3],
            "meaning": "RGB; the network includes the normalization",
            "prepared": "upright by EXIF, transparency on white, the center square, resized with "
            "PIL's bicubic filter",
            "crop": weights.eval_crop,
        },
        "output": {
            "name": OUTPUT,
            "dtype": "float32",
            "shape": ["batch", weights.num_classes],
            "meaning": "logits; apply softmax for probabilities",
        },
        "class_names": list(weights.class_names),
        "checkpoint": {
            "name": weights.checkpoint,
            "step": weights.step,
            "epoch": weights.epoch,
            "is_average": weights.is_average,
        },
        "metrics": dict(weights.metrics),
        "version": weights.version,
        "revision": weights.revision,
    }


def max_logit_difference(weights: Weights, classify: LogitsFunction) -> float:
    """Returns the largest difference between exported and original logits, on random images.

    Uses two batch sizes, to test the free batch size too.

    Raises:
      RunError: if it is larger than rounding explains.
    """
    shape = (3, weights.image_size, weights.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = Predictor(_in_float32(weights), batch_size=3).logits(pixels)
    logits = np.concatenate([classify(pixels[:1]), classify(pixels[1:])])
    difference = float(np.abs(logits - expected).max())
    if not difference <= _TOLERANCE:
        raise RunError(
            f"the exported network is not equivalent: logits differ by up to {difference:.3g}. "
            "This is a bug in this program or in the converter; please report it"
        )
    return difference


def _fold_batch_norm(function: Any, args: Sequence[Any], kwargs: Any, context: Any) -> Any:
    """Computes a `ConvUnit` as one convolution with a bias, then ReLU; a Flax method interceptor.

    In evaluation, BatchNorm is a factor and an offset per channel, which are folded into the kernel
    and a bias. The convolution is Flax's, which converters support.
    """
    unit = context.module
    if not isinstance(unit, ConvUnit) or context.method_name != "__call__":
        return function(*args, **kwargs)
    params = unit.variables["params"]
    kernel = np.asarray(params["conv"]["kernel"])
    if unit.batch_norm:
        norm, running = params["norm"], unit.variables["batch_stats"]["norm"]
        factor = np.asarray(norm["scale"]) / np.sqrt(np.asarray(running["var"]) + unit.epsilon)
        kernel = kernel * factor.astype(np.float32)
        bias = np.asarray(norm["bias"]) - np.asarray(running["mean"]) * factor
    else:
        bias = np.asarray(params["conv"]["bias"])
    half = unit.kernel_size // 2
    conv = nn.Conv(
        unit.features,
        (unit.kernel_size, unit.kernel_size),
        (unit.stride, unit.stride),
        padding=unit.paddings or ((half, half), (half, half)),
        parent=None,
    )
    weights = {"params": {"kernel": kernel, "bias": bias.astype(np.float32)}}
    result: Any = conv.apply(weights, args[0])
    return nn.relu(result)
