"""Behavior of Orbax that is not documented; the only module that relies on it.

Undocumented is:

- `AsyncOptions.post_finalization_callback` runs when all items of a checkpoint are written and
  merged, before its directory gets its final name or, in a bucket, its commit file. The manifest is
  written there.
- Of the files in the directory, only `STEP_METADATA` changes after that: Orbax adds the commit
  time. A restore does not read it.
- `ocp.utils.tmp_checkpoints` lists the directories of unfinished checkpoints.

Private is:

- `CheckpointManager._checkpoint_deleter` deletes old checkpoints after each save. In a bucket it
  deletes files in any order, so that a kill can leave a part that has the commit file.
- `tensorstore_utils` has the context of all reads and writes of arrays, with the number of retries.

To raise the pin to a version that is not in `TESTED_WITH`, run test_checkpoints.py,
test_bucket_checkpoints.py and test_faults.py, then add it here.
"""

import functools
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import orbax.checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils
from orbax.checkpoint.path import step as steps

if TYPE_CHECKING:
    from etils import epath

TESTED_WITH = {"orbax-checkpoint": ("0.12.8",)}

STEP_METADATA = "_CHECKPOINT_METADATA"


class BucketSteps(steps.NameFormat[steps.Metadata]):
    """Finds checkpoints in a bucket; Orbax's own format needs several requests for each.

    Also, that asks for the bucket's metadata, which takes a permission that writing objects does
    not.

    Args:
      list_steps: returns the steps of the checkpoints in a folder.
    """

    def __init__(self, list_steps: Callable[["epath.Path"], Sequence[int]]) -> None:
        self._list_steps = list_steps

    def build_name(self, step: int) -> str:
        """Returns the name of a checkpoint's folder."""
        return str(step)

    def find_all(self, base_path: Any) -> Iterator[steps.Metadata]:
        """Yields all checkpoints in a folder."""
        return (self.find_step(base_path, step) for step in self._list_steps(base_path))

    def find_step(self, base_path: Any, step: int) -> steps.Metadata:
        """Returns a checkpoint in a folder, without looking for it."""
        return steps.Metadata(step=step, path=base_path / self.build_name(step))


class _Deleter:
    def __init__(self, delete: Callable[[int], None]) -> None:
        self.delete = delete

    def delete_steps(self, steps: Sequence[int]) -> None:
        for step in steps:
            self.delete(step)

    def close(self) -> None:
        pass


def set_delete(manager: ocp.CheckpointManager, delete: Callable[[int], None]) -> None:
    """Replaces how a manager deletes old checkpoints: in the background, by their steps."""
    manager._checkpoint_deleter = _Deleter(delete)


def limit_retries(seconds: float) -> None:
    """Limits for how long this process repeats a failed request for arrays in a bucket.

    Also, a request without a byte from the server for a minute fails.
    """
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "60")
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    delays = [1.0]  # Seconds; TensorStore's own, without its random part.
    while sum(delays) + (following := min(2 * delays[-1], 32.0)) <= seconds:
        delays.append(following)
    retries = {"max_retries": len(delays), "initial_delay": "1s", "max_delay": "32s"}
    for context in (
        tensorstore_utils._BASE_TS_CONTEXT,
        tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT,
    ):
        context["gcs_request_retries"] = retries


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
    # A failed save leaves another one; the current one is the newest.
    action(max(_unfinished(directory), key=lambda folder: folder.stat().st_mtime_ns))


def delete_unfinished(directory: pathlib.Path) -> None:
    """Deletes what killed and failed saves left in a local directory of checkpoints.

    Orbax would do so in the background while the manager is already in use, and an error there,
    such as of a directory that is unmounted meanwhile, would fail every later save.
    """
    for folder in _unfinished(directory):
        shutil.rmtree(folder)


def _unfinished(directory: pathlib.Path) -> list[pathlib.Path]:
    return [pathlib.Path(each.get()) for each in ocp.utils.tmp_checkpoints(directory)]
