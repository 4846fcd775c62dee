"""Tests operations against direct formulas, and CPU equivalents against plain operations."""

import functools
import importlib.metadata
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.config import Model
from inception_jax.models import networks, ops
from inception_jax.models.mini_googlenet import MiniGoogLeNet
from inception_jax.runtime import sharding


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def direct_conv(
    x: np.ndarray, kernel: np.ndarray, stride: int, paddings: ops.Paddings
) -> np.ndarray:
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), *paddings, (0, 0)))
    height, width = ((side - size) // stride + 1 for side in x.shape[1:3])
    result = np.zeros((x.shape[0], height, width, kernel.shape[-1]))
    for i in range(height):
        for j in range(width):
            window = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            result[:, i, j] = np.einsum("bijc,ijco->bo", window, kernel)
    return result


def direct_max_pool(x: np.ndarray, window: int, stride: int) -> np.ndarray:
    before = (window - 1) // 2 if stride == 1 else 0
    height, width = (
        side if stride == 1 else int(np.ceil((side - window) / stride)) + 1 for side in x.shape[1:3]
    )
    result = np.zeros((x.shape[0], height, width, x.shape[3]), x.dtype)
    for i in range(height):
        for j in range(width):
            top, left = i * stride - before, j * stride - before
            rows = slice(max(0, top), top + window)
            columns = slice(max(0, left), left + window)
            result[:, i, j] = x[:, rows, columns].max(axis=(1, 2))
    return result


# From inputs to a function's value and its gradients.
Vjp = Callable[..., tuple[np.ndarray, list[np.ndarray]]]


def value_and_vjp(
    function: Callable[..., Any], *inputs: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns a function's value and its gradients for a fixed random cotangent."""
    return jitted_vjp(function, inputs[0].dtype)(*inputs)


def jitted_vjp(function: Callable[..., Any], dtype: np.dtype) -> Vjp:
    """Returns `value_and_vjp` of a function of inputs with a dtype, compiled once per shape."""

    def both(*inputs: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        value, pull_back = jax.vjp(function, *inputs)
        return value, pull_back(jnp.asarray(normal(*value.shape), value.dtype))

    options = ops.compiler_options(MiniGoogLeNet(2, dtype=dtype, rewrite="cpu"))
    compiled = jax.jit(both, compiler_options=options)

    def call(*inputs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        value, gradients = compiled(*inputs)
        return np.asarray(value), [np.asarray(gradient) for gradient in gradients]

    return call


@pytest.mark.parametrize(
    ("side", "size", "stride", "paddings"),
    [
        (5, 1, 1, ops.NO_PADDING),
        (6, 3, 1, ((1, 1), (1, 1))),
        (2, 3, 1, ((1, 1), (1, 1))),
        (4, 5, 1, ((2, 2), (2, 2))),
        (7, 5, 1, ((2, 2), (2, 2))),
        (9, 7, 2, ((3, 3), (3, 3))),
        (6, 3, 2, ((0, 1), (0, 1))),
        (6, 3, 1, ((0, 2), (1, 0))),
    ],
)
@pytest.mark.parametrize("rewrite", ["", "cpu", "gpu"])
def test_conv_matches_direct_sum(
    rewrite: ops.Rewrite, side: int, size: int, stride: int, paddings: ops.Paddings
) -> None:
    x, kernel = normal(2, side, side + 1, 3), normal(size, size, 3, 4)
    result = ops.conv(
        jnp.asarray(x), jnp.asarray(kernel), stride=stride, paddings=paddings, rewrite=rewrite
    )
    np.testing.assert_allclose(result, direct_conv(x, kernel, stride, paddings), atol=1e-4)


@pytest.mark.parametrize(
    ("side", "size", "paddings"),
    [
        (5, 1, ops.NO_PADDING),
        (2, 3, ((1, 1), (1, 1))),
        (6, 3, ((0, 2), (1, 0))),
        (4, 5, ((2, 2),) * 2),
        (7, 5, ((2, 2),) * 2),
        (32, 3, ((1, 1),) * 2),
    ],
)
@pytest.mark.parametrize("channels", [3, 8])  # From eight on, each tap is a product.
def test_matmul_conv_matches_plain_conv(
    side: int, size: int, paddings: ops.Paddings, channels: int
) -> None:
    x, kernel = normal(2, side, side + 1, channels), normal(size, size, channels, 4)
    value, gradients = value_and_vjp(
        lambda x, kernel: ops.matmul_conv(x, kernel, paddings), x, kernel
    )
    plain_value, plain_gradients = value_and_vjp(
        lambda x, kernel: ops.plain_conv(x, kernel, paddings), x, kernel
    )
    np.testing.assert_allclose(value, plain_value, atol=1e-4)
    for gradient, plain_gradient in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-4, atol=2e-4)


POOLS = [(8, 3, 2), (7, 3, 2), (2, 3, 2), (8, 2, 2), (7, 2, 2), (1, 2, 2), (6, 3, 1), (1, 3, 1)]


@pytest.mark.parametrize("rewrite", ["", "cpu", "gpu"])
@pytest.mark.parametrize(("side", "window", "stride"), POOLS)
def test_max_pool_matches_direct_maximum(
    rewrite: ops.Rewrite, side: int, window: int, stride: int
) -> None:
    x = normal(2, side, side + 2, 3)
    result = ops.max_pool(jnp.asarray(x), window=window, stride=stride, rewrite=rewrite)
    np.testing.assert_array_equal(result, direct_max_pool(x, window, stride))


@pytest.mark.parametrize("size", [(16, 16), (3, 5)])
def test_padded_max_pool_equals_plain_max_pool_exactly(size: tuple[int, int]) -> None:
    """Few distinct values, so that many windows have equal maxima."""
    x = np.round(normal(2, *size, 3)) - 2
    pool = functools.partial(ops.max_pool, window=3, stride=1)
    padded, plain = (
        value_and_vjp(functools.partial(pool, rewrite=rewrite), x) for rewrite in ("tpu_padded", "")
    )
    np.testing.assert_array_equal(padded[0], plain[0])
    np.testing.assert_array_equal(padded[1][0], plain[1][0])


@pytest.mark.parametrize(
    ("kind", "libtpu", "expected"),
    [
        ("TPU v6 lite", "0.0.50.1", "tpu_padded"),
        ("TPU7x", "0.0.50.1", "tpu_padded"),
        ("TPU v6 lite", "0.0.52", "tpu"),
        ("TPU v5 lite", "0.0.50.1", "tpu"),
    ],
)
def test_pools_are_padded_only_for_compilers_that_fail_on_their_gradient(
    kind: str, libtpu: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: libtpu)
    device: Any = types.SimpleNamespace(platform="tpu", device_kind=kind)
    assert ops.preferred_rewrite(device) == expected


@pytest.mark.parametrize(
    ("rewrite", "size", "expected"),
    [
        ("tpu_padded", 4, True),
        ("tpu_padded", 16, True),
        ("tpu_padded", 21, True),
        ("tpu_padded", 22, False),
        ("tpu", 4, False),
    ],
)
def test_only_small_pools_are_padded(rewrite: ops.Rewrite, size: int, expected: bool) -> None:
    settings = Model(name="googlenet", stem="s16", width=0.05)
    network = networks.create(settings, 2, rewrite=rewrite)
    images = jax.ShapeDtypeStruct((1, 4 * size, 4 * size, 3), jnp.float32)

    def call(images: jax.Array) -> Any:
        return network.init_with_output(jax.random.key(0), images)

    program = str(jax.make_jaxpr(call)(images))
    # The two modules at a quarter of the size; later ones are smaller.
    padded = program.count(f"1,{size + 2},{size + 2},")
    assert (padded > 0) is expected


@pytest.mark.parametrize(("side", "window", "stride"), POOLS)
def test_indexed_max_pool_matches_plain_max_pool(side: int, window: int, stride: int) -> None:
    x = normal(2, side, side + 2, 3)
    paddings = ops.pool_paddings(x.shape, window=window, stride=stride)

    def pooled(pool: Callable[..., jax.Array], *options: bool) -> Vjp:
        return jitted_vjp(lambda x: pool(x, window, stride, paddings, *options), x.dtype)

    plain = pooled(ops.plain_max_pool)
    for materialize in (False, True):
        indexed = pooled(ops.indexed_max_pool, materialize)
        for images in (x, np.round(x)):  # Rounded, many windows have equal maxima.
            value, (gradient,) = indexed(images)
            plain_value, (plain_gradient,) = plain(images)
            np.testing.assert_array_equal(value, plain_value)
            np.testing.assert_allclose(gradient, plain_gradient, atol=1e-6)


def test_indexed_max_pool_saves_one_byte_for_each_maximum() -> None:
    pool = functools.partial(ops.max_pool, window=3, stride=2, rewrite="gpu")
    value, pull_back = jax.vjp(pool, jnp.asarray(normal(2, 8, 8, 3)))
    (saved,) = jax.tree.leaves(pull_back)
    assert (saved.dtype, saved.shape) == (jnp.uint8, value.shape)


# oneDNN computes products and convolutions of more than a few rows; for fewer than 16 images its
# result for XLA's weight gradient is wrong. jaxlib cannot cache programs that use it.
@pytest.mark.filterwarnings("ignore:Error writing persistent compilation cache")
@pytest.mark.parametrize("batch", [4, 8, 16])
@pytest.mark.parametrize(
    ("side", "size", "channels", "stride"),
    [(16, 3, 32, 1), (32, 3, 3, 1), (32, 7, 3, 2), (16, 3, 16, 2), (8, 5, 16, 1), (8, 1, 64, 1)],
)
def test_bfloat16_convolutions_are_correct_up_to_rounding(
    batch: int, side: int, size: int, channels: int, stride: int
) -> None:
    x, kernel = normal(batch, side, side, channels), normal(size, size, channels, 32)
    paddings = ((size // 2,) * 2,) * 2
    convolve = functools.partial(ops.conv, stride=stride, paddings=paddings, rewrite="cpu")
    value, gradients = value_and_vjp(
        convolve, np.asarray(x, jnp.bfloat16), np.asarray(kernel, jnp.bfloat16)
    )
    exact_value, exact_gradients = value_and_vjp(
        lambda x, kernel: ops.plain_conv(x, kernel, paddings, stride), x, kernel
    )
    for result, exact in zip([value, *gradients], [exact_value, *exact_gradients], strict=True):
        assert result.dtype == jnp.bfloat16
        assert np.linalg.norm(np.float32(result) - exact) < 0.01 * np.linalg.norm(exact)


@pytest.mark.parametrize("normalize", [ops.plain_batch_norm_relu, ops.fused_batch_norm_relu])
def test_batch_norm_relu_matches_flax(
    normalize: Callable[..., tuple[jax.Array, jax.Array, jax.Array]],
) -> None:
    x, scale, bias = 2 * normal(4, 3, 5, 6) + 1, normal(6), normal(6) + 0.1

    def flax(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        variables = {
            "params": {"scale": scale, "bias": bias},
            "batch_stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)},
        }
        norm = nn.BatchNorm(use_running_average=False, epsilon=1e-3)
        return nn.relu(norm.apply(variables, x, mutable=["batch_stats"])[0])

    value, gradients = value_and_vjp(lambda *inputs: normalize(*inputs, 1e-3)[0], x, scale, bias)
    flax_value, flax_gradients = value_and_vjp(flax, x, scale, bias)
    np.testing.assert_allclose(value, flax_value, atol=1e-5)
    for gradient, flax_gradient in zip(gradients, flax_gradients, strict=True):
        np.testing.assert_allclose(gradient, flax_gradient, rtol=1e-5, atol=1e-5)
    _, mean, variance = normalize(x, scale, bias, 1e-3)
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance, x.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize("rewrite", ["", "cpu"])
@pytest.mark.parametrize("group_size", [1, 4, 16, 48])
def test_batch_norm_of_groups_equals_that_of_each_group(
    group_size: int, rewrite: ops.Rewrite
) -> None:
    """Eight devices of 6 images hold whole groups, share some, or split them unevenly."""
    x, scale, bias = 2 * normal(48, 3, 2, 5) + 1, normal(5), normal(5) + 0.1
    weights = normal(*x.shape)

    def loss(
        x: jax.Array, scale: jax.Array, bias: jax.Array, weights: jax.Array, size: int
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        result = ops.batch_norm_relu(x, scale, bias, epsilon=1e-3, rewrite=rewrite, group_size=size)
        return (result[0] * weights).sum(), result

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnames="size")
    groups = np.split(np.arange(48), 48 // group_size)
    expected = [gradient(x[rows], scale, bias, weights[rows], size=0) for rows in groups]
    y, mean, variance = zip(*(each[1] for each in expected), strict=True)
    gradient_x, gradient_scale, gradient_bias = zip(*(each[0] for each in expected), strict=True)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    for devices in (1, 8):
        rows = sharding.batch_sharding(sharding.make_mesh(jax.devices()[:devices]))
        gradients, result = gradient(
            jax.device_put(x, rows), scale, bias, jax.device_put(weights, rows), size=group_size
        )
        jax.tree.map(close, result, (np.concatenate(y), np.mean(mean, 0), np.mean(variance, 0)))
        close(gradients[0], np.concatenate(gradient_x))
        close(gradients[1], np.sum(gradient_scale, 0))
        close(gradients[2], np.sum(gradient_bias, 0))


@functools.cache
def _abstract_variables(name: str) -> Any:
    """Returns the shapes of the variables, which do not depend on the rewrite."""
    network = networks.create(Model(name=name, width=0.05), 2, rewrite="")
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    return jax.eval_shape(network.init, jax.random.key(0), images)


@pytest.mark.parametrize(
    ("backend", "rewrite", "equivalents"),
    [
        ("cpu", None, {"matmul_conv", "indexed_max_pool", "fused_batch_norm_relu"}),
        ("gpu", None, {"indexed_max_pool"}),
        ("tpu", None, set()),
        ("tpu", "cpu", {"matmul_conv", "indexed_max_pool", "fused_batch_norm_relu"}),
        ("cpu", "", set()),
    ],
)
@pytest.mark.parametrize("name", ["googlenet", "mini_googlenet"])
def test_rewrite_is_chosen_when_the_network_is_created(
    backend: str,
    rewrite: ops.Rewrite | None,
    equivalents: set[str],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The choice is made once, whatever the backend is at tracing time."""
    settings = Model(name=name, width=0.05, dtype="bfloat16")
    with monkeypatch.context() as patched:
        device = types.SimpleNamespace(platform=backend, device_kind="")
        patched.setattr(jax, "devices", lambda: [device])
        network = networks.create(settings, 2, rewrite=rewrite)
    assert network.rewrite == (backend if rewrite is None else rewrite)
    assert bool(ops.compiler_options(network)) is ("matmul_conv" in equivalents)

    def call(variables: Any, images: jax.Array) -> Any:
        return network.apply(
            variables,
            images,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(0)},
        )

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    program = str(jax.make_jaxpr(call)(_abstract_variables(name), images))
    for equivalent in ("matmul_conv", "indexed_max_pool", "fused_batch_norm_relu"):
        assert (equivalent in program) is (equivalent in equivalents)
    assert ("reduce_window_max" in program) is ("indexed_max_pool" not in equivalents)
