"""Behavior of Orbax that is not documented; the only module that relies on it.

All names used here are public. Undocumented is:

- `AsyncOptions.post_finalization_callback` runs when all items of a checkpoint are written and
  merged, before its directory gets its final name. The manifest is written there.
- Of the files in the directory, only `STEP_METADATA` changes after that: Orbax adds the commit
  time. A restore does not read it.
- `ocp.utils.tmp_checkpoints` lists the directories of unfinished checkpoints.

To raise the pin to a version that is not in `TESTED_WITH`, run test_checkpoints.py and
test_faults.py, then add it here.
"""

import functools
import pathlib
from collections.abc import Callable

import orbax.checkpoint as ocp

TESTED_WITH = {"orbax-checkpoint": ("0.12.8",)}

STEP_METADATA = "_CHECKPOINT_METADATA"


def before_commit(
    directory: pathlib.Path, action: Callable[[pathlib.Path], None]
) -> Callable[[], None]:
    """Returns a post-finalization callback that processes a checkpoint before it gets its name.

    Args:
      directory: directory of all checkpoints; one is written at a time.
      action: called with the checkpoint's directory. If it raises, the save fails with that error
        and the directory stays unnamed.
    """
    return functools.partial(_apply_to_unfinished, directory, action)


def _apply_to_unfinished(directory: pathlib.Path, action: Callable[[pathlib.Path], None]) -> None:
    # A process killed during a save leaves other ones; the current one is the newest.
    unfinished = [pathlib.Path(each.get()) for each in ocp.utils.tmp_checkpoints(directory)]
    action(max(unfinished, key=lambda folder: folder.stat().st_mtime_ns))
