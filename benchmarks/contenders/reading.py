"""How a reader of batches is timed, the same for ours and the peers."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.contenders import resources, serve


def mode(batches: Iterator[Any], size_of: Callable[[Any], int]) -> Callable[..., serve.Numbers]:
    """Returns a mode that reads for some seconds.

    Args:
      batches: endless.
      size_of: returns how many images a batch holds, when the batch is complete.
    """

    def read(seconds: float) -> serve.Numbers:
        with resources.PeakMemory() as memory:
            # The first batch after a pause, in which readers may have read ahead, is not counted.
            size_of(next(batches))
            start, cpu = time.perf_counter(), resources.cpu_seconds()
            images, elapsed = 0, 0.0
            while elapsed < seconds:
                images += size_of(next(batches))
                elapsed = time.perf_counter() - start
            cpu = resources.cpu_seconds() - cpu
        return {
            "images_per_second": images / elapsed,
            # Nothing at all, by the clock of the kernel's ticks, may be a very short measurement.
            "images_per_cpu_second": images / max(cpu, 0.01),
            "memory_growth": memory.growth,
        }

    return read
