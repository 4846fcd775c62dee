"""The learning-rate range test: one short training with a rising rate shows which rates work.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3;
with the rate rising exponentially, and stopped where the loss diverges, as in Gugger 2018, "How Do
You Find A Good Learning Rate" (the learning-rate finder of fastai).
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.runtime import environment
from inception_jax.training import initialization, optimizers
from inception_jax.training.run import Run, train_batches
from inception_jax.training.step import make_train_step

# A smoothed loss above this multiple of its least has diverged (Gugger 2018).
DIVERGENCE_FACTOR = 4.0

# The average reaches over this share of the steps: long enough to even out batches, short against
# the factor of ten in the rate that separates "learns" from "diverges".
SMOOTHING_FRACTION = 1 / 20

# The rate proposed is the one with the least smoothed loss divided by this. At the least the loss
# is about to rise, so it is the edge; Smith takes the peak of a cycle just below it, and Gugger a
# tenth of it for a constant rate. A third lies between, for a peak reached by a warm-up.
PEAK_DIVISOR = 3.0

# BatchNorm lets a loss stay flat over a factor of ten in the rate, and noise then decides where it
# is least. The rate proposed is therefore none above the first that has this share of the decrease.
FLAT_FRACTION = 0.9

# A loss that never fell below this share of what guessing costs has learned next to nothing.
MAX_CHANCE_FRACTION = 0.95

# A loss that fell below this share of its start has learned its images by heart; whatever the rate
# is after that, it stays there.
MEMORIZED_FRACTION = 0.05

# A smoothed loss that fell by less than this share of the first losses shows noise and no learning.
MIN_DECREASE_FRACTION = 0.05

# A rate shows its effect in the steps after it, some ten with a momentum of 0.9. With fewer steps
# than that for each factor of ten in the rate, the edge is found too high.
MIN_STEPS_PER_DECADE = 30

# Past its least the smoothed loss must rise by this share of its decrease, or it was not the edge.
MIN_RISE_FRACTION = 0.5

# Where the loss fell by this share of its decrease within the first tenth of the steps,
# rates below the range would have been needed, too.
MAX_EARLY_FRACTION = 0.5

# The decrease must be that many deviations of the smoothed loss, or its least is where noise puts it.
MIN_DECREASE_DEVIATIONS = 8.0


@dataclasses.dataclass(frozen=True)
class Point:
    """One step of a range test.

    Attributes:
      step: counted from 1.
      rate: learning rate of its update.
      loss: objective before the update; may be infinite or NaN in the last point.
      smoothed_loss: exponential moving average of the loss up to here, without bias to its start.
      smoothed_rate: geometric mean of the rates with the same weights, which is where on the axis
        the smoothed loss belongs: at the newest rate it would lag.
    """

    step: int
    rate: float
    loss: float
    smoothed_rate: float
    smoothed_loss: float


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a range test says; rates in the unit of config.schedule.learning_rate.

    Attributes:
      rate: proposed peak, to two digits: `least / PEAK_DIVISOR`, or the first rate at which the
        loss has made `FLAT_FRACTION`, if that is less.
      least: where the smoothed loss is least.
      diverged: whether the test ended by divergence; if not, `least` may be the end of the range.
    """

    rate: float
    least: float
    diverged: bool


def exponential_schedule(low: float, high: float, steps: int) -> optax.Schedule:
    """Returns rate(t) = low (high / low)^(t / (steps - 1)), t the updates already made."""
    exponent = math.log(high / low) / (steps - 1)
    return lambda count: low * jnp.exp(exponent * jnp.asarray(count, jnp.float32))


