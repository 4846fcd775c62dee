"""What a trained network looks for and finds: filters and activations as pictures."""

import math
import pathlib
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

# Between the pictures of a grid, pixels of it.
_GAP_PIXELS = 1


def layer_kernel(weights: Weights, layer: str) -> np.ndarray:
    """Returns the kernel of a layer.

    Args:
      weights: of the network.
      layer: path of the module, with slashes, such as "conv1".

    Returns:
      float32 [k, k, I, O].
    """
    leaves = files.flatten(weights.variables["params"])
    return next(
        np.asarray(leaf)
        for name, leaf in leaves.items()
        if name.startswith(f"{layer}/") and name.endswith("/kernel")
    )


def compute_activations(predictor: Predictor, pixels: np.ndarray, layer: str) -> np.ndarray:
    """Returns what a module of the network makes of an image.

    Args:
      predictor: of the network.
      pixels: uint8 [S, S, 3], as `Predictor.read` gives them.
      layer: path of the module, with slashes, such as "inception_3a" or "inception_3a/conv_5x5".

    Returns:
      float32 [H, W, C].

    Raises:
      UserError: if there is no such module, or it gives no image.
    """
    model, prepared = predictor.model, predictor.preprocess
    images = jax.eval_shape(prepared, jax.ShapeDtypeStruct((1, *pixels.shape), pixels.dtype))
    modules = introspect.spatial_layers(model, predictor.variables, images)
    if layer not in modules:
        raise UserError(
            f"--layer={layer}: no such module of {predictor.weights.model.name}, or its output is "
            f"not a feature map.{nearest(layer, modules)} Use one of {', '.join(modules)}"
        )

    def compute(variables: Any, image: jax.Array) -> jax.Array:
        found: dict[str, jax.Array] = {}

        def see(_: nn.Module, path: str, result: Any) -> Any:
            found[path] = result
            return result

        with introspect.intercept_outputs(see):
            model.apply(variables, prepared(image), train=False)
        return found[layer]

    compiled = jax.jit(compute, compiler_options=predictor.compiler_options)
    return np.asarray(compiled(predictor.variables, pixels[None])[0], np.float32)


def draw_filters(path: pathlib.Path, kernel: np.ndarray, title: str) -> None:
    """Draws filters in a grid, the values of each from its least (0) to its greatest (full).

    Args:
      path: of the PNG file.
      kernel: float32 [k, k, 3, O].
      title: above the picture.

    Raises:
      UserError: if the file cannot be written.
    """
    low, high = kernel.min((0, 1, 2)), kernel.max((0, 1, 2))
    shown = (kernel - low) / np.maximum(high - low, 1e-12)
    words = f"{kernel.shape[3]} filters of {kernel.shape[0]}×{kernel.shape[1]} px"
    _save(path, [(tile_images(shown.transpose(3, 0, 1, 2)), words)], title)


def draw_activations(
    path: pathlib.Path, pixels: np.ndarray, maps: np.ndarray, *, layer: str, title: str
) -> None:
    """Draws every channel of a module's result beside its image, each from 0 to its greatest value.

    Args:
      path: of the PNG file.
      pixels: the image, uint8 [S, S, 3].
      maps: float32 [H, W, C].
      layer: what gave the maps.
      title: above the picture.

    Raises:
      UserError: if the file cannot be written.
    """
    low = np.minimum(maps.min((0, 1)), 0)
    shown = (maps - low) / np.maximum(maps.max((0, 1)) - low, 1e-12)
    height, width, channels = maps.shape
    words = f"{layer}: {channels} channels of {height}×{width}"
    _save(path, [(pixels, "image"), (tile_images(shown.transpose(2, 0, 1)), words)], title)


def tile_images(pictures: np.ndarray) -> np.ndarray:
    """Lays pictures out in a square, with gaps.

    Args:
      pictures: float [N, H, W] or [N, H, W, 3].

    Returns:
      float [rows (H + 1) + 1, columns (W + 1) + 1, …]; NaN in the gaps and where no picture is.
    """
    count, height, width = pictures.shape[:3]
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    shape = (
        rows * (height + _GAP_PIXELS) + _GAP_PIXELS,
        columns * (width + _GAP_PIXELS) + _GAP_PIXELS,
        *pictures.shape[3:],
    )
    laid = np.full(shape, np.nan, np.float32)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        top, left = (
            row * (height + _GAP_PIXELS) + _GAP_PIXELS,
            column * (width + _GAP_PIXELS) + _GAP_PIXELS,
        )
        laid[top : top + height, left : left + width] = picture
    return laid


def _save(path: pathlib.Path, pictures: list[tuple[np.ndarray, str]], title: str) -> None:
    """Draws pictures side by side, the last one large."""
    from matplotlib.figure import Figure

    ratios = [1.0] * (len(pictures) - 1) + [3.0]
    figure = Figure(figsize=(2.6 * sum(ratios), 8.4), layout="constrained")
    figure.suptitle(title, fontsize=13)
    panels = figure.subplots(1, len(pictures), width_ratios=ratios, squeeze=False)[0]
    for axes, (picture, words) in zip(panels, pictures, strict=True):
        if picture.ndim == 3 and picture.dtype != np.uint8:
            picture = np.nan_to_num(picture, nan=1.0)  # White gaps: colours know no NaN.
        axes.imshow(picture, cmap="magma", interpolation="nearest")
        axes.set_title(words, fontsize=11)
        axes.axis("off")
    try:
        figures.save(figure, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error}. Make the folder writable or free disk space"
        ) from error
