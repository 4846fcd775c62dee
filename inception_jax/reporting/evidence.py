"""Extracts the numbers that a diagnosis is based on.

They come from evaluations, without mixing, augmentation, label smoothing or dropout: of validation
images, and of training images evaluated the same way (split train_eval,
`config.evaluation.train_eval_examples`). The training loss is that of the objective and says little
about the fit: with mixed and smoothed labels it stays high however good the network is. From
training itself only the accuracy is used, as a lower bound: the same images evaluated without
augmentation must score at least about as well.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config, auto_settings

# A row of metrics.jsonl.
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Numbers of a run, stored in diagnosis.json; NaN (null in JSON) if unknown.

    Attributes:
      steps, epochs: trained so far.
      planned_steps: duration according to the settings.
      recipe_epochs: duration in the experiment file, if the command line changed it.
      nonfinite_step: step of the first row with a non-finite loss.
      evaluations: number of evaluations with a finite loss.
      guessing_loss: loss of a uniform guess over K classes, ln K, nats.
      chance_loss: loss of a network that knows only the class frequencies, nats; from the
        validation labels, or `guessing_loss` if they are unknown.
      chance_top1: top-1 of that network, percent.
      loss, best_loss, worst_loss: last, lowest and highest validation loss, nats.
      top1: last validation accuracy, percent.
      noise: two standard errors of `top1` (binomial), at least one point.
      loss_half: validation loss at half of the steps so far, nats.
      train_loss, train_top1: last values of training images evaluated like validation images.
      train_noise: two standard errors of `train_top1`, at least one point.
      running_top1: recent accuracy reported by training, on augmented images, percent.
    """

    steps: int
    epochs: float
    planned_steps: int
    recipe_epochs: float
    nonfinite_step: float
    evaluations: int
    guessing_loss: float
    chance_loss: float
    chance_top1: float
    loss: float
    best_loss: float
    worst_loss: float
    top1: float
    noise: float
    loss_half: float
    train_loss: float
    train_top1: float
    train_noise: float
    running_top1: float

    @property
    def gap(self) -> float:
        """Top-1 on training images minus top-1 on validation images, points."""
        return self.train_top1 - self.top1


def gather(
    rows: Sequence[Row],
    config: Config,
    *,
    classes: int,
    train_examples: int,
    split: str = "",
    label_counts: Sequence[int] = (),
    recipe_settings: Mapping[str, Any] | None = None,
) -> Evidence:
    """Extracts the numbers of a run.

    Args:
      rows: rows of metrics.jsonl, at least one.
      config: the run's settings.
      classes: number of classes in the dataset.
      train_examples: size of the training split.
      split: split whose evaluations count as validation; '': the first one evaluated.
      label_counts: validation examples per class; empty: unknown.
      recipe_settings: the experiment file's values of settings that the command line changed.
    """
    timeline = configs.Timeline(config.train.batch_size, train_examples)
    split = split or first_eval_split(rows)
    train = [row for row in rows if row["split"] == "train"]
    train_eval = [row for row in rows if row["split"] == "train_eval"]
    # Non-finite evaluations carry no other information.
    validation = [row for row in rows if row["split"] == split and row.get("loss") is not None]
    nonfinite = [row["step"] for row in rows if "loss" in row and row["loss"] is None]
    loss, top1 = _column(validation, "loss"), _column(validation, "top1")
    # Training accuracy since the last evaluation but one: recent, and over enough images.
    begin = validation[-2]["step"] if len(validation) > 1 else rows[-1]["step"] / 2
    recent = [row for row in train if row["step"] > begin]
    steps = int(rows[-1]["step"])
    chance_loss, chance_top1 = _chance(classes, label_counts)
    return Evidence(
        steps=steps,
        epochs=float(rows[-1]["epoch"]),
        planned_steps=timeline.steps(config.train.duration),
        recipe_epochs=_recipe_epochs(timeline, config, recipe_settings or {}),
        nonfinite_step=nonfinite[0] if nonfinite else math.nan,
        evaluations=len(validation),
        guessing_loss=math.log(classes),
        chance_loss=chance_loss,
        chance_top1=chance_top1,
        loss=_last(loss),
        best_loss=float(loss.min()) if loss.size else math.nan,
        worst_loss=float(loss.max()) if loss.size else math.nan,
        top1=_last(top1),
        noise=_two_standard_errors(validation),
        loss_half=_interpolate(steps / 2, validation, loss),
        train_loss=_last(_column(train_eval, "loss")),
        train_top1=_last(_column(train_eval, "top1")),
        train_noise=_two_standard_errors(train_eval),
        running_top1=_mean(_column(recent, "top1")),
    )


def first_eval_split(rows: Sequence[Row]) -> str:
    """Returns the first evaluated split other than the training ones; '' before any evaluation."""
    return next((row["split"] for row in rows if not row["split"].startswith("train")), "")


def _chance(classes: int, label_counts: Sequence[int]) -> tuple[float, float]:
    """Returns loss (nats) and top-1 (percent) of a network that knows only class frequencies."""
    counts = np.array(label_counts, np.float64) if sum(label_counts) else np.ones(classes)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = -(frequencies * np.log(frequencies)).sum()
    return float(entropy) + 0.0, float(100 * frequencies.max())


def _recipe_epochs(
    timeline: configs.Timeline, config: Config, recipe_settings: Mapping[str, Any]
) -> float:
    """Returns the duration in the experiment file, epochs; NaN if the run did not change it."""
    if "train.duration" not in recipe_settings:
        return math.nan
    length = recipe_settings["train.duration"]
    if config.train.auto_size and not length:
        return auto_settings.epochs(config, timeline.train_examples, timeline.batch_size)
    return timeline.epochs(length) or math.nan


def _interpolate(step: float, rows: Sequence[Row], values: np.ndarray) -> float:
    """Returns the evaluations' value at a step, linearly interpolated; NaN for fewer than two."""
    if len(rows) < 2:
        return math.nan
    return float(np.interp(step, _column(rows, "step"), values))


def _two_standard_errors(rows: Sequence[Row]) -> float:
    """Returns two standard errors of the last top-1, in points, at least one."""
    top1, count = _last(_column(rows, "top1")), _last(_column(rows, "count"))
    # Laplace smoothing: one more right and one more wrong, since 4 of 4 right is not certainty.
    accuracy = (count * top1 / 100 + 1) / (count + 2)
    return max(1.0, 200 * math.sqrt(accuracy * (1 - accuracy) / count)) if count > 0 else math.nan


def _column(rows: Sequence[Row], key: str) -> np.ndarray:
    """Returns one value per row: float64 [len(rows)], NaN if missing or null."""
    values = [row.get(key) for row in rows]
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if values.size else math.nan


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan
