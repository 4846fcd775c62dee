"""The folder of a run, with the paths of all files that a run writes."""

import contextlib
import pathlib
from collections.abc import Callable

from inception_jax.storage import paths
from inception_jax.storage.mirror import Log, Mirror

CHECKPOINTS = "checkpoints"
LOCK_FILE = "run.lock"
CONFIG = "config.json"
_RESULT = "result.json"
# Checkpoints are read and written in their bucket, and so is the lock. The last one has prepared
# data, whose folder may be the run's, too.
_NOT_COPIED = (CHECKPOINTS, LOCK_FILE, "inception_jax")


class Workdir:
    """Paths of the files in the folder of a run; they need not exist.

    Of a run in a bucket, all files but the checkpoints are read and written in a temporary local
    folder, between `download` and `upload`. For a local run, these and the like do nothing.

    Args:
      location: the run's folder, local or in a bucket; the text of this object.

    Attributes:
      location: the folder as given.
      path: the local folder of the files below.
      config: JSON: settings, data set, environment, and the changes of later starts.
      checkpoints: folder of the checkpoints, each named by its step; in a bucket if the run is.
      metrics: JSON lines with a row of metrics each.
      tensorboard: folder of TensorBoard's event files.
      plots: folder of the plots, as PNG files.
      report: HTML report.
      predictions: NumPy archive with the latest evaluation's predictions for each example.
      diagnosis: JSON: diagnosis of the training from its evaluations.
      result: JSON: the last evaluation, with the speed and duration of the whole run.
    """

    def __init__(self, location: paths.Path) -> None:
        self.location = location
        self._mirror: Mirror | None = None
        if paths.is_local(location):
            self.path = location
        else:
            self._mirror = Mirror(location, exclude=_NOT_COPIED, last=(_RESULT,))
            self.path = self._mirror.path
        self.config = self.path / CONFIG
        self.checkpoints: paths.Path = location / CHECKPOINTS
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.plots = self.path / "plots"
        self.report = self.path / "report.html"
        self.predictions = self.path / "predictions.npz"
        self.diagnosis = self.path / "diagnosis.json"
        self.result = self.path / _RESULT

    def download(self, *files: pathlib.Path) -> None:
        """Reads the files of a run in a bucket.

        Args:
          files: the files to read, if they exist; none: all.

        Raises:
          BucketError: if they cannot be read.
        """
        if self._mirror:
            self._mirror.download([file.relative_to(self.path).as_posix() for file in files])

    def upload(self) -> None:
        """Writes new and changed files of a run to its bucket.

        Raises:
          BucketError: if a file cannot be written.
          RunError: if the lock of the block of `uploading` was lost.
        """
        if self._mirror:
            self._mirror.upload()

    def upload_soon(self) -> None:
        """Starts `upload` in the background; does nothing outside a block of `uploading`.

        Raises:
          RunError: if an earlier one found that the lock was lost.
        """
        if self._mirror:
            self._mirror.upload_soon()

    def uploading(
        self, check: Callable[[], None], log: Log
    ) -> contextlib.AbstractContextManager[None]:
        """Uploads files in the background during a block, and all at its end.

        Args:
          check: called before each attempt to upload; raises an error if another process may write.
          log: called with lines about failed uploads in the background.

        Raises:
          WriteError: if the last upload fails; the local files are then kept.
        """
        return self._mirror.uploading(check, log) if self._mirror else contextlib.nullcontext()

    def check_lock(self) -> None:
        """Checks before a write to the bucket that this process may write, as `upload` does."""
        if self._mirror:
            self._mirror.check_lock()

    def location_of(self, file: pathlib.Path) -> paths.Path:
        """Returns where a file of `path` is for the user: the same path, or one in the bucket."""
        return self.location / file.relative_to(self.path).as_posix()

    def __str__(self) -> str:
        return str(self.location)

    def __repr__(self) -> str:
        return f"Workdir({str(self)!r})"
