"""Files that are there whole or not at all, whenever the process ends; folders that are marked."""

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from inception_jax.errors import WriteError

# In a folder: what lies there was written by this program, and is no part of a data set.
MARKER = ".inception_jax"


def make_output_folder(folder: pathlib.Path) -> None:
    """Makes a folder for files that are written, and marks it, so that no data set takes them in.

    A folder that holds something already gets no mark: it may be one of images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.iterdir()):
        (folder / MARKER).write_text("Written by inception_jax; not part of a data set.\n")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a name to write a file under, which takes the place of `path` at the end.

    The contents are on the disk before they take the place. An error leaves what was there before,
    and nothing besides.

    Args:
      path: of the file.

    Raises:
      WriteError: if it cannot be written.
    """
    # A name may be as long as the file system allows: 255 bytes, of which a letter takes up to 4.
    temporary = path.with_name(f".{path.name[:40]}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename not in (None, *map(str, (temporary, path))):
            raise  # Of another file, which the block reads.
        raise WriteError(
            f"{path}: cannot be written: {error.strerror or error}. Use an existing, writable "
            "folder on a disk with free space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
      WriteError: if it cannot be written.
    """
    with replacing(path) as temporary, temporary.open("w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
