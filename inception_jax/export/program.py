"""A trained network as one function of pixels, which all formats of other programs write down.

It takes pixels, uint8 [batch, S, S, 3] in RGB, of images cut and resized as in evaluation, and
gives logits, float32 [batch, classes]; the batch may have any size. Resizing to another size of
evaluation and the normalisation are inside. Logits, not probabilities: a softmax is one line
anywhere, and cannot be undone to the last digit. BatchNorm is folded into the convolutions, and all
is computed in float32 whatever the training computed in.
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

# What descriptions call the arrays.
INPUT, OUTPUT = "pixels", "logits"
# Logits of trained networks are some tens; float32 in another order changes them by some 1e-5.
_TOLERANCE = 1e-2

# Logits, float32 [N, classes], of pixels, uint8 [N, S, S, 3].
LogitsFunction = Callable[[np.ndarray], np.ndarray]


def pixels_to_logits(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """Returns the network as a function of pixels alone, traced the same on every backend.

    Args:
      weights: of the network; their variables become constants.

    Returns:
      A pure function of uint8 [B, S, S, 3] that gives float32 [B, classes].
    """
    network, predictor = images_to_logits(weights), Predictor(weights)
    return lambda pixels: network(predictor.preprocess(pixels))


def images_to_logits(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """Returns the network as a function of float32 [B, H, W, 3], resized and normalised."""
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
    """Returns what a user of an exported file has to know, for JSON.

    Args:
      weights: of the network, with the metrics of the file.
      precision: what the file computes in, "float32" or "int8".
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
            "prepared": "the center square, resized with PIL's bicubic filter",
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
    """Returns how much an exported network's logits differ from its own, on images of noise.

    In batches of two sizes, so that the free batch size is tried too.

    Raises:
      RunError: if it is more than rounding gives.
    """
    shape = (3, weights.image_size, weights.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = Predictor(_in_float32(weights), batch_size=3).logits(pixels)
    found = np.concatenate([classify(pixels[:1]), classify(pixels[1:])])
    difference = float(np.abs(found - expected).max())
    if not difference <= _TOLERANCE:
        raise RunError(
            f"the exported network is not equivalent: logits differ by up to {difference:.3g}. "
            "This is a bug in this program or in the converter; please report it"
        )
    return difference


def _fold_batch_norm(function: Any, args: Sequence[Any], kwargs: Any, context: Any) -> Any:
    """Computes a `ConvUnit` as one convolution with a bias, and ReLU; an interceptor of flax.

    In evaluation BatchNorm is a factor and an offset for each channel, which the kernel and a bias
    take. The convolution is flax's own, which converters know.
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
