"""Schedules at every step against their formulas."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax import config
from inception_jax.errors import ConfigError
from inception_jax.training import schedules

# 12.5 steps an epoch, so that boundaries in epochs fall between steps.
TIMELINE = config.Timeline(batch_size=8, train_examples=100)
TOTAL = 100
PEAK = 0.4


def schedule_of(name: str, **changes: object) -> config.Schedule:
    return config.Schedule(**({"name": name, "learning_rate": PEAK} | changes))


def rates(schedule: config.Schedule, last: int = TOTAL + 20) -> np.ndarray:
    rate = schedules.make_schedule(schedule, timeline=TIMELINE, total_steps=TOTAL)
    return np.asarray(jax.jit(rate)(np.arange(last)))


def progress(step: int, warmup: int) -> float:
    return min(1.0, (step - warmup) / (TOTAL - warmup))


# Name, settings, and the rate after the warm-up as (step, warm-up steps) -> rate over peak.
SHAPES: list[tuple[str, dict[str, object], Callable[[int, int], float]]] = [
    ("constant", {}, lambda t, w: 1),
    (
        "steps",
        {"boundaries": ("2 epochs", "3.1 epochs", "7 epochs"), "decay_rate": 0.2},
        # 25, 38.75 and 87.5 steps.
        lambda t, w: 0.2 ** ((t >= 25) + (t >= 39) + (t >= 88)),
    ),
    (
        "steps",
        {"boundaries": ("25 steps", "39 steps")},
        lambda t, w: 0.1 ** ((t >= 25) + (t >= 39)),
    ),
    (
        # "Decreasing the learning rate by 4% every 8 epochs" (Szegedy et al. 2014, section 6).
        "exponential",
        {"decay_rate": 0.96, "decay_period": "8 epochs", "staircase": True},
        lambda t, w: 0.96 ** (t >= 100),
    ),
    (
        "exponential",
        {"decay_rate": 0.5, "decay_period": "2 epochs"},
        lambda t, w: 2 ** (-(t - w) / 25),
    ),
    (
        "exponential",
        {"decay_rate": 0.5, "decay_period": "6 steps", "staircase": True},
        lambda t, w: 0.5 ** sum(w < multiple <= t for multiple in range(0, 200, 6)),
    ),
    (
        "cosine",
        {"final_lr_ratio": 0.1},
        lambda t, w: 0.1 + 0.9 * math.cos(progress(t, w) * math.pi / 2) ** 2,
    ),
    ("linear", {}, lambda t, w: 1 - progress(t, w)),
    ("linear", {"final_lr_ratio": 0.3, "power": 3.0}, lambda t, w: 1 - 0.7 * progress(t, w)),
    (
        "polynomial",
        {"final_lr_ratio": 0.01, "power": 2.5},
        lambda t, w: 0.01 + 0.99 * (1 - progress(t, w)) ** 2.5,
    ),
    ("polynomial", {"power": 0.5}, lambda t, w: math.sqrt(1 - progress(t, w))),
]


@pytest.mark.parametrize(("warmup", "warmup_steps"), [("", 0), ("1 epoch", 13), ("1 step", 1)])
@pytest.mark.parametrize(("name", "changes", "factor"), SHAPES)
def test_schedule_follows_its_formula_at_every_step(
    name: str,
    changes: dict[str, object],
    factor: Callable[[int, int], float],
    warmup: str,
    warmup_steps: int,
) -> None:
    result = rates(schedule_of(name, warmup=warmup, **changes))
    expected = [
        PEAK * (step / warmup_steps if step < warmup_steps else factor(step, warmup_steps))
        for step in range(len(result))
    ]
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=1e-7)
    assert result[warmup_steps] == np.float32(PEAK)


@pytest.mark.parametrize("final_lr_ratio", [0.0, 0.001, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial"])
def test_schedule_ends_at_the_end_factor_and_stays(name: str, final_lr_ratio: float) -> None:
    result = rates(schedule_of(name, final_lr_ratio=final_lr_ratio, warmup="10 steps"))
    assert result[10] == np.float32(PEAK)
    np.testing.assert_allclose(result[TOTAL:], PEAK * final_lr_ratio, rtol=1e-6)
    if final_lr_ratio < 1:
        assert result[TOTAL - 1] > result[TOTAL]


def test_last_update_of_a_linear_schedule_is_one_step_above_the_end() -> None:
    result = rates(schedule_of("linear", warmup="20 steps"))
    np.testing.assert_allclose(result[TOTAL - 1], PEAK / 80, rtol=1e-5)


@pytest.mark.parametrize(("name", "changes", "_"), SHAPES)
def test_schedule_of_one_step_is_that_of_many(
    name: str, changes: dict[str, object], _: object
) -> None:
    schedule = schedule_of(name, warmup="3 steps", **changes)
    rate = schedules.make_schedule(schedule, timeline=TIMELINE, total_steps=TOTAL)
    of_many = rates(schedule)
    for count in (2, np.int32(2), jnp.int32(2), 50):
        result = rate(count)
        assert result.shape == () and result.dtype == jnp.float32
        np.testing.assert_allclose(result, of_many[int(count)], rtol=1e-6)


@pytest.mark.parametrize("steps", [TOTAL, TOTAL + 1])
def test_warmup_must_be_shorter_than_the_run(steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"warmup = .{steps} steps.*the run .{TOTAL} steps"):
        rates(schedule_of("cosine", warmup=f"{steps} steps"))
    rates(schedule_of("cosine", warmup=f"{TOTAL - 1} steps"))


@pytest.mark.parametrize(("boundary", "warmup"), [(0.5, 7), (0.0, 0)])
def test_a_boundary_in_the_warmup_is_refused(boundary: float, warmup: int) -> None:
    boundaries = (f"{boundary} epochs", "4 epochs")
    with pytest.raises(ConfigError, match=r"boundaries.*after the warm-up"):
        rates(schedule_of("steps", boundaries=boundaries, warmup=f"{warmup} steps"))
    rates(schedule_of("cosine", boundaries=boundaries, warmup=f"{warmup} steps"))
