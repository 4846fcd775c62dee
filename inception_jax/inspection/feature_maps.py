"""Draws the filters and activations of a trained network."""

import math
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from inception_jax import figures
from inception_jax.errors import UserError, nearest
from inception_jax.inference.predictor import Predictor
from inception_jax.models import introspect
from inception_jax.models import weights as files
from inception_jax.models.weights import Weights
from inception_jax.storage import atomic, paths

# Width of the gaps between tiles, pixels.
_GAP = 1


def spatial_layers(weights: Weights) -> list[str]:
    """Returns the slash-separated paths of the modules that output a feature map, in order."""
    size = weights.eval_image_size or weights.image_size
    images = jax.ShapeDtypeStruct((1, size, size, 3), np.float32)
    return list(introspect.spatial_layers(weights.network, weights.variables, images))


def first_filters(weights: Weights) -> tuple[str, np.ndarray] | None:
    """Returns the path and kernel, float32 [k, k, 3, O], of the first convolution of the image.

    None: the network has none.
    """
    leaves = files.flatten(weights.variables["params"])
    for layer in spatial_layers(weights):
        kernel = np.asarray(leaves.get(f"{layer}/kernel", ()))
        if kernel.ndim == 4 and kernel.shape[2] == 3:
            return layer, kernel
    return None


def compute_activations(predictor: Predictor, pixels: np.ndarray, layer: str) -> np.ndarray:
    """Returns the output of a module for an image.

    Args:
      predictor: of the network.
      pixels: uint8 [S, S, 3], as `Predictor.read` returns them.
      layer: slash-separated path of the module, such as "inception_3a" or "inception_3a/conv_5x5".

    Returns:
      float32 [H, W, C].

    Raises:
      UserError: if there is no such module, or its output is not a feature map.
    """
    model, preprocess = predictor.model, predictor.preprocess
    images = jax.eval_shape(preprocess, jax.ShapeDtypeStruct((1, *pixels.shape), pixels.dtype))
    modules = introspect.spatial_layers(model, predictor.variables, images)
    if not modules:
        raise UserError(f"{predictor.weights.model.name}: has no feature maps to draw")
    if layer not in modules:
        raise UserError(
            f"--layer={layer}: no such module of {predictor.weights.model.name}, or its output is "
            f"not a feature map.{nearest(layer, modules)} Use one of {', '.join(modules)}"
        )

    def compute(variables: Any, image: jax.Array) -> jax.Array:
        outputs: dict[str, jax.Array] = {}

        def record(_: nn.Module, path: str, result: Any) -> Any:
            outputs[path] = result
            return result

        with introspect.intercept_outputs(record):
            model.apply(variables, preprocess(image), train=False)
        return outputs[layer]

    compiled = jax.jit(compute, compiler_options=predictor.compiler_options)
    return np.asarray(compiled(predictor.variables, pixels[None])[0], np.float32)


def draw_filters(path: paths.Path, kernel: np.ndarray, title: str) -> None:
    """Draws filters in a grid, each scaled to its range of values.

    Args:
      path: of the PNG file.
      kernel: float32 [k, k, 3, O].
      title: of the figure.

    Raises:
      WriteError: if the file cannot be written.
    """
    low, high = kernel.min((0, 1, 2)), kernel.max((0, 1, 2))
    scaled = (kernel - low) / np.maximum(high - low, 1e-12)
    caption = f"{kernel.shape[3]} filters of {kernel.shape[0]}×{kernel.shape[1]} px"
    _save(path, [(tile_images(scaled.transpose(3, 0, 1, 2)), caption)], title)


def draw_activations(
    path: paths.Path, pixels: np.ndarray, maps: np.ndarray, *, layer: str, title: str
) -> None:
    """Draws an image next to every channel of a module's output, each scaled from 0 to its maximum.

    Args:
      path: of the PNG file.
      pixels: the image, uint8 [S, S, 3].
      maps: the module's output, float32 [H, W, C].
      layer: path of the module.
      title: of the figure.

    Raises:
      WriteError: if the file cannot be written.
    """
    low = np.minimum(maps.min((0, 1)), 0)
    scaled = (maps - low) / np.maximum(maps.max((0, 1)) - low, 1e-12)
    height, width, channels = maps.shape
    caption = f"{layer}: {channels} channels of {height}×{width}"
    _save(path, [(pixels, "image"), (tile_images(scaled.transpose(2, 0, 1)), caption)], title)


def tile_images(images: np.ndarray) -> np.ndarray:
    """Tiles images into a square, with gaps.

    Args:
      images: float [N, H, W] or [N, H, W, 3].

    Returns:
      float [rows (H + 1) + 1, columns (W + 1) + 1, …]; NaN in the gaps and unused tiles.
    """
    count, height, width = images.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP, *images.shape[3:])
    tiled = np.full(shape, np.nan, np.float32)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = row * (height + _GAP) + _GAP, column * (width + _GAP) + _GAP
        tiled[top : top + height, left : left + width] = image
    return tiled


def _save(path: paths.Path, images: list[tuple[np.ndarray, str]], title: str) -> None:
    """Draws captioned images side by side, the last one large."""
    from matplotlib.figure import Figure

    ratios = [1.0] * (len(images) - 1) + [3.0]
    figure = Figure(figsize=(2.6 * sum(ratios), 8.4), layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(1, len(images), width_ratios=ratios, squeeze=False)[0]
    for axes, (image, caption) in zip(panels, images, strict=True):
        if image.ndim == 3 and image.dtype != np.uint8:
            image = np.nan_to_num(image, nan=1.0)  # White gaps: RGB images cannot show NaN.
        axes.imshow(image, cmap="magma", interpolation="nearest")
        axes.set_title(caption, fontsize=11)
        axes.axis("off")
    with atomic.replacing(path) as temporary:
        figures.save(figure, temporary)