def range_test(
    run: Run,
    *,
    low: float,
    high: float,
    steps: int,
    on_step: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Trains a run from its initial state with the rate rising from `low` to `high`.

    All else is as the run has it when it begins: batches, augmentation, image size, optimizer. Only
    labels are neither mixed nor smoothed: with such labels the loss cannot fall far, so that with
    BatchNorm, which lets a network bear rates that teach it nothing, it hardly shows the edge.
    Nothing is saved.

    Args:
      run: what is tested; its own schedule and length are not used.
      low, high: first and last rate.
      steps: how many rates, equally spaced on a logarithmic axis; at least 2.
      on_step: takes each point as soon as it is known.

    Returns:
      A point for each step, up to the one at which the loss diverged or was not finite.
    """
    schedule = exponential_schedule(low, high, steps)
    optimizer = optimizers.make_optimizer(run.config.optimizer, schedule, run.model)
    config = copy.deepcopy(run.config)
    config.augment.mixup = config.augment.cutmix = config.train.label_smoothing = 0.0
    rising = dataclasses.replace(
        run, config=config, schedule=schedule, total_steps=steps, optimizer=optimizer
    )
    state, train_step = initialization.create_state(rising), make_train_step(rising)
    smooth = _Smoothing(_time_constant(steps))
    points: list[Point] = []
    for step, batch in enumerate(train_batches(rising), start=1):
        state, output = train_step(state, batch)
        points.append(smooth(step, float(schedule(step - 1)), float(jax.device_get(output.loss))))
        on_step(points[-1])
        if has_diverged(points):
            break
    return points


def has_diverged(points: Sequence[Point]) -> bool:
    """Whether the last smoothed loss is not finite, or above `DIVERGENCE_FACTOR` times the least before."""
    last = points[-1].smoothed_loss
    least = min((p.smoothed_loss for p in points[:-1]), default=last)
    return not math.isfinite(last) or last > DIVERGENCE_FACTOR * least


def chance_loss(run: Run) -> float:
    """Returns the objective of guessing uniformly among a run's classes, nats."""
    heads = 2 if run.config.model.aux_heads else 0
    return math.log(run.dataset.num_classes) * (1 + heads * run.config.train.aux_weight)


def reliability_warnings(
    points: Sequence[Point], proposal: Proposal, *, steps: int, high: float, chance: float
) -> list[str]:
    """Returns why a proposal cannot be relied on, each with a remedy; empty if it can.

    Args:
      points: of the range test.
      proposal: what `propose` made of them.
      steps: how many the test was planned to have.
      high: the last rate it was planned to have.
      chance: loss of guessing, as `chance_loss` gives it.
    """
    found = []
    low = points[0].rate
    # Rounded, as rates are float32.
    needed = math.ceil(round(MIN_STEPS_PER_DECADE * math.log10(high / low), 3))
    if steps < needed:
        found.append(
            f"{steps} steps are too few for rates from {low:g} to {high:g}: a rate takes effect "
            f"some steps later, so the edge is overestimated. Use --steps={needed}"
        )
    finite = [p for p in points if math.isfinite(p.smoothed_loss)]
    start = _initial_loss(points, finite)
    least = min(finite, key=lambda p: p.smoothed_loss)
    decrease = start - least.smoothed_loss
    after = max(p.smoothed_loss for p in finite if p.step >= least.step)
    rose = proposal.diverged or after - least.smoothed_loss >= MIN_RISE_FRACTION * decrease
    if not rose and least.smoothed_loss < MEMORIZED_FRACTION * start:
        found.append(
            "the network memorized the few images before any rate was too high, so the edge does "
            "not show. Keep the experiment's rate, or use more images"
        )
    elif not rose:
        found.append(
            f"the loss did not rise again up to a rate of {finite[-1].rate:.3g}, so the edge lies "
            "beyond it. Use a larger --high"
        )
    if least.smoothed_loss > MAX_CHANCE_FRACTION * chance:
        found.append(
            f"the loss fell only to {least.smoothed_loss:.3g}, and a uniform guess has "
            f"{chance:.3g}: nothing was learned at any rate. Use more --steps, or check that the "
            "labels match the images"
        )
    early = finite[min(len(finite) - 1, math.ceil(2 * SMOOTHING_FRACTION * steps))]
    if start - early.smoothed_loss > MAX_EARLY_FRACTION * decrease:
        found.append(
            f"the loss fell mostly at the first rates, {low:.3g} to {early.rate:.3g}, so it shows "
            "little about higher ones. Use a smaller --low"
        )
    deviation = _smoothed_loss_std([p.loss for p in finite if p.step <= least.step], steps)
    if decrease < MIN_DECREASE_DEVIATIONS * deviation:
        found.append(
            f"the loss fell by only {decrease:.3g}, too little compared with its batch-to-batch noise "
            f"({deviation:.2g} after smoothing). Use more --steps or a larger "
            "--config.train.batch_size"
        )
    return found


def _smoothed_loss_std(losses: Sequence[float], steps: int) -> float:
    """Returns the standard deviation of the smoothed loss around its course; jumps do not count."""
    if len(losses) < 3:
        return 0.0
    # 1.4826 median(|x|) is the deviation of a normal x; a second difference has √(1 + 4 + 1) of it,
    # and an average with the time constant T √(1 / (2T - 1)).
    one = 1.4826 / math.sqrt(6) * np.median(np.abs(np.diff(losses, 2)))
    return float(one / math.sqrt(2 * _time_constant(steps) - 1))


def _time_constant(steps: int) -> float:
    return max(2.0, SMOOTHING_FRACTION * steps)


def _initial_loss(points: Sequence[Point], finite: Sequence[Point]) -> float:
    """Returns the loss that a test began with; one batch alone would be a noisy start."""
    return float(np.mean([p.loss for p in finite[: math.ceil(SMOOTHING_FRACTION * len(points))]]))


def propose(points: Sequence[Point]) -> Proposal | None:
    """Returns what a range test proposes, or None if the loss did not decrease in its range."""
    finite = [p for p in points if math.isfinite(p.smoothed_loss)]
    if not finite:
        return None
    start, least = _initial_loss(points, finite), min(finite, key=lambda p: p.smoothed_loss)
    decrease = start - least.smoothed_loss
    if decrease < MIN_DECREASE_FRACTION * start:
        return None
    flat = next(p for p in finite if start - p.smoothed_loss >= FLAT_FRACTION * decrease)
    rate = min(least.smoothed_rate / PEAK_DIVISOR, flat.smoothed_rate)
    return Proposal(
        rate=float(f"{rate:.2g}"), least=least.smoothed_rate, diverged=has_diverged(points)
    )


def record(
    config: Config, points: Sequence[Point], proposal: Proposal | None, found: Sequence[str]
) -> dict[str, Any]:
    """Returns what find_lr.json holds.

    Args:
      config: of the run that was tested.
      points: of the range test.
      proposal: what `propose` made of them.
      found: the `reliability_warnings`, with which nothing is proposed.
    """
    return {
        "proposal": dataclasses.asdict(proposal) if proposal and not found else None,
        "doubts": list(found),
        "rule": f"the rate with the lowest smoothed loss divided by {PEAK_DIVISOR:g}, or the first "
        f"rate with {FLAT_FRACTION:.0%} of the decrease, whichever is lower",
        "points": [dataclasses.asdict(point) for point in points],
        "config": configs.to_dict(config),
        "environment": environment.environment(),
    }


class _Smoothing:
    """Bias-corrected exponential moving averages of loss and log rate (as in Adam's moments).

    Args:
      steps: time constant T of the average; the newest value has the weight 1 / T.
    """

    def __init__(self, steps: float) -> None:
        self._decay = 1 - 1 / steps
        self._loss = self._log_rate = self._weight = 0.0

    def __call__(self, step: int, rate: float, loss: float) -> Point:
        keep, add = self._decay, 1 - self._decay
        self._loss = keep * self._loss + add * loss
        self._log_rate = keep * self._log_rate + add * math.log(rate)
        self._weight = keep * self._weight + add
        return Point(
            step=step,
            rate=rate,
            loss=loss,
            smoothed_rate=math.exp(self._log_rate / self._weight),
            smoothed_loss=self._loss / self._weight,
        )
