"""The folder of a run's checkpoints on disk: which are whole, and what is done with the others.

A checkpoint is whole if its files are those that its manifest lists. One without a manifest was
written by an older version: all that can be said of it is that its parts are there.
"""

import contextlib
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator

from inception_jax.errors import CheckpointError, WriteError
from inception_jax.storage import manifest

ARRAYS = ("model", "training")
ITEMS = (*ARRAYS, "progress")
_SHOWN = 3

Log = Callable[[str], None]


def say(line: str) -> None:
    """Prints a line for the user on stderr; stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints that are there, rising."""
    found = (child for child in directory.iterdir() if child.name.isdecimal() and child.is_dir())
    return sorted(int(child.name) for child in found)


def problem(folder: pathlib.Path) -> str:
    """Returns what is damaged of a checkpoint, or '' if nothing is known to be."""
    found = manifest.damage(folder)
    if found == [] and unmerged(folder):
        found = [
            "its arrays were not merged, as older versions left it in a folder with brackets in "
            "its path; the training's command, started again, does it"
        ]
    if found is None:
        parts = (folder / item for item in ITEMS)
        found = [f"{part.name} is missing" for part in parts if not _holds_files(part)]
    more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return ", ".join(found[:_SHOWN] + more)


def unmerged(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the items of a checkpoint whose arrays are there, but not in one database."""
    items = (folder / item for item in ARRAYS)
    return [
        item
        for item in items
        if any(item.glob("ocdbt.process_*")) and not (item / "manifest.ocdbt").exists()
    ]


def set_aside_damaged(directory: pathlib.Path, log: Log) -> None:
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
    there = steps(directory) if directory.is_dir() else []
    damaged = {step: text for step in there if (text := problem(directory / str(step)))}
    whole = [step for step in there if step not in damaged]
    if damaged and not whole:
        lines = "\n  ".join(f"{step}: {text}" for step, text in damaged.items())
        raise CheckpointError(
            f"{directory}: none of the checkpoints is whole; nothing was changed:\n  {lines}\n"
            "Put back a copy of one, or give another --workdir to start anew"
        )
    for step, text in damaged.items():
        folder = directory / str(step)
        aside = _unused(directory / f"{step}.damaged")
        folder.rename(aside)
        log(
            f"{folder}: this checkpoint is damaged: {text}. It is kept as {aside.name}; the newest "
            f"that is whole is of step {max(whole)}"
        )


@contextlib.contextmanager
def tolerated(go_on: bool, log: Log) -> Iterator[None]:
    """Lets a failure to write be no more than a line of text.

    Args:
      go_on: whether it may; if not, the error is raised.
      log: takes the line.
    """
    try:
        yield
    except WriteError as error:
        if not go_on:
            raise
        log(f"{error}\nTraining goes on, as config.checkpoint.on_write_error = 'continue' says")


def _holds_files(folder: pathlib.Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())


def _unused(path: pathlib.Path) -> pathlib.Path:
    """Returns a path, or the first of path-2, path-3, … that is not there yet."""
    others = (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))
    return next(each for each in itertools.chain([path], others) if not each.exists())
