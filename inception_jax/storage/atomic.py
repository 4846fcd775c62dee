"""Atomic file writes, safe against a kill at any time; marked output folders."""

import contextlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from inception_jax.errors import WriteError
from inception_jax.storage import buckets, paths

# Marks a folder whose files were written by this program and are not part of a data set.
MARKER = ".inception_jax"


def make_output_folder(folder: pathlib.Path) -> None:
    """Creates a folder for output files and marks it, so that no data set includes them.

    A folder that is not empty gets no mark, because it may contain a user's images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / MARKER).write_text("Written by inception_jax; not part of a data set.\n")


@contextlib.contextmanager
def replacing(path: paths.Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path to write to, which replaces `path` at the end of the block.

    The contents are flushed to disk before the replacement; they are uploaded if `path` is in a
    bucket, and written to it if it is a device or a pipe. On an error, an earlier file stays as it
    was and the temporary one is removed.

    Args:
      path: the file to write.

    Raises:
      WriteError: if it cannot be written.
    """
    if not paths.is_local(path) or is_stream(path):
        with tempfile.TemporaryDirectory(prefix="inception_jax-") as folder:
            local = pathlib.Path(folder, path.name)
            yield local
            if paths.is_local(path):
                path.write_bytes(local.read_bytes())
            else:
                buckets.write_bytes(path, local.read_bytes())
        return
    # File systems limit names to 255 bytes, and a character has up to 4.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, *map(str, (temporary, path))):
            raise  # About another file, which the block reads.
        raise WriteError(
            f"{path}: cannot be written: {error.strerror or error}. Use an existing, writable "
            "folder on a disk with free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def is_stream(path: pathlib.Path) -> bool:
    """Whether a path is a device or a pipe, such as /dev/stdout, which no file may replace."""
    is_usual = not path.exists() or path.is_file() or path.is_dir()
    # Behind /dev/stdout may be a usual file. /dev/shm is an ordinary folder.
    return not is_usual or str(path.parent) in ("/dev", "/dev/fd", "/proc/self/fd")


def write_json(path: paths.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file atomically.

    Raises:
      WriteError: if it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
