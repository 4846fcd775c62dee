"""The package's exceptions: errors that users can fix, and failures of a run.

A message names the thing, the value found, what is allowed and the remedy. `cli.run` prints a
`UserError` as one message with exit code 2 and a `RunError` as one message with exit code 1; any
other exception is a bug and keeps its traceback. `Preempted` is not a failure: its exit code tells
a scheduler to rerun the command.
"""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator, Sequence

# sysexits.h: "temporary failure; the user is invited to retry". Distinct from 143 and 130, the exit
# codes of programs killed by SIGTERM and SIGINT.
EXIT_PREEMPTED = os.EX_TEMPFAIL


class UserError(Exception):
    """An error that the user can fix: a setting, a file, a missing device. Exit code 2."""


class ConfigError(UserError):
    """A setting is unknown, has the wrong type, is out of range, or contradicts another."""


class DataError(UserError):
    """A data source is missing, incomplete, corrupt or not of the expected kind."""


class CheckpointError(UserError):
    """A checkpoint is missing, or belongs to another model or data set."""


class WriteError(UserError):
    """A run's file cannot be written: the disk is full, or the folder is read-only or missing."""


class RunError(Exception):
    """A run failed through no error of the user, e.g. with a non-finite loss. Exit code 1."""


class Preempted(Exception):
    """Training was interrupted and a checkpoint saved. Exit code 75, `EXIT_PREEMPTED`."""


_PHASE = "phase: "


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Notes the phase on an exception raised in the `with` block, unless it has one already."""
    try:
        yield
    except Exception as error:
        if not phase_of(error):
            error.add_note(f"{_PHASE}{phase}")
        raise


def phase_of(error: BaseException) -> str:
    """Returns the phase that `during` noted on an exception, or ''."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_PHASE)]
    return notes[0].removeprefix(_PHASE) if notes else ""


def join_truncated(texts: Sequence[str], limit: int = 10, separator: str = ", ") -> str:
    """Joins up to `limit` texts and appends the number of the others.

    >>> join_truncated(["a", "b", "c"], limit=2)
    'a, b and 1 more'
    """
    more = len(texts) - limit
    on_a_line = f"{separator}…" if "\n" in separator else ""
    return separator.join(texts[:limit]) + (f"{on_a_line} and {more:,} more" if more > 0 else "")


def nearest(name: str, allowed: Iterable[str], prefix: str = "") -> str:
    """Returns ' Did you mean X?' for the allowed name closest to `name`, or '' if none is close.

    Args:
      name: the unknown name.
      allowed: the allowed names.
      prefix: put before the suggested name.
    """
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {prefix}{matches[0]}?" if matches else ""
