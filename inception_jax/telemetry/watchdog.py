"""Shows where a run hangs: a thread that watches the run's clock and dumps all stacks."""

import faulthandler
import sys
import threading
from collections.abc import Callable
from typing import Self

from inception_jax.telemetry.clock import Clock

# Phases that can last long without a phase change in a healthy run.
LONG_PHASES = ("compile", "evaluate")
_CHECKS_PER_LIMIT = 20  # Checks in the time that counts as a stall.


def dump_stacks() -> None:
    """Writes the Python stacks of all threads to stderr."""
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)


class Watchdog:
    """Watches a run's clock; a context manager.

    A healthy run changes the phase of its clock several times per step. If the phase does not
    change for too long, this is logged once, with the stacks of all threads; the run continues.

    Args:
      clock: the run's clock.
      limit: seconds without a phase change that count as a stall; 0: never.
      long_limit: the same during compilation and evaluation.
      log: called with a line of text.
      dump: writes the stacks of all threads.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        limit: float,
        long_limit: float,
        log: Callable[[str], None],
        dump: Callable[[], None] = dump_stacks,
    ) -> None:
        self._clock, self._log, self._dump = clock, log, dump
        self._limit, self._long_limit = limit, long_limit
        self._logged = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit or self._long_limit:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Logs a stall that has not been logged yet."""
        phase, seconds = self._clock.idle_time()
        is_long = phase in LONG_PHASES
        limit = self._long_limit if is_long else self._limit
        if not limit or seconds <= limit:
            self._logged = False
        elif not self._logged:
            self._logged = True
            setting = "long_stall_minutes" if is_long else "stall_minutes"
            self._log(
                f"no progress for {seconds / 60:.1f} minutes in phase {phase!r}; the run keeps "
                "waiting. Check the disks, the other hosts and the devices. "
                f"config.watch.{setting} sets this limit. Stacks of all threads, most recent call "
                "first:"
            )
            self._dump()

    def _watch(self) -> None:
        shortest = min(filter(None, (self._limit, self._long_limit)))
        while not self._stopped.wait(shortest / _CHECKS_PER_LIMIT):
            self.check()
