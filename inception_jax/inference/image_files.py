"""Finds and reads image files: files, folders and standard input, in a stable order."""

import os
import re
import sys
from collections.abc import Sequence
from typing import NamedTuple

from inception_jax.datasets.builders import folders
from inception_jax.datasets.sources.files import MAX_BYTES, FolderSource
from inception_jax.errors import DataError, join_truncated
from inception_jax.storage import access, atomic, buckets, paths

# The argument for standard input.
STDIN = "-"


class ImageFiles(NamedTuple):
    """The image files found for a command's arguments.

    Attributes:
      files: paths to read, in order, possibly with `STDIN`.
      skipped: paths of files in folders that have no image extension.
    """

    files: list[str]
    skipped: list[str]


def find(arguments: Sequence[str]) -> ImageFiles:
    """Finds the image files of a command's arguments, without reading any.

    Files are in the order of the arguments and, within a folder, in natural order: 2.jpg comes
    before 10.jpg. Folders are searched recursively, ignoring system files, names that start with a
    dot and local folders that this program wrote, and skipping files without an image extension. A
    file or folder given as an argument is always included.

    Args:
      arguments: paths of files and folders, local or in a bucket, and at most once `STDIN`.

    Raises:
      DataError: if a path does not exist, a folder cannot be read, or no file is found.
      BucketError: if a bucket cannot be read.
    """
    if "" in arguments:
        raise DataError("'': an empty path; no image was classified")
    places = {path: paths.user_path(path, path) for path in arguments if path != STDIN}
    below: dict[str, list[str] | None] = {STDIN: None}
    missing: list[str] = []
    for path, place in places.items():
        try:
            below[path] = _below(place)
        except FileNotFoundError:
            missing.append(str(place))
    if missing:
        raise DataError(
            f"{folders.quote_and_join([folders.escape_for_display(path) for path in missing])}: "
            "no such file or folder; no image was classified"
        )
    if arguments.count(STDIN) > 1:
        raise DataError(f"{STDIN!r}: must be given only once; standard input holds one image")
    images = ImageFiles([], [])
    for path in arguments:
        name, files = str(places.get(path, path)), below[path]
        if files is None:
            images.files.append(name)
            continue
        for file in files:
            inner = os.path.join(name, file)
            is_image = folders.has_image_extension(file) and not _is_special(inner)
            (images.files if is_image else images.skipped).append(inner)
    if not images.files:
        more = f" Skipped: {join_truncated(images.skipped)}." if images.skipped else ""
        raise DataError(
            f"{folders.quote_and_join(arguments)}: no file has an image extension (.jpg, .png, …), "
            f"hidden files and this program's output aside."
            f"{more} To read a file whatever its name, give its path"
        )
    return images


def _below(path: paths.Path) -> list[str] | None:
    """Returns the paths of the files below a folder, relative to it, in natural order.

    Returns:
      None if the path is a file.

    Raises:
      FileNotFoundError: if it does not exist.
    """
    if paths.is_local(path):
        if not os.path.exists(path):
            raise FileNotFoundError(path)
        if not path.is_dir():
            return None
        source = FolderSource(path, is_hidden=folders.is_hidden)
        # Heat maps of an earlier command, plots of runs.
        outputs = tuple(
            file.removesuffix(atomic.MARKER)
            for file in source.hidden
            if file.endswith(f"/{atomic.MARKER}")
        )
        found = [file for file in source.sizes if not file.startswith(outputs)]
    else:
        if access.is_file(path):
            return None
        objects = buckets.list_files(path)
        if not objects:
            raise FileNotFoundError(path)
        # Some programs create empty objects for folders.
        found = [name for name in objects if not name.endswith("/") and not folders.is_hidden(name)]
    return sorted(found, key=natural_key)


def _is_special(path: str) -> bool:
    """Returns whether a path is a device or pipe, which may be endless; false for dead links."""
    return os.path.exists(path) and not os.path.isfile(path)


def natural_key(path: str) -> list[tuple[list[tuple[int, int, str]], str]]:
    """Returns a key that sorts paths folder by folder, in natural order.

    Case matters only between names that are otherwise equal.

    >>> sorted(["10.jpg", "2.jpg", "b/1.jpg", "A/1.jpg"], key=natural_key)
    ['2.jpg', '10.jpg', 'A/1.jpg', 'b/1.jpg']
    """
    return [(_parts(name), name) for name in path.split("/")]


def _parts(name: str) -> list[tuple[int, int, str]]:
    """Returns the numbers and texts that make up a name; numbers sort before texts."""
    parts = re.findall("[0-9]+|[^0-9]+", name.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def read(path: str) -> bytes:
    """Returns the content of a file, or of standard input.

    Raises:
      DataError: if it cannot be read, or is far larger than any image.
      BucketError: if its bucket cannot be read.
    """
    try:
        if path == STDIN:
            if sys.stdin is None:
                raise DataError("standard input: is closed, so no image can be read from it")
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            data = access.read_bytes(paths.from_text(path), MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"{display_name(path)}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise DataError(f"{display_name(path)}: must not be larger than {MAX_BYTES:,} bytes")
    return data


def display_name(path: str) -> str:
    """Returns a path as a single line for messages."""
    return "standard input" if path == STDIN else folders.escape_for_display(path)
