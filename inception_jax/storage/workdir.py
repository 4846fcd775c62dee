"""The folder of a run, and the name of everything that a run leaves in it."""

import pathlib


class Workdir:
    """Names what lies in a run's folder; nothing of it need be there.

    Attributes:
      path: the folder.
      config: JSON: the settings, the data set, the environment, what later starts changed.
      checkpoints: the folder of the checkpoints, each named by its step.
      metrics: JSON lines: a row of metrics each.
      tensorboard: the folder of TensorBoard's event files.
      plots: the folder of the plots, PNG files.
      report: the page for a browser.
      predictions: NumPy archive: what the newest evaluation said of each example.
      diagnosis: JSON: what the evaluations mean.
      result: JSON: the last evaluation, with the speed and time of the whole run.
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
