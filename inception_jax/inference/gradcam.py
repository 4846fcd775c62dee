"""Per-location evidence for a class: Grad-CAM.

Selvaraju et al. 2017, "Grad-CAM: Visual Explanations from Deep Networks via Gradient-based
Localization", arXiv:1610.02391.
"""

import io
import itertools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from inception_jax import figures
from inception_jax.errors import ConfigError, nearest
from inception_jax.inference.predictor import ClassifiedImage, Predictor
from inception_jax.models import introspect
from inception_jax.storage import atomic, paths
from inception_jax.training.state import Variables

# Height and width of the image next to its heat map, pixels: enough for photos, small on screen.
VIEW_SIZE = 384

# Opacity of the heat map where it is largest.
_MAX_OPACITY = 0.65


def grad_cam(
    model: nn.Module, variables: Variables, images: jax.Array, labels: jax.Array, layer: str
) -> jax.Array:
    """Returns per-location evidence for a class, at the resolution of a layer.

    With A_k channel k of the layer's feature map and y the class's logit, alpha_k is the mean of
    dy / dA_k over the map (eq. 1), and the result is ReLU(sum_k alpha_k A_k) (eq. 2).

    Args:
      model: a network that returns a `layers.ModelOutput`.
      variables: of the network.
      images: float32 [B, H, W, 3], the network's input.
      labels: int32 [B], the classes.
      layer: a key of `introspect.spatial_layers`.

    Returns:
      float32 [B, h, w], 0 or more.
    """

    def logits_and_activations(delta: jax.Array) -> tuple[jax.Array, jax.Array]:
        outputs = []

        def add_delta(_: nn.Module, path: str, result: Any) -> Any:
            if path != layer:
                return result
            outputs.append(result)
            return result + delta

        with introspect.intercept_outputs(add_delta):
            output: Any = model.apply(variables, images, train=False)
        return output.logits, outputs[0]

    # The gradient with respect to a delta added to the layer is that of the layer. In evaluation
    # images do not depend on each other, so one pass gives the gradients of all.
    grid = introspect.spatial_layers(model, variables, images)[layer]
    logits, backward, activations = jax.vjp(
        logits_and_activations, jnp.zeros(grid.shape, grid.dtype), has_aux=True
    )
    (gradients,) = backward(jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype))
    alpha = gradients.astype(jnp.float32).mean(axis=(1, 2))
    return nn.relu(jnp.einsum("bhwk,bk->bhw", activations.astype(jnp.float32), alpha))


