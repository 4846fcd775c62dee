"""The folder of a run, with the paths of all files that a run writes."""

import pathlib

from inception_jax.storage import paths
from inception_jax.storage.mirror import Log, Mirror

CHECKPOINTS = "checkpoints"
LOCK_FILE = "run.lock"


class Workdir:
    """Paths of the files in the folder of a run; they need not exist.

    Of a run in a bucket, all files but the checkpoints are read and written in a temporary local
    folder, between `download` and `upload`. For a local run these two do nothing.

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
            self._mirror = Mirror(location, exclude=(CHECKPOINTS, LOCK_FILE))
            self.path = self._mirror.path
        self.config = self.path / "config.json"
        self.checkpoints: paths.Path = location / CHECKPOINTS
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.plots = self.path / "plots"
        self.report = self.path / "report.html"
        self.predictions = self.path / "predictions.npz"
        self.diagnosis = self.path / "diagnosis.json"
        self.result = self.path / "result.json"

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
        """
        if self._mirror:
            self._mirror.upload()

    def upload_soon(self, log: Log) -> None:
        """Starts `upload` in the background; if that fails, only logs it."""
        if self._mirror:
            self._mirror.upload_soon(log)

    def __str__(self) -> str:
        return str(self.location)

    def __repr__(self) -> str:
        return f"Workdir({str(self)!r})"
