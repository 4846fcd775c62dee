"""Metrics by name: what they are, their sums on the device, and one division on the host.

Training metrics live in the train state: each step adds to them inside the jitted function, so that
no step waits for the host, and a checkpoint carries the sums of an unfinished logging interval. The
base is `clu.metrics`; its `Average` holds a float32 total and an int32 count, of fixed shape and
type, as donation and checkpoints need.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from inception_jax.config import Evaluation
from inception_jax.errors import ConfigError
from inception_jax.registry import (
    METRICS,
    MetricPart,
    describe_value,
    options_with_defaults,
    register_metric,
)
from inception_jax.training import losses

NEVER = -1

# Evaluation batches that may be dispatched before the host waits for an older one.
_BATCHES_AHEAD = 2

Arrays = TypeVar("Arrays")


@register_metric("loss")
def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the cross-entropy of each example in nats: float32 [B]."""
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return losses.cross_entropy(logits, targets)


@register_metric("top1", percent=True)
def top1(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns whether the most probable class is right: bool [B]."""
    return top_k_correct(logits, labels, 1)


# Of five classes and fewer it is always 100%.
@register_metric("top5", percent=True, min_classes=6)
def top5(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns whether the label is among the five most probable classes: bool [B]."""
    return top_k_correct(logits, labels, 5)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns whether each label is among the k classes with the largest logits.

    Of equal logits the lower class number comes first, as in argmax and in a stable sort; a network
    that says the same for all classes thus scores one class, not every example. An example with a
    NaN among its logits counts as wrong. With k >= K every other example counts as right.

    Args:
      logits: float [B, K].
      labels: int32 [B], in [0, K).
      k: at least 1.

    Returns:
      bool [B].
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])[None, :]
    ahead = (logits > own) | ((logits == own) & (classes < labels[:, None]))
    rank = jnp.sum(ahead, axis=1)
    return (rank < k) & ~jnp.any(jnp.isnan(logits), axis=1)


