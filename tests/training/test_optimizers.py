"""Schedules at every step against their formulas; update rules against numpy and PyTorch."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inception_jax import config
from inception_jax.config import Duration
from inception_jax.errors import ConfigError
from inception_jax.models import registry
from inception_jax.training import optimizers

# 12.5 steps an epoch, so that boundaries in epochs fall between steps.
TIMELINE = config.Timeline(batch_size=8, train_examples=100)
TOTAL = 100
PEAK = 0.4


def schedule_of(name: str, **changes: object) -> config.Schedule:
    return config.Schedule(**({"name": name, "learning_rate": PEAK} | changes))


def rates(schedule: config.Schedule, last: int = TOTAL + 20) -> np.ndarray:
    rate = optimizers.make_schedule(schedule, timeline=TIMELINE, total_steps=TOTAL)
    return np.asarray(jax.jit(rate)(np.arange(last)))


def progress(step: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / (TOTAL - warmup))


# Name, settings, and the rate after the warm-up as (step, warm-up steps) -> rate over peak.
SHAPES: list[tuple[str, dict[str, object], Callable[[int, int], float]]] = [
    ("constant", {}, lambda t, w: 1),
    (
        "steps",
        {"boundaries": (2.0, 3.1, 7.0), "decay": 0.2},
        # 25, 38.75 and 87.5 steps.
        lambda t, w: 0.2 ** ((t >= 25) + (t >= 39) + (t >= 88)),
    ),
    (
        "steps",
        {"boundaries": (25.0, 39.0), "boundaries_unit": "steps"},
        lambda t, w: 0.1 ** ((t >= 25) + (t >= 39)),
    ),
    (
        # "Decreasing the learning rate by 4% every 8 epochs" (Szegedy et al. 2014, section 6).
        "exponential",
        {"decay": 0.96, "decay_every": Duration(epochs=8), "staircase": True},
        lambda t, w: 0.96 ** (t >= 100),
    ),
    (
        "exponential",
        {"decay": 0.5, "decay_every": Duration(epochs=2)},
        lambda t, w: 2 ** (-(t - w) / 25),
    ),
    (
        "exponential",
        {"decay": 0.5, "decay_every": Duration(steps=6), "staircase": True},
        lambda t, w: 0.5 ** sum(w < multiple <= t for multiple in range(0, 200, 6)),
    ),
    (
        "cosine",
        {"end_factor": 0.1},
        lambda t, w: 0.1 + 0.9 * math.cos(progress(t, w) * math.pi / 2) ** 2,
    ),
    ("linear", {}, lambda t, w: 1 - progress(t, w)),
    ("linear", {"end_factor": 0.3, "power": 3.0}, lambda t, w: 1 - 0.7 * progress(t, w)),
    (
        "polynomial",
        {"end_factor": 0.01, "power": 2.5},
        lambda t, w: 0.01 + 0.99 * (1 - progress(t, w)) ** 2.5,
    ),
    ("polynomial", {"power": 0.5}, lambda t, w: math.sqrt(1 - progress(t, w))),
]


@pytest.mark.parametrize(
    ("warmup", "warmup_steps"), [({}, 0), ({"epochs": 1}, 13), ({"steps": 1}, 1)]
)
@pytest.mark.parametrize(("name", "changes", "factor"), SHAPES)
def test_schedule_follows_its_formula_at_every_step(
    name: str,
    changes: dict[str, object],
    factor: Callable[[int, int], float],
    warmup: dict[str, float],
    warmup_steps: int,
) -> None:
    result = rates(schedule_of(name, warmup=Duration(**warmup), **changes))
    expected = [
        PEAK * (step / warmup_steps if step < warmup_steps else factor(step, warmup_steps))
        for step in range(len(result))
    ]
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-7)
    assert result[warmup_steps] == np.float32(PEAK)


@pytest.mark.parametrize("end_factor", [0.0, 0.001, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial"])
def test_schedule_ends_at_the_end_factor_and_stays(name: str, end_factor: float) -> None:
    result = rates(schedule_of(name, end_factor=end_factor, warmup=Duration(steps=10)))
    assert result[10] == np.float32(PEAK)
    np.testing.assert_allclose(result[TOTAL:], PEAK * end_factor, rtol=1e-6)
    if end_factor < 1:
        assert result[TOTAL - 1] > result[TOTAL]


def test_last_update_of_a_linear_schedule_is_one_step_above_the_end() -> None:
    result = rates(schedule_of("linear", warmup=Duration(steps=20)))
    np.testing.assert_allclose(result[TOTAL - 1], PEAK / 80, rtol=1e-5)


@pytest.mark.parametrize(("name", "changes", "_"), SHAPES)
def test_schedule_of_one_step_is_that_of_many(
    name: str, changes: dict[str, object], _: object
) -> None:
    schedule = schedule_of(name, warmup=Duration(steps=3), **changes)
    rate = optimizers.make_schedule(schedule, timeline=TIMELINE, total_steps=TOTAL)
    of_many = rates(schedule)
    for count in (2, np.int32(2), jnp.int32(2), 50):
        result = rate(count)
        assert result.shape == () and result.dtype == jnp.float32
        np.testing.assert_allclose(result, of_many[int(count)], rtol=1e-6)


@pytest.mark.parametrize("steps", [TOTAL, TOTAL + 1])
def test_warmup_must_be_shorter_than_the_run(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"warmup = {steps} steps.*run of {TOTAL} steps"):
        rates(schedule_of("cosine", warmup=Duration(steps=steps)))
    rates(schedule_of("cosine", warmup=Duration(steps=TOTAL - 1)))


@pytest.mark.parametrize(("boundary", "warmup"), [(0.5, 7), (0.0, 0)])
def test_a_boundary_in_the_warmup_is_refused(boundary: float, warmup: int) -> None:
    with pytest.raises(ConfigError, match=r"boundaries.*after the warm-up"):
        rates(schedule_of("steps", boundaries=(boundary, 4.0), warmup=Duration(steps=warmup)))
    rates(schedule_of("cosine", boundaries=(boundary, 4.0), warmup=Duration(steps=warmup)))


PARAMS = {
    "conv": {
        "kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
        "bias": np.array([0.5, -0.5, 1.0, 2.0], np.float32),
    },
    "norm": {"scale": np.ones(4, np.float32)},
}
STEPS = 8


def gradients(step: int) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: rng.normal(0, 2, p.shape).astype(np.float32), PARAMS)


def rate(count: jax.typing.ArrayLike) -> jax.Array:
    """Returns 0.1, 0.09, …"""
    return 0.1 - 0.01 * jnp.asarray(count, jnp.float32)


def trained(settings: config.Optimizer) -> dict[str, dict[str, jax.Array]]:
    optimizer = optimizers.make_optimizer(settings, rate)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    # optax raises a float to the power of an integer count in Adam's bias correction.
    promotion = "strict" if settings.name.startswith("sgd") else "standard"
    with jax.numpy_dtype_promotion(promotion):
        for step in range(STEPS):
            updates, state = update(gradients(step), state, params)
            params = optax.apply_updates(params, updates)
    return params


SETTINGS = [
    config.Optimizer(name=name, **changes)
    for name in ("sgd", "sgd_nesterov", "adam", "adamw")
    for changes in (
        {},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decay_all": True, "clip_norm": 3.0},
        {"momentum": 0.5, "beta1": 0.7, "beta2": 0.9, "epsilon": 1e-3, "clip_norm": 1e6},
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
            decays = settings.decay_all or path[1] == "kernel"
            decay = settings.weight_decay * p if decays else np.zeros_like(p)
            g = grads[path] if settings.name == "adamw" else grads[path] + decay
            if settings.name.startswith("sgd"):
                first[path] = settings.momentum * first[path] + g
                nesterov = settings.name == "sgd_nesterov"
                direction = g + settings.momentum * first[path] if nesterov else first[path]
            else:
                first[path] = settings.beta1 * first[path] + (1 - settings.beta1) * g
                second[path] = settings.beta2 * second[path] + (1 - settings.beta2) * g**2
                mean = first[path] / (1 - settings.beta1 ** (step + 1))
                square = second[path] / (1 - settings.beta2 ** (step + 1))
                direction = mean / (np.sqrt(square) + settings.epsilon)
            if settings.name == "adamw":
                direction = direction + decay
            params[path] = p - lr * direction
    return {a: {b: params[a, b] for b in leaf} for a, leaf in PARAMS.items()}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_update_rule_equals_numpy(settings: config.Optimizer) -> None:
    result, expected = trained(settings), by_numpy(settings)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), result, expected)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_update_rule_equals_pytorch(settings: config.Optimizer) -> None:
    torch = pytest.importorskip("torch")
    tensors = jax.tree.map(lambda p: torch.tensor(p, requires_grad=True), PARAMS)
    kernel, others = tensors["conv"]["kernel"], [tensors["conv"]["bias"], tensors["norm"]["scale"]]
    groups = [
        {"params": [kernel], "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": settings.weight_decay if settings.decay_all else 0.0},
    ]
    if settings.name.startswith("sgd"):
        optimizer = torch.optim.SGD(
            groups, lr=0.1, momentum=settings.momentum, nesterov=settings.name == "sgd_nesterov"
        )
    else:
        rule = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
        betas = (settings.beta1, settings.beta2)
        optimizer = rule(groups, lr=0.1, betas=betas, eps=settings.epsilon)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 - 0.01 * step
        jax.tree.map(lambda t, g: setattr(t, "grad", torch.tensor(g)), tensors, gradients(step))
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_([kernel, *others], settings.clip_norm)
        optimizer.step()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b.detach().numpy(), atol=2e-5),
        trained(settings),
        tensors,
    )


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
    result = np.asarray(jax.jit(optimizers.orthogonalized)(matrix))
    u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    np.testing.assert_allclose(result, (u * newton_schulz(values)) @ v, atol=2e-3)
    found = np.linalg.svd(result, compute_uv=False)
    large = values > 0.002 * np.linalg.norm(matrix)
    assert (found[large] > 0.68).all() and (found < 1.21).all() and large.any()


@pytest.mark.parametrize("scale", [0.0, 1e-25, 1e-10, 1e15])
def test_orthogonalized_is_finite_at_any_scale(scale: float) -> None:
    matrix = np.float32(scale) * np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    assert np.isfinite(optimizers.orthogonalized(jnp.asarray(matrix))).all()


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
        config.Optimizer(name="muon", adam_rate_factor=1.0),
        config.Optimizer(name="muon", momentum=0.5, weight_decay=0.3, clip_norm=20.0),
        config.Optimizer(name="muon", weight_decay=0.3, decay_all=True),
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
        optimizer = optimizers.make_optimizer(settings, lambda count: factor * rate(count))
        params = jax.tree.map(jnp.asarray, draw(99))
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        with jax.numpy_dtype_promotion("standard"):
            for step in range(STEPS):
                updates, state = update(draw(step), state, params)
                params = optax.apply_updates(params, updates)
        return params

    result = train(settings, 1.0)
    expected = train(dataclasses.replace(settings, name="adamw"), settings.adam_rate_factor)
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


@pytest.mark.parametrize("name", config.MODELS)
def test_muon_takes_all_kernels_but_the_first_and_the_last(name: str) -> None:
    aux = name.startswith("googlenet")
    model = registry.create(config.Model(name=name, aux_heads=aux, width=0.5), num_classes=7)
    key = jax.random.key(0)
    variables = jax.eval_shape(
        lambda: model.init({"params": key, "dropout": key}, jnp.zeros((1, 64, 64, 3)), train=True)
    )
    optimizer = optimizers.make_optimizer(config.Optimizer(name="muon"), rate)
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


@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov", "adam", "adamw", "muon"])
def test_state_has_one_structure_whatever_the_settings(name: str) -> None:
    plain = config.Optimizer(name=name)
    variants = [
        dataclasses.replace(plain, **changes)
        for changes in (
            {"weight_decay": 0.1},
            {"weight_decay": 0.1, "decay_all": True},
            {"clip_norm": 1.0},
            {"momentum": 0.0, "beta1": 0.0},
        )
    ]
    make = optimizers.make_schedule
    constant = make(schedule_of("constant"), timeline=TIMELINE, total_steps=TOTAL)
    cosine = make(
        schedule_of("cosine", warmup=Duration(steps=5)), timeline=TIMELINE, total_steps=TOTAL
    )

    def structure(settings: config.Optimizer, schedule: optax.Schedule) -> object:
        state = optimizers.make_optimizer(settings, schedule).init(PARAMS)
        shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
        return jax.tree.structure(state), jax.tree.leaves(shapes)

    expected = structure(plain, constant)
    for settings in variants:
        assert structure(settings, cosine) == expected
