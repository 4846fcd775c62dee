"""Update rules against numpy and PyTorch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inception_jax import config
from inception_jax.models import weights
from inception_jax.registry import OPTIMIZERS
from inception_jax.training import optimizers, schedules
from tests import small

PARAMS = {
    "conv": {
        "kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "bias": np.array([0.5, -0.5, 1.0, 2.0], np.float32),
    },
    "norm": {"scale": np.ones(4, np.float32), "bias": np.array([0.3, 0.0, -2.0, 1.0], np.float32)},
}
STEPS = 8


def gradients(step: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.normal(0, 2, p.shape).astype(np.float32), PARAMS)


def rate(count: jax.typing.ArrayLike) -> jax.Array:
    """Returns 0.1, 0.09, …"""
    return 0.1 - 0.01 * jnp.asarray(count, jnp.float32)


def trained(settings: config.Optimizer) -> dict[str, dict[str, jax.Array]]:
    # optax raises a float to the power of an integer count in Adam's bias correction.
    promotion = "strict" if settings.name.startswith("sgd") else "standard"
    return by_optax(optimizers.make_optimizer(settings, rate), promotion)


def by_optax(
    optimizer: optax.GradientTransformation, promotion: str = "standard"
) -> dict[str, dict[str, jax.Array]]:
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    with jax.numpy_dtype_promotion(promotion):
        for step in range(STEPS):
            updates, state = update(gradients(step), state, params)
            params = optax.apply_updates(params, updates)
    return params


SETTINGS = [
    config.Optimizer(name=name, **changes)
    for name in ("sgd", "sgd_nesterov", "adam", "adamw", "lion", "rmsprop")
    for changes in (
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decay_norm_and_bias": True, "clip_norm": 3.0},
        {"momentum": 0.5, "beta1": 0.7, "beta2": 0.9, "epsilon": 1e-3, "clip_norm": 1e6},
        {"weight_decay": 0.1, "decay_norm_and_bias": True, "norm_bias_lr_ratio": 4.0},
    )
]


def by_numpy(settings: config.Optimizer) -> dict[str, dict[str, np.ndarray]]:
    params = {(a, b): v.astype(np.float64) for a, leaf in PARAMS.items() for b, v in leaf.items()}
    first = {path: np.zeros_like(value) for path, value in params.items()}
    second = {path: np.zeros_like(value) for path, value in params.items()}
    for step in range(STEPS):
        grads = {path: gradients(step)[path[0]][path[1]].astype(np.float64) for path in params}
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        if 0 < settings.clip_norm < norm:
            grads = {path: g * settings.clip_norm / norm for path, g in grads.items()}
        lr = 0.1 - 0.01 * step
        for path, p in params.items():
            decays = settings.decay_norm_and_bias or path[1] == "kernel"
            decay = settings.weight_decay * p if decays else np.zeros_like(p)
            ratio = settings.norm_bias_lr_ratio if path == ("norm", "bias") else 1
            decay = decay / ratio
            decoupled = settings.name in ("adamw", "lion")
            g = grads[path] if decoupled else grads[path] + decay
            if settings.name.startswith("sgd"):
                first[path] = settings.momentum * first[path] + g
                nesterov = settings.name == "sgd_nesterov"
                direction = g + settings.momentum * first[path] if nesterov else first[path]
            elif settings.name == "lion":
                direction = np.sign(settings.beta1 * first[path] + (1 - settings.beta1) * g)
                first[path] = settings.beta2 * first[path] + (1 - settings.beta2) * g
            elif settings.name == "rmsprop":
                second[path] = settings.beta2 * second[path] + (1 - settings.beta2) * g**2
                scaled = g / (np.sqrt(second[path]) + settings.epsilon)
                direction = first[path] = settings.momentum * first[path] + scaled
            else:
                first[path] = settings.beta1 * first[path] + (1 - settings.beta1) * g
                second[path] = settings.beta2 * second[path] + (1 - settings.beta2) * g**2
                mean = first[path] / (1 - settings.beta1 ** (step + 1))
                square = second[path] / (1 - settings.beta2 ** (step + 1))
                direction = mean / (np.sqrt(square) + settings.epsilon)
            if decoupled:
                direction = direction + decay
            params[path] = p - lr * ratio * direction
    return {a: {b: params[a, b] for b in leaf} for a, leaf in PARAMS.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_update_rule_equals_numpy(settings: config.Optimizer) -> None:
    result, expected = trained(settings), by_numpy(settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), result, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_update_rule_equals_pytorch(settings: config.Optimizer) -> None:
    torch = pytest.importorskip("torch")
    if settings.name == "lion":
        pytest.skip("PyTorch has no Lion")
    tensors = jax.tree.map(lambda p: torch.tensor(p, requires_grad=True), PARAMS)
    kernel, others = tensors["conv"]["kernel"], [tensors["conv"]["bias"], tensors["norm"]["scale"]]
    norm_bias, ratio = tensors["norm"]["bias"], settings.norm_bias_lr_ratio
    decay = settings.weight_decay if settings.decay_norm_and_bias else 0.0
    groups = [
        {"params": [kernel], "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": decay},
        {"params": [norm_bias], "weight_decay": decay / ratio},
    ]
    if settings.name.startswith("sgd"):
        optimizer = torch.optim.SGD(
            groups, lr=0.1, momentum=settings.momentum, nesterov=settings.name == "sgd_nesterov"
        )
    elif settings.name == "rmsprop":
        optimizer = torch.optim.RMSprop(
            groups,
            lr=0.1,
            alpha=settings.beta2,
            eps=settings.epsilon,
            momentum=settings.momentum,
        )
    else:
        rule = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
        betas = (settings.beta1, settings.beta2)
        optimizer = rule(groups, lr=0.1, betas=betas, eps=settings.epsilon)
    for step in range(STEPS):
        for group, factor in zip(optimizer.param_groups, (1, 1, ratio), strict=True):
            group["lr"] = factor * (0.1 - 0.01 * step)
        jax.tree.map(lambda t, g: setattr(t, "grad", torch.tensor(g)), tensors, gradients(step))
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_([kernel, *others, norm_bias], settings.clip_norm)
        optimizer.step()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-5),
        trained(settings),
        tensors,
    )


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        (
            config.Optimizer(name="lamb", weight_decay=0.1, beta2=0.9, epsilon=1e-6),
            lambda mask: optax.lamb(rate, b2=0.9, weight_decay=0.1, mask=mask),
        ),
        (config.Optimizer(name="adafactor"), lambda mask: optax.adafactor(rate)),
    ],
    ids=["lamb", "adafactor"],
)
def test_update_rule_equals_optax(settings: config.Optimizer, reference: Any) -> None:
    mask = {"conv": {"kernel": True, "bias": False}, "norm": {"scale": False, "bias": False}}
    expected = by_optax(reference(mask))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), trained(settings), expected
    )


def test_adafactor_decay_is_decoupled() -> None:
    plain, decaying = (
        trained(config.Optimizer(name="adafactor", weight_decay=decay)) for decay in (0.0, 0.1)
    )
    assert np.array_equal(plain["conv"]["bias"], decaying["conv"]["bias"])
    assert np.linalg.norm(decaying["conv"]["kernel"]) < np.linalg.norm(plain["conv"]["kernel"])


@pytest.mark.parametrize("name", [part.name for part in OPTIMIZERS if part.is_builtin])
def test_only_updates_of_norm_biases_are_multiplied(name: str) -> None:
    network = small.Network()
    params = small.random_variables(network, 8)["params"]

    def update(ratio: float) -> Any:
        settings = config.Optimizer(name=name, norm_bias_lr_ratio=ratio)
        optimizer = optimizers.make_optimizer(settings, rate, network)
        return jax.jit(optimizer.update)(params, optimizer.init(params), params)[0]

    with jax.numpy_dtype_promotion("standard"):
        plain, scaled = (weights.flatten(update(ratio)) for ratio in (1.0, 64.0))
    for path, value in plain.items():
        factor = 64 if path in ("conv1/norm/bias", "conv2/norm/bias") else 1
        np.testing.assert_array_equal(scaled[path], factor * np.asarray(value), err_msg=path)


@pytest.mark.parametrize("name", [part.name for part in OPTIMIZERS if part.is_builtin])
def test_state_structure_does_not_depend_on_settings(name: str) -> None:
    plain = config.Optimizer(name=name)
    variants = [
        dataclasses.replace(plain, **changes)
        for changes in (
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decay_norm_and_bias": True},
            {"clip_norm": 1.0},
            {"momentum": 0.0, "beta1": 0.0},
            {"weight_decay": 0.1, "norm_bias_lr_ratio": 4.0},
        )
    ]
    make = functools.partial(
        schedules.make_schedule, timeline=config.Timeline(8, 100), total_steps=100
    )
    constant = make(config.Schedule(name="constant"))
    cosine = make(config.Schedule(name="cosine", warmup="5 steps"))

    def structure(settings: config.Optimizer, schedule: optax.Schedule) -> object:
        state = optimizers.make_optimizer(settings, schedule, small.Network()).init(PARAMS)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        return jax.tree.structure(state), jax.tree.leaves(shapes)

    expected = structure(plain, constant)
    for settings in variants:
        assert structure(settings, cosine) == expected
