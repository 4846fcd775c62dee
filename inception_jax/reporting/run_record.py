"""Reads the workdir of a run for a report.

Only metrics.jsonl is required: a workdir may have been copied in part, or written by an older
version. Missing data is None or empty, and the report omits it.
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
from inception_jax.evaluation.predictions import SavedEvaluation
from inception_jax.reporting import evidence
from inception_jax.reporting.diagnosis import Diagnosis, diagnose
from inception_jax.reporting.evidence import Row
from inception_jax.storage import paths
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import drop_trivial_top5, read_metrics

# Relative tolerance for the loss of one checkpoint evaluated twice on the same examples.
_LOSS_TOLERANCE = 0.01
# Names that older versions gave to metrics of the evaluation "flip", in another one's row.
_FLIP_METRICS = {"flip_loss": "loss", "flip_top1": "top1", "flip_top5": "top5"}


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """Everything that a workdir contains about its run.

    Attributes:
      workdir: the workdir.
      rows: rows of metrics.jsonl, at least one.
      config: the settings; None without config.json.
      experiment: the experiment's file ("file") and its values of overridden settings ("own");
        None if not recorded.
      changes: settings changed when the run was resumed, each with step, date and settings.
      dataset: config.json's description of the dataset.
      result: the newest evaluation, as in result.json; empty before the first one.
      environment: versions and hardware; empty if not recorded.
      evaluated: per-example predictions of that evaluation; None if it stored none.
      finished: whether the run has reached its planned duration.
    """

    workdir: Workdir
    rows: Sequence[Row]
    config: Config | None
    experiment: Mapping[str, Any] | None
    changes: Sequence[Mapping[str, Any]]
    dataset: Mapping[str, Any]
    result: Mapping[str, Any]
    environment: Mapping[str, Any]
    evaluated: SavedEvaluation | None
    finished: bool

    @property
    def name(self) -> str:
        """The experiment's name; the workdir's name if unknown."""
        if self.config is not None:
            return self.config.name
        return self.result.get("name") or paths.absolute(self.workdir.location).name

    @property
    def split(self) -> str:
        """The split that the run's result is for; '' before the first evaluation."""
        return self.result.get("split") or evidence.first_eval_split(self.rows)

    @property
    def evaluations(self) -> list[Row]:
        """The rows of evaluations on `split`, in order."""
        return [row for row in self.rows if row["split"] == self.split]

    def role(self, step: int) -> str:
        """Returns "best", "last", "best and last", or "" for the evaluation at a step."""
        rows = [row for row in self.evaluations if row.get("top1") is not None]
        if not rows:
            return ""
        # The last of equally good ones, as for checkpoints.
        best = max(rows, key=lambda row: (row["top1"], row["step"]))
        roles = {"best": best["step"], "last": rows[-1]["step"]}
        return " and ".join(name for name, each in roles.items() if each == step)

    def class_name(self, label: int) -> str:
        """Returns the name of a class; its number if names were not recorded."""
        names = self.dataset.get("class names", ())
        return names[label] if label < len(names) else str(label)

    @property
    def num_classes(self) -> int:
        """The number of classes; inferred from the predictions if not recorded."""
        if "classes" in self.dataset or self.evaluated is None:
            return self.dataset.get("classes", 0)
        predicted = self.evaluated.predictions
        return int(max(predicted.labels.max(), predicted.top_classes.max())) + 1

    @property
    def label_counts(self) -> list[int]:
        """The number of evaluated examples of each class; empty if unknown."""
        if self.evaluated is None:
            return []
        return np.bincount(self.evaluated.predictions.labels).tolist()

    @functools.cached_property
    def confusion(self) -> np.ndarray | None:
        """The confusion matrix, int64 [K, K], true by predicted class; None if unknown."""
        if self.evaluated is None:
            return None
        predicted = self.evaluated.predictions
        return calibration.confusion(
            predicted.labels, predicted.top_classes[:, 0], self.num_classes
        )

    @functools.cached_property
    def diagnosis(self) -> Diagnosis | None:
        """The diagnosis of the evaluations; None without config.json."""
        if self.config is None:
            return None
        stats = evidence.gather(
            self.rows,
            self.config,
            classes=self.dataset["classes"],
            train_examples=self.dataset["training examples"],
            split=self.split,
            label_counts=self.label_counts,
            recipe_settings=(self.experiment or {}).get("own"),
        )
        return diagnose(stats, self.config)


