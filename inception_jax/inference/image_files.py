"""The picture files that a user names: files, folders and the standard input, in a stable order."""

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from inception_jax.datasets.builders import folders
from inception_jax.datasets.sources.files import MOST_BYTES, FolderSource
from inception_jax.errors import DataError
from inception_jax.storage import paths

# The argument that stands for the standard input.
STDIN = "-"


class ImageFiles(NamedTuple):
    """What a user's arguments stand for.

    Attributes:
      files: paths to read, in order; `STDIN` may be among them.
      skipped: paths of the files below folders that are no pictures by their names.
    """

    files: list[str]
    skipped: list[str]


def find(arguments: Sequence[str]) -> ImageFiles:
    """Finds the files that arguments stand for, without reading any.

    The order is that of the arguments and, within a folder, of the files' paths, in which numbers
    count as numbers: 2.jpg comes before 10.jpg. Folders are walked; what systems leave behind and
    whatever begins with a dot is passed over, and a file whose name does not end as that of a
    picture format is left out. A file that is an argument itself is taken whatever its name.

    Args:
      arguments: paths of files and folders, and at most once `STDIN`.

    Raises:
      DataError: if a path leads nowhere, a folder cannot be read, or there is no file at all.
    """
    arguments = [path if path == STDIN else str(paths.local(path, path)) for path in arguments]
    if missing := [path for path in arguments if path != STDIN and not os.path.exists(path)]:
        raise DataError(
            f"{folders.quoted([folders.shown(path) for path in missing])}: no such file or folder. "
            "Nothing was read; correct the paths"
        )
    if arguments.count(STDIN) > 1:
        raise DataError(f"{STDIN!r}: must be given only once; standard input holds one image")
    found = ImageFiles([], [])
    for path in arguments:
        if path != STDIN and os.path.isdir(path):
            for file in _below(path):
                inner = os.path.join(path, file)
                taken = folders.named_as_picture(file) and not _is_special(inner)
                (found.files if taken else found.skipped).append(inner)
        else:
            found.files.append(path)
    if not found.files:
        more = f" Skipped: {folders.listed(found.skipped)}." if found.skipped else ""
        raise DataError(
            f"{folders.quoted(arguments)}: no file has an image extension (.jpg, .png, …).{more} "
            "To read a file whatever its name, give its path"
        )
    return found


def _below(folder: str) -> list[str]:
    """Returns the paths of the files below a folder, relative to it, in natural order."""
    path = pathlib.Path(folder)
    return sorted(FolderSource(path, hidden=folders.hidden).sizes, key=natural_key)


def _is_special(path: str) -> bool:
    """Whether a path is that of a device or a pipe, which may have no end; not a dead link's."""
    return os.path.exists(path) and not os.path.isfile(path)


def natural_key(path: str) -> list[tuple[list[tuple[int, int, str]], str]]:
    """Returns what to sort paths by, folder by folder, so that 2 comes before 10.

    Letters' case counts only between names that are otherwise equal.
    """
    return [(_parts(name), name) for name in path.split("/")]


def _parts(name: str) -> list[tuple[int, int, str]]:
    """Returns the texts and numbers that a name consists of; numbers come before texts."""
    parts = re.findall("[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def read(path: str) -> bytes:
    """Returns the content of a file, or of the standard input.

    Raises:
      DataError: if it cannot be read, or is far larger than any picture.
    """
    try:
        with contextlib.ExitStack() as stack:
            file = sys.stdin.buffer
            if path != STDIN:
                file = stack.enter_context(pathlib.Path(path).open("rb"))
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{display_name(path)}: cannot be read: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise DataError(f"{display_name(path)}: must not be larger than {MOST_BYTES:,} bytes")
    return data


def display_name(path: str) -> str:
    """Returns a path as text of one line."""
    return "standard input" if path == STDIN else folders.shown(path)
