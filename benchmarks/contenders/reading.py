"""Times a reader of batches, in the same way for ours and the peers."""

import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.contenders import resources, serve


def timed_reader(
    batches: Iterator[Any], size_of: Callable[[Any], int]
) -> Callable[..., serve.Numbers]:
    """Returns a mode that reads batches for a given number of seconds.

    Args:
      batches: infinite iterator.
      size_of: returns the number of images in a batch once the batch is complete.
    """

    def read(seconds: float) -> serve.Numbers:
        with resources.PeakMemory() as memory:
            # Skips the first batch, because readers may have read ahead during the pause.
            size_of(next(batches))
            start, cpu = time.perf_counter(), resources.cpu_seconds()
            images, elapsed = 0, 0.0
            while elapsed < seconds:
                images += size_of(next(batches))
                elapsed = time.perf_counter() - start
            cpu = resources.cpu_seconds() - cpu
        return {
            "images_per_second": images / elapsed,
            # A very short measurement may take zero ticks of the kernel's clock.
            "images_per_cpu_second": images / max(cpu, 0.01),
            "memory_growth": memory.growth,
        }

    return read
