"""What a run takes of its machine: memory, disk."""

import os
import pathlib
import shutil

_STATM = pathlib.Path("/proc/self/statm")


def resident_memory() -> float | None:
    """Returns how much of this process is in memory, GB; None where the system does not say."""
    try:
        pages = int(_STATM.read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def free_disk(folder: pathlib.Path) -> float | None:
    """Returns how much may still be written to a folder's disk, GB; None if it is not there."""
    try:
        return shutil.disk_usage(folder).free / 1e9
    except OSError:
        return None
