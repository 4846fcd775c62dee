"""Metrics summed on the device, and divided once on the host.

Training metrics live in the train state: each step adds to them inside the jitted function, so that
no step waits for the host, and a checkpoint carries the sums of an unfinished logging interval. The
base is `clu.metrics`; its `Average` holds a float32 total and an int32 count, of fixed shape and
type, as donation and checkpoints need.
"""

import collections
from collections.abc import Iterable, Mapping
from typing import Self

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

NEVER = -1

# Evaluation batches that may be dispatched before the host waits for an older one.
_BATCHES_AHEAD = 2


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
class TrainMetrics(metrics.Collection):
    """Training metrics since the last report, a pytree of scalars on the device."""

    loss: metrics.Average
    top1: metrics.Average
    top5: metrics.Average
    gradient_norm: metrics.Average
    first_nonfinite_step: FirstStep

    @classmethod
    def single_step(
        cls,
        *,
        step: jax.typing.ArrayLike,
        loss: jax.Array,
        top1: jax.Array,
        top5: jax.Array,
        gradient_norm: jax.Array,
    ) -> Self:
        """Returns the metrics of one step.

        Args:
          step: integer scalar, counted from 1.
          loss: float32 [B], each example's loss.
          top1: bool or float32 [B], whether the most probable class is right. With mixed labels the
            one that has the larger share counts as the label.
          top5: the same for the five most probable classes.
          gradient_norm: float32 scalar, global norm of the gradients.
        """
        finite = jnp.isfinite(gradient_norm) & jnp.all(jnp.isfinite(loss))
        average = metrics.Average.from_model_output
        return cls.empty().replace(
            loss=average(loss.astype(jnp.float32)),
            top1=average(top1.astype(jnp.float32)),
            top5=average(top5.astype(jnp.float32)),
            gradient_norm=average(gradient_norm.astype(jnp.float32)),
            first_nonfinite_step=FirstStep.from_model_output(step=step, happened=~finite),
        )

    def compute(self) -> dict[str, float]:
        """Returns the metrics on the host; waits for the steps they come from.

        Returns:
          loss: mean over examples. top1, top5: percent of examples. gradient_norm: mean over steps.
          first_nonfinite_step: the first step with a loss or gradient that is not finite, or -1.
          Means are NaN when there was no step.
        """
        host = jax.device_get(self)
        return {
            "loss": _mean(host.loss.total, host.loss.count),
            "top1": 100 * _mean(host.top1.total, host.top1.count),
            "top5": 100 * _mean(host.top5.total, host.top5.count),
            "gradient_norm": _mean(host.gradient_norm.total, host.gradient_norm.count),
            "first_nonfinite_step": host.first_nonfinite_step.compute(),
        }


@flax.struct.dataclass
class EvalMetrics:
    """Sums over evaluated examples.

    From `single_batch` the leaves are scalars on the device; from `total` they are NumPy scalars in
    double precision, whose sums do not depend on how the examples were cut into batches beyond the
    rounding inside one batch.

    Attributes:
      loss: float32 (total: float64), sum of the examples' losses.
      top1: int32 (total: int64), how many examples have their most probable class right.
      top5: the same for the five most probable classes.
      count: int32 (total: int64), how many examples.
    """

    loss: jax.Array | np.float64
    top1: jax.Array | np.int64
    top5: jax.Array | np.int64
    count: jax.Array | np.int64

    @classmethod
    def single_batch(
        cls, *, loss: jax.Array, top1: jax.Array, top5: jax.Array, mask: jax.Array
    ) -> Self:
        """Returns the sums of one batch; meant for use inside jit.

        Args:
          loss: float32 [B].
          top1: bool [B].
          top5: bool [B].
          mask: bool [B], False for the padding of a last batch, which then counts nowhere.
        """
        return cls(
            # A padded example may have any loss, NaN too, so it is replaced, not multiplied by 0.
            loss=jnp.where(mask, loss.astype(jnp.float32), jnp.float32(0)).sum(),
            top1=(top1 & mask).sum(dtype=jnp.int32),
            top5=(top5 & mask).sum(dtype=jnp.int32),
            count=mask.sum(dtype=jnp.int32),
        )

    @classmethod
    def total(cls, batches: Iterable[Mapping[str, Self]]) -> dict[str, Self]:
        """Returns the sums over all batches, on the host.

        Args:
          batches: from `single_batch`, by the name of what was evaluated; each batch has the same
            names. An iterator that dispatches them is asked for the next one before this waits for
            an earlier one, and is never more than a few ahead of the device, so that the images of
            a large split do not pile up there.
        """
        sums: dict[str, Self] = {}
        in_flight: collections.deque[Mapping[str, Self]] = collections.deque()

        def add_oldest() -> None:
            for name, batch in in_flight.popleft().items():
                sums[name] = sums.get(name, cls._zero())._plus(batch)

        for batch in batches:
            in_flight.append(batch)
            if len(in_flight) > _BATCHES_AHEAD:
                add_oldest()
        while in_flight:
            add_oldest()
        return sums

    @classmethod
    def _zero(cls) -> Self:
        return cls(loss=np.float64(0), top1=np.int64(0), top5=np.int64(0), count=np.int64(0))

    def _plus(self, batch: Self) -> Self:
        """Returns the sums of a `total` with one more batch."""
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), self, jax.device_get(batch))

    def compute(self) -> dict[str, float]:
        """Returns the metrics on the host.

        Returns:
          loss: mean over examples. top1, top5: percent of examples. count: number of examples (an
          int). Means are NaN when there was no example.
        """
        host = jax.device_get(self)
        return {
            "loss": _mean(host.loss, host.count),
            "top1": 100 * _mean(host.top1, host.count),
            "top5": 100 * _mean(host.top5, host.count),
            "count": int(host.count),
        }


def _mean(total: np.ndarray, count: np.ndarray) -> float:
    """Returns total / count in double precision; NaN for a count of zero."""
    return float(total) / int(count) if count else float("nan")
