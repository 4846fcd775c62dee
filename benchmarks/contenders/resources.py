"""CPU time and memory of this process and the processes that it started, from /proc (Linux)."""

import os
import pathlib
import threading
import time
from collections.abc import Iterator

_TICKS = os.sysconf("SC_CLK_TCK")


def processes(root: int | None = None) -> Iterator[int]:
    """Yields the id of a process, this one by default, and of all that descend from it."""
    root = root or os.getpid()
    yield root
    for task in pathlib.Path(f"/proc/{root}/task").glob("*/children"):
        for child in _read(task).split():
            yield from processes(int(child))


def cpu_seconds() -> float:
    """Returns the CPU time that this process and its running children have used."""
    children = [pid for pid in processes() if pid != os.getpid()]
    # Fields 14 and 15, user and system time, counted after the name, which may contain spaces.
    fields = [_read(f"/proc/{pid}/stat").rpartition(")")[2].split() for pid in children]
    ticks = sum(int(each[11]) + int(each[12]) for each in fields if each)
    return time.process_time() + ticks / _TICKS


def anonymous_bytes() -> int:
    """Returns the resident memory of this process and its children that no file backs.

    Pages of mapped files (the decoded cache, libraries) can be dropped at any time and are not
    counted; shared memory, in which PyTorch's workers hand over batches, is not either.
    """
    kilobytes = 0
    for pid in processes():
        for line in _read(f"/proc/{pid}/status").splitlines():
            if line.startswith("RssAnon:"):
                kilobytes += int(line.split()[1])
    return 1024 * kilobytes


def _read(path: str | pathlib.Path) -> str:
    """Returns what a file of /proc says; nothing for a process that has just ended."""
    try:
        return pathlib.Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


class PeakMemory:
    """Watches `anonymous_bytes` inside a `with` block, ten times a second.

    Attributes:
      growth: highest value seen, less that at the start; bytes.
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
