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

from inception_jax import config as configs
from inception_jax import registry
from inception_jax.config import Config, Schedule, Timeline
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

    def steps(self, duration: str) -> int:
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
      exponential   decay_rate ^ ((t - W) / E), E the setting decay_period
        staircase   decay ^ (t // E - W // E), falling at whole multiples of E
      cosine        end + (1 - end) * (1 + cos(pi * p)) / 2, with p = (t - W) / (T - W)
      linear        end + (1 - end) * (1 - p)
      polynomial    end + (1 - end) * (1 - p) ^ power

    `end`, the setting final_lr_ratio, is reached at t = T, so the last update is just above it: for
    linear at peak * (end + (1 - end) / (T - W)). After T these three stay at the end, the others go
    on. Boundaries and multiples of E count from the start of training, warm-up included. Durations
    are rounded up to whole steps.

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
            f"config.schedule.warmup = {schedule.warmup!r} ({warmup} steps): must be shorter than "
            f"the run ({total_steps} steps); shorten it, or lengthen config.train.duration"
        )
    filled = registry.fill(part, schedule)
    settings = Settings(**vars(filled), timeline=timeline, warmup_steps=warmup)
    with registry.explained(part, f"the schedule {part.name!r}"):
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


@register_schedule("steps", settings=("boundaries", "decay_rate"), check=_check_boundaries)
def steps(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns a rate that falls at boundaries, which count from the start of training."""
    boundaries = [settings.steps(boundary) for boundary in settings.boundaries]
    warmup = settings.warmup_steps
    if boundaries[0] <= warmup:
        raise ConfigError(
            f"config.schedule.boundaries = {settings.boundaries}: the first is at step "
            f"{boundaries[0]}, and must be after the warm-up, which ends at step {warmup}; move "
            "it, or shorten config.schedule.warmup"
        )
    passed = np.asarray(boundaries, np.int32) - warmup

    def factor(count: jax.Array) -> jax.Array:
        return settings.decay_rate ** _float(jnp.searchsorted(passed, count, side="right"))

    return _times_peak(settings, factor)


def _check_decay_period(config: Config) -> Iterator[str]:
    if configs.parse_duration(config.schedule.decay_period) is None:
        yield (
            f"config.schedule.decay_period = {config.schedule.decay_period!r}: the schedule "
            "'exponential' needs it; set it to a duration such as '8 epochs'"
        )


@register_schedule(
    "exponential", settings=("decay_rate", "decay_period", "staircase"), check=_check_decay_period
)
def exponential(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns a rate that falls by one factor in equal times."""
    every, warmup = settings.steps(settings.decay_period), settings.warmup_steps
    if settings.staircase:
        return _times_peak(
            settings,
            lambda t: settings.decay_rate ** _float((t + warmup) // every - warmup // every),
        )
    return _times_peak(settings, lambda t: settings.decay_rate ** (t / every))


# The fall from 1 to 0 as a function of progress from 0 to 1: that of Loshchilov and Hutter 2017, by
# equal steps, and as a power of what is left.
_FALLS: dict[str, tuple[tuple[str, ...], Callable[[Settings, jax.Array], jax.Array]]] = {
    "cosine": ((), lambda s, p: (1 + jnp.cos(jnp.pi * p)) / 2),
    "linear": ((), lambda s, p: 1 - p),
    "polynomial": (("power",), lambda s, p: (1 - p) ** s.power),
}


def _falling(fall: Callable[[Settings, jax.Array], jax.Array]) -> Callable[..., optax.Schedule]:
    """Returns what makes a schedule that falls from the peak to its final_lr_ratio."""

    def build(settings: Settings, total_steps: int) -> optax.Schedule:
        def factor(count: jax.Array) -> jax.Array:
            left = fall(settings, jnp.clip(count / total_steps, 0, 1))
            # Written so that it is exactly 1 where `left` is, however final_lr_ratio is rounded.
            return settings.final_lr_ratio * (1 - left) + left

        return _times_peak(settings, factor)

    return build


for _name, (_read, _fall) in _FALLS.items():
    register_schedule(_name, settings=("final_lr_ratio", *_read))(_falling(_fall))


def _times_peak(settings: Settings, factor: Callable[[jax.Array], jax.Array]) -> optax.Schedule:
    return lambda count: settings.learning_rate * factor(jnp.asarray(count))


def _float(number: jax.Array) -> jax.Array:
    return number.astype(jnp.float32)
