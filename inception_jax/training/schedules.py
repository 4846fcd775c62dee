"""Learning-rate schedules: functions of the step alone.

So a resumed run needs none of its history, and may be given another one.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from inception_jax import registry
from inception_jax.config import Config, Duration, Schedule, Timeline
from inception_jax.errors import ConfigError
from inception_jax.registry import register_schedule


@dataclasses.dataclass
class Settings(Schedule):
    """The settings of a schedule, with what it may have to know of the run.

    Attributes:
      timeline: of the run.
      warmup_steps: length of the warm-up before it.
    """

    timeline: Timeline = dataclasses.field(default_factory=lambda: Timeline(1, 1))
    warmup_steps: int = 0

    def steps(self, duration: Duration) -> int:
        """Returns a duration in steps, rounded up."""
        return self.timeline.steps(duration)


def make_schedule(schedule: Schedule, *, timeline: Timeline, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of t, the number of updates already made.

    So the first update has rate(0) and the last rate(total_steps - 1). With W steps of warm-up, T =
    total_steps and `peak` the setting learning_rate::

      rate(t) = peak * t / W        for t < W
      rate(t) = peak * factor(t)    for t >= W, where factor(W) is exactly 1

      constant      1
      steps         decay ^ (how many boundaries lie in (W, t])
      exponential   decay ^ ((t - W) / E), E the setting decay_every
        staircase   decay ^ (t // E - W // E), falling at whole multiples of E
      cosine        end + (1 - end) * (1 + cos(pi * p)) / 2, with p = (t - W) / (T - W)
      linear        end + (1 - end) * (1 - p)
      polynomial    end + (1 - end) * (1 - p) ^ power

    `end`, the setting end_factor, is reached at t = T, so the last update is made just above it:
    for linear at peak * (end + (1 - end) / (T - W)). After T these three stay at the end, the
    others go on. Boundaries and multiples of E count from the start of training, warm-up included.
    Durations are rounded up to whole steps.

    Bits of the rates are those of revision 56edb8b: where a formula of optax rounds otherwise, it
    is written here.

    Args:
      schedule: the settings.
      timeline: turns their durations into steps.
      total_steps: length of the run.

    Returns:
      A function of an integer, or an integer array of any shape, to float32 of the same shape.

    Raises:
      ConfigError: if the warm-up is not shorter than the run, a boundary lies in the warm-up, or
        what was registered gives no rate.
    """
    part = registry.SCHEDULES.get(schedule.name)
    warmup = timeline.steps(schedule.warmup)
    if warmup and warmup >= total_steps:
        raise ConfigError(
            f"config.schedule.warmup = {schedule.warmup}, {warmup} steps: must be shorter than the "
            f"run of {total_steps} steps; shorten it, or lengthen config.train.length"
        )
    filled = registry.fill(part, schedule)
    settings = Settings(**vars(filled), timeline=timeline, warmup_steps=warmup)
    after = part.build(settings, total_steps - warmup)
    _check_rate(part, after)
    peak = schedule.learning_rate
    joined = optax.join_schedules([lambda t: peak * (t / max(warmup, 1)), after], [warmup])
    return lambda count: jnp.asarray(joined(jnp.asarray(count, jnp.int32)), jnp.float32)


def _check_rate(part: registry.Part, schedule: Any) -> None:
    """Checks that what a part returned maps a step to a rate."""
    expected = "it has to return a function of the step, int32 [], to a rate, float []"
    found = repr(schedule)
    if callable(schedule):
        step = jax.ShapeDtypeStruct((), jnp.int32)
        rate = jax.eval_shape(lambda step: jnp.asarray(schedule(step)), step)
        if not rate.shape and jnp.issubdtype(rate.dtype, jnp.floating):
            return
        found = f"a function that gives {registry.described(rate)}"
    raise ConfigError(f"{part.place}: the schedule {part.name!r} returned {found}; {expected}")


@register_schedule("constant", settings=())
def constant(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns the peak."""
    return optax.constant_schedule(settings.learning_rate)


def _check_boundaries(config: Config) -> Iterator[str]:
    if not config.schedule.boundaries:
        yield "config.schedule.boundaries = (): the schedule 'steps' needs at least one"


@register_schedule(
    "steps", settings=("boundaries", "boundaries_unit", "decay"), check=_check_boundaries
)
def steps(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns a rate that falls at boundaries, which count from the start of training."""
    if settings.boundaries_unit == "epochs":
        boundaries = [settings.steps(Duration(epochs=b)) for b in settings.boundaries]
    else:
        boundaries = [int(step) for step in settings.boundaries]
    warmup = settings.warmup_steps
    if boundaries[0] <= warmup:
        raise ConfigError(
            f"config.schedule.boundaries = {settings.boundaries}: the first is at step "
            f"{boundaries[0]}, and must be after the warm-up, which ends at step {warmup}; move "
            "it, or shorten config.schedule.warmup"
        )
    passed = np.asarray(boundaries, np.int32) - warmup

    def factor(count: jax.Array) -> jax.Array:
        return settings.decay ** _float(jnp.searchsorted(passed, count, side="right"))

    return _times_peak(settings, factor)


def _check_decay_every(config: Config) -> Iterator[str]:
    if not config.schedule.decay_every:
        yield "config.schedule.decay_every = none: the schedule 'exponential' needs it"


@register_schedule(
    "exponential", settings=("decay", "decay_every", "staircase"), check=_check_decay_every
)
def exponential(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns a rate that falls by one factor in equal times."""
    every, warmup = settings.steps(settings.decay_every), settings.warmup_steps
    if settings.staircase:
        return _times_peak(
            settings,
            lambda t: settings.decay ** _float((t + warmup) // every - warmup // every),
        )
    return _times_peak(settings, lambda t: settings.decay ** (t / every))


# The fall from 1 to 0 as a function of progress from 0 to 1: that of Loshchilov and Hutter 2017, by
# equal steps, and as a power of what is left.
_FALLS: dict[str, tuple[tuple[str, ...], Callable[[Settings, jax.Array], jax.Array]]] = {
    "cosine": ((), lambda s, p: (1 + jnp.cos(jnp.pi * p)) / 2),
    "linear": ((), lambda s, p: 1 - p),
    "polynomial": (("power",), lambda s, p: (1 - p) ** s.power),
}


def _falling(fall: Callable[[Settings, jax.Array], jax.Array]) -> Callable[..., optax.Schedule]:
    """Returns what makes a schedule that falls from the peak to its end_factor."""

    def build(settings: Settings, total_steps: int) -> optax.Schedule:
        def factor(count: jax.Array) -> jax.Array:
            left = fall(settings, jnp.clip(count / total_steps, 0, 1))
            # Written so that it is exactly 1 where `left` is, whatever the rounding of end_factor.
            return settings.end_factor * (1 - left) + left

        return _times_peak(settings, factor)

    return build


for _name, (_read, _fall) in _FALLS.items():
    register_schedule(_name, settings=("end_factor", *_read))(_falling(_fall))


def _times_peak(settings: Settings, factor: Callable[[jax.Array], jax.Array]) -> optax.Schedule:
    return lambda count: settings.learning_rate * factor(jnp.asarray(count))


def _float(number: jax.Array) -> jax.Array:
    return number.astype(jnp.float32)
