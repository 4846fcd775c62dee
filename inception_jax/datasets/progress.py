"""Progress of a long preparation: a bar on a terminal, a few plain lines elsewhere."""

import sys
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

_LINES = 4


class Progress:
    """Counts work done and shows it.

    On a terminal it is a tqdm bar on stderr; elsewhere (a log file, a notebook server) a line at each
    quarter goes to `log`.

    Args:
      label: what is being done, such as "reading images".
      total: how much there is to do; 0: unknown.
      unit: what is counted.
      log: takes one line of text.
    """

    def __init__(
        self, label: str, total: int, *, unit: str = "images", log: Callable[[str], None] = print
    ) -> None:
        self._label, self._total, self._unit, self._log = label, total, unit, log
        self._done = 0
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total or None, desc=self._label, unit=f" {self._unit}", unit_scale=True
            )
        else:
            total = f"{self._total:,} {self._unit}" if self._total else f"unknown {self._unit}"
            self._log(f"{self._label}: {total}")
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
        before, self._done = self._done, self._done + count
        if self._bar is not None:
            self._bar.update(count)
        elif self._total and self._done * _LINES // self._total > before * _LINES // self._total:
            percent = 100 * self._done // self._total
            self._log(f"{self._label}: {self._done:,} of {self._total:,} ({percent}%)")