class MetricSet:
    """The metrics that a run's settings name, checked and ready to call; loss is always one.

    Args:
      settings: with the names, and the options of those that have any.
      num_classes: K; metrics that say nothing of so few are left out.

    Attributes:
      scale: by the names of those that are averaged over examples, what their means are multiplied
        by: 100 where they are to be percent.

    Raises:
      ConfigError: if a metric fails, or returns what is no metric: which, what, and what is
        expected.
    """

    def __init__(self, settings: Evaluation, num_classes: int) -> None:
        parts = {name: METRICS.get(name) for name in ("loss", *settings.metrics)}
        parts = {name: part for name, part in parts.items() if num_classes >= part.min_classes}
        self._over_examples: dict[str, Any] = {}
        self._over_split: dict[str, Any] = {}
        self._scale = {name: 100 if part.percent else 1 for name, part in parts.items()}
        for name, part in parts.items():
            function = functools.partial(
                part.build, **options_with_defaults(part, settings.options)
            )
            _check(part, function, num_classes)
            group = self._over_split if part.over == "split" else self._over_examples
            group[name] = function
        self.scale = {name: self._scale[name] for name in self._over_examples}

    @property
    def needs_logits(self) -> bool:
        """Whether one of them takes the logits of a whole split."""
        return bool(self._over_split)

    def per_example(self, logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        """Returns by name what is averaged over examples: bool or float [B] each.

        Args:
          logits: float [B, K].
          labels: int32 [B].
        """
        logits = logits.astype(jnp.float32)
        return {name: function(logits, labels) for name, function in self._over_examples.items()}

    def over_split(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns by name what a whole split gives, as the functions return it.

        Args:
          logits: float32 [N, K], of all its examples in order.
          labels: int32 [N].
        """
        return {name: float(each(logits, labels)) for name, each in self._over_split.items()}

    def in_units(self, means: Mapping[str, float]) -> dict[str, float]:
        """Returns means in the order of the settings, in percent where they are to be, then others.

        Args:
          means: by name.
        """
        return _scaled(means, self._scale)


def _check(part: MetricPart, function: Any, num_classes: int) -> None:
    """Raises ConfigError if a metric does not return what it should, for examples made up here."""
    # Two of each class, but no more than 40 MB.
    examples = min(2 * num_classes + 1, max(10**7 // num_classes, 3))
    labels = np.arange(examples, dtype=np.int32) % num_classes
    logits = np.zeros((examples, num_classes), np.float32)
    logits[np.arange(examples), labels] = 1
    given = f"logits float32 [{examples}, {num_classes}] and labels int32 [{examples}]"
    try:
        if part.over == "split":
            found = function(logits, labels)
        else:
            found = jax.eval_shape(function, logits, labels)
    except Exception as error:
        what = "inside jit, as JAX arrays" if part.over == "example" else "as NumPy arrays"
        raise ConfigError(
            f"metric {part.name!r} ({part.location}): failed on {given}, {what}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    if part.over == "split":
        expected = "a number"
        fits = np.ndim(found) == 0 and np.asarray(found).dtype.kind in "bif"
    else:
        expected = f"float or bool [{examples}], a value for each example"
        shape, dtype = getattr(found, "shape", None), getattr(found, "dtype", np.dtype(object))
        fits = shape == (examples,) and (dtype.kind == "b" or jnp.issubdtype(dtype, jnp.floating))
    if not fits:
        raise ConfigError(
            f"metric {part.name!r} ({part.location}): returned {describe_value(found)} for "
            f"{given}; expected {expected}"
        )


@flax.struct.dataclass
class FirstStep(metrics.Metric):
    """The first step at which something happened.

    Attributes:
      step: int32 scalar; `NEVER` (-1) if it has not happened.
    """

    step: jax.Array

    @classmethod
    def empty(cls) -> Self:
        """Returns the metric of no step at all."""
        return cls(step=jnp.array(NEVER, jnp.int32))

    @classmethod
    def from_model_output(cls, *, step: jax.typing.ArrayLike, happened: jax.Array) -> Self:
        """Returns the metric of one step.

        Args:
          step: integer scalar.
          happened: bool scalar.
        """
        return cls(step=jnp.where(happened, jnp.asarray(step, jnp.int32), jnp.int32(NEVER)))

    def merge(self, other: Self) -> Self:
        """Returns the metric of these steps followed by those of `other`."""
        return type(self)(step=jnp.where(self.step == NEVER, other.step, self.step))

    def compute(self) -> int:
        """Returns the step, or -1."""
        return int(self.step)


@flax.struct.dataclass
class TrainMetrics:
    """Training metrics since the last report, a pytree of scalars on the device.

    Attributes:
      averages: by name; those of a `MetricSet` over examples, loss among them, and gradient_norm.
      first_nonfinite_step: the first step with a loss or gradient that is not finite.
      scale: what `compute` multiplies means by, by name, in the order of their report.
    """

    averages: dict[str, metrics.Average]
    first_nonfinite_step: FirstStep
    scale: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False)

    @classmethod
    def empty(cls, scale: Mapping[str, int]) -> Self:
        """Returns the metrics of no step at all.

        Args:
          scale: of a `MetricSet`: its names, and what their means are multiplied by.
        """
        averages = {name: metrics.Average.empty() for name in ("loss", *scale, "gradient_norm")}
        return cls(
            averages=averages, first_nonfinite_step=FirstStep.empty(), scale=tuple(scale.items())
        )

    @classmethod
    def single_step(
        cls,
        *,
        step: jax.typing.ArrayLike,
        values: Mapping[str, jax.Array],
        scale: Mapping[str, int],
        gradient_norm: jax.Array,
    ) -> Self:
        """Returns the metrics of one step.

        Args:
          step: integer scalar, counted from 1.
          values: by name, bool or float [B] each; loss, each example's, among them.
          scale: of a `MetricSet`.
          gradient_norm: float32 scalar, global norm of the gradients.
        """
        finite = jnp.isfinite(gradient_norm) & jnp.all(jnp.isfinite(values["loss"]))
        return cls(
            averages={
                name: metrics.Average.from_model_output(each.astype(jnp.float32))
                for name, each in {**values, "gradient_norm": gradient_norm}.items()
            },
            first_nonfinite_step=FirstStep.from_model_output(step=step, happened=~finite),
            scale=tuple(scale.items()),
        )

    def merge(self, other: Self) -> Self:
        """Returns the metrics of these steps followed by those of `other`, of the same names."""
        return type(self)(
            averages={
                name: each.merge(other.averages[name]) for name, each in self.averages.items()
            },
            first_nonfinite_step=self.first_nonfinite_step.merge(other.first_nonfinite_step),
            scale=self.scale,
        )

    def cleared(self) -> Self:
        """Returns the metrics of no step; it still knows of steps that were not finite.

        That takes a copy: the next step donates these, and the reported ones are still to be read.
        """
        first = jax.tree.map(jnp.copy, self.first_nonfinite_step)
        return dataclasses.replace(
            self,
            averages={name: metrics.Average.empty() for name in self.averages},
            first_nonfinite_step=first,
        )

    def compute(self) -> dict[str, float]:
        """Returns the means on the host; waits for the steps they come from.

        Returns:
          By name, in the units of the metric: the mean over examples, of gradient_norm over steps.
          NaN when there was no step.
        """
        host = jax.device_get(self.averages)
        means = {name: _mean(each.total, each.count) for name, each in host.items()}
        return _scaled(means, dict(self.scale))

    def item(self) -> dict[str, Any]:
        """Returns what a checkpoint holds: each sum by its name."""
        return {**self.averages, "first_nonfinite_step": self.first_nonfinite_step}

    def with_item(self, saved: Mapping[str, Any]) -> Self:
        """Returns the metrics of a checkpoint, which may have been of a run with other metrics.

        Args:
          saved: of `item`; sums that it lacks are as here, those that it has besides are left out.
        """
        return dataclasses.replace(
            self,
            averages={name: saved.get(name, each) for name, each in self.averages.items()},
            first_nonfinite_step=saved["first_nonfinite_step"],
        )


@flax.struct.dataclass
class EvalMetrics:
    """Sums over evaluated examples.

    From `single_batch` the leaves are scalars on the device; `plus` adds them on the host in double
    precision, where sums do not depend on how the examples were cut into batches beyond the
    rounding inside one batch.

    Attributes:
      sums: by name: float32 (on the host: float64), or of a metric that is a bool int32 (int64).
      count: int32 (int64), how many examples.
    """

    sums: dict[str, Any]
    count: Any

    @classmethod
    def single_batch(cls, values: Mapping[str, jax.Array], mask: jax.Array) -> Self:
        """Returns the sums of one batch; meant for use inside jit.

        Args:
          values: by name, bool or float [B] each.
          mask: bool [B], False for the padding of a last batch, which then counts nowhere.
        """

        def total(each: jax.Array) -> jax.Array:
            if each.dtype == bool:
                return (each & mask).sum(dtype=jnp.int32)
            # A padded example may have any value, NaN too, so it is replaced, not multiplied by 0.
            return jnp.where(mask, each.astype(jnp.float32), jnp.float32(0)).sum()

        return cls(
            sums={name: total(each) for name, each in values.items()},
            count=mask.sum(dtype=jnp.int32),
        )

    def plus(self, batch: Self) -> Self:
        """Returns the sums with those of one more batch, on the host."""
        return jax.tree.map(lambda a, b: _widened(a) + _widened(b), self, batch)

    def compute(self) -> dict[str, float]:
        """Returns the metrics on the host.

        Returns:
          By name the mean over examples, NaN when there was none; count: how many (an int).
        """
        host = jax.device_get(self)
        means = {name: _mean(total, host.count) for name, total in host.sums.items()}
        return {**means, "count": int(host.count)}


def to_host(batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """Yields what is computed batch by batch, on the host.

    Args:
      batches: trees of arrays. An iterator that dispatches them is asked for the next one before
        this waits for an earlier one, and is never more than a few ahead of the device, so that the
        images of a large split do not pile up there.
    """
    in_flight: collections.deque[Arrays] = collections.deque()
    for batch in batches:
        in_flight.append(batch)
        if len(in_flight) > _BATCHES_AHEAD:
            yield jax.device_get(in_flight.popleft())
    while in_flight:
        yield jax.device_get(in_flight.popleft())


def _widened(value: Any) -> Any:
    """Returns a scalar of NumPy in double precision."""
    value = np.asarray(value)
    return value.astype(np.float64 if value.dtype.kind == "f" else np.int64)


def _scaled(means: Mapping[str, float], scale: Mapping[str, int]) -> dict[str, float]:
    """Returns means in the order of a scale, each multiplied by its own, then the others."""
    own = {name: factor * means[name] for name, factor in scale.items() if name in means}
    return own | {name: mean for name, mean in means.items() if name not in own}


def _mean(total: np.ndarray, count: np.ndarray) -> float:
    """Returns total / count in double precision; NaN for a count of zero."""
    return float(total) / int(count) if count else math.nan
