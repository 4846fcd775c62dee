"""Muon against numpy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inception_jax import config
from inception_jax.models import networks
from inception_jax.registry import MODELS
from inception_jax.training import muon, optimizers
from tests.training.test_optimizers import STEPS, rate


def newton_schulz(values: np.ndarray) -> np.ndarray:
    """What Muon's five iterations make of singular values, by their polynomial."""
    values = values / np.sqrt((values**2).sum())
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def muon_direction(kernel: np.ndarray) -> np.ndarray:
    matrix = kernel.reshape(-1, kernel.shape[-1])
    u, values, v = np.linalg.svd(matrix, full_matrices=False)
    scale = max(1, matrix.shape[1] / matrix.shape[0]) ** 0.5
    return (scale * (u * newton_schulz(values)) @ v).reshape(kernel.shape)


@pytest.mark.parametrize("shape", [(48, 12), (12, 48), (20, 20), (6, 1)])
@pytest.mark.parametrize("decades", [0, 8])
def test_orthogonalized_brings_singular_values_near_one(
    shape: tuple[int, int], decades: int
) -> None:
    rng = np.random.default_rng(0)
    # Columns that fall to 1e-8 make a matrix of low rank: its rounding errors grow most.
    matrix = (rng.normal(size=shape) * np.logspace(0, -decades, shape[1])).astype(np.float32)
    result = np.asarray(jax.jit(muon.orthogonalized)(matrix))
    u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(result, (u * newton_schulz(values)) @ v, atol=2e-3)
    found = np.linalg.svd(result, compute_uv=False)
    large = values > 0.002 * np.linalg.norm(matrix)
    assert (found[large] > 0.68).all() and (found < 1.21).all() and large.any()


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-10, 1e15])
def test_orthogonalized_is_finite_at_any_scale(scale: float) -> None:
    matrix = np.float32(scale) * np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    assert np.isfinite(muon.orthogonalized(jnp.asarray(matrix))).all()


class Ends(nn.Module):
    """Says which of `MUON_PARAMS` are the ends."""

    first_conv = "conv1/conv"
    classifiers = ("classifier/dense",)


MUON_PARAMS = {
    "conv1": {"conv": {"kernel": (3, 3, 3, 4)}},
    "inception": {
        "tall": {"kernel": (3, 3, 4, 6)},
        "wide": {"kernel": (1, 1, 4, 9), "bias": (9,)},
        "norm": {"scale": (9,)},
    },
    "classifier": {"dense": {"kernel": (9, 5), "bias": (5,)}},
}


@pytest.mark.parametrize(
    "settings",
    [
        config.Optimizer(name="muon", muon_adam_lr_ratio=1.0),
        config.Optimizer(name="muon", momentum=0.5, weight_decay=0.3, clip_norm=20.0),
        config.Optimizer(name="muon", weight_decay=0.3, decay_norm_and_bias=True),
    ],
    ids=str,
)
def test_muon_equals_numpy_on_hidden_kernels_and_adamw_elsewhere(
    settings: config.Optimizer,
) -> None:
    def draw(seed: int) -> dict:
        rng = np.random.default_rng(seed)
        return jax.tree.map(
            lambda shape: np.asarray(rng.normal(0, 2, shape), np.float32),
            MUON_PARAMS,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    def train(settings: config.Optimizer, factor: float) -> dict:
        optimizer = optimizers.make_optimizer(settings, lambda count: factor * rate(count), Ends())
        params = jax.tree.map(jnp.asarray, draw(99))
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        with jax.numpy_dtype_promotion("standard"):
            for step in range(STEPS):
                updates, state = update(draw(step), state, params)
                params = optax.apply_updates(params, updates)
        return params

    result = train(settings, 1.0)
    expected = train(dataclasses.replace(settings, name="adamw"), settings.muon_adam_lr_ratio)
    for layer in ("tall", "wide"):
        kernel = draw(99)["inception"][layer]["kernel"].astype(np.float64)
        momentum = np.zeros_like(kernel)
        for step in range(STEPS):
            norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(draw(step))))
            clip = min(1.0, settings.clip_norm / norm) if settings.clip_norm else 1.0
            grad = clip * draw(step)["inception"][layer]["kernel"]
            momentum = settings.momentum * momentum + grad
            direction = muon_direction(grad + settings.momentum * momentum)
            kernel -= (0.1 - 0.01 * step) * (direction + settings.weight_decay * kernel)
        expected["inception"][layer]["kernel"] = kernel
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), result, expected)


@pytest.mark.parametrize("name", [part.name for part in MODELS if part.is_own])
def test_muon_takes_all_kernels_but_the_first_and_the_last(name: str) -> None:
    aux = name.startswith("googlenet")
    model = networks.create(config.Model(name=name, aux_heads=aux, width=0.5), num_classes=7)
    key = jax.random.key(0)
    variables = jax.eval_shape(
        lambda: model.init({"params": key, "dropout": key}, jnp.zeros((1, 64, 64, 3)), train=True)
    )
    optimizer = optimizers.make_optimizer(config.Optimizer(name="muon"), rate, model)
    state = jax.eval_shape(optimizer.init, variables["params"])
    momentum = optax.tree.get_all_with_path(state, "trace")
    paths = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    }
    hidden = {
        path
        for path, shape in paths.items()
        if path.endswith("kernel") and shape[-2] != 3 and shape[-1] != 7
    }
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for _, trace in momentum
        for path, _ in jax.tree_util.tree_leaves_with_path(trace)
    }
    assert found == hidden
    assert len(hidden) >= 18
