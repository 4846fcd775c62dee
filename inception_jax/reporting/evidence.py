"""The numbers of a run that a diagnosis rests on.

All are of evaluations, in which images are neither mixed nor augmented, labels not smoothed and no
features dropped: of the validation images, and of training images seen the same way (split
train_eval, `config.evaluation.train_eval_examples`). The loss that training reports is of its
objective, which says little about a fit: with mixed and smoothed labels it stays high however good
the network is. Of training itself only its accuracy is used, as a lower bound: the same images
evaluated plainly must come out at least about as well.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config, auto_settings

# Of metrics.jsonl.
Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Numbers of a run; NaN (null in JSON) where its files do not hold what is needed.

    Attributes:
      steps, epochs: trained so far.
      planned_steps: what the settings plan.
      recipe_epochs: what the experiment's file plans, where the command line changed that.
      nonfinite_step: of the first row whose loss is not finite.
      evaluations: how many with a finite loss.
      guessing_loss: of a network that knows nothing and says the same of each class: ln K, nats.
      chance_loss: of a network that knows only how frequent each class is, nats; from the
        validation labels, or `guessing_loss` where these are not known.
      chance_top1: of that network, percent.
      loss, best_loss, worst_loss: the last, least and greatest validation loss, nats.
      top1: the last validation accuracy, percent.
      noise: two standard errors of `top1` (binomial), at least one point.
      loss_half: validation loss when half of the steps so far were done, nats.
      top1_half: validation accuracy then, percent.
      train_loss, train_top1: of training images evaluated like validation images, the last.
      train_noise: two standard errors of `train_top1`, at least one point.
      running_top1: accuracy that training reported lately, on augmented images, percent.
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
    top1_half: float
    train_loss: float
    train_top1: float
    train_noise: float
    running_top1: float

    @property
    def gap(self) -> float:
        """Accuracy on training images minus that on validation images, points."""
        return self.train_top1 - self.top1


def gather(
    rows: Sequence[Row],
    config: Config,
    *,
    classes: int,
    train_examples: int,
    split: str = "",
    label_counts: Sequence[int] = (),
    own_settings: Mapping[str, Any] | None = None,
) -> Evidence:
    """Returns the numbers of a run.

    Args:
      rows: of its metrics.jsonl, at least one.
      config: its settings.
      classes: how many the data set has.
      train_examples: size of the training split.
      split: whose evaluations count as validation; '': that of the first.
      label_counts: how many validation examples each class has; empty: not known.
      own_settings: the experiment file's values of settings that the command line changed.
    """
    timeline = configs.Timeline(config.train.batch_size, train_examples)
    split = split or first_evaluated(rows)
    train = [row for row in rows if row["split"] == "train"]
    sample = [row for row in rows if row["split"] == "train_eval"]
    # Of what is not finite nothing more can be said than that.
    validation = [row for row in rows if row["split"] == split and row.get("loss") is not None]
    broken = [row["step"] for row in rows if "loss" in row and row["loss"] is None]
    loss, top1 = _column(validation, "loss"), _column(validation, "top1")
    # Training accuracy since the evaluation before the last: the newest that is not of few images.
    begin = validation[-2]["step"] if len(validation) > 1 else rows[-1]["step"] / 2
    lately = [row for row in train if row["step"] > begin]
    steps = int(rows[-1]["step"])
    chance_loss, chance_top1 = _chance(classes, label_counts)
    return Evidence(
        steps=steps,
        epochs=float(rows[-1]["epoch"]),
        planned_steps=timeline.steps(config.train.duration),
        recipe_epochs=_recipe_epochs(timeline, config, own_settings or {}),
        nonfinite_step=broken[0] if broken else math.nan,
        evaluations=len(validation),
        guessing_loss=math.log(classes),
        chance_loss=chance_loss,
        chance_top1=chance_top1,
        loss=_last(loss),
        best_loss=float(loss.min()) if loss.size else math.nan,
        worst_loss=float(loss.max()) if loss.size else math.nan,
        top1=_last(top1),
        noise=_noise(validation),
        loss_half=_at(steps / 2, validation, loss),
        top1_half=_at(steps / 2, validation, top1),
        train_loss=_last(_column(sample, "loss")),
        train_top1=_last(_column(sample, "top1")),
        train_noise=_noise(sample),
        running_top1=_mean(_column(lately, "top1")),
    )


def first_evaluated(rows: Sequence[Row]) -> str:
    """Returns the first split that was evaluated and not trained on; '' if there is none yet."""
    return next((row["split"] for row in rows if not row["split"].startswith("train")), "")


def _chance(classes: int, label_counts: Sequence[int]) -> tuple[float, float]:
    """Returns loss (nats) and top-1 (percent) of knowing only how frequent the classes are."""
    counts = np.array(label_counts, np.float64) if sum(label_counts) else np.ones(classes)
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum()) + 0.0, float(100 * share.max())


def _recipe_epochs(
    timeline: configs.Timeline, config: Config, own_settings: Mapping[str, Any]
) -> float:
    """Returns the epochs that the experiment's file plans; NaN where the run has that length."""
    if "train.duration" not in own_settings:
        return math.nan
    length = own_settings["train.duration"]
    if config.train.auto_size and not length:
        return auto_settings.epochs(config, timeline.train_examples, timeline.batch_size)
    return timeline.epochs(length) or math.nan


def _at(step: float, rows: Sequence[Row], values: np.ndarray) -> float:
    """Returns what the evaluations' values were at a step, between two of them interpolated."""
    if len(rows) < 2:
        return math.nan
    return float(np.interp(step, _column(rows, "step"), values))


def _noise(rows: Sequence[Row]) -> float:
    """Returns two standard errors of the last top-1, points; one point at least."""
    top1, count = _last(_column(rows, "top1")), _last(_column(rows, "count"))
    # One more right and one more wrong (Laplace): 4 of 4 right is no certainty.
    share = (count * top1 / 100 + 1) / (count + 2)
    return max(1.0, 200 * math.sqrt(share * (1 - share) / count)) if count > 0 else math.nan


def _column(rows: Sequence[Row], key: str) -> np.ndarray:
    """Returns one number of each row: float64 [len(rows)], NaN where it is missing or null."""
    values = [row.get(key) for row in rows]
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if values.size else math.nan


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan
