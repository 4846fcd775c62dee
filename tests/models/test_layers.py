"""Tests the layers against NumPy."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.errors import ConfigError
from inception_jax.models import layers, ops
from inception_jax.models.mini_googlenet import MiniInception


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def test_local_response_norm_matches_formula() -> None:
    x = 100 * normal(2, 3, 3, 7)
    expected = np.empty_like(x)
    for channel in range(7):
        neighbors = x[..., max(0, channel - 2) : channel + 3]
        energy = 1 + 1e-4 / 5 * (neighbors**2).sum(axis=-1)
        expected[..., channel] = x[..., channel] / energy**0.75
    np.testing.assert_allclose(layers.local_response_norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_local_response_norm_keeps_dtype_and_sums_in_float32() -> None:
    x = jnp.asarray(10 * normal(2, 3, 3, 7), jnp.bfloat16)
    result = layers.local_response_norm(x)
    expected = layers.local_response_norm(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result.astype(jnp.float32), expected.astype(jnp.float32))


@pytest.mark.parametrize("side", [1, 2, 4, 5, 8, 14])
def test_adaptive_average_pool_matches_torch_windows(side: int) -> None:
    x = normal(2, side, 6, 3)
    expected = np.empty((2, 4, 4, 3), np.float32)
    for i in range(4):
        for j in range(4):
            rows = slice(i * side // 4, int(np.ceil((i + 1) * side / 4)))
            columns = slice(j * 6 // 4, int(np.ceil((j + 1) * 6 / 4)))
            expected[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
    result = layers.adaptive_average_pool(jnp.asarray(x), 4)
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_conv_unit_uses_batch_statistics_in_training_and_running_ones_in_evaluation() -> None:
    x = 3 * normal(4, 5, 5, 2) + 1
    train = layers.ConvUnit(3, 3, momentum=0.8, epsilon=1e-3, train=True)
    variables = train.init(jax.random.key(0), jnp.asarray(x))
    assert set(variables["params"]["conv"]) == {"kernel"}, "BatchNorm replaces the bias"
    convolved = layers.Conv(3, 3).apply({"params": variables["params"]["conv"]}, jnp.asarray(x))
    convolved = np.asarray(convolved)
    mean, variance = convolved.mean(axis=(0, 1, 2)), convolved.var(axis=(0, 1, 2))

    result, updated = train.apply(variables, jnp.asarray(x), mutable=["batch_stats"])
    expected = np.maximum(0, (convolved - mean) / np.sqrt(variance + 1e-3))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    running = jax.tree.map(np.asarray, updated["batch_stats"]["norm"])
    np.testing.assert_allclose(running["mean"], 0.2 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(running["var"], 0.8 + 0.2 * variance, rtol=1e-4)

    evaluation = layers.ConvUnit(3, 3, epsilon=1e-3)
    result = evaluation.apply({**variables, **updated}, jnp.asarray(x))
    expected = np.maximum(0, (convolved - running["mean"]) / np.sqrt(running["var"] + 1e-3))
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_conv_unit_without_batch_norm_has_bias_and_no_statistics() -> None:
    unit = layers.ConvUnit(3, 1, batch_norm=False)
    x = normal(2, 4, 4, 5)
    variables = unit.init(jax.random.key(0), jnp.asarray(x))
    assert set(variables) == {"params"}
    conv = variables["params"]["conv"]
    bias = normal(3)
    result = unit.apply({"params": {"conv": {**conv, "bias": jnp.asarray(bias)}}}, jnp.asarray(x))
    expected = np.maximum(0, x @ np.asarray(conv["kernel"])[0, 0] + bias)
    np.testing.assert_allclose(result, expected, atol=1e-5)


def test_kernels_have_he_variance_at_initialization() -> None:
    params = layers.Conv(512, 3).init(jax.random.key(0), jnp.ones((1, 4, 4, 32)))["params"]
    kernel = params["kernel"]
    assert float(kernel.std()) == pytest.approx(np.sqrt(2 / (3 * 3 * 32)), rel=0.02)


@pytest.mark.parametrize(("kind", "branch"), [("5x5", [5]), ("3x3", [3]), ("two_3x3", [3, 3])])
def test_inception_concatenates_branches_in_paper_order(kind: str, branch: list[int]) -> None:
    unit = functools.partial(layers.ConvUnit, batch_norm=False)
    module = layers.Inception(layers.InceptionWidths(1, 2, 3, 4, 5, 6), kind, unit)
    x = jnp.asarray(normal(1, 4, 4, 7))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    shapes = {name: each["conv"]["kernel"].shape for name, each in params.items()}
    assert shapes.pop("conv_1x1") == (1, 1, 7, 1)
    assert shapes.pop("reduce_3x3") == (1, 1, 7, 2)
    assert shapes.pop("conv_3x3") == (3, 3, 2, 3)
    assert shapes.pop("reduce_5x5") == (1, 1, 7, 4)
    assert shapes.pop("pool_proj") == (1, 1, 7, 6)
    assert [shape[0] for shape in shapes.values()] == branch
    assert {shape[-1] for shape in shapes.values()} == {5}

    # With all kernels 0, each branch returns its last bias.
    last = {"conv_1x1": 1.0, "conv_3x3": 2.0, "conv_5x5": 3.0, "pool_proj": 4.0}
    zeros = jax.tree.map(jnp.zeros_like, params)
    for name, value in last.items():
        zeros[name]["conv"]["bias"] += value
    result = jax.jit(module.apply)({"params": zeros}, x)
    assert result.shape == (1, 4, 4, 15)
    np.testing.assert_array_equal(result[0, 0, 0], np.repeat([1, 2, 3, 4], [1, 3, 5, 6]))


# Only training normalizes by statistics of the batch, which joined branches compute together.
@pytest.mark.parametrize("group_size", [0, 2])
@pytest.mark.parametrize("kind", ["inception", "mini"])
def test_branches_joined_before_normalization_give_the_same(kind: str, group_size: int) -> None:
    def module(rewrite: ops.Rewrite) -> nn.Module:
        unit = functools.partial(
            layers.ConvUnit, train=True, batch_norm=True, group_size=group_size
        )
        if kind == "inception":
            widths = layers.InceptionWidths(1, 2, 3, 4, 5, 6)
            return layers.Inception(widths, "5x5", unit, rewrite)
        return MiniInception(2, 3, functools.partial(unit, defer=rewrite == "tpu"))

    x, weights = jnp.asarray(normal(4, 5, 5, 7)), normal(4, 5, 5, 15 if kind == "inception" else 5)
    variables = module("").init(jax.random.key(0), x)
    # Every scale and bias another, so that none can be confused with its neighbor's.
    params = jax.tree.map(lambda leaf: leaf + 0.1 * normal(*leaf.shape), variables.pop("params"))

    @functools.partial(jax.jit, static_argnums=2)
    def run(params: Any, x: jax.Array, rewrite: ops.Rewrite) -> Any:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            result = module(rewrite).apply(
                {"params": params, **variables}, x, mutable=["batch_stats"]
            )
            return (result[0] * weights).sum(), result

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    jax.tree.map(close, run(params, x, "tpu"), run(params, x, ""))


def test_dropout_is_applied_only_in_training() -> None:
    x = jnp.ones((2, 1000))
    drops = layers.Classifier(3, dropout=0.5, train=True)
    keeps = layers.Classifier(3, dropout=0.5, train=False)
    variables = keeps.init(jax.random.key(0), x)
    outputs = [drops.apply(variables, x, rngs={"dropout": jax.random.key(i)}) for i in range(2)]
    assert not np.allclose(outputs[0], outputs[1])
    expected = np.asarray(variables["params"]["dense"]["kernel"]).sum(axis=0)
    np.testing.assert_allclose(keeps.apply(variables, x)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "width", "expected"), [(64, 1.0, 64), (96, 0.25, 24), (16, 0.01, 1)]
)
def test_scaled_channels_are_rounded_and_at_least_one(
    channels: int, width: float, expected: int
) -> None:
    assert layers.scale_channels(channels, width) == expected


def test_too_small_image_is_rejected_with_model_and_min_size() -> None:
    layers.check_image_size(jnp.ones((1, 31, 31, 3)), min_size=31, model="GoogLeNet")
    with pytest.raises(ConfigError, match=r"40 x 30 px.*31 x 31 px.*GoogLeNet.*image_size"):
        layers.check_image_size(jnp.ones((1, 40, 30, 3)), min_size=31, model="GoogLeNet")
