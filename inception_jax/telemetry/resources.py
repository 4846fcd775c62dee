"""Measures memory and disk space."""

import os
import pathlib
import shutil

_STATM = pathlib.Path("/proc/self/statm")


def resident_memory() -> float | None:
    """Returns the resident memory of this process, GB; None without /proc."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def free_disk(directory: pathlib.Path) -> float | None:
    """Returns the free disk space of a directory, GB; None if it does not exist."""
    try:
        return shutil.disk_usage(directory).free / 1e9
    except OSError:
        return None
