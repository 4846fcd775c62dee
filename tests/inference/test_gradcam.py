"""Tests Grad-CAM against its definition: Selvaraju et al. 2017, eq. 1 and 2."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from inception_jax.config import Model
from inception_jax.errors import ConfigError
from inception_jax.inference import gradcam
from inception_jax.inference.gradcam import Explainer, HeatmapWriter
from inception_jax.inference.predictor import ClassifiedImage, LoadedImage, Predictor
from inception_jax.models import introspect, networks
from inception_jax.models.layers import ModelOutput
from tests import small


class Curved(nn.Module):
    """A network whose logits are a nonlinear function of a three-channel feature map."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        grid = nn.relu(nn.Conv(3, (3, 3), name="grid")(images))
        hidden = jnp.tanh(nn.Dense(5, name="hidden")(grid.reshape(len(grid), -1)))
        return ModelOutput(nn.Dense(4, name="classifier")(hidden))


def test_grad_cam_matches_finite_differences() -> None:
    """Differentiates y(A) in double precision, with A computed by the network's first half."""
    random = np.random.default_rng(0)
    images = random.normal(size=(2, 4, 5, 3)).astype(np.float32)
    model = Curved()
    variables: Any = model.init(jax.random.key(1), images)
    labels = np.array([3, 0], np.int32)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])

    def logit(grid: np.ndarray, label: int) -> float:
        grid = np.maximum(grid, 0)
        hidden = np.tanh(grid.reshape(-1) @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return (hidden @ params["classifier"]["kernel"] + params["classifier"]["bias"])[label]

    convolution = nn.Conv(3, (3, 3))
    grids = np.asarray(convolution.apply({"params": variables["params"]["grid"]}, images))
    expected = []
    for grid, label in zip(grids.astype(np.float64), labels, strict=True):
        gradient = np.zeros_like(grid)
        for index in np.ndindex(grid.shape):
            step = np.zeros_like(grid)
            step[index] = 1e-6
            gradient[index] = (logit(grid + step, label) - logit(grid - step, label)) / 2e-6
        alpha = gradient.mean(axis=(0, 1))
        expected.append(np.maximum((grid * alpha).sum(axis=-1), 0))
    maps = gradcam.grad_cam(model, variables, images, labels, "grid")
    assert maps.shape == (2, 4, 5)
    assert 0 < np.count_nonzero(expected) < 40
    np.testing.assert_allclose(maps, np.array(expected), rtol=1e-3, atol=1e-6)


class ColorMean(nn.Module):
    """Logit k is the mean of channel k."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        eye = lambda key, shape, dtype: jnp.eye(3, dtype=dtype).reshape(shape)  # noqa: E731
        grid = nn.Conv(3, (1, 1), kernel_init=eye, name="grid")(images)
        return ModelOutput(grid.mean(axis=(1, 2)))


def test_only_evidence_for_the_class_lights_up() -> None:
    """Red in one corner, green in another: alpha is 1 / 16 for the class's color, else 0."""
    image = np.zeros((1, 4, 4, 3), np.float32)
    image[0, 0, 0, 0] = 5
    image[0, 3, 2, 1] = 3
    model = ColorMean()
    variables: Any = model.init(jax.random.key(0), image)
    labels = np.array([0, 1, 2], np.int32)
    maps = gradcam.grad_cam(model, variables, np.repeat(image, 3, axis=0), labels, "grid")
    expected = np.zeros((3, 4, 4), np.float32)
    expected[0, 0, 0], expected[1, 3, 2] = 5 / 16, 3 / 16
    np.testing.assert_allclose(maps, expected, rtol=1e-6)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(small.weights(), batch_size=2)


def test_grad_cam_of_last_module_equals_cam(predictor: Predictor) -> None:
    """Only a mean and the classifier follow it, so alpha is the classifier's kernel (CAM)."""
    random = np.random.default_rng(0)
    explainer = Explainer(predictor)
    assert (explainer.layer, explainer.grid) == ("inception_4b", (2, 2))
    pixels = random.integers(0, 256, (3, 8, 8, 3), np.uint8)
    labels = np.array([1, 9, 4])
    weights = predictor.weights
    images = (pixels / np.float32(255) - weights.mean) / weights.std
    _, captured = predictor.model.apply(weights.variables, images, capture_intermediates=True)
    (grid,) = captured["intermediates"]["inception_4b"]["__call__"]
    kernel = weights.variables["params"]["classifier"]["dense"]["kernel"]
    expected = np.maximum(np.einsum("bhwk,kb->bhw", grid, kernel[:, labels]), 0) / 4
    assert expected.any()
    maps = explainer.maps(pixels, labels)
    np.testing.assert_allclose(maps, expected, rtol=1e-4, atol=1e-6)


def test_spatial_layers_output_feature_maps() -> None:
    model = networks.create(Model(stem="s16", aux_heads=True), 200)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes: Any = jax.eval_shape(model.init, jax.random.key(0), images)
    layers = introspect.spatial_layers(model, shapes, images)
    top = [path for path in layers if "/" not in path]
    assert top[:4] == ["conv1", "conv2_reduce", "conv2", "inception_3a"]
    assert top[-2:] == ["inception_5a", "inception_5b"]
    assert layers["inception_4e"].shape == (1, 8, 8, 832)
    assert layers["inception_3b/conv_5x5"].shape == (1, 16, 16, 96)


def test_unknown_layer_is_rejected_with_alternatives(predictor: Predictor) -> None:
    with pytest.raises(ConfigError) as error:
        Explainer(predictor, "inception_4c")
    message = str(error.value)
    assert "--layer=inception_4c: no such layer" in message
    assert "Did you mean inception_" in message
    assert "inception_3a (4 × 4)" in message and "inception_4b (2 × 2)" in message
    inner = message.rpartition("such as ")[2]
    assert "/" in inner and Explainer(predictor, inner).layer == inner
    with pytest.raises(ConfigError):
        Explainer(predictor, "classifier")


def test_overlay_colors_only_hot_areas() -> None:
    view = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    np.testing.assert_array_equal(gradcam.overlay(view, np.zeros((4, 4), np.float32)), view)
    heat = np.zeros((4, 4), np.float32)
    heat[0, 3] = 1e-3
    shown = gradcam.overlay(view, heat)
    assert shown.dtype == np.uint8
    np.testing.assert_array_equal(shown[20:, :20], view[20:, :20])
    assert np.abs(shown[:8, 32:].astype(int) - view[:8, 32:]).mean() > 30
    # Only values relative to the maximum matter.
    np.testing.assert_array_equal(gradcam.overlay(view, 1000 * heat), shown)


def test_heat_maps_are_drawn_next_to_images(predictor: Predictor, tmp_path: pathlib.Path) -> None:
    random = np.random.default_rng(0)
    names = ["a/cat.jpg", "b/cat.png", "cat-2.gif", "$x^{2$.png"]
    pixels = random.integers(0, 256, (4, 8, 8, 3), np.uint8)
    views = [random.integers(0, 256, (32, 32, 3), np.uint8) for _ in names]
    writer = HeatmapWriter(tmp_path, Explainer(predictor), label=None)
    images = [LoadedImage(*each) for each in zip(names, pixels, views, strict=True)]
    logits = predictor.logits(pixels)
    writer.draw([ClassifiedImage(*each) for each in zip(images, logits, strict=True)])
    writer.draw([])
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["$x^{2$.png", "cat-2-2.png", "cat-2.png", "cat.png"]
    assert writer.count == 4
    with Image.open(tmp_path / "cat.png") as image:
        width, height = image.size
        assert width > 900 and 500 < height < width
