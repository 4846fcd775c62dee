"""Where the time of a run goes: seconds in named phases, and the speed of training alone.

Throughput that counts evaluation, saving or compiling as training time says little about either, so
each second belongs to exactly one phase, and the rate is taken over training time only.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping

from inception_jax import errors


class Clock:
    """Adds up seconds by phase ("compile", "train", "evaluate", "save", "input", "other", …).

    Phases nest: an inner one stops the outer one, so that no second is counted twice.

    Args:
      initial: seconds by phase that earlier parts of the run took, as `state` gave them.
      now: returns seconds that never go back.
    """

    def __init__(
        self,
        initial: Mapping[str, float] | None = None,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = dict(initial or {})
        self._now = now
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` block, less that of phases within it, under `name`.

        An error that leaves the block carries the name of the innermost phase.
        """
        self._settle()
        self._open.append(name)
        try:
            with errors.during(name):
                yield
        finally:
            self._settle()
            self._open.pop()

    def seconds(self, name: str) -> float:
        """Returns the seconds spent in one phase until now."""
        self._settle()
        return self._seconds.get(name, 0.0)

    def total(self) -> float:
        """Returns the seconds spent in all phases until now."""
        self._settle()
        return sum(self._seconds.values())

    def state(self) -> dict[str, float]:
        """Returns the seconds by phase, for a checkpoint and for `initial`."""
        self._settle()
        return dict(self._seconds)

    def idle_time(self) -> tuple[str, float]:
        """Returns the innermost open phase, '' if none is, and seconds since the last phase change.

        The only method for other threads than the run's own.
        """
        since, names = self._since, self._open[-1:]
        return (names[0], self._now() - since) if names else ("", 0.0)

    def _settle(self) -> None:
        """Credits the time since the last change to the innermost open phase."""
        now = self._now()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now


class Laps:
    """The seconds of a clock from one report to the next.

    Args:
      clock: what measures the time.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._last = clock.state()

    def since_last(self, images: int) -> tuple[float, float]:
        """Returns the speed of training since the last call, and the share of time it waited.

        Args:
          images: how many it has seen since then.

        Returns:
          Images a second of the phases "train" and "input", all others being pauses, and the share
          of "input" in all phases, from 0 to 1; NaN when no time was spent in them.
        """
        last, self._last = self._last, self._clock.state()
        lap = {phase: seconds - last.get(phase, 0.0) for phase, seconds in self._last.items()}
        waited, total = lap.get("input", 0.0), sum(lap.values())
        busy = lap.get("train", 0.0) + waited
        return images / busy if busy > 0 else math.nan, waited / total if total > 0 else math.nan