class Explainer:
    """Computes heat maps for the predictions of a network. Thread-safe.

    Attributes:
      predictor: of the network.
      layer: path of the layer to explain.
      grid: height and width of the layer's feature map, and so of the heat maps.

    Args:
      predictor: of the network.
      layer: path of the layer to explain; '': the last inception module.

    Raises:
      ConfigError: if there is no such layer.
    """

    def __init__(self, predictor: Predictor, layer: str = "") -> None:
        self.predictor = predictor
        size = predictor.weights.image_size
        pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
        images = jax.eval_shape(predictor.preprocess, pixels)
        layers = introspect.spatial_layers(predictor.model, predictor.variables, images)
        modules = {
            path: f"{s.shape[1]} × {s.shape[2]}" for path, s in layers.items() if "/" not in path
        }
        if not modules:
            raise ConfigError(
                f"{predictor.weights.model.name}: no module returns a feature map [B, h, w, C], so "
                "heat maps cannot be computed; make the layers to explain submodules"
            )
        self.layer = layer or list(modules)[-1]
        if self.layer not in layers:
            raise ConfigError(_unknown_layer(layer, modules, list(layers)))
        self.grid = layers[self.layer].shape[1:3]
        self._maps = jax.jit(self._compute_maps, compiler_options=predictor.compiler_options)

    def maps(self, pixels: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Returns Grad-CAM maps.

        Args:
          pixels: uint8 [N, S, S, 3], N at least 1, as `Predictor.read` returns them.
          labels: int32 [N], the class to explain for each image.

        Returns:
          float32 [N, h, w], 0 or more.

        Raises:
          UserError: if the pixels have another dtype or shape.
        """
        pixels = self.predictor.validate_pixels(pixels)
        return self.predictor.map_batches(self._maps, pixels, labels.astype(np.int32))

    def _compute_maps(
        self, variables: Variables, pixels: jax.Array, labels: jax.Array
    ) -> jax.Array:
        images = self.predictor.preprocess(pixels)
        return grad_cam(self.predictor.model, variables, images, labels, self.layer)


def _unknown_layer(layer: str, modules: Mapping[str, str], known: list[str]) -> str:
    listing = ", ".join(f"{path} ({grid})" for path, grid in modules.items())
    inner = next((path for path in known if path.rpartition("/")[0] in modules), "")
    inside = f", or one inside them, such as {inner}" if inner else ""
    return (
        f"--layer={layer}: no such layer, or its output is not a feature map."
        f"{nearest(layer, known)} Use one of {listing}{inside}"
    )


def overlay(view: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Blends a heat map over an image.

    Args:
      view: the image, uint8 [V, V, 3].
      heat: float32 [h, w], 0 or more; scaled by its maximum.

    Returns:
      uint8 [V, V, 3]: the image where the map is 0, increasingly covered where it is larger.
    """
    import matplotlib

    side = view.shape[0]
    relative = heat / max(float(heat.max()), np.finfo(np.float32).tiny)
    smooth = Image.fromarray(relative.astype(np.float32)).resize(
        (side, side), Image.Resampling.BICUBIC
    )
    relative = np.asarray(smooth).clip(0, 1)
    colors = 255 * matplotlib.colormaps["inferno"](relative)[..., :3]
    opacity = _MAX_OPACITY * relative[..., None]
    return np.round(view * (1 - opacity) + colors * opacity).astype(np.uint8)


def draw_heat_map(
    path: paths.Path, view: np.ndarray, heat: np.ndarray, *, title: str, captions: tuple[str, str]
) -> None:
    """Draws an image next to its heat map.

    Args:
      path: of the PNG file.
      view: the image, uint8 [V, V, 3].
      heat: float32 [h, w], 0 or more.
      title: of the figure, such as the class and its probability.
      captions: of the image and of the heat map.

    Raises:
      WriteError: if the file cannot be written.
    """
    # Imported late, since predictions alone do not need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.55), layout="constrained")
    figure.suptitle(title, fontsize=15)
    both = zip(figure.subplots(1, 2), (view, overlay(view, heat)), captions, strict=True)
    for axes, image, caption in both:
        axes.imshow(image)
        axes.set_title(caption, fontsize=11)
        axes.set_axis_off()
    with atomic.replacing(path) as temporary:
        figures.save(figure, temporary, dpi=120)


class HeatmapWriter:
    """Draws images next to their heat maps into a folder.

    A file has the name of its image with the extension .png; if several images share a name, later
    ones get a number: cat.png, cat-2.png.

    Attributes:
      layer: path of the layer to explain.
      view_size: height and width of the drawn images, pixels.
      count: number of files drawn.

    Args:
      folder: an existing folder, or one in a bucket.
      explainer: computes the heat maps.
      label: the class to explain; None: each image's most probable class.
    """

    view_size = VIEW_SIZE

    def __init__(self, folder: paths.Path, explainer: Explainer, label: int | None) -> None:
        self._folder, self._explainer, self._label = folder, explainer, label
        self._names: set[str] = set()
        self.layer = explainer.layer

    @property
    def count(self) -> int:
        """Number of files drawn."""
        return len(self._names)

    def draw(self, classified: Sequence[ClassifiedImage]) -> None:
        """Draws images and their heat maps.

        Raises:
          WriteError: if a file cannot be written.
        """
        if not classified:
            return
        images = [each.image for each in classified]
        logits = np.stack([each.logits for each in classified])
        labels = logits.argmax(axis=1) if self._label is None else np.full(len(logits), self._label)
        maps = self._explainer.maps(np.stack([image.pixels for image in images]), labels)
        for image, row, label, heat in zip(images, logits, labels, maps, strict=True):
            prediction = self._explainer.predictor.prediction(row, int(label))
            caption = f"Grad-CAM of {self.layer}" if heat.any() else "no evidence for this class"
            draw_heat_map(
                self._folder / self._unused_name(image.name),
                image.view,
                heat,
                title=f"{figures.truncate(prediction.name, 60)}: {prediction.probability:.1%}",
                captions=(figures.truncate(os.path.basename(image.name), 40), caption),
            )

    def _unused_name(self, image_name: str) -> str:
        stem = pathlib.PurePath(image_name).stem
        names = (f"{stem}{number}.png" for number in itertools.chain([""], itertools.count(-2, -1)))
        name = next(name for name in names if name not in self._names)
        self._names.add(name)
        return name


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns an image, uint8 [H, W, 3], as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
