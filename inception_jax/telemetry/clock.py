"""Accounts for the time of a run: seconds in named phases, and the throughput of training alone.

Throughput that counted evaluation, saving or compilation as training time would say little about
either, so each second belongs to exactly one phase, and throughput covers training time only.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

from inception_jax import errors


class Clock:
    """Accumulates seconds by phase ("compile", "train", "evaluate", "save", "input", "other", …).

    Phases nest: an inner phase pauses the outer one, so no second is counted twice.

    Args:
      initial: seconds by phase of earlier parts of the run, from `state`.
      now: returns monotonic seconds.
    """

    def __init__(
        self,
        initial: Mapping[str, float] | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = dict(initial or {})
        self._now = now
        self._phases: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block, except for nested phases, as phase `name`.

        An exception that leaves the block carries the name of the innermost phase.
        """
        self._accrue()
        self._phases.append(name)
        try:
            with errors.during(name):
                yield
        finally:
            self._accrue()
            self._phases.pop()

    def seconds(self, name: str) -> float:
        """Returns the seconds spent in a phase so far."""
        self._accrue()
        return self._seconds.get(name, 0.0)

    def total(self) -> float:
        """Returns the seconds spent in all phases so far."""
        self._accrue()
        return sum(self._seconds.values())

    def state(self) -> dict[str, float]:
        """Returns the seconds by phase, to be stored in a checkpoint and passed as `initial`."""
        self._accrue()
        return dict(self._seconds)

    def idle_time(self) -> tuple[str, float]:
        """Returns the innermost open phase ('' if none) and the seconds since the last change.

        The only method that other threads may call.
        """
        since, names = self._since, self._phases[-1:]
        return (names[0], self._now() - since) if names else ("", 0.0)

    def _accrue(self) -> None:
        """Adds the time since the last change to the innermost open phase."""
        now = self._now()
        if self._phases:
            name = self._phases[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class Laps:
    """Measures a clock's seconds from one report to the next."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = clock.state()

    def since_last(self, images: int) -> tuple[float, float]:
        """Returns throughput and input wait since the last call.

        Args:
          images: images trained on since then.

        Returns:
          Images per second over the phases "train" and "input" (all others count as pauses), and
          the fraction of "input" in all phases, from 0 to 1; NaN if no time was spent in them.
        """
        last, self._last = self._last, self._clock.state()
        lap = {phase: seconds - last.get(phase, 0.0) for phase, seconds in self._last.items()}
        waited, total = lap.get("input", 0.0), sum(lap.values())
        busy = lap.get("train", 0.0) + waited
        return images / busy if busy > 0 else math.nan, waited / total if total > 0 else math.nan
