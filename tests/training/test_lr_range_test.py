"""The range test on a linear classifier of digits, which compiles fast."""

import copy
import dataclasses
import json
import math
import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from inception_jax.config import Augment, Optimizer, Schedule, Train
from inception_jax.input import pipeline
from inception_jax.models import weights
from inception_jax.models.layers import ModelOutput
from inception_jax.training import lr_range_test, run, state, step
from inception_jax.training.lr_range_test import (
    Point,
    Proposal,
    has_diverged,
    propose,
    reliability_warnings,
)
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
    """Returns the losses of ordinary training."""
    train_step, current = step.make_train_step(this, this.dataset.image_size), state.create(this)
    losses: list[float] = []
    batches = pipeline.train_batches(
        this.dataset.train, batch_size=64, seed=0, start=0, stop=steps, mesh=this.mesh
    )
    for batch in batches:
        current, output = train_step(current, batch)
        losses.append(float(output.loss))
    return losses


def test_constant_rate_equals_ordinary_training(linear: run.Run) -> None:
    points = lr_range_test.range_test(linear, low=0.01, high=0.01, steps=8)
    assert [p.rate for p in points] == pytest.approx([0.01] * 8)
    np.testing.assert_allclose([p.loss for p in points], losses_of_training(linear, 8), rtol=1e-5)


def test_range_test_starts_from_pretrained_weights(linear: run.Run, tmp_path: pathlib.Path) -> None:
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


def test_chance_counts_the_auxiliary_heads_of_a_custom_network(linear: run.Run) -> None:
    class OneAuxiliaryHead(nn.Module):
        @nn.compact
        def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
            logits = nn.Dense(10)(images.mean((1, 2)))
            return ModelOutput(logits, aux=(logits,) if train else ())

    assert linear.config.train.aux_weight == pytest.approx(0.3)
    assert lr_range_test.chance_loss(linear) == pytest.approx(math.log(10))
    custom = dataclasses.replace(linear, model=OneAuxiliaryHead())
    assert lr_range_test.chance_loss(custom) == pytest.approx(1.3 * math.log(10))


def test_divergence_ends_test_without_error(linear: run.Run) -> None:
    received: list[Point] = []
    points = lr_range_test.range_test(
        linear, low=1e-4, high=1e4, steps=160, on_step=received.append
    )
    assert received == points
    assert len(points) < 160
    rates = [p.rate for p in points]
    np.testing.assert_allclose(rates, 1e-4 * 10 ** (8 * np.arange(len(points)) / 159), rtol=1e-4)
    assert has_diverged(points)
    assert not any(has_diverged(points[:n]) for n in range(1, len(points)))
    proposal = propose(points)
    assert proposal is not None
    assert proposal.diverged
    assert proposal.rate < proposal.least < rates[-1]
    # The proposed rate learns, and a thousand times that does not.
    ends = []
    for rate in (proposal.rate, 1000 * proposal.rate):
        losses = lr_range_test.range_test(linear, low=rate, high=rate, steps=20)
        ends.append(losses[-1].loss)
    assert ends[0] < 0.5 * points[0].loss < ends[1]


def test_nonfinite_loss_ends_test(linear: run.Run) -> None:
    points = lr_range_test.range_test(linear, low=1e30, high=1e38, steps=12)
    assert not math.isfinite(points[-1].loss) or points[-1].loss > 4 * points[0].loss
    assert len(points) < 12
    assert propose(points) is None


def synthetic(loss: Any, steps: int = 200) -> list[Point]:
    """Returns points from 1e-5 to 10 with a given loss as a function of log10 of the rate."""
    exponents = np.linspace(-5, 1, steps)
    return [Point(n, 10**x, loss(x), 10**x, loss(x)) for n, x in enumerate(exponents, start=1)]


def test_proposed_rate_is_a_third_of_rate_with_lowest_loss() -> None:
    # Falls from 10^-3.5 to its minimum at 10^-1, then rises steeply.
    points = synthetic(
        lambda x: 2.3 - min(max(0.0, x + 3.5), 2.5) * 0.6 + (50 * (x + 1) ** 2 if x > -1 else 0)
    )
    proposal = propose(points)
    assert proposal is not None
    assert proposal.least == pytest.approx(0.1, rel=0.1)
    assert proposal.rate == pytest.approx(proposal.least / 3, rel=0.05)
    assert proposal.diverged


