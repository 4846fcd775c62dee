"""Progress of a long preparation: a bar on a terminal, a few plain lines elsewhere."""

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

# Seconds between two plain lines.
_PAUSE = 5.0


class Progress:
    """Counts work done and shows it.

    On a terminal it is a tqdm bar on stderr; elsewhere (a log file, a notebook server) a line goes
    to `log` at the start and then every few seconds.

    Args:
      label: what is being done, such as "reading images".
      total: how much there is to do.
      unit: what is counted.
      log: takes one line of text.
      shown: whether to show anything besides the notes.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str = "images",
        log: Callable[[str], None] = print,
        shown: bool = True,
    ) -> None:
        self._label, self._total, self._unit, self._log = label, total, unit, log
        self._shown = shown
        self._done = 0
        self._bar: tqdm | None = None
        self._next_line = 0.0

    def __enter__(self) -> "Progress":
        if not self._shown:
            self._next_line = math.inf
        elif sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total, desc=self._label, unit=f" {self._unit}", unit_scale=True
            )
        else:
            self._log(f"{self._label}: {self._total:,} {self._unit}")
            self._next_line = time.monotonic() + _PAUSE
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """Adds `count` to the work done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._next_line:
            self._log(f"{self._label}: {self._done:,} of {self._total:,} {self._unit}")
            self._next_line = time.monotonic() + _PAUSE

    def note(self, line: str) -> None:
        """Hands a line to `log`, above the bar if there is one."""
        if self._bar is not None:
            with self._bar.external_write_mode(file=sys.stderr):
                self._log(line)
        else:
            self._log(line)
