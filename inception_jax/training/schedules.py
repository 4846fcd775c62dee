"""Learning-rate schedules: functions of the step alone.

So a resumed run needs no history, and its schedule may be changed.
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
    """The settings of a schedule, and properties of the run that it may depend on.

    Attributes:
      timeline: the run's timeline.
      warmup_steps: length of the warm-up before the schedule.
    """

    timeline: Timeline = dataclasses.field(default_factory=lambda: Timeline(1, 1))
    warmup_steps: int = 0

    def steps(self, duration: str) -> int:
        """Converts a duration to steps, rounded up."""
        return self.timeline.steps(duration)


def make_schedule(schedule: Schedule, *, timeline: Timeline, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of t, the number of previous updates.

    So the first update has rate(0) and the last rate(total_steps - 1). With W steps of warm-up, T =
    total_steps and `peak` the setting learning_rate::

      rate(t) = peak * t / W        for t < W
      rate(t) = peak * factor(t)    for t >= W, where factor(W) is exactly 1

      constant      1
      steps         decay_rate ^ (number of boundaries in (W, t])
      exponential   decay_rate ^ ((t - W) / E), E the setting decay_period
        staircase   decay_rate ^ (t // E - W // E), falling at multiples of E
      cosine        end + (1 - end) * (1 + cos(pi * p)) / 2, with p = (t - W) / (T - W)
      linear        end + (1 - end) * (1 - p)
      polynomial    end + (1 - end) * (1 - p) ^ power

    `end`, the setting final_lr_ratio, is reached at t = T, so the last update is just above it: for
    linear at peak * (end + (1 - end) / (T - W)). After T these three stay at `end`, the others
    continue. Boundaries and multiples of E count from the start of training, including the warm-up.
    Durations are rounded up to integer steps.

    The rates are bit-identical to those of revision 56edb8b: formulas that optax rounds differently
    are written out here.

    Args:
      schedule: the settings.
      timeline: converts durations to steps.
      total_steps: length of the run.

    Returns:
      A function from an integer, or an integer array of any shape, to float32 of the same shape.

    Raises:
      ConfigError: if the warm-up is not shorter than the run, a boundary is within the warm-up, or
        the registered function does not return a schedule.

    >>> rate = make_schedule(Schedule(name="linear"), timeline=Timeline(8, 80), total_steps=4)
    >>> [round(float(rate(t)), 3) for t in range(4)]
    [0.1, 0.075, 0.05, 0.025]
    """
    part = registry.SCHEDULES.get(schedule.name)
    warmup = timeline.steps(schedule.warmup)
    if warmup and warmup >= total_steps:
        raise ConfigError(
            f"config.schedule.warmup = {schedule.warmup!r} ({warmup} steps): must be shorter than "
            f"the run ({total_steps} steps); shorten it or lengthen config.train.duration"
        )
    filled = registry.settings_with_defaults(part, schedule)
    settings = Settings(**vars(filled), timeline=timeline, warmup_steps=warmup)
    with registry.as_config_error(part, f"the schedule {part.name!r}"):
        after = part.build(settings, total_steps - warmup)
        _check_rate(part, after)
    peak = schedule.learning_rate
    joined = optax.join_schedules([lambda t: peak * (t / max(warmup, 1)), after], [warmup])
    return lambda count: jnp.asarray(joined(jnp.asarray(count, jnp.int32)), jnp.float32)


def _check_rate(part: registry.Part, schedule: Any) -> None:
    """Checks that a registered schedule maps a step to a rate."""
    expected = "it must return a function from the step, int32 [], to a rate, float []"
    got = repr(schedule)
    if callable(schedule):
        step = jax.ShapeDtypeStruct((), jnp.int32)
        rate = jax.eval_shape(lambda step: jnp.asarray(schedule(step)), step)
        if not rate.shape and jnp.issubdtype(rate.dtype, jnp.floating):
            return
        got = f"a function that returns {registry.describe_value(rate)}"
    raise ConfigError(f"{part.location}: the schedule {part.name!r} returned {got}; {expected}")


@register_schedule("constant")
def constant(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns a constant rate, the peak."""
    return optax.constant_schedule(settings.learning_rate)


def _check_boundaries(config: Config) -> Iterator[str]:
    if not config.schedule.boundaries:
        yield (
            "config.schedule.boundaries = (): must not be empty for the schedule 'steps'; set "
            "durations such as '30 epochs'"
        )


@register_schedule("steps", check=_check_boundaries)
def steps(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns a rate that drops at boundaries, counted from the start of training."""
    boundaries = [settings.steps(boundary) for boundary in settings.boundaries]
    warmup = settings.warmup_steps
    if boundaries[0] <= warmup:
        raise ConfigError(
            f"config.schedule.boundaries = {settings.boundaries}: the first one, step "
            f"{boundaries[0]}, must come after the warm-up, which ends at step {warmup}; move "
            "it or shorten config.schedule.warmup"
        )
    passed = np.asarray(boundaries, np.int32) - warmup

    def factor(count: jax.Array) -> jax.Array:
        return settings.decay_rate ** _float(jnp.searchsorted(passed, count, side="right"))

    return _scale_peak(settings, factor)


def _check_decay_period(config: Config) -> Iterator[str]:
    if configs.parse_duration(config.schedule.decay_period) is None:
        yield (
            f"config.schedule.decay_period = {config.schedule.decay_period!r}: must be set for the "
            "schedule 'exponential'; use a duration such as '8 epochs'"
        )


@register_schedule("exponential", check=_check_decay_period)
def exponential(settings: Settings, total_steps: int) -> optax.Schedule:
    """Returns a rate that falls by the same factor in each period."""
    every, warmup = settings.steps(settings.decay_period), settings.warmup_steps
    if settings.staircase:
        return _scale_peak(
            settings,
            lambda t: settings.decay_rate ** _float((t + warmup) // every - warmup // every),
        )
    return _scale_peak(settings, lambda t: settings.decay_rate ** (t / every))


# Curves from 1 to 0 as functions of progress from 0 to 1 (cosine: Loshchilov and Hutter 2017).
_DECAY_CURVES: dict[str, Callable[[Settings, jax.Array], jax.Array]] = {
    "cosine": lambda s, p: (1 + jnp.cos(jnp.pi * p)) / 2,
    "linear": lambda s, p: 1 - p,
    "polynomial": lambda s, p: (1 - p) ** s.power,
}


def _decaying(curve: Callable[[Settings, jax.Array], jax.Array]) -> Callable[..., optax.Schedule]:
    """Returns a builder of schedules that fall from the peak to final_lr_ratio times the peak."""

    def build(settings: Settings, total_steps: int) -> optax.Schedule:
        def factor(count: jax.Array) -> jax.Array:
            remaining = curve(settings, jnp.clip(count / total_steps, 0, 1))
            # Written to be exactly 1 where `remaining` is, however final_lr_ratio is rounded.
            return settings.final_lr_ratio * (1 - remaining) + remaining

        return _scale_peak(settings, factor)

    return build


for _name, _curve in _DECAY_CURVES.items():
    register_schedule(_name)(_decaying(_curve))


def _scale_peak(settings: Settings, factor: Callable[[jax.Array], jax.Array]) -> optax.Schedule:
    return lambda count: settings.learning_rate * factor(jnp.asarray(count))


def _float(number: jax.Array) -> jax.Array:
    return number.astype(jnp.float32)
