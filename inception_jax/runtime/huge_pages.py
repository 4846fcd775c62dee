"""Huge pages for the C library's memory. Imports nothing heavy, because it runs first of all."""

import os
import pathlib
import sys

_TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Restarts the process with 2 MiB memory pages where the system provides them on request.

    XLA's CPU backend allocates and frees some hundred megabytes in each step. With 4 KiB pages,
    a fifth of the step is spent on page faults. glibc requests larger pages only if an environment
    variable is set when a process starts, hence the restart (0.1 s). Does nothing if the variable
    is already set, if huge pages are always or never used, or without glibc. Call before starting
    threads or opening files.
    """
    try:
        on_demand = "[madvise]" in _MODE.read_text()
        glibc = os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (OSError, ValueError):
        return
    if on_demand and glibc and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = HUGE_PAGES
        # Not sys.argv, which lacks the interpreter's own options.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
