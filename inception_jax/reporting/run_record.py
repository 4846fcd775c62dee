"""What the folder of a run says about it, read for a report.

Nothing but metrics.jsonl is needed, for a folder may have been copied in part, or written by an
older version; what is missing is None or empty, and left out of the report.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Evaluated
from inception_jax.reporting import plots
from inception_jax.reporting.diagnosis import Diagnosis, diagnose
from inception_jax.reporting.plots import Line
from inception_jax.training import workdir
from inception_jax.training.workdir import Workdir

# Losses of the same checkpoint on the same examples differ by less.
_SAME_LOSS = 0.01


@dataclasses.dataclass(frozen=True, eq=False)
class Record:
    """A run, as its folder says it.

    Attributes:
      folder: where it is.
      lines: of metrics.jsonl, at least one.
      config: the settings; None without config.json.
      experiment: the file they are from, and its own values of what was overridden; None where it
        was not recorded.
      changes: what later starts changed, each with step, date and settings.
      dataset: what config.json says of the data.
      result: of the newest evaluation, as in result.json; empty before the first.
      environment: versions and hardware; empty where they were not recorded.
      evaluated: what that left of each example; None where it left nothing.
      finished: whether the run has reached the length that its settings give it.
    """

    folder: pathlib.Path
    lines: Sequence[Line]
    config: Config | None
    experiment: Mapping[str, Any] | None
    changes: Sequence[Mapping[str, Any]]
    dataset: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]
    evaluated: Evaluated | None
    finished: bool

    @property
    def name(self) -> str:
        """What the experiment is called; the folder's name where that is not known."""
        if self.config is not None:
            return self.config.name
        return self.result.get("name") or self.folder.resolve().name

    @property
    def evaluations(self) -> list[Line]:
        """The lines of the evaluations, in order."""
        return [line for line in self.lines if not line["split"].startswith("train")]

    def role(self, step: int) -> str:
        """Returns which evaluation a step's is: "best", "last", "best and last", or "": neither."""
        found = [line for line in self.evaluations if line.get("top1") is not None]
        if not found:
            return ""
        # Of equally good ones the last, as for the checkpoints.
        best = max(found, key=lambda line: (line["top1"], line["step"]))
        roles = {"best": best["step"], "last": found[-1]["step"]}
        return " and ".join(name for name, each in roles.items() if each == step)

    def class_name(self, label: int) -> str:
        """Returns the name of a class; its number where the names were not recorded."""
        names = self.dataset.get("class names", ())
        return names[label] if label < len(names) else str(label)

    @property
    def classes(self) -> int:
        """How many classes the data have; those that occur, where that was not recorded."""
        if "classes" in self.dataset or self.evaluated is None:
            return self.dataset.get("classes", 0)
        found = self.evaluated.predictions
        return int(max(found.labels.max(), found.guesses.max())) + 1

    @property
    def label_counts(self) -> list[int]:
        """How many evaluated examples each class has; empty where that is not known."""
        if self.evaluated is None:
            return []
        return np.bincount(self.evaluated.predictions.labels).tolist()

    def diagnosis(self) -> Diagnosis | None:
        """Returns what the evaluations say; None without the settings, which that takes."""
        if self.config is None:
            return None
        return diagnose(
            self.lines,
            self.config,
            classes=self.dataset["classes"],
            train_examples=self.dataset["training examples"],
            label_counts=self.label_counts,
            own_settings=(self.experiment or {}).get("own"),
        )


def read(folder: pathlib.Path) -> Record:
    """Returns what a run's folder says.

    Raises:
      UserError: if it has no metrics, or one of its files cannot be read.
    """
    lines = plots.read_metrics(folder / "metrics.jsonl")
    recorded = workdir.recorded(Workdir(folder))
    config = recorded.config if recorded else None
    dataset = recorded.dataset if recorded else {}
    evaluated = predictions.read(folder)
    if evaluated and not _is_of(lines, evaluated.result):
        evaluated = None
    result = _newest(lines, [_result(folder), evaluated.result if evaluated else {}])
    finished = bool(result)
    if config is not None and "training examples" in dataset:
        timeline = configs.Timeline(config.train.batch_size, dataset["training examples"])
        finished = lines[-1]["step"] >= timeline.steps(config.train.length)
    return Record(
        folder=folder,
        lines=lines,
        config=config,
        experiment=recorded.experiment if recorded else None,
        changes=recorded.changes if recorded else (),
        dataset=dataset,
        result=result,
        environment=result.get("environment") or (recorded.environment if recorded else {}),
        evaluated=evaluated,
        finished=finished,
    )


def names(records: Sequence[Record]) -> list[str]:
    """Returns a name for each run by which it can be told from the others."""
    if len(records) == 1:
        return [records[0].name]
    folders = [record.folder.resolve() for record in records]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        found = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(found)) == len(found):
            return found
    return [f"{folder.name} ({number})" for number, folder in enumerate(folders, start=1)]


def _result(folder: pathlib.Path) -> dict[str, Any]:
    """Returns result.json; empty if there is none that can be read: the metrics say nearly all."""
    try:
        values = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and {"step", "loss"} <= set(values) else {}


def _newest(lines: Sequence[Line], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of the last step: result.json is only written at a run's end."""
    found = [result for result in results if _is_of(lines, result)]
    return max(found, key=lambda result: result["step"], default={})


def _is_of(lines: Sequence[Line], result: Mapping[str, Any]) -> bool:
    """Whether a result is of this run: an earlier one in the same folder may have left it."""
    return any(
        all(line.get(key) == result.get(key) for key in ("step", "split"))
        # A finished run that is evaluated once more, on another machine, rounds otherwise.
        and math.isclose(
            line.get("loss") or math.nan, result.get("loss") or math.nan, rel_tol=_SAME_LOSS
        )
        for line in lines
    )
