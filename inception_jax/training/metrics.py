"""Metrics by name: definitions, sums on the device, and a single division on the host.

Training metrics are part of the train state: each step adds to them inside the jitted function, so
that no step waits for the host, and a checkpoint includes the sums of an unfinished logging
interval. They are based on `clu.metrics`, whose `Average` consists of a float32 total and an int32
count, of fixed shape and dtype as required by donation and checkpoints.
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
_MAX_BATCHES_IN_FLIGHT = 2

Arrays = TypeVar("Arrays")


@register_metric("loss")
def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Computes the cross-entropy of each example in nats: float32 [B]."""
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return losses.cross_entropy(logits, targets)


@register_metric("top1", percent=True)
def top1(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns whether the most probable class is correct: bool [B]."""
    return top_k_correct(logits, labels, 1)


# With five classes or fewer it is always 100%.
@register_metric("top5", percent=True, min_classes=6)
def top5(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns whether the label is among the five most probable classes: bool [B]."""
    return top_k_correct(logits, labels, 5)


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Returns whether each label is among the k classes with the largest logits.

    Among equal logits the lower class number comes first, as in argmax and in a stable sort, so a
    network with constant logits is correct on one class, not on every example. An example with a
    NaN among its logits counts as wrong. With k >= K every other example counts as correct.

    Args:
      logits: float [B, K].
      labels: int32 [B], in [0, K).
      k: at least 1.

    Returns:
      bool [B].

    >>> logits = jnp.array([[0.0, 3.0, 1.0], [0.0, 3.0, 1.0]])
    >>> top_k_correct(logits, jnp.array([2, 0]), k=2).tolist()
    [True, False]
    """
    true_logit = jnp.take_along_axis(logits, labels[:, None], axis=1)
    classes = jnp.arange(logits.shape[1])[None, :]
    ahead = (logits > true_logit) | ((logits == true_logit) & (classes < labels[:, None]))
    rank = jnp.sum(ahead, axis=1)
    return (rank < k) & ~jnp.any(jnp.isnan(logits), axis=1)


def all_finite(values: jax.Array) -> jax.Array:
    """Returns whether all values are finite, a bool scalar.

    It counts the others: unlike `jnp.all`, a sum travels between devices with a step's other sums.
    """
    return jnp.sum(~jnp.isfinite(values), dtype=jnp.float32) == 0


class MetricSet:
    """The configured metrics, checked and ready to call; always includes loss.

    Args:
      settings: names of the metrics, and options of those that have any.
      num_classes: K; metrics that are meaningless for so few classes are skipped.

    Attributes:
      scale: factor for the mean of each metric that is averaged over examples, by name: 100 for
        percent, else 1.

    Raises:
      ConfigError: if a metric fails or returns an invalid value.
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
        """Whether any metric is computed from the logits of an entire split."""
        return bool(self._over_split)

    def per_example(self, logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        """Computes the metrics that are averaged over examples: bool or float [B] by name.

        Args:
          logits: float [B, K].
          labels: int32 [B].
        """
        logits = logits.astype(jnp.float32)
        return {name: function(logits, labels) for name, function in self._over_examples.items()}

    def over_split(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Computes the metrics that need an entire split, in the units that they return.

        Args:
          logits: float32 [N, K], for all examples in order.
          labels: int32 [N].
        """
        return {name: float(each(logits, labels)) for name, each in self._over_split.items()}

    def in_units(self, means: Mapping[str, float]) -> dict[str, float]:
        """Converts means to percent where required; sorts them as configured, then all others."""
        return _scale_means(means, self._scale)


def _check(part: MetricPart, function: Any, num_classes: int) -> None:
    """Raises ConfigError if a metric fails or returns an invalid value for synthetic examples."""
    # Two examples per class, but at most 40 MB.
    examples = min(2 * num_classes + 1, max(10**7 // num_classes, 3))
    labels = np.arange(examples, dtype=np.int32) % num_classes
    logits = np.zeros((examples, num_classes), np.float32)
    logits[np.arange(examples), labels] = 1
    inputs = f"logits float32 [{examples}, {num_classes}] and labels int32 [{examples}]"
    try:
        if part.over == "split":
            result = function(logits, labels)
        else:
            result = jax.eval_shape(function, logits, labels)
    except Exception as error:
        kind = "inside jit, as JAX arrays" if part.over == "example" else "as NumPy arrays"
        raise ConfigError(
            f"metric {part.name!r} ({part.location}): failed on {inputs}, {kind}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
    if part.over == "split":
        expected = "a number"
        is_valid = np.ndim(result) == 0 and np.asarray(result).dtype.kind in "bif"
    else:
        expected = f"float or bool [{examples}], one value per example"
        shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", np.dtype(object))
        is_valid = shape == (examples,) and (
            dtype.kind == "b" or jnp.issubdtype(dtype, jnp.floating)
        )
    if not is_valid:
        raise ConfigError(
            f"metric {part.name!r} ({part.location}): returned {describe_value(result)} for "
            f"{inputs}; expected {expected}"
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
        """Returns the metric for zero steps."""
        return cls(step=jnp.array(NEVER, jnp.int32))

    @classmethod
    def from_model_output(cls, *, step: jax.typing.ArrayLike, happened: jax.Array) -> Self:
        """Returns the metric for one step.

        Args:
          step: integer scalar.
          happened: bool scalar.
        """
        return cls(step=jnp.where(happened, jnp.asarray(step, jnp.int32), jnp.int32(NEVER)))

    def merge(self, other: Self) -> Self:
        """Returns the metric for these steps followed by those of `other`."""
        return type(self)(step=jnp.where(self.step == NEVER, other.step, self.step))

    def compute(self) -> int:
        """Returns the step, or -1."""
        return int(self.step)


@flax.struct.dataclass
class TrainMetrics:
    """Training metrics since the last report, a pytree of scalars on the device.

    Attributes:
      averages: averages by name: the per-example metrics of a `MetricSet`, including loss, and
        gradient_norm.
      first_nonfinite_step: the first step with a non-finite loss or gradient.
      scale: factor for each mean in `compute`, by name, in the order of the report.
    """

    averages: dict[str, metrics.Average]
    first_nonfinite_step: FirstStep
    scale: tuple[tuple[str, int], ...] = flax.struct.field(pytree_node=False)

    @property
    def is_empty(self) -> bool:
        """Whether there was no step, or every step was skipped."""
        return not self.averages["loss"].count

    @classmethod
    def empty(cls, scale: Mapping[str, int]) -> Self:
        """Returns the metrics for zero steps.

        Args:
          scale: from a `MetricSet`.
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
        """Returns the metrics for one step.

        Args:
          step: integer scalar, counted from 1.
          values: per-example values by name, bool or float [B] each, including loss.
          scale: from a `MetricSet`.
          gradient_norm: float32 scalar, global norm of the gradients.
        """
        finite = jnp.isfinite(gradient_norm) & all_finite(values["loss"])
        return cls(
            averages={
                name: metrics.Average.from_model_output(each.astype(jnp.float32))
                for name, each in {**values, "gradient_norm": gradient_norm}.items()
            },
            first_nonfinite_step=FirstStep.from_model_output(step=step, happened=~finite),
            scale=tuple(scale.items()),
        )

    def merge(self, other: Self) -> Self:
        """Returns the metrics for these steps followed by those of `other`, with equal names."""
        return type(self)(
            averages={
                name: each.merge(other.averages[name]) for name, each in self.averages.items()
            },
            first_nonfinite_step=self.first_nonfinite_step.merge(other.first_nonfinite_step),
            scale=self.scale,
        )

    def reset(self) -> Self:
        """Returns the metrics for zero steps, but keeps `first_nonfinite_step`.

        It is copied: the next step donates these metrics, and the old ones are yet to be reported.
        """
        first = jax.tree.map(jnp.copy, self.first_nonfinite_step)
        return dataclasses.replace(
            self,
            averages={name: metrics.Average.empty() for name in self.averages},
            first_nonfinite_step=first,
        )

    def without_nonfinite_step(self) -> Self:
        """Returns the metrics as if all of their steps had been finite."""
        before = self.first_nonfinite_step.step
        never = jax.device_put(np.int32(NEVER), before.sharding)
        return dataclasses.replace(self, first_nonfinite_step=FirstStep(never))

    def compute(self) -> dict[str, float]:
        """Returns the means on the host, after waiting for their steps.

        Returns:
          Means by name, in the units of each metric: over examples, or over steps for
          gradient_norm. NaN if there were no steps.
        """
        host = jax.device_get(self.averages)
        means = {name: _mean(each.total, each.count) for name, each in host.items()}
        return _scale_means(means, dict(self.scale))

    def checkpoint_item(self) -> dict[str, Any]:
        """Returns the sums to store in a checkpoint, by name."""
        return {**self.averages, "first_nonfinite_step": self.first_nonfinite_step}

    def with_checkpoint_item(self, saved: Mapping[str, Any]) -> Self:
        """Returns the metrics with sums from a checkpoint, which may have other metrics.

        Args:
          saved: from `checkpoint_item`; missing sums keep their values here, extra ones are
            ignored.
        """
        return dataclasses.replace(
            self,
            averages={name: saved.get(name, each) for name, each in self.averages.items()},
            first_nonfinite_step=saved["first_nonfinite_step"],
        )


@flax.struct.dataclass
class EvalMetrics:
    """Sums over evaluated examples.

    `single_batch` returns scalars on the device; `add` adds them on the host in double precision,
    so that sums depend on the batch size only through rounding within a batch.

    Attributes:
      sums: sums by name: float32 (float64 on the host), or int32 (int64) for bool metrics.
      count: number of examples, int32 (int64 on the host).
    """

    sums: dict[str, Any]
    count: Any

    @classmethod
    def single_batch(cls, values: Mapping[str, jax.Array], mask: jax.Array) -> Self:
        """Computes the sums of one batch, for use inside jit.

        Args:
          values: per-example values by name, bool or float [B] each.
          mask: bool [B], False for padding in the last batch, which is not counted.
        """

        def total(each: jax.Array) -> jax.Array:
            if each.dtype == bool:
                return (each & mask).sum(dtype=jnp.int32)
            # Padding may have any value, even NaN, so it is replaced, not multiplied by 0.
            return jnp.where(mask, each.astype(jnp.float32), jnp.float32(0)).sum()

        return cls(
            sums={name: total(each) for name, each in values.items()},
            count=mask.sum(dtype=jnp.int32),
        )

    def add(self, batch: Self) -> Self:
        """Returns the sums including one more batch, on the host."""
        return jax.tree.map(lambda a, b: _widen(a) + _widen(b), self, batch)

    def compute(self) -> dict[str, float]:
        """Returns the metrics on the host.

        Returns:
          The mean over examples by name (NaN if there are none), and count, their number (int).
        """
        host = jax.device_get(self)
        means = {name: _mean(total, host.count) for name, total in host.sums.items()}
        return {**means, "count": int(host.count)}


def to_host(batches: Iterable[Arrays]) -> Iterator[Arrays]:
    """Yields the results of batches on the host.

    Args:
      batches: trees of arrays on the device. The next one is dispatched before waiting for an
        earlier one, but at most a few ahead of the device, so that images of a large split do not
        pile up there.
    """
    in_flight: collections.deque[Arrays] = collections.deque()
    for batch in batches:
        in_flight.append(batch)
        if len(in_flight) > _MAX_BATCHES_IN_FLIGHT:
            yield jax.device_get(in_flight.popleft())
    while in_flight:
        yield jax.device_get(in_flight.popleft())


def _widen(value: Any) -> Any:
    """Converts to a NumPy scalar in double precision."""
    value = np.asarray(value)
    return value.astype(np.float64 if value.dtype.kind == "f" else np.int64)


def _scale_means(means: Mapping[str, float], scale: Mapping[str, int]) -> dict[str, float]:
    """Multiplies means by their factors, in the order of `scale`; others follow unchanged."""
    scaled = {name: factor * means[name] for name, factor in scale.items() if name in means}
    return scaled | {name: mean for name, mean in means.items() if name not in scaled}


def _mean(total: np.ndarray, count: np.ndarray) -> float:
    """Computes total / count in double precision; NaN for a count of zero."""
    return float(total) / int(count) if count else math.nan
