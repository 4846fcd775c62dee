"""The folder of a run, with the paths of all files that a run writes."""

import pathlib


class Workdir:
    """Paths of the files in the folder of a run; they need not exist.

    Attributes:
      path: the folder.
      config: JSON: settings, data set, environment, and the changes of later starts.
      checkpoints: folder of the checkpoints, each named by its step.
      metrics: JSON lines with a row of metrics each.
      tensorboard: folder of TensorBoard's event files.
      plots: folder of the plots, as PNG files.
      report: HTML report.
      predictions: NumPy archive with the latest evaluation's predictions for each example.
      diagnosis: JSON: diagnosis of the training from its evaluations.
      result: JSON: the last evaluation, with the speed and duration of the whole run.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.config = path / "config.json"
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.plots = path / "plots"
        self.report = path / "report.html"
        self.predictions = path / "predictions.npz"
        self.diagnosis = path / "diagnosis.json"
        self.result = path / "result.json"

    def __repr__(self) -> str:
        return f"Workdir({str(self.path)!r})"
