"""Tests figures of filters and activations."""

import dataclasses
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from inception_jax.config import Model
from inception_jax.errors import UserError
from inception_jax.inference.predictor import Predictor
from inception_jax.inspection import feature_maps
from inception_jax.models import networks
from inception_jax.models.weights import Weights
from tests import random_weights, small

SIZE = 8


@pytest.fixture(scope="module")
def weights() -> Weights:
    """A network whose first layer returns the positive parts of red, green and blue."""
    model = Model(name="mini_googlenet", width=0.04)
    variables = small.random_variables(networks.create(model, 3), SIZE)
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


def test_activations_match_the_layer(weights: Weights, pixels: np.ndarray) -> None:
    maps = feature_maps.compute_activations(Predictor(weights), pixels, "conv1")
    epsilon = weights.model.norm_epsilon
    normalized = (pixels / 255 - weights.mean) / weights.std
    expected = np.maximum(normalized, 0) / np.sqrt(1 + epsilon)
    assert maps.shape == (SIZE, SIZE, 4)
    np.testing.assert_allclose(maps[..., :3], expected, rtol=1e-5, atol=1e-6)
    assert not maps[..., 3].any()


def test_nested_module_can_be_selected(weights: Weights, pixels: np.ndarray) -> None:
    predictor = Predictor(weights)
    whole = feature_maps.compute_activations(predictor, pixels, "inception_2a")
    part = feature_maps.compute_activations(predictor, pixels, "inception_2a/conv_1x1")
    np.testing.assert_allclose(whole[..., : part.shape[-1]], part, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", ["inception_2x", "classifier", ""])
def test_layer_without_feature_map_is_rejected(
    layer: str, weights: Weights, pixels: np.ndarray
) -> None:
    with pytest.raises(UserError, match=f"--layer={layer}: .*inception_2a") as error:
        feature_maps.compute_activations(Predictor(weights), pixels, layer)
    if layer == "inception_2x":
        assert "Did you mean inception_2" in str(error.value)


def test_first_filters_are_those_of_the_image(weights: Weights) -> None:
    found = feature_maps.first_filters(weights)
    assert found is not None and found[0] == "conv1/conv"
    assert np.array_equal(found[1], weights.variables["params"]["conv1"]["conv"]["kernel"])


def test_convolution_of_rearranged_pixels_has_no_filters_to_draw() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Dense(3)(x).reshape(len(x), 4, 2, 4, 2, 3).transpose(0, 1, 3, 2, 4, 5)
            x = nn.Conv(8, (3, 3))(x.reshape(len(x), 4, 4, 12))
            return nn.Dense(7)(x.mean((1, 2)))

    network = Net()
    variables = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    changes = {"variables": {**variables, "batch_stats": {}}, "module": network, "image_size": 8}
    own = dataclasses.replace(random_weights.make(), **changes)
    assert feature_maps.first_filters(own) is None
    assert feature_maps.spatial_layers(own) == ["Dense_0", "Conv_0"]


def test_tiles_contain_every_image_once() -> None:
    images = np.arange(1, 6)[:, None, None] * np.ones((5, 2, 3))
    tiled = feature_maps.tile_images(images)
    assert tiled.shape == (2 * 3 + 1, 3 * 4 + 1)
    assert np.isnan(tiled[0]).all() and np.isnan(tiled[:, 0]).all() and np.isnan(tiled[3]).all()
    values, counts = np.unique(tiled[~np.isnan(tiled)], return_counts=True)
    assert values.tolist() == [1, 2, 3, 4, 5] and set(counts) == {6}
    assert tiled[1, 1] == 1 and tiled[1, 5] == 2 and tiled[4, 1] == 4


def test_figures_are_drawn(weights: Weights, pixels: np.ndarray, tmp_path: pathlib.Path) -> None:
    filters, maps = tmp_path / "filters.png", tmp_path / "maps.png"
    kernel = weights.variables["params"]["conv1"]["conv"]["kernel"]
    feature_maps.draw_filters(filters, kernel, "filters")
    activations = feature_maps.compute_activations(Predictor(weights), pixels, "conv1")
    feature_maps.draw_activations(maps, pixels, activations, layer="conv1", title="maps")
    for path in (filters, maps):
        with Image.open(path) as image:
            assert min(image.size) > 500
            # Not an empty figure: the filters have many colors.
            assert len(image.convert("RGB").getcolors(1 << 24) or []) > 20
    with pytest.raises(UserError, match=r"/proc/no/filters\.png: cannot be written"):
        feature_maps.draw_filters(pathlib.Path("/proc/no/filters.png"), kernel, "")
