"""JAX's persistent compilation cache, which makes restarts fast, with two weaknesses fixed.

JAX does the caching; its keys cover the program, the versions, XLA's flags and the processor's
features. This module works around two problems:

- JAX writes an entry in place, so a kill or a full disk leaves a partial one, which JAX then
  reports at every start and never replaces.
- The cache grows without limit. JAX's own bound (jax_compilation_cache_max_size) locks the folder
  for each read, and in JAX 0.10 a kill at the wrong moment stops all later writes.

Imports nothing heavy, because the command line imports it at every start.
"""

import contextlib
import os
import pathlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

from inception_jax.storage import buckets, paths

Log = Callable[[str], None]

# With the folder of the cache.
VARIABLE = "JAX_COMPILATION_CACHE_DIR"

# A GoogLeNet's programs take 2.5 MB.
MAX_BYTES = 2 * 2**30

# JAX stores the program jit(f) in jit_f-<hash>-cache; its warnings name the program.
_CACHE_WARNING = re.compile(
    r"Error (?P<action>reading|writing) persistent compilation cache entry for '(?P<program>[^']*)'"
    r": (?P<reason>.*)",
    re.DOTALL,
)
_HASH = "[0-9a-f]" * 64


def enable(log: Log) -> None:
    """Enables the cache in the user's cache folder.

    The environment variable JAX_COMPILATION_CACHE_DIR sets another folder, local or in a bucket;
    empty, it disables the cache.

    Args:
      log: called with a line if the cache cannot be used.

    Raises:
      UserError: if that variable is not the path of a folder.
    """
    given = os.environ.get(VARIABLE)
    if given == "":
        return
    if given:
        # JAX would take ~ and other URLs for names of folders in the current one.
        folder = paths.user_path(given, f"{VARIABLE}={given}")
        if not paths.is_local(folder):
            buckets.configure_epath()  # With which JAX writes there.
    else:
        try:
            folder = _user_folder()
            _evict_oldest(folder, MAX_BYTES)
        except (OSError, RuntimeError) as error:
            log(f"compilation cache disabled; programs are recompiled at every start: {error}")
            return
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))


def _user_folder() -> pathlib.Path:
    """Returns the folder below the user's cache directory; creates it if missing.

    Raises:
      OSError: if it cannot be created, or is owned by another user, who could plant programs there.
      RuntimeError: if the home directory is unknown.
    """
    folder = paths.user_cache() / "xla"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise PermissionError(f"{folder}: owned by another user")
    return folder


def _evict_oldest(folder: pathlib.Path, max_bytes: int) -> None:
    """Removes the least recently used entries until the rest fit in `max_bytes`."""
    entries = []
    for path in folder.glob("*-cache"):
        # Another process may be removing the same entries.
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            # On file systems without access times (noatime), the last write counts.
            entries.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= size


@contextlib.contextmanager
def log_cache_errors(log: Log) -> Iterator[None]:
    """Removes the broken entries that JAX warns about in the block and logs one line instead.

    Other warnings are shown as before, and all of them are after the block.
    """
    show = warnings.showwarning
    logged = set()

    def showwarning(message: Warning | str, *args: object, **kwargs: object) -> None:
        if not (warning := _CACHE_WARNING.match(str(message))):
            show(message, *args, **kwargs)  # type: ignore[arg-type]
            return
        # jaxlib cannot serialize a program that calls oneDNN (models/ops.py); nothing is written.
        if "bad_alloc" in warning["reason"]:
            return
        # JAX warns before it compiles and writes the program again, or after a failed write. The
        # warning does not tell which of the program's entries is affected.
        import jax

        # Some versions of JAX do not declare the types of their settings.
        folder = paths.from_text(cast(Any, jax.config).jax_compilation_cache_dir)
        # An object in a bucket is complete or missing.
        if paths.is_local(folder):
            with contextlib.suppress(OSError):
                for path in folder.glob(f"{warning['program']}-{_HASH}-cache"):
                    path.unlink(missing_ok=True)
        # If one entry cannot be written, none can.
        if warning["action"] not in logged:
            verb = "read" if warning["action"] == "reading" else "write"
            log(f"{folder}: cannot {verb} compiled programs: {warning['reason']}")
        logged.add(warning["action"])

    with warnings.catch_warnings():
        # Handle repeated warnings too, and never turn them into errors.
        warnings.filterwarnings("always", _CACHE_WARNING.pattern)
        warnings.showwarning = showwarning
        yield
