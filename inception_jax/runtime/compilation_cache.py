"""Compiled programs on disk, so that a restart does not wait for them.

JAX's persistent cache does the work: its keys hold the program, the versions, XLA's flags and the
processor's features. What it leaves open is mended here. It writes an entry in place, so a kill or
a full disk leaves a part of one; that it reports at every start, and never replaces. And it grows
without end: its own bound (jax_compilation_cache_max_size) locks the folder for each read, and in
JAX 0.10 one kill at a bad moment stops it from writing ever after.

Imports nothing heavy, as the command line does it at each start.
"""

import contextlib
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

Log = Callable[[str], None]

# A GoogLeNet's programs take 2.5 MB.
MAX_BYTES = 2 * 2**30

# JAX's file of the program jit(f) is jit_f-<hash>-cache; its warnings name the program.
_PROBLEM = re.compile(
    r"Error (?P<what>reading|writing) persistent compilation cache entry for '(?P<program>[^']*)'"
    r": (?P<reason>.*)",
    re.DOTALL,
)
_HASH = "[0-9a-f]" * 64


def use(log: Log) -> None:
    """Switches the cache on, in the user's cache folder.

    JAX_COMPILATION_CACHE_DIR names another folder; set to nothing, it turns the cache off.

    Args:
      log: takes a line about a cache that cannot be used, or entries that were thrown away.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        try:
            folder = _own_folder()
            _remove_oldest(folder, MAX_BYTES)
        except (OSError, RuntimeError) as error:
            log(f"compilation cache disabled; programs are recompiled at every start: {error}")
            return
        import jax

        jax.config.update("jax_compilation_cache_dir", str(folder))


def _own_folder() -> pathlib.Path:
    """Returns the folder in the user's cache, made if missing.

    Raises:
      OSError: if it cannot be made, or is another user's, who could put programs of theirs there.
      RuntimeError: if the user has no home.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification has relative paths ignored.
    if not cache.is_absolute():
        cache = pathlib.Path.home() / ".cache"
    folder = cache / "inception_jax" / "xla"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise PermissionError(f"{folder}: owned by another user")
    return folder


def _remove_oldest(folder: pathlib.Path, max_bytes: int) -> None:
    """Removes the entries that were not used for longest, until the rest fit in `max_bytes`."""
    entries = []
    for path in folder.glob("*-cache"):
        # Another process may be removing the same ones.
        with contextlib.suppress(FileNotFoundError):
            found = path.stat()
            # Where reading leaves no trace (noatime), the last write has to do.
            entries.append((max(found.st_atime, found.st_mtime), found.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


@contextlib.contextmanager
def explained_problems(log: Log) -> Iterator[None]:
    """Mends what JAX warns of inside the `with` block, and logs it in one line.

    Every other warning is shown as before; afterwards all warnings are.
    """
    show = warnings.showwarning
    logged = set()

    def showwarning(message: Warning | str, *args: object, **kwargs: object) -> None:
        if not (problem := _PROBLEM.match(str(message))):
            show(message, *args, **kwargs)  # type: ignore[arg-type]
            return
        # jaxlib cannot write a program that calls oneDNN (models/ops.py); then nothing was written.
        if "bad_alloc" in problem["reason"]:
            return
        # Called before the program is compiled and written again, or after it could not be written.
        # Which of the program's entries it is, the warning does not tell.
        import jax

        # Not every version of JAX declares the types of its settings.
        folder = pathlib.Path(cast(Any, jax.config).jax_compilation_cache_dir)
        with contextlib.suppress(OSError):
            for path in folder.glob(f"{problem['program']}-{_HASH}-cache"):
                path.unlink(missing_ok=True)
        # Where one cannot be written, none can.
        if problem["what"] not in logged:
            verb = "read" if problem["what"] == "reading" else "write"
            log(f"{folder}: cannot {verb} compiled programs: {problem['reason']}")
        logged.add(problem["what"])

    with warnings.catch_warnings():
        # Not only the first of several equal ones, and never as an error.
        warnings.filterwarnings("always", _PROBLEM.pattern)
        warnings.showwarning = showwarning
        yield
