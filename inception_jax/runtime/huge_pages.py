"""How the C library gets its memory. Imports nothing heavy: it comes before all else."""

import os
import pathlib
import sys

_TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
_MODE = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def use_huge_pages() -> None:
    """Starts the process anew with memory in pages of 2 MiB, where the system gives them on demand.

    XLA's CPU backend allocates some hundred megabytes for each step and frees them. In pages
    of 4 KiB a fifth of the step is spent on getting them. glibc asks for larger ones only if an
    environment variable says so when a process starts, hence the new start (0.1 s). Nothing is done
    where the variable is set already, where all memory is in huge pages anyway or none may be, and
    without glibc. Call before threads are started or files opened.
    """
    try:
        on_demand = "[madvise]" in _MODE.read_text()
        glibc = os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (OSError, ValueError):
        return
    if on_demand and glibc and _TUNABLES not in os.environ:
        os.environ[_TUNABLES] = HUGE_PAGES
        # Not sys.argv: the interpreter's own options belong to the command, too.
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
