"""What the package knows of Orbax beyond its documentation, and of it alone.

Every name it calls is public. Not written down anywhere is:

- `AsyncOptions.post_finalization_callback` runs when all items of a checkpoint are written and
  merged, before its folder gets its name. The manifest is written there.
- Of the files below the folder, only `STEP_METADATA` changes after that: Orbax adds the time of the
  commit. A restore does not read it.
- `ocp.utils.tmp_checkpoints` lists the folders of unfinished checkpoints.

Whoever raises a pin to a version that is not in `TESTED_WITH` runs test_checkpoints.py and
test_faults.py, and then adds it here.
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
    """Returns a post-finalization callback: does something to a checkpoint that has no name yet.

    Args:
      directory: of all checkpoints; one is written at a time.
      action: takes the folder. What it raises is the save's error, and the folder stays unnamed.
    """
    return functools.partial(_apply_to_unfinished, directory, action)


def _apply_to_unfinished(directory: pathlib.Path, action: Callable[[pathlib.Path], None]) -> None:
    # Others are there if a process of several was killed in the midst of a save: the newest is it.
    unfinished = [pathlib.Path(each.get()) for each in ocp.utils.tmp_checkpoints(directory)]
    action(max(unfinished, key=lambda folder: folder.stat().st_mtime_ns))
