"""What the folder of a run says about it, read for a report.

Nothing but metrics.jsonl is needed, for a folder may have been copied in part, or written by an
older version; what is missing is None or empty, and left out of the report.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import UserError
from inception_jax.evaluation import calibration, predictions
from inception_jax.evaluation.predictions import Evaluated
from inception_jax.reporting import evidence
from inception_jax.reporting.diagnosis import Diagnosis, diagnose
from inception_jax.reporting.evidence import Row
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import informative, read_lines

# Losses of the same checkpoint on the same examples differ by less.
_SAME_LOSS = 0.01
# How older versions called the metrics of the evaluation "flip", in the row of another.
_FLIP = {"flip_loss": "loss", "flip_top1": "top1", "flip_top5": "top5"}


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """A run, as its folder says it.

    Attributes:
      workdir: where it is.
      rows: of metrics.jsonl, at least one.
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

    workdir: Workdir
    rows: Sequence[Row]
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
        return self.result.get("name") or self.workdir.path.resolve().name

    @property
    def split(self) -> str:
        """What the run's result is of; '' before the first evaluation."""
        return self.result.get("split") or evidence.first_evaluated(self.rows)

    @property
    def evaluations(self) -> list[Row]:
        """The rows of the evaluations that the run's result is the last of, in order."""
        return [row for row in self.rows if row["split"] == self.split]

    def role(self, step: int) -> str:
        """Returns which evaluation a step's is: "best", "last", "best and last", or "": neither."""
        found = [row for row in self.evaluations if row.get("top1") is not None]
        if not found:
            return ""
        # Of equally good ones the last, as for the checkpoints.
        best = max(found, key=lambda row: (row["top1"], row["step"]))
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

    @functools.cached_property
    def confusion(self) -> np.ndarray | None:
        """How often each class was taken for each: int64 [K, K]; None where that is not known."""
        if self.evaluated is None:
            return None
        found = self.evaluated.predictions
        return calibration.confusion(found.labels, found.guesses[:, 0], self.classes)

    @functools.cached_property
    def diagnosis(self) -> Diagnosis | None:
        """What the evaluations say; None without the settings, which that takes."""
        if self.config is None:
            return None
        stats = evidence.gather(
            self.rows,
            self.config,
            classes=self.dataset["classes"],
            train_examples=self.dataset["training examples"],
            split=self.split,
            label_counts=self.label_counts,
            own_settings=(self.experiment or {}).get("own"),
        )
        return diagnose(stats, self.config)


def read(path: pathlib.Path) -> RunRecord:
    """Returns what a run's folder says.

    Raises:
      UserError: if it has no metrics, or one of its files cannot be read.
    """
    workdir = Workdir(path)
    try:
        recorded = configs.read_record(workdir.config)
    except FileNotFoundError:
        recorded = None
    config = recorded.config if recorded else None
    dataset = recorded.dataset if recorded else {}
    rows = _rows(workdir.metrics, dataset.get("classes"))
    evaluated = predictions.read(path)
    if evaluated and not _is_of(rows, evaluated.result):
        evaluated = None
    result = _newest(rows, [_result(workdir.result), evaluated.result if evaluated else {}])
    finished = bool(result)
    if config is not None and "training examples" in dataset:
        timeline = configs.Timeline(config.train.batch_size, dataset["training examples"])
        finished = rows[-1]["step"] >= timeline.steps(config.train.duration)
    return RunRecord(
        workdir=workdir,
        rows=rows,
        config=config,
        experiment=recorded.experiment if recorded else None,
        changes=recorded.changes if recorded else (),
        dataset=dataset,
        result=result,
        environment=result.get("environment") or (recorded.environment if recorded else {}),
        evaluated=evaluated,
        finished=finished,
    )


def _rows(path: pathlib.Path, classes: int | None) -> list[Row]:
    """Returns the rows of a metrics.jsonl, at least one; each evaluation in its own.

    Without top-5 where there are no more than five classes: older runs wrote it.

    Raises:
      UserError: if there are none, or the file cannot be read.
    """
    try:
        lines = read_lines(path)
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}. Give the --workdir of a run that has started"
        ) from error
    if not lines:
        raise UserError(
            f"{path} has no metrics yet. Wait for the run's first report (config.log.every)"
        )
    rows: list[Row] = []
    for line in lines:
        row = line if classes is None else informative(line, classes)
        flipped = {_FLIP[name]: row[name] for name in row if name in _FLIP}
        rows.append({name: row[name] for name in row if name not in _FLIP})
        if flipped:
            view = {n: row[n] for n in ("step", "epoch", "count") if n in row}
            rows.append({**view, "split": "flip", **flipped})
    return rows


def names(records: Sequence[RunRecord]) -> list[str]:
    """Returns a name for each run by which it can be told from the others."""
    if len(records) == 1:
        return [records[0].name]
    folders = [record.workdir.path.resolve() for record in records]
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        found = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(found)) == len(found):
            return found
    return [f"{folder.name} ({number})" for number, folder in enumerate(folders, start=1)]


def _result(path: pathlib.Path) -> dict[str, Any]:
    """Returns result.json; empty if there is none that can be read: the metrics say nearly all."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and {"step", "loss"} <= set(values) else {}


def _newest(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of the last step: result.json is only written at a run's end."""
    found = [result for result in results if _is_of(rows, result)]
    return max(found, key=lambda result: result["step"], default={})


def _is_of(rows: Sequence[Row], result: Mapping[str, Any]) -> bool:
    """Whether a result is of this run: an earlier one in the same folder may have left it."""
    return any(
        all(row.get(key) == result.get(key) for key in ("step", "split"))
        # A finished run that is evaluated once more, on another machine, rounds otherwise.
        and math.isclose(
            row.get("loss") or math.nan, result.get("loss") or math.nan, rel_tol=_SAME_LOSS
        )
        for row in rows
    )
