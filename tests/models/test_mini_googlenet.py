"""Tests MiniGoogLeNet against figure 3 of Zhang et al. 2017."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.models.layers import ConvUnit
from inception_jax.models.mini_googlenet import Downsample, MiniGoogLeNet

# Modules in order, with the output channels of all their branches together.
MODULES = {
    "inception_2a": 32 + 32,
    "inception_2b": 32 + 48,
    "downsample_2c": 80 + (32 + 48),
    "inception_3a": 112 + 48,
    "inception_3b": 96 + 64,
    "inception_3c": 80 + 80,
    "inception_3d": 48 + 96,
    "downsample_3e": 96 + (48 + 96),
    "inception_4a": 176 + 160,
    "inception_4b": 176 + 160,
}


@pytest.mark.parametrize(("size", "grids"), [(28, (28, 14, 7)), (32, (32, 16, 8))])
def test_modules_match_widths_and_sizes_of_the_figure(size: int, grids: tuple[int, ...]) -> None:
    module = MiniGoogLeNet(num_classes=10)

    def call(images: jax.Array) -> jax.Array:
        variables = module.init(jax.random.key(0), images)
        collections = {"capture_intermediates": True, "mutable": ["intermediates"]}
        return module.apply(variables, images, **collections)[1]["intermediates"]

    results = jax.eval_shape(call, jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32))
    shapes = {name: each["__call__"][0].shape for name, each in results.items() if name in MODULES}
    sides = [grids[0]] * 2 + [grids[1]] * 5 + [grids[2]] * 3
    expected = [(2, side, side, width) for side, width in zip(sides, MODULES.values(), strict=True)]
    assert [shapes[name] for name in MODULES] == expected


def test_downsample_concatenates_convolution_before_max_pool() -> None:
    unit = functools.partial(ConvUnit, batch_norm=False)
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 1)).astype(np.float32)
    module = Downsample(2, unit)
    params = jax.jit(module.init)(jax.random.key(0), jnp.asarray(x))["params"]
    result = np.asarray(module.apply({"params": params}, jnp.asarray(x)))
    kernel = np.asarray(params["conv_3x3"]["conv"]["kernel"])
    # The last window extends one pixel past the right and lower border.
    corner = np.pad(x[0, 2:, 2:], ((0, 1), (0, 1), (0, 0)))
    expected = np.maximum(0, np.einsum("ijc,ijco->o", corner, kernel))
    np.testing.assert_allclose(result[0, 1, 1, :2], expected, atol=1e-6)
    assert result[0, 0, 0, 2] == x[0, :3, :3].max()
    assert result[0, 1, 1, 2] == x[0, 2:, 2:].max()
