"""Output for the user: standard streams, log lines and progress bars."""

import functools
import io
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG_INTERVAL_SECONDS = 5.0


@functools.cache
def log_once(line: str) -> None:
    """Logs a line, unless this process has logged it before."""
    log(line)


def prepare_streams() -> None:
    """Makes writing to the standard streams safe. Call first of all.

    Characters that the terminal's encoding lacks are escaped. Messages are dropped if their reader
    (a terminal, ssh, tee, head) is gone. And closed streams are opened to /dev/null: otherwise the
    next file opened would get their number, and with it everything that libraries write to them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Gets the lowest free number.
    if sys.stdout is None:
        # Stays open until the process ends, like the stream it replaces.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_DetachableStream(2, "w", closefd=False)),
            encoding=sys.stderr.encoding if sys.stderr else "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )


class _DetachableStream(io.FileIO):
    """A stream that ignores errors if its reader is gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def log(line: str) -> None:
    """Prints a line to stderr, above a progress bar if there is one; stdout is for results."""
    # There is no bar unless tqdm has been imported.
    if tqdm := sys.modules.get("tqdm"):
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, left: Collection[int] = (0,)
) -> str:
    """Returns an aligned table in Markdown.

    Args:
      head: names of the columns.
      rows: their cells, as many as columns.
      left: the columns whose text begins at the left, from 0; that of others ends at the right.

    Returns:
      The lines, without a final newline.

    >>> print(markdown_table(["what", "n"], [["images", "1,000"]]))
    | what   |     n |
    | ------ | ----: |
    | images | 1,000 |
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * n if i in left else "-" * (n - 1) + ":" for i, n in enumerate(widths)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in (cells[0], rule, *cells[1:])
    )


class Progress:
    """Shows progress: a bar on a terminal, otherwise a plain line every few seconds.

    In log files and batch consoles, a bar would be a mess of control characters.

    Args:
      label: description of the work, such as "reading images".
      total: total amount of work.
      unit: unit of the amount.
      log: called with each plain line.
      visible: whether to show progress; `log` works in any case.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        unit: str = "images",
        log: Callable[[str], None] = print,
        visible: bool = True,
    ) -> None:
        self._label, self._total, self._unit, self._log = label, total, unit, log
        self._visible = visible
        self._done = 0
        self._start = time.monotonic()
        self._bar: tqdm | None = None
        self._next_line = math.inf

    def __enter__(self) -> Self:
        if self._visible and sys.stderr.isatty():
            self._bar = self.draw(desc=self._label)
        elif self._visible:
            self._log(f"{self._label}: {self._amount(self._total)}")
            self._next_line = time.monotonic() + _LOG_INTERVAL_SECONDS
        return self

    def draw(self, **arguments: Any) -> "tqdm":
        """Returns a bar; `arguments` are passed to tqdm."""
        from tqdm import tqdm

        return tqdm(total=self._total, unit=f" {self._unit}", unit_scale=True, **arguments)

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Closes the bar; its last state stays visible."""
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int) -> None:
        """Adds `count` to the amount of work done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() >= self._next_line:
            self._log(f"{self._label}: {self._describe()}")
            self._next_line = time.monotonic() + _LOG_INTERVAL_SECONDS

    def _describe(self) -> str:
        if self._unit != "bytes":
            return f"{self._done:,} of {self._total:,} {self._unit}"
        rate = self._done / (time.monotonic() - self._start) / 1e6
        return f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB, {rate:.1f} MB/s"

    def _amount(self, amount: int) -> str:
        is_large = self._unit == "bytes" and amount >= 1e7
        return f"{amount / 1e9:.2f} GB" if is_large else f"{amount:,} {self._unit}"

    def log(self, line: str) -> None:
        """Logs a line, above the bar if there is one."""
        if self._bar is not None:
            with self._bar.external_write_mode(file=sys.stderr):
                self._log(line)
        else:
            self._log(line)
