"""The standard streams of a command, made fit for what may be at their other end."""

import io
import os
import sys
from typing import Any


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


def say(line: str) -> None:
    """Prints a line for the user on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


class _Messages(io.FileIO):
    """A stream whose reader may be gone."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes
