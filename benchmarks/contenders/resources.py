"""Measures CPU time and memory of this process and its descendants, from /proc (Linux)."""

import os
import pathlib
import threading
import time
from collections.abc import Iterator

_TICKS = os.sysconf("SC_CLK_TCK")


def processes(root: int | None = None) -> Iterator[int]:
    """Yields the ids of a process, by default this one, and of all its descendants."""
    root = root or os.getpid()
    yield root
    for task in pathlib.Path(f"/proc/{root}/task").glob("*/children"):
        for child in _read(task).split():
            yield from processes(int(child))


def cpu_seconds() -> float:
    """Returns the CPU time of this process and its running descendants, seconds."""
    children = [pid for pid in processes() if pid != os.getpid()]
    # User and system time, fields 14 and 15, counted after the name, which may contain spaces.
    fields = [_read(f"/proc/{pid}/stat").rpartition(")")[2].split() for pid in children]
    ticks = sum(int(each[11]) + int(each[12]) for each in fields if each)
    return time.process_time() + ticks / _TICKS


def anonymous_bytes() -> int:
    """Returns the anonymous resident memory of this process and its descendants, bytes.

    Excludes pages of mapped files (the decoded cache, libraries), which can be dropped at any time,
    and shared memory, in which PyTorch's workers return batches.
    """
    kilobytes = 0
    for pid in processes():
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith("RssAnon:"):
                kilobytes += int(line.split()[1])
    return 1024 * kilobytes


def _read(path: str | pathlib.Path) -> str:
    """Returns the contents of a file in /proc; '' if the process has just exited."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class PeakMemory:
    """Samples `anonymous_bytes` inside a `with` block, ten times per second.

    Attributes:
      growth: highest value minus the value at the start, bytes.
    """

    def __enter__(self) -> "PeakMemory":
        self.growth = 0
        self._start = anonymous_bytes()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        done = False
        while not done:
            done = self._stop.wait(0.1)
            self.growth = max(self.growth, anonymous_bytes() - self._start)
