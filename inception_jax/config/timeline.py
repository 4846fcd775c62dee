"""Turns durations (epochs, steps or examples) into steps."""

import dataclasses
import math
from fractions import Fraction

from inception_jax.config.schema import Duration


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Converts between epochs, steps and examples for one run.

    Training runs over an endless sequence of shuffled epochs, one after another; a batch may hold
    the end of one epoch and the start of the next, so no example is ever left out. An epoch is
    therefore `train_examples / batch_size` steps, which need not be whole.

    Args:
      batch_size: examples a step, over all devices.
      train_examples: size of the training split.
    """

    batch_size: int
    train_examples: int

    def _examples(self, duration: Duration) -> Fraction:
        if duration.epochs:
            return Fraction(duration.epochs).limit_denominator(10**6) * self.train_examples
        return Fraction(duration.steps * self.batch_size or duration.examples)

    def steps(self, duration: Duration) -> int:
        """Returns the least number of steps that lasts at least `duration`."""
        return math.ceil(self._examples(duration) / self.batch_size)

    def due(self, every: Duration, step: int) -> bool:
        """Whether a multiple of `every` is reached by step `step` (counted from 1)."""
        period = self._examples(every)
        return step * self.batch_size // period > (step - 1) * self.batch_size // period

    def epoch(self, step: int) -> float:
        """Returns how many epochs `step` steps are."""
        return step * self.batch_size / self.train_examples
