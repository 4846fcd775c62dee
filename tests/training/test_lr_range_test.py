"""The range test on a linear classifier of the digits, which compiles in a moment."""

import copy
import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from inception_jax.config import Augment, Optimizer, Schedule, Train
from inception_jax.input import pipeline
from inception_jax.models import weights
from inception_jax.training import lr_range_test, run, state, step
from inception_jax.training.lr_range_test import Point, Proposal, doubts, has_diverged, propose
from tests import small

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def linear(data_directory: pathlib.Path) -> run.Run:
    config = small.config(
        data_directory,
        augment=Augment(crop="none", flip=False),
        optimizer=Optimizer(name="sgd_nesterov", momentum=0.9),
        schedule=Schedule(name="constant", learning_rate=0.01),
        train=Train(batch_size=64, duration="20 steps"),
    )
    return dataclasses.replace(run.assemble(config, log=lambda _: None), model=small.Linear())


def losses_of_training(this: run.Run, steps: int) -> list[float]:
    """The losses of a run's own training."""
    train_step, current = step.make_train_step(this, this.dataset.image_size), state.create(this)
    losses: list[float] = []
    batches = pipeline.train_batches(
        this.dataset.train, batch_size=64, seed=0, start=0, stop=steps, mesh=this.mesh
    )
    for batch in batches:
        current, found = train_step(current, batch)
        losses.append(float(found.loss))
    return losses


def test_at_one_rate_it_is_the_runs_own_training(linear: run.Run) -> None:
    points = lr_range_test.range_test(linear, low=0.01, high=0.01, steps=8)
    assert [p.rate for p in points] == pytest.approx([0.01] * 8)
    np.testing.assert_allclose([p.loss for p in points], losses_of_training(linear, 8), rtol=1e-5)


def test_it_starts_from_the_weights_that_the_run_starts_from(
    linear: run.Run, tmp_path: pathlib.Path
) -> None:
    nothing = jax.tree.map(np.zeros_like, jax.device_get(state.create(linear).params))
    path = tmp_path / "zeros.safetensors"
    dataset = linear.dataset
    zeros = weights.Weights(
        variables={"params": nothing, "batch_stats": {}},
        model=linear.config.model,
        image_size=dataset.image_size,
        class_names=dataset.class_names,
        mean=dataset.mean,
        std=dataset.std,
    )
    weights.save(path, zeros)
    config = copy.deepcopy(linear.config)
    config.init.pretrained = str(path)
    fine_tuning = dataclasses.replace(linear, config=config)
    point = lr_range_test.range_test(fine_tuning, low=0.01, high=0.01, steps=2)[0]
    assert point.loss == pytest.approx(math.log(10), rel=1e-5)


def test_labels_are_neither_mixed_nor_smoothed(linear: run.Run) -> None:
    config = copy.deepcopy(linear.config)
    config.augment.mixup, config.train.label_smoothing = 1.0, 0.5
    mixing = dataclasses.replace(linear, config=config)
    mixed, plain = (
        lr_range_test.range_test(each, low=0.01, high=0.01, steps=8) for each in (mixing, linear)
    )
    assert mixed == plain
    assert mixing.config.augment.mixup == 1.0


def test_a_range_that_diverges_ends_there_without_an_error(linear: run.Run) -> None:
    heard: list[Point] = []
    points = lr_range_test.range_test(linear, low=1e-4, high=1e4, steps=160, stepped=heard.append)
    assert heard == points
    assert len(points) < 160
    rates = [p.rate for p in points]
    np.testing.assert_allclose(rates, 1e-4 * 10 ** (8 * np.arange(len(points)) / 159), rtol=1e-4)
    assert has_diverged(points)
    assert not any(has_diverged(points[:n]) for n in range(1, len(points)))
    found = propose(points)
    assert found is not None
    assert found.diverged
    assert found.rate < found.least < rates[-1]
    # What it proposes learns, and a thousand times that does not.
    ends = []
    for rate in (found.rate, 1000 * found.rate):
        losses = lr_range_test.range_test(linear, low=rate, high=rate, steps=20)
        ends.append(losses[-1].loss)
    assert ends[0] < 0.5 * points[0].loss < ends[1]


def test_a_loss_that_is_not_finite_ends_it(linear: run.Run) -> None:
    points = lr_range_test.range_test(linear, low=1e30, high=1e38, steps=12)
    assert not math.isfinite(points[-1].loss) or points[-1].loss > 4 * points[0].loss
    assert len(points) < 12
    assert propose(points) is None


def synthetic(loss: Any, steps: int = 200) -> list[Point]:
    """Points from 1e-5 to 10 with a given loss by log10 of the rate, no smoothing needed."""
    exponents = np.linspace(-5, 1, steps)
    return [Point(n, 10**x, loss(x), 10**x, loss(x)) for n, x in enumerate(exponents, start=1)]


def test_the_rate_proposed_is_a_third_of_that_of_the_least_loss() -> None:
    # A fall from 10^-3.5 on to the least at 10^-1, then a steep rise.
    points = synthetic(
        lambda x: 2.3 - min(max(0.0, x + 3.5), 2.5) * 0.6 + (50 * (x + 1) ** 2 if x > -1 else 0)
    )
    found = propose(points)
    assert found is not None
    assert found.least == pytest.approx(0.1, rel=0.1)
    assert found.rate == pytest.approx(found.least / 3, rel=0.05)
    assert found.diverged


