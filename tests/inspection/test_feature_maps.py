"""Filters and activations as pictures."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from inception_jax.config import Model
from inception_jax.errors import UserError
from inception_jax.inference.predictor import Predictor
from inception_jax.inspection import feature_maps
from inception_jax.models import networks
from inception_jax.models.weights import Weights
from tests import small

SIZE = 8


@pytest.fixture(scope="module")
def weights() -> Weights:
    """A network whose first layer hands on red, green and blue, as far as they are positive."""
    model = Model(name="mini_googlenet", width=0.04)
    variables = small.draw(networks.create(model, 3), SIZE)
    conv1, running = variables["params"]["conv1"], variables["batch_stats"]["conv1"]["norm"]
    kernel = conv1["conv"]["kernel"]
    kernel[:] = 0
    kernel[1, 1, :, :3] = np.eye(3)
    conv1["norm"]["scale"][:] = running["var"][:] = 1
    conv1["norm"]["bias"][:] = running["mean"][:] = 0
    return Weights(
        variables=variables,
        model=model,
        image_size=SIZE,
        class_names=(),
        mean=np.array([0.5, 0.5, 0.5], np.float32),
        std=np.array([0.5, 0.25, 0.5], np.float32),
    )


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def test_activations_are_what_the_layer_computes(weights: Weights, pixels: np.ndarray) -> None:
    maps = feature_maps.activations(Predictor(weights), pixels, "conv1")
    epsilon = weights.model.norm_epsilon
    normalised = (pixels / 255 - weights.mean) / weights.std
    expected = np.maximum(normalised, 0) / np.sqrt(1 + epsilon)
    assert maps.shape == (SIZE, SIZE, 4)
    np.testing.assert_allclose(maps[..., :3], expected, rtol=1e-5, atol=1e-6)
    assert not maps[..., 3].any()


def test_a_module_inside_a_module_can_be_looked_at(weights: Weights, pixels: np.ndarray) -> None:
    predictor = Predictor(weights)
    whole = feature_maps.activations(predictor, pixels, "inception_2a")
    part = feature_maps.activations(predictor, pixels, "inception_2a/conv_1x1")
    np.testing.assert_allclose(whole[..., : part.shape[-1]], part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["inception_2x", "classifier", ""])
def test_a_layer_that_gives_no_image_is_refused(
    layer: str, weights: Weights, pixels: np.ndarray
) -> None:
    with pytest.raises(UserError, match=f"--layer={layer}: .*inception_2a") as error:
        feature_maps.activations(Predictor(weights), pixels, layer)
    if layer == "inception_2x":
        assert "Did you mean inception_2" in str(error.value)


def test_filters_are_the_kernel(weights: Weights) -> None:
    kernel = feature_maps.filters(weights, "conv1")
    assert np.array_equal(kernel, weights.variables["params"]["conv1"]["conv"]["kernel"])


def test_a_grid_holds_every_picture_once_with_gaps() -> None:
    pictures = np.arange(1, 6)[:, None, None] * np.ones((5, 2, 3))
    laid = feature_maps.grid(pictures)
    assert laid.shape == (2 * 3 + 1, 3 * 4 + 1)
    assert np.isnan(laid[0]).all() and np.isnan(laid[:, 0]).all() and np.isnan(laid[3]).all()
    values, counts = np.unique(laid[~np.isnan(laid)], return_counts=True)
    assert values.tolist() == [1, 2, 3, 4, 5] and set(counts) == {6}
    assert laid[1, 1] == 1 and laid[1, 5] == 2 and laid[4, 1] == 4


def test_pictures_are_drawn(weights: Weights, pixels: np.ndarray, tmp_path: pathlib.Path) -> None:
    filters, maps = tmp_path / "filters.png", tmp_path / "maps.png"
    feature_maps.draw_filters(filters, feature_maps.filters(weights, "conv1"), "filters")
    found = feature_maps.activations(Predictor(weights), pixels, "conv1")
    feature_maps.draw_activations(maps, pixels, found, layer="conv1", title="maps")
    for path in (filters, maps):
        with Image.open(path) as image:
            assert min(image.size) > 500
            # Pictures, not an empty page: one filter is all one colour after another.
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    with pytest.raises(UserError, match=r"/proc/no/filters\.png: cannot be written"):
        feature_maps.draw_filters(
            pathlib.Path("/proc/no/filters.png"), feature_maps.filters(weights, "conv1"), ""
        )
