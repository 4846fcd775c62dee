"""The learning-rate range test: a short training run with an increasing learning rate.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, section 3.3;
with an exponentially increasing rate, and stopped when the loss diverges, as in Gugger 2018, "How
Do You Find A Good Learning Rate" (the learning-rate finder of fastai).
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
from inception_jax.models.layers import ModelOutput
from inception_jax.runtime import environment
from inception_jax.training import initialization, optimizers
from inception_jax.training.run import Run, train_batches
from inception_jax.training.step import make_train_step

# A smoothed loss above this multiple of its minimum has diverged (Gugger 2018).
DIVERGENCE_FACTOR = 4.0

# Time constant of the smoothing as a fraction of the steps: long enough to even out batches, short
# compared with the factor of ten in the rate that separates "learns" from "diverges".
SMOOTHING_FRACTION = 1 / 20

# The proposed rate is the one with the lowest smoothed loss divided by this. At its minimum the
# loss is about to rise, so it is the edge; Smith sets the peak of a cycle just below it, and Gugger
# a tenth of it for a constant rate. A third lies in between, for a peak reached by a warm-up.
PEAK_DIVISOR = 3.0

# With BatchNorm the loss may stay flat over a factor of ten in the rate, and noise then decides
# where its minimum is. So the proposed rate is at most the first one with this fraction of the
# decrease.
DECREASE_FRACTION = 0.9

# A loss that never fell below this fraction of a uniform guess's has learned next to nothing.
MAX_CHANCE_FRACTION = 0.95

# A network whose loss fell below this fraction of its start has memorized the images; the loss then
# stays there whatever the rate.
MEMORIZED_FRACTION = 0.05

# A decrease of the smoothed loss below this fraction of the first losses is noise, not learning.
MIN_DECREASE_FRACTION = 0.05

# A rate takes effect over the following steps, about ten with a momentum of 0.9. With fewer steps
# than this per factor of ten in the rate, the edge is overestimated.
MIN_STEPS_PER_DECADE = 30

# After its minimum the smoothed loss must rise by this fraction of its decrease, or the minimum was
# not the edge.
MIN_RISE_FRACTION = 0.5

# If the loss fell by this fraction of its decrease within the first tenth of the steps, the range
# should have started lower.
MAX_EARLY_FRACTION = 0.5

# The decrease must be this many standard deviations of the smoothed loss, or noise decides where
# its minimum is.
MIN_DECREASE_DEVIATIONS = 8.0


@dataclasses.dataclass(frozen=True)
class Point:
    """One step of a range test.

    Attributes:
      step: counted from 1.
      rate: learning rate of its update.
      loss: objective before the update; may be infinite or NaN in the last point.
      smoothed_loss: bias-corrected exponential moving average of the loss so far.
      smoothed_rate: geometric mean of the rates with the same weights, where the smoothed loss
        belongs on the axis: at the newest rate it would lag.
    """

    step: int
    rate: float
    loss: float
    smoothed_rate: float
    smoothed_loss: float


@dataclasses.dataclass(frozen=True)
class Proposal:
    """The result of a range test; rates as in config.schedule.learning_rate.

    Attributes:
      rate: proposed peak, to two digits: `least / PEAK_DIVISOR`, or the first rate with
        `DECREASE_FRACTION` of the decrease, whichever is lower.
      least: rate with the lowest smoothed loss.
      diverged: whether the test ended by divergence; if not, `least` may be the end of the range.
    """

    rate: float
    least: float
    diverged: bool


def exponential_schedule(low: float, high: float, steps: int) -> optax.Schedule:
    """Returns rate(t) = low (high / low)^(t / (steps - 1)), t the number of previous updates.

    >>> [round(float(exponential_schedule(0.01, 1.0, 3)(t)), 3) for t in range(3)]
    [0.01, 0.1, 1.0]
    """
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
    """Trains a run from its initial state with the rate increasing from `low` to `high`.

    Everything else is as at the start of the run: batches, augmentation, image size, optimizer.
    Except that labels are neither mixed nor smoothed: with such labels the loss cannot fall far, so
    that it hardly shows the edge with BatchNorm, which tolerates rates that teach nothing. Nothing
    is saved.

    Args:
      run: the run to test; its schedule and length are not used.
      low, high: first and last rate.
      steps: number of rates, equally spaced on a logarithmic axis; at least 2.
      on_step: called with each point as soon as it is known.

    Returns:
      A point for each step, up to the one at which the loss diverged or was not finite.
    """
    schedule = exponential_schedule(low, high, steps)
    optimizer = optimizers.make_optimizer(run.config.optimizer, schedule, run.model)
    config = copy.deepcopy(run.config)
    config.augment.mixup = config.augment.cutmix = config.train.label_smoothing = 0.0
    test_run = dataclasses.replace(
        run, config=config, schedule=schedule, total_steps=steps, optimizer=optimizer
    )
    state, train_step = initialization.create_state(test_run), make_train_step(test_run)
    smooth = _Smoothing(_time_constant(steps))
    points: list[Point] = []
    for step, batch in enumerate(train_batches(test_run), start=1):
        state, output = train_step(state, batch)
        points.append(smooth(step, float(schedule(step - 1)), float(jax.device_get(output.loss))))
        on_step(points[-1])
        if has_diverged(points):
            break
    return points


def has_diverged(points: Sequence[Point]) -> bool:
    """Whether the last smoothed loss is not finite, or `DIVERGENCE_FACTOR` times the lowest."""
    last = points[-1].smoothed_loss
    least = min((p.smoothed_loss for p in points[:-1]), default=last)
    return not math.isfinite(last) or last > DIVERGENCE_FACTOR * least


def chance_loss(run: Run) -> float:
    """Returns the objective of a run whose heads all guess uniformly among the classes, in nats."""

    def output(images: jax.Array) -> ModelOutput:
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}
        return run.model.init_with_output(rngs, images, train=True)[0]

    size = run.config.data.image_size
    images = jax.ShapeDtypeStruct((run.config.train.batch_size, size, size, 3), jnp.float32)
    auxiliary_heads = len(jax.eval_shape(output, images).aux)
    return math.log(run.dataset.num_classes) * (1 + auxiliary_heads * run.config.train.aux_weight)


def reliability_warnings(
    points: Sequence[Point], proposal: Proposal, *, steps: int, high: float, chance: float
) -> list[str]:
    """Returns the reasons why a proposal is unreliable, with remedies; empty if it is reliable.

    Args:
      points: points of the range test.
      proposal: the result of `propose`.
      steps: planned number of steps.
      high: planned last rate.
      chance: loss of a uniform guess, from `chance_loss`.
    """
    reasons = []
    low = points[0].rate
    # Rounded, as rates are float32.
    needed = math.ceil(round(MIN_STEPS_PER_DECADE * math.log10(high / low), 3))
    if steps < needed:
        reasons.append(
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
        reasons.append(
            "the network memorized the few images before any rate was too high, so the edge does "
            "not show. Keep the experiment's rate, or use more images"
        )
    elif not rose:
        reasons.append(
            f"the loss did not rise again up to a rate of {finite[-1].rate:.3g}, so the edge lies "
            "beyond it. Use a larger --high"
        )
    if least.smoothed_loss > MAX_CHANCE_FRACTION * chance:
        reasons.append(
            f"the loss fell only to {least.smoothed_loss:.3g}, and a uniform guess has "
            f"{chance:.3g}: nothing was learned at any rate. Use more --steps, or check that the "
            "labels match the images"
        )
    early = finite[min(len(finite) - 1, math.ceil(2 * SMOOTHING_FRACTION * steps))]
    if start - early.smoothed_loss > MAX_EARLY_FRACTION * decrease:
        reasons.append(
            f"the loss fell mostly at the first rates, {low:.3g} to {early.rate:.3g}, so it shows "
            "little about higher ones. Use a smaller --low"
        )
    deviation = _smoothed_loss_std([p.loss for p in finite if p.step <= least.step], steps)
    if decrease < MIN_DECREASE_DEVIATIONS * deviation:
        reasons.append(
            f"the loss fell by only {decrease:.3g}, too little compared with its batch-to-batch "
            f"noise ({deviation:.2g} after smoothing). Use more --steps or a larger "
            "--config.train.batch_size"
        )
    return reasons


def _smoothed_loss_std(losses: Sequence[float], steps: int) -> float:
    """Returns the standard deviation of the smoothed loss around its trend, ignoring jumps."""
    if len(losses) < 3:
        return 0.0
    # 1.4826 median(|x|) is the standard deviation of a normal x; a second difference has √(1 + 4 +
    # 1) times that, and an average with the time constant T √(1 / (2T - 1)) times that.
    one = 1.4826 / math.sqrt(6) * np.median(np.abs(np.diff(losses, 2)))
    return float(one / math.sqrt(2 * _time_constant(steps) - 1))


def _time_constant(steps: int) -> float:
    return max(2.0, SMOOTHING_FRACTION * steps)


def _initial_loss(points: Sequence[Point], finite: Sequence[Point]) -> float:
    """Returns the initial loss, averaged over several steps, as a single batch is noisy."""
    return float(np.mean([p.loss for p in finite[: math.ceil(SMOOTHING_FRACTION * len(points))]]))


def propose(points: Sequence[Point]) -> Proposal | None:
    """Returns the rate that a range test proposes, or None if the loss did not fall."""
    finite = [p for p in points if math.isfinite(p.smoothed_loss)]
    if not finite:
        return None
    start, least = _initial_loss(points, finite), min(finite, key=lambda p: p.smoothed_loss)
    decrease = start - least.smoothed_loss
    if decrease <= MIN_DECREASE_FRACTION * start:
        return None
    flat = next(p for p in finite if start - p.smoothed_loss >= DECREASE_FRACTION * decrease)
    rate = min(least.smoothed_rate / PEAK_DIVISOR, flat.smoothed_rate)
    return Proposal(
        rate=float(f"{rate:.2g}"), least=least.smoothed_rate, diverged=has_diverged(points)
    )


def record(
    config: Config, points: Sequence[Point], proposal: Proposal | None, reasons: Sequence[str]
) -> dict[str, Any]:
    """Returns the contents of find_lr.json.

    Args:
      config: configuration of the tested run.
      points: points of the range test.
      proposal: the result of `propose`.
      reasons: the result of `reliability_warnings`; if not empty, no rate is proposed.
    """
    return {
        "proposal": dataclasses.asdict(proposal) if proposal and not reasons else None,
        "doubts": list(reasons),
        "rule": f"the rate with the lowest smoothed loss divided by {PEAK_DIVISOR:g}, or the first "
        f"rate with {DECREASE_FRACTION:.0%} of the decrease, whichever is lower",
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