def test_where_the_loss_is_flat_the_least_rate_of_the_flat_part_is_proposed() -> None:
    # Flat from 10^-2 on, and at its least at 1 by next to nothing.
    points = synthetic(lambda x: 2.3 - 1.5 / (1 + math.exp(-8 * (x + 2.2))) - 0.001 * (x < 0))
    found = propose(points)
    assert found is not None
    assert found.least == pytest.approx(1, rel=0.2)
    assert found.rate == pytest.approx(10**-1.93, rel=0.1)


@pytest.mark.parametrize(("fall", "proposed"), [(0.049, False), (0.053, True)])
def test_a_fall_of_less_than_a_twentieth_is_none(fall: float, proposed: bool) -> None:
    points = synthetic(lambda x: 2 * (1 - fall * (x + 5) / 6))
    assert isinstance(propose(points), Proposal) == proposed


@pytest.mark.parametrize(("last", "diverged"), [(3.99, False), (4.01, True), (math.nan, True)])
def test_four_times_the_least_is_divergence(last: float, diverged: bool) -> None:
    points = [Point(n, 0.1, loss, 0.1, loss) for n, loss in enumerate([2.0, 1.0, last])]
    assert has_diverged(points) == diverged


def test_the_smoothed_curve_does_not_lag() -> None:
    smooth = lr_range_test._Smoothing(10.0)
    points = [smooth(n, math.exp(n / 10), 5 - n / 10) for n in range(100)]
    # On a straight line over the log rate, the averages lie on the line.
    for p in points:
        assert p.smoothed_loss == pytest.approx(5 - math.log(p.smoothed_rate))
    assert points[0].smoothed_loss == pytest.approx(5)
    assert points[-1].smoothed_rate < 0.6 * points[-1].rate


def recorded(name: str) -> tuple[list[Point], Proposal | None]:
    """Returns a range test of 200 steps from 1e-5 to 10 that was measured, and its proposal."""
    smooth = lr_range_test._Smoothing(10.0)
    losses = json.loads((HERE / "curves" / "range_tests.json").read_text())[name]
    rates = 1e-5 * 10 ** (6 * np.arange(200) / 199)
    points = [
        smooth(step, rate, math.inf if loss is None else loss)
        for step, (rate, loss) in enumerate(zip(rates, losses, strict=False), start=1)
    ]
    return points, propose(points)


@pytest.mark.parametrize(
    ("name", "classes", "low", "high"),
    [
        # 600 images of three classes; trained at 0.025, the recipe of experiments/image_folder.py.
        ("pictures", 3, 0.025, 0.1),
        ("digits", 10, 0.05, 0.2),
    ],
)
def test_a_measured_curve_that_shows_the_edge_gives_a_rate_that_works(
    name: str, classes: int, low: float, high: float
) -> None:
    points, found = recorded(name)
    assert found is not None
    assert low < found.rate < high
    assert not doubts(points, found, steps=200, high=10.0, chance=math.log(classes))


def test_mixed_and_smoothed_labels_would_hide_the_edge() -> None:
    """The same images and network as "pictures", with mixup of 0.2 and smoothing of 0.1."""
    (_, plain), (_, mixed) = recorded("pictures"), recorded("mixed")
    assert plain is not None
    assert mixed is not None
    assert mixed.least > 5 * plain.least


@pytest.mark.parametrize(
    ("name", "classes", "words"),
    [
        ("forty", 2, "the few images were learned by heart before a rate was too high"),
        ("shuffled", 3, "guessing costs 1.1: nothing was learned at any rate"),
        ("shuffled", 3, "which is little against its noise from batch to batch"),
    ],
)
def test_a_measured_curve_that_does_not_show_the_edge_is_doubted(
    name: str, classes: int, words: str
) -> None:
    points, found = recorded(name)
    assert found is not None
    said = doubts(points, found, steps=200, high=10.0, chance=math.log(classes))
    assert any(words in doubt for doubt in said), said


@pytest.mark.parametrize(
    ("loss", "steps", "words"),
    [
        # Still falling at the end of the range.
        (lambda x: 2.3 - 0.3 * max(0.0, x + 2), 200, "Give a larger --high"),
        # Down at once.
        (lambda x: 2.3 - 1.5 * min(1.0, 4 * (x + 5)) + 3 * max(0.0, x), 200, "a smaller --low"),
        (lambda x: 2.3 - 0.3 * max(0.0, x + 4) + 4 * max(0.0, x), 179, "Give --steps=180"),
        (lambda x: 2.3 - 0.3 * max(0.0, x + 4) + 4 * max(0.0, x), 180, ""),
    ],
)
def test_each_condition_that_is_not_met_is_said(loss: Any, steps: int, words: str) -> None:
    points = synthetic(loss, steps)
    found = propose(points)
    assert found is not None
    said = doubts(points, found, steps=steps, high=10.0, chance=2.3)
    assert [words in doubt for doubt in said] == ([True] if words else []), said
