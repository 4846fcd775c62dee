"""Tests converted operations in ONNX Runtime against JAX."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest

from inception_jax.export import onnx_graph
from inception_jax.models import ops
from inception_jax.models.layers import local_response_norm

SIZE = 9


def pooled(window: int, stride: int) -> Callable[[jax.Array], jax.Array]:
    return lambda x: ops.max_pool(x, window=window, stride=stride)


def averaged(window: int, stride: int) -> Callable[[jax.Array], jax.Array]:
    def pool(x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return nn.avg_pool(x, (window, window), (stride, stride), padding="SAME")

    return pool


def normalized(x: jax.Array) -> jax.Array:
    """Flax's BatchNorm in evaluation, with nontrivial statistics."""
    values = np.array([0.3, 1.2, 0.7], np.float32)
    variables = {
        "params": {"scale": values, "bias": values[::-1]},
        "batch_stats": {"mean": -values, "var": values + 1},
    }
    result: Any = nn.BatchNorm(use_running_average=True).apply(variables, x)
    return jnp.asarray(result)


def to_seven_channels(x: jax.Array) -> jax.Array:
    """Maps three channels to seven, with an asymmetrically padded convolution."""
    kernel = np.random.default_rng(2).normal(size=(2, 2, 3, 7)).astype(np.float32)
    return ops.conv(x, jnp.asarray(kernel), stride=2, paddings=((1, 0), (2, 1)))


def convolved(**options: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns a Flax convolution of three to six channels."""
    layer = nn.Conv(6, (3, 3), **options)
    variables = layer.init(jax.random.key(4), jnp.zeros((1, SIZE, SIZE, 3)))
    return lambda x: jnp.asarray(layer.apply(variables, x))


def check_conversion(network: Callable[[jax.Array], jax.Array]) -> None:
    """Checks that ONNX Runtime computes what a network of normalized images does."""
    mean, std = np.array([0.4, 0.5, 0.6], "f4"), np.array([0.2, 0.3, 0.1], "f4")
    model = onnx_graph.convert(
        network,
        name="one",
        size=SIZE,
        resized=SIZE,
        resize_kernel="linear",
        mean=mean,
        std=std,
        names=("x", "y"),
    )
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE, 3), np.uint8)
    expected = jax.jit(network)(((pixels / 255 - mean) / std).astype(np.float32))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (outputs,) = session.run(["y"], {"x": pixels})
    # Sums of hundreds of terms may nearly cancel.
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "operation",
    [
        pooled(3, 1),
        pooled(3, 2),
        pooled(2, 2),
        averaged(3, 1),
        averaged(3, 2),
        to_seven_channels,
        normalized,
        lambda x: local_response_norm(50 * to_seven_channels(x)),
        lambda x: jnp.concatenate(
            [to_seven_channels(x), jax.nn.relu(to_seven_channels(x))], axis=-1
        ),
        lambda x: x * x - x / 3,
        convolved(feature_group_count=3),
        convolved(kernel_dilation=2),
        nn.gelu,
        lambda x: nn.gelu(x, approximate=False),
        nn.silu,
        nn.relu6,
        lambda x: jnp.log(jnp.exp(-jnp.abs(x)) + jnp.sqrt(jnp.square(x))),
    ],
    ids=[
        "pool",
        "pool over the end",
        "even pool",
        "average",
        "average at stride 2",
        "conv",
        "norm",
        "lrn",
        "branches",
        "arithmetic",
        "depthwise",
        "dilated",
        "gelu",
        "exact gelu",
        "silu",
        "relu6",
        "functions",
    ],
)
def test_operation_matches_jax(operation: Callable[[jax.Array], jax.Array]) -> None:
    def network(x: jax.Array) -> jax.Array:
        # Weights each pixel differently, so that swapped pixels are noticed.
        x = operation(x)
        weights = np.random.default_rng(3).normal(size=(1, *x.shape[1:])).astype(np.float32)
        return (x * jnp.broadcast_to(weights, x.shape)).sum((1, 2))

    check_conversion(network)


def test_flattening_keeps_the_order_of_pixels() -> None:
    matrix = np.random.default_rng(5).normal(size=(SIZE * SIZE * 3, 4)).astype(np.float32)
    check_conversion(lambda x: nn.relu(x.reshape(len(x), -1)) @ matrix)


def test_features_are_concatenated() -> None:
    matrix = np.random.default_rng(7).normal(size=(6, 4)).astype(np.float32)

    def network(x: jax.Array) -> jax.Array:
        return jnp.concatenate([x.mean((1, 2)), (x * x).mean((1, 2))], -1) @ matrix

    check_conversion(network)


def test_operation_without_inputs_is_named() -> None:
    with pytest.raises(NotImplementedError, match="operation iota cannot"):
        check_conversion(lambda x: x.mean((1, 2)) * jax.lax.iota(jnp.float32, 3)[None])


def test_unsupported_operation_is_named() -> None:
    with pytest.raises(NotImplementedError, match="cos"):
        onnx_graph.convert(
            lambda x: jnp.cos(x).sum((1, 2)),
            name="",
            size=4,
            resized=4,
            resize_kernel="linear",
            mean=np.zeros(3),
            std=np.ones(3),
            names=("x", "y"),
        )