def test_constant_loss_of_zero_gives_no_proposal() -> None:
    assert propose(synthetic(lambda x: 0.0)) is None


def test_lowest_rate_of_flat_minimum_is_proposed() -> None:
    # Flat from 10^-2, with a marginal minimum at 1.
    points = synthetic(lambda x: 2.3 - 1.5 / (1 + math.exp(-8 * (x + 2.2))) - 0.001 * (x < 0))
    proposal = propose(points)
    assert proposal is not None
    assert proposal.least == pytest.approx(1, rel=0.2)
    assert proposal.rate == pytest.approx(10**-1.93, rel=0.1)


@pytest.mark.parametrize(("fall", "proposed"), [(0.049, False), (0.053, True)])
def test_decrease_below_a_twentieth_gives_no_proposal(fall: float, proposed: bool) -> None:
    points = synthetic(lambda x: 2 * (1 - fall * (x + 5) / 6))
    assert isinstance(propose(points), Proposal) == proposed


@pytest.mark.parametrize(("last", "diverged"), [(3.99, False), (4.01, True), (math.nan, True)])
def test_four_times_the_minimum_is_divergence(last: float, diverged: bool) -> None:
    points = [Point(n, 0.1, loss, 0.1, loss) for n, loss in enumerate([2.0, 1.0, last])]
    assert has_diverged(points) == diverged


def test_smoothed_curve_does_not_lag() -> None:
    smooth = lr_range_test._Smoothing(10.0)
    points = [smooth(n, math.exp(n / 10), 5 - n / 10) for n in range(100)]
    # On a straight line over the log rate, the averages lie on the line.
    for p in points:
        assert p.smoothed_loss == pytest.approx(5 - math.log(p.smoothed_rate))
    assert points[0].smoothed_loss == pytest.approx(5)
    assert points[-1].smoothed_rate < 0.6 * points[-1].rate


def measured(name: str) -> tuple[list[Point], Proposal | None]:
    """Returns a measured range test of 200 steps from 1e-5 to 10, and its proposal."""
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
def test_measured_curve_with_edge_gives_working_rate(
    name: str, classes: int, low: float, high: float
) -> None:
    points, proposal = measured(name)
    assert proposal is not None
    assert low < proposal.rate < high
    assert not reliability_warnings(
        points, proposal, steps=200, high=10.0, chance=math.log(classes)
    )


def test_mixed_and_smoothed_labels_would_hide_edge() -> None:
    """Compares "pictures" with the same images and network, mixup 0.2 and label smoothing 0.1."""
    (_, plain), (_, mixed) = measured("pictures"), measured("mixed")
    assert plain is not None
    assert mixed is not None
    assert mixed.least > 5 * plain.least


@pytest.mark.parametrize(
    ("name", "classes", "words"),
    [
        ("forty", 2, "the network memorized the few images before any rate was too high"),
        ("shuffled", 3, "a uniform guess has 1.1: nothing was learned at any rate"),
        ("shuffled", 3, "too little compared with its batch-to-batch noise"),
    ],
)
def test_measured_curve_without_edge_is_unreliable(name: str, classes: int, words: str) -> None:
    points, proposal = measured(name)
    assert proposal is not None
    reasons = reliability_warnings(points, proposal, steps=200, high=10.0, chance=math.log(classes))
    assert any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("loss", "steps", "words"),
    [
        # Still falling at the end of the range.
        (lambda x: 2.3 - 0.3 * max(0.0, x + 2), 200, "Use a larger --high"),
        # Falls immediately.
        (lambda x: 2.3 - 1.5 * min(1.0, 4 * (x + 5)) + 3 * max(0.0, x), 200, "a smaller --low"),
        (lambda x: 2.3 - 0.3 * max(0.0, x + 4) + 4 * max(0.0, x), 179, "Use --steps=180"),
        (lambda x: 2.3 - 0.3 * max(0.0, x + 4) + 4 * max(0.0, x), 180, ""),
    ],
)
def test_each_unmet_condition_is_reported(loss: Any, steps: int, words: str) -> None:
    points = synthetic(loss, steps)
    proposal = propose(points)
    assert proposal is not None
    reasons = reliability_warnings(points, proposal, steps=steps, high=10.0, chance=2.3)
    assert [words in reason for reason in reasons] == ([True] if words else []), reasons
