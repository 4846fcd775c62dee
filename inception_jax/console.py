"""What a command shows: its standard streams made fit for it, lines for the user, progress."""

import functools
import io
import math
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from tqdm import tqdm

# Seconds between two plain lines about progress.
_PAUSE = 5.0


@functools.cache
def say_once(line: str) -> None:
    """Prints a line for the user as `say` does, unless this process has done so before."""
    say(line)


def prepare() -> None:
    """Lets no message end a run, and none land in another file. To be called first of all.

    A name may have letters that the terminal's encoding lacks: they are written as escapes. Who
    reads the messages (a terminal, ssh, tee, head) may be gone before the run ends: they are
    dropped then. And where a stream is closed, the next file that is opened would get its number,
    and with that all that libraries write to the stream.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # Gets the lowest number that is free.
    if sys.stdout is None:
        # Open until the process ends, as the stream it stands for.
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if sys.stderr is sys.__stderr__:
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(_Messages(2, "w", closefd=False)),
            encoding=sys.stderr.encoding if sys.stderr else "utf-8",
            errors="backslashreplace",
            line_buffering=True,
        )


class _Messages(io.FileIO):
    """A stream whose reader may be gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def say(line: str) -> None:
    """Prints a line for the user on stderr, above a bar if there is one; stdout is for results."""
    # Only what imported it can have drawn a bar.
    if tqdm := sys.modules.get("tqdm"):
        tqdm.tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    else:
        print(line, file=sys.stderr, flush=True)


class Progress:
    """Shows how far some work is: a bar on a terminal, a few plain lines elsewhere.

    In a log file or a batch system's console a bar is a mess of control characters: there a line
    goes to `log` at the start, and then every few seconds.

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
        self._next_line = math.inf

    def __enter__(self) -> Self:
        if self._shown and sys.stderr.isatty():
            self._bar = self.draw(desc=self._label)
        elif self._shown:
            self._log(f"{self._label}: {self._total:,} {self._unit}")
            self._next_line = time.monotonic() + _PAUSE
        return self

    def draw(self, **arguments: Any) -> "tqdm":
        """Returns a bar; `arguments` are tqdm's besides total and unit."""
        from tqdm import tqdm

        return tqdm(total=self._total, unit=f" {self._unit}", unit_scale=True, **arguments)

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends the bar, whose last state stays visible."""
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
