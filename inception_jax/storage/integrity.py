"""Detection of corrupt checkpoints by checksums; corrupt ones are renamed.

A checkpoint has a manifest with the size and SHA-256 (as `sha256sum` prints it) of each file.
Checking a 50 MB checkpoint takes about 0.05 s (docs/notes/reliability.md). For a checkpoint
without a manifest, written by an older version, only missing parts can be detected.
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
_MAX_LISTED = 3

Log = Callable[[str], None]


def write_manifest(folder: pathlib.Path, exclude: Collection[str] = ()) -> None:
    """Writes the manifest of a folder and flushes it to disk.

    Args:
      folder: a folder whose files no longer change.
      exclude: relative paths of files to omit.

    Raises:
      OSError: if a file cannot be read, or the manifest cannot be written.
    """
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST and name not in exclude:
            files[name] = _size_and_checksum(path)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: pathlib.Path) -> list[str] | None:
    """Checks the files of a folder against its manifest, ignoring files that it does not list.

    Returns:
      A description of each corrupt file, with the actual and expected state; empty: all files are
      intact; None: there is no manifest.
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
        return [f"{MANIFEST} is not a valid manifest"]


def _difference(path: pathlib.Path, expected: dict[str, Any]) -> str:
    """Returns how a file differs from its manifest entry; '' if it does not."""
    size, checksum = expected["size"], expected["sha256"]
    try:
        actual_size = path.stat().st_size
        if actual_size != size:
            return f"has {actual_size:,} bytes instead of {size:,}"
        if _size_and_checksum(path)["sha256"] != checksum:
            return "has changed (SHA-256 mismatch)"
        return ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _size_and_checksum(path: pathlib.Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"size": file.tell(), "sha256": digest.hexdigest()}


def list_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, ascending; [] if it does not exist."""
    children = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(each.name) for each in children if each.name.isdecimal() and each.is_dir())


def unmerged_items(checkpoint: pathlib.Path) -> list[pathlib.Path]:
    """Returns the items of a checkpoint whose arrays are not merged into one database."""
    items = (checkpoint / item for item in ARRAYS)
    return [
        item
        for item in items
        if any(item.glob("ocdbt.process_*")) and not (item / "manifest.ocdbt").exists()
    ]


def find_corruption(checkpoint: pathlib.Path) -> str:
    """Returns what is corrupt in a checkpoint; '' if nothing is known to be."""
    problems = verify(checkpoint)
    if problems == [] and unmerged_items(checkpoint):
        problems = [
            "its arrays are not merged, because an older version wrote it to a path with "
            "brackets; rerun the training command to merge them"
        ]
    if problems is None:
        parts = (checkpoint / item for item in ITEMS)
        problems = [f"{part.name} is missing" for part in parts if not _has_files(part)]
    more = [f"and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    return ", ".join(problems[:_MAX_LISTED] + more)


def _has_files(folder: pathlib.Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def quarantine_corrupt(directory: pathlib.Path, log: Log) -> None:
    """Renames the corrupt checkpoints of a folder, so that training can save their steps again.

    Orbax refuses to save a step that it lists, and overwrites the folder of one that it does not.
    And a corrupt checkpoint that counted among the most recent ones to keep would displace an
    intact one. Nothing is deleted.

    Args:
      directory: folder of the checkpoints; need not exist.
      log: called with a line about each corrupt checkpoint.

    Raises:
      CheckpointError: if no checkpoint is intact; then nothing is renamed.
    """
    steps = list_steps(directory)
    corrupt = {step: text for step in steps if (text := find_corruption(directory / str(step)))}
    intact = [step for step in steps if step not in corrupt]
    if corrupt and not intact:
        lines = "\n  ".join(f"{step}: {text}" for step, text in corrupt.items())
        raise CheckpointError(
            f"{directory}: no checkpoint is intact; nothing was changed:\n  {lines}\n"
            "Restore one from a backup, or use a new --workdir"
        )
    for step, text in corrupt.items():
        folder = directory / str(step)
        aside = _unused_path(directory / f"{step}.damaged")
        folder.rename(aside)
        log(
            f"{folder}: corrupt checkpoint: {text}. Renamed it to {aside.name}; the newest intact "
            f"checkpoint is of step {max(intact)}"
        )


def _unused_path(path: pathlib.Path) -> pathlib.Path:
    """Returns the first of path, path-2, path-3, … that does not exist."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())


@contextlib.contextmanager
def log_write_errors(continue_on_error: bool, log: Log) -> Iterator[None]:
    """Logs a `WriteError` raised in the block.

    Args:
      continue_on_error: log the error and continue; otherwise it is raised.
      log: called with the message.
    """
    try:
        yield
    except WriteError as error:
        if not continue_on_error:
            raise
        log(f"{error}\nTraining continues (config.checkpoint.on_write_error = 'continue')")
