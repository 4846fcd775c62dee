"""Damage to checkpoints on disk: found by checksums, named, and set aside.

A checkpoint has a manifest, which lists for each of its files the size and the SHA-256, as
`sha256sum` gives it. Reading a checkpoint of 50 MB for it takes some 0.05 s
(docs/notes/reliability.md). Of one without a manifest, which an older version wrote, all that can
be told is whether its parts are there.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from inception_jax.errors import CheckpointError, WriteError

MANIFEST = "manifest.json"
FORMAT = 1
ARRAYS = ("model", "training")
ITEMS = (*ARRAYS, "progress")
_SHOWN = 3

Log = Callable[[str], None]


def write_manifest(folder: pathlib.Path, leave_out: Collection[str] = ()) -> None:
    """Writes the manifest of a folder, and sees it safely on disk.

    Args:
      folder: whose files nobody changes any more.
      leave_out: paths below it of files that are not listed.

    Raises:
      OSError: if a file cannot be read, or the manifest not be written.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and name not in leave_out:
            files[name] = _size_and_checksum(path)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: pathlib.Path) -> list[str] | None:
    """Returns what is wrong with the files of a folder, by the manifest in it.

    Files that the manifest does not list are of no interest.

    Returns:
      For each damaged file, its path with what was found and what is right; empty: all is whole;
      None: there is no manifest, so nothing is known.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())["files"]
        return [
            f"{name} {difference}"
            for name, expected in listed.items()
            if (difference := _difference(folder / name, expected))
        ]
    except FileNotFoundError:
        return None
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror})"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is not a manifest"]


def _difference(path: pathlib.Path, expected: dict[str, Any]) -> str:
    """Returns how a file differs from what is known of it; '' if it does not."""
    size, checksum = expected["size"], expected["sha256"]
    try:
        found = path.stat().st_size
        if found != size:
            return f"has {found:,} bytes instead of {size:,}"
        if _size_and_checksum(path)["sha256"] != checksum:
            return "has changed (its SHA-256 is another)"
        return ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _size_and_checksum(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, rising; none where it is missing."""
    children = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(each.name) for each in children if each.name.isdecimal() and each.is_dir())


def unmerged(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """Returns the items of a checkpoint whose arrays are there, but not in one database."""
    items = (checkpoint / item for item in ARRAYS)
    return [
        item
        for item in items
        if any(item.glob("ocdbt.process_*")) and not (item / "manifest.ocdbt").exists()
    ]


def find_corruption(checkpoint: pathlib.Path) -> str:
    """Returns what is damaged of a checkpoint, or '' if nothing is known to be."""
    found = verify(checkpoint)
    if found == [] and unmerged(checkpoint):
        found = [
            "its arrays were not merged, as older versions left it in a folder with brackets in "
            "its path; the training's command, started again, does it"
        ]
    if found is None:
        parts = (checkpoint / item for item in ITEMS)
        found = [f"{part.name} is missing" for part in parts if not _holds_files(part)]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ", ".join(found[:_SHOWN] + more)


def _holds_files(folder: pathlib.Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def quarantine_corrupt(directory: pathlib.Path, log: Log) -> None:
    """Renames the damaged checkpoints of a folder, so that training can save their steps again.

    Orbax refuses to save a step that it lists, and replaces the folder of one that it does not. And
    a damaged one that counted among the last that are kept would drive out a whole one. Nothing
    is deleted.

    Args:
      directory: of the checkpoints; it need not exist.
      log: takes one line of text about each.

    Raises:
      CheckpointError: if none is whole; then nothing is renamed.
    """
    there = steps(directory)
    damaged = {step: text for step in there if (text := find_corruption(directory / str(step)))}
    whole = [step for step in there if step not in damaged]
    if damaged and not whole:
        lines = "\n  ".join(f"{step}: {text}" for step, text in damaged.items())
        raise CheckpointError(
            f"{directory}: none of the checkpoints is intact; nothing was changed:\n  {lines}\n"
            "Restore one from a backup, or use a new --workdir"
        )
    for step, text in damaged.items():
        folder = directory / str(step)
        aside = _unused(directory / f"{step}.damaged")
        folder.rename(aside)
        log(
            f"{folder}: this checkpoint is damaged: {text}. It is kept as {aside.name}; the newest "
            f"intact one is of step {max(whole)}"
        )


def _unused(path: pathlib.Path) -> pathlib.Path:
    """Returns a path, or the first of path-2, path-3, … that is not there yet."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())


@contextlib.contextmanager
def log_write_errors(go_on: bool, log: Log) -> Iterator[None]:
    """Makes a line of text of a failure to write.

    Args:
      go_on: whether that is enough; if not, the error is raised.
      log: takes the line.
    """
    try:
        yield
    except WriteError as error:
        if not go_on:
            raise
        log(f"{error}\nTraining goes on, as config.checkpoint.on_write_error = 'continue' says")
