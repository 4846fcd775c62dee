"""Micro-batches and SAM gradients against formulas, on networks of one or two layers."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

from inception_jax.models.layers import ModelOutput
from inception_jax.runtime import sharding
from inception_jax.training import gradients, losses

BATCH, CLASSES = 32, 5
KEY = jax.random.key(3)


class Net(nn.Module):
    """Optional BatchNorm, hidden layer and dropout, and a linear layer."""

    norm: bool = False
    hidden: int = 0
    dropout: float = 0.0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> ModelOutput:
        x = images.reshape(len(images), -1)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        if self.hidden:
            x = nn.tanh(nn.Dense(self.hidden)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return ModelOutput(nn.Dense(CLASSES, name="last")(x))


def mesh_of(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def data() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.normal(size=(BATCH, 2, 2, 3)).astype(np.float32)
    return images, rng.dirichlet(np.ones(CLASSES), BATCH).astype(np.float32)


def variables_of(net: Net) -> tuple[Any, Any]:
    variables = net.init({"params": KEY, "dropout": KEY}, data()[0], train=True)
    return variables["params"], variables.get("batch_stats", {})


def make(net: Net, parts: int, rho: float, mesh: Mesh) -> gradients.GradientFunction:
    def loss(output: ModelOutput, targets: jax.Array) -> jax.Array:
        return losses.cross_entropy(output.logits, targets)

    return gradients.make_gradient(net, loss, num_microbatches=parts, sam_rho=rho, mesh=mesh)


def gradient_of(
    net: Net, *, parts: int = 1, rho: float = 0.0, devices: int = 1, at: Any = None
) -> gradients.GradOutput:
    """Returns the gradient at the initial or given parameters, the batch split over devices."""
    params, batch_stats = variables_of(net)
    mesh = mesh_of(devices)
    replicated, sharded = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    gradient = make(net, parts, rho, mesh)
    placed = jax.device_put((params if at is None else at, batch_stats), replicated)
    return jax.jit(gradient)(
        *placed, *jax.device_put(data(), sharded), jax.device_put(KEY, replicated)
    )


@functools.cache
def full_batch_gradient(net: Net, rho: float) -> gradients.GradOutput:
    return gradient_of(net, rho=rho)


def assert_close(actual: Any, expected: Any, **tolerance: float) -> None:
    limits = {"rtol": 1e-5, "atol": 1e-6} | tolerance
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **limits), actual, expected)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rho", [0.0, 0.5])
@pytest.mark.parametrize("parts", [2, 4])
def test_microbatches_give_gradient_of_full_batch(parts: int, rho: float, devices: int) -> None:
    net = Net(hidden=4)
    result = gradient_of(net, parts=parts, rho=rho, devices=devices)
    assert_close(result, full_batch_gradient(net, rho))


def test_devices_do_not_exchange_images() -> None:
    net, mesh = Net(hidden=4), mesh_of(8)
    replicated, sharded = sharding.replicated(mesh), sharding.batch_sharding(mesh)
    gradient = make(net, 2, 0.0, mesh)
    jitted = jax.jit(gradient, in_shardings=(replicated, replicated, sharded, sharded, replicated))
    program = jitted.lower(*variables_of(net), *data(), KEY).compile().as_text()
    assert program and "all-reduce" in program
    for exchange in ("all-gather", "all-to-all", "collective-permute"):
        assert exchange not in program


def test_running_statistics_are_updated_by_each_microbatch() -> None:
    images = data()[0].reshape(BATCH, -1).astype(np.float64)
    mean, variance = np.zeros(12), np.ones(12)
    for part in range(4):
        mean = 0.9 * mean + 0.1 * images[part::4].mean(0)
        variance = 0.9 * variance + 0.1 * images[part::4].var(0)
    result = gradient_of(Net(norm=True), parts=4, devices=8).batch_stats["norm"]
    assert_close(result, {"mean": mean, "var": variance})


def test_each_microbatch_has_independent_dropout() -> None:
    net = Net(dropout=0.5)
    images, targets = data()
    plain = make(net, 1, 0.0, mesh_of(1))
    parts = [
        plain(*variables_of(net), images[i::2], targets[i::2], jax.random.fold_in(KEY, i))
        for i in range(2)
    ]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, parts[0].grads, parts[1].grads)
    result = gradient_of(net, parts=2)
    assert_close(result.grads, expected)
    assert_close(result.logits[1::2], parts[1].logits)


def test_sam_gradient_equals_formula() -> None:
    images, targets = data()
    images = images.reshape(BATCH, -1).astype(np.float64)
    start = jax.tree.map(lambda p: np.asarray(p, np.float64), variables_of(Net())[0]["last"])

    def gradient(layer: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        powers = np.exp(images @ layer["kernel"] + layer["bias"])
        error = (powers / powers.sum(1, keepdims=True) - targets) / BATCH
        return {"kernel": images.T @ error, "bias": error.sum(0)}

    here = gradient(start)
    norm = np.sqrt(sum((g**2).sum() for g in here.values()))
    expected = gradient({name: start[name] + 0.7 * here[name] / norm for name in start})
    assert_close(gradient_of(Net(), rho=0.7).grads["last"], expected)
    assert_close(gradient_of(Net()).grads["last"], here)
    assert abs(expected["kernel"] - here["kernel"]).max() > 0.01


def test_sam_step_equals_optax() -> None:
    net = Net(hidden=4)
    params = variables_of(net)[0]
    ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
    rule = optax.contrib.sam(optax.sgd(0.1), ascent, opaque_mode=True)
    updates, _ = rule.update(
        gradient_of(net).grads,
        rule.init(params),
        params,
        grad_fn=lambda at, _: gradient_of(net, at=at).grads,
    )
    result = gradient_of(net, rho=0.3).grads
    assert_close(jax.tree.map(lambda g: -0.1 * g, result), updates)


def test_second_sam_pass_reuses_dropout_and_keeps_statistics() -> None:
    net = Net(norm=True, hidden=4, dropout=0.5)
    plain, result = gradient_of(net), gradient_of(net, rho=0.3)
    assert_close(result[1:], plain[1:])
    factor = 0.3 / optax.tree.norm(plain.grads)
    neighbor = jax.tree.map(lambda p, g: p + factor * g, variables_of(net)[0], plain.grads)
    assert_close(result.grads, gradient_of(net, at=neighbor).grads)


def test_zero_gradient_does_not_perturb_parameters() -> None:
    net = Net()
    params, _ = variables_of(net)
    mesh = mesh_of(1)
    gradient = make(net, 1, 0.5, mesh)
    zeros = jax.tree.map(jnp.zeros_like, params)
    uniform = jnp.full((BATCH, CLASSES), 1 / CLASSES)
    result = gradient(zeros, {}, jnp.asarray(data()[0]), uniform, KEY)
    assert_close(result.grads, zeros)
