"""Converts durations (epochs, steps or examples) to steps."""

import dataclasses
import math
from fractions import Fraction

from inception_jax.config import durations


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Converts between epochs, steps and examples for one run.

    Training runs over an endless sequence of shuffled epochs; a batch may contain the end of one
    epoch and the start of the next, so no example is ever dropped. An epoch is therefore
    `train_examples / batch_size` steps, not necessarily a whole number.

    Args:
      batch_size: examples per step, over all devices.
      train_examples: size of the training split.

    >>> timeline = Timeline(batch_size=32, train_examples=100)
    >>> timeline.steps("2 epochs"), timeline.steps("64 examples")
    (7, 2)
    """

    batch_size: int
    train_examples: int

    def _examples(self, duration: str) -> Fraction:
        length = durations.parse_duration(duration)
        if length is None:
            return Fraction(0)
        if length.unit == "epochs":
            return Fraction(length.amount).limit_denominator(10**6) * self.train_examples
        return Fraction(int(length.amount)) * (self.batch_size if length.unit == "steps" else 1)

    def steps(self, duration: str) -> int:
        """Returns the smallest number of steps that lasts at least `duration` ('' = 0)."""
        return math.ceil(self._examples(duration) / self.batch_size)

    def due(self, every: str, step: int) -> bool:
        """Whether step `step`, counted from 1, reaches a multiple of the interval `every`."""
        period = self._examples(every)
        return step * self.batch_size // period > (step - 1) * self.batch_size // period

    def epochs(self, duration: str) -> float:
        """Returns how many epochs a duration is; of steps and examples, rounded up to steps."""
        length = durations.parse_duration(duration)
        if length is not None and length.unit == "epochs":
            return length.amount
        return self.epoch(self.steps(duration))

    def epoch(self, step: int) -> float:
        """Returns how many epochs `step` steps are."""
        return step * self.batch_size / self.train_examples
