"""The errors of the package: what a user can mend, and what stops a run.

Every message names the thing, the value found, what is allowed and the remedy. `cli.run` turns a
`UserError` into one message on stderr and exit code 2, a `RunError` into one message and exit code
1, and leaves everything else, a bug, its traceback. `Preempted` is no failure; its exit code tells
a scheduler to start the command again.
"""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator

# sysexits.h: "temporary failure; the user is invited to try again". Apart from 143 and 130, with
# which a program ends that a signal met unprepared.
EXIT_PREEMPTED = os.EX_TEMPFAIL


class UserError(Exception):
    """A mistake that the user can mend: a setting, a file, a missing device. Exit code 2."""


class ConfigError(UserError):
    """A setting is unknown, of the wrong type, out of its range, or contradicts another."""


class DataError(UserError):
    """A data source is missing, truncated, incomplete, corrupt or not what it should be."""


class CheckpointError(UserError):
    """A checkpoint is missing, or belongs to another model or data set."""


class WriteError(UserError):
    """A file of a run cannot be written: a full disk, a folder that is read-only or gone."""


class RunError(Exception):
    """A run had to stop through no mistake of the user's: a non-finite loss. Exit code 1."""


class Preempted(Exception):
    """Training was told to end, and has been saved. Exit code `EXIT_PREEMPTED`, 75."""


_PHASE = "phase: "


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Notes the phase in an error that leaves the `with` block; the first note stays."""
    try:
        yield
    except Exception as error:
        if not phase_of(error):
            error.add_note(f"{_PHASE}{phase}")
        raise


def phase_of(error: BaseException) -> str:
    """Returns what `during` noted, or ''."""
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith(_PHASE)]
    return notes[0].removeprefix(_PHASE) if notes else ""


def nearest(name: str, allowed: Iterable[str], prefix: str = "") -> str:
    """Returns ' Did you mean X?' for the allowed name closest to `name`, or '' if none is close.

    Args:
      name: what was given.
      allowed: the allowed names.
      prefix: put before the suggested name.
    """
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {prefix}{matches[0]}?" if matches else ""