def read(workdir: Workdir) -> RunRecord:
    """Reads the workdir of a run; one in a bucket must be downloaded.

    Raises:
      UserError: if it contains no metrics, or one of its files cannot be read.
    """
    try:
        recorded = configs.read_record(workdir.config, workdir.location_of(workdir.config))
    except FileNotFoundError:
        recorded = None
    config = recorded.config if recorded else None
    dataset = recorded.dataset if recorded else {}
    rows = _read_rows(workdir, dataset.get("classes"))
    evaluated = predictions.read(workdir)
    if evaluated and not _has_row_of(rows, evaluated.result):
        evaluated = None
    result = _newest_result(
        rows, [_read_result(workdir.result), evaluated.result if evaluated else {}]
    )
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


def _read_rows(workdir: Workdir, classes: int | None) -> list[Row]:
    """Returns the rows of a metrics.jsonl, at least one, with each evaluation in a separate row.

    Omits top-5 for five classes or fewer, which older versions wrote.

    Raises:
      UserError: if the file is empty or cannot be read.
    """
    path = workdir.location_of(workdir.metrics)
    try:
        lines = read_metrics(workdir.metrics, path)
    except FileNotFoundError as error:
        raise UserError(
            f"{workdir}: not a run with metrics ({path.name} not found); use the folder of a "
            "run that has started"
        ) from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if not lines:
        raise UserError(
            f"{path}: contains no metrics yet; wait for the run's first report (config.log.every)"
        )
    rows: list[Row] = []
    for line in lines:
        row = line if classes is None else drop_trivial_top5(line, classes)
        flipped = {_FLIP_METRICS[name]: row[name] for name in row if name in _FLIP_METRICS}
        rows.append({name: row[name] for name in row if name not in _FLIP_METRICS})
        if flipped:
            view = {n: row[n] for n in ("step", "epoch", "count") if n in row}
            rows.append({**view, "split": "flip", **flipped})
    return rows


def display_names(records: Sequence[RunRecord]) -> list[str]:
    """Returns a distinct name for each run: the shortest unique end of its path."""
    if len(records) == 1:
        return [records[0].name]
    directories = [paths.absolute(record.workdir.location) for record in records]
    for parts in range(1, max(len(directory.parts) for directory in directories) + 1):
        names = ["/".join(directory.parts[-parts:]) for directory in directories]
        if len(set(names)) == len(names):
            return names
    return [f"{directory.name} ({number})" for number, directory in enumerate(directories, start=1)]


def _read_result(path: pathlib.Path) -> dict[str, Any]:
    """Returns result.json; empty if it cannot be read, as the metrics contain nearly all of it."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) and {"step", "loss"} <= set(values) else {}


def _newest_result(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the result of the latest step: result.json is only written at the end of a run."""
    matching = [result for result in results if _has_row_of(rows, result)]
    return max(matching, key=lambda result: result["step"], default={})


def _has_row_of(rows: Sequence[Row], result: Mapping[str, Any]) -> bool:
    """Returns whether a result belongs to this run rather than to an earlier one in its workdir."""
    return any(
        all(row.get(key) == result.get(key) for key in ("step", "split"))
        # Evaluating a finished run again on another machine rounds differently.
        and math.isclose(_loss(row), _loss(result), rel_tol=_LOSS_TOLERANCE)
        for row in rows
    )


def _loss(values: Mapping[str, Any]) -> float:
    loss = values.get("loss")
    return math.nan if loss is None else loss
