"""The numbers of a run's curves that a diagnosis rests on.

Training metrics here are of the objective (smoothed and mixed targets, auxiliary heads, dropout,
augmentation), so the training loss is never compared with the validation loss: it is compared with
itself and with the loss of guessing. Guessing uniformly among K classes costs ln K whatever the
targets are. Training top-1 is what the network reaches in training: evaluated without augmentation
and dropout on the same images it would be higher, so it is a lower bound.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config

Line = Mapping[str, Any]

# Where the rate is above this share of its peak, a rise of top-1 is progress that more steps at
# this rate would continue. Below, top-1 rises because the rate falls, in any run.
HIGH_RATE = 0.3

# The part of that phase whose gain says whether top-1 had levelled off.
LAST_PART = 0.2

# Resized crops of less than this share of the image often miss what the label names.
SMALL_CROP = 0.5


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Numbers of a run; NaN (null in JSON) where its lines do not hold what is needed.

    Attributes:
      steps, epochs: trained so far.
      done: share of the planned steps.
      evaluations: how many.
      nonfinite_epoch: of the first line whose loss is not finite; NaN if none.
      train_loss: objective since the last but one evaluation, in units of guessing.
      train_loss_fall: objective of the first line minus `train_loss`, in the same unit.
      train_loss_noise: standard deviation of a line's objective around its course, the same unit:
        from the median distance of a line from the middle of its neighbours; 0 with fewer than
        three lines.
      train_loss_spike: largest rise of the objective above its earlier minimum, the same unit.
      train_loss_excess: how far `train_loss` is above the least line, the same unit.
      second_half: share of the objective's fall that the second half of the training contributed,
        where halves are of the sum of the learning rate over steps; NaN where the size of the
        training images changed meanwhile, with which the loss falls whatever the rate.
      gradient_norm: of the last line over that of the first.
      train_top1: percent, since the last but one evaluation.
      train_is_bound: whether that may be far below what the network reaches on plain images.
      validation_loss: the least, in units of guessing.
      validation_loss_rise: the last minus the least, the same unit.
      validation_top1: the last, percent.
      validation_drop: the best validation top-1 minus the last, points.
      noise: two standard errors of the validation top-1 (binomial), at least one point.
      gap: train_top1 − validation_top1, points.
      error_share: training error over validation error: the share of the error that the network
        makes on the images it trains on.
      late_gain: rise of validation top-1 in the last fifth of the time at a high rate, points; NaN
        where the size of the training images changed meanwhile.
    """

    steps: int
    epochs: float
    done: float
    evaluations: int
    nonfinite_epoch: float
    train_loss: float
    train_loss_fall: float
    train_loss_noise: float
    train_loss_spike: float
    train_loss_excess: float
    second_half: float
    gradient_norm: float
    train_top1: float
    train_is_bound: bool
    validation_loss: float
    validation_loss_rise: float
    validation_top1: float
    validation_drop: float
    noise: float
    gap: float
    error_share: float
    late_gain: float


def gather(lines: Sequence[Line], config: Config, *, classes: int, train_examples: int) -> Evidence:
    """Returns the numbers of a run.

    Args:
      lines: of its metrics.jsonl, at least one.
      config: its settings.
      classes: how many the data set has.
      train_examples: size of the training split.
    """
    train = [line for line in lines if line["split"] == "train"]
    validation = [line for line in lines if line["split"] not in ("train", "train_eval")]
    sample = [line for line in lines if line["split"] == "train_eval"]
    timeline = configs.Timeline(config.train.batch_size, train_examples)
    broken = [line["epoch"] for line in lines if "loss" in line and line["loss"] is None]
    objective, ended = _objective(train, validation, config, classes)
    top1 = _column(validation, "top1")
    train_top1 = _last(_column(sample, "top1")) if sample else _mean(_column(ended, "top1"))
    # Of what was not finite nothing more can be said than that.
    loss = _column(validation, "loss") / math.log(classes)
    loss = loss[np.isfinite(loss)]
    return Evidence(
        steps=int(lines[-1]["step"]),
        epochs=float(lines[-1]["epoch"]),
        done=lines[-1]["step"] / timeline.steps(config.train.length),
        evaluations=len(validation),
        nonfinite_epoch=broken[0] if broken else math.nan,
        **objective,
        second_half=_second_half(train, config.train.image_size_epochs),
        gradient_norm=_growth(_column(train, "gradient_norm")),
        train_top1=train_top1,
        train_is_bound=not sample and hides_training_accuracy(config),
        validation_loss=float(loss.min()) if loss.size else math.nan,
        validation_loss_rise=float(loss[-1] - loss.min()) if loss.size else math.nan,
        validation_top1=_last(top1),
        validation_drop=float(np.nanmax(top1) - top1[-1]) if np.isfinite(top1).any() else math.nan,
        noise=_noise(_last(top1), _last(_column(validation, "count"))),
        gap=train_top1 - _last(top1),
        error_share=(100 - train_top1) / max(100 - _last(top1), 1e-9),
        late_gain=_late_gain(train, validation, config.train.image_size_epochs),
    )


def hides_training_accuracy(config: Config) -> bool:
    """Whether training images are so changed that training top-1 says little about plain ones."""
    augment = config.augment
    return bool(
        ((augment.mixup or augment.cutmix) and augment.mix_probability)
        or augment.cutout
        or augment.policy != "none"
        or (augment.crop in ("resized", "inception") and augment.area_min < SMALL_CROP)
        or config.model.dropout > 0.5
    )


def _objective(
    train: Sequence[Line], validation: Sequence[Line], config: Config, classes: int
) -> tuple[dict[str, float], list[Line]]:
    """Returns what `Evidence` says of the training loss, and the lines its last value is from."""
    heads = 2 if config.model.aux_heads else 0
    guessing = math.log(classes) * (1 + heads * config.train.aux_weight)
    begin = validation[-2]["step"] if len(validation) > 1 else 0
    ended = [line for line in train if line["step"] > begin] or list(train[-1:])
    loss = _column(train, "loss") / guessing
    finite = loss[np.isfinite(loss)]
    last = _mean(_column(ended, "loss")) / guessing
    nothing = not finite.size
    return {
        "train_loss": last,
        "train_loss_fall": math.nan if nothing else float(finite[0]) - last,
        "train_loss_noise": _scatter(finite),
        "train_loss_spike": math.nan
        if nothing
        else float(np.max(finite - np.minimum.accumulate(finite))),
        "train_loss_excess": math.nan if nothing else last - float(finite.min()),
    }, ended


def _scatter(values: np.ndarray) -> float:
    """Returns the standard deviation of values around a smooth course; jumps do not count."""
    if len(values) < 3:
        return 0.0
    # 1.4826 median(|x|) is the deviation of a normal x; a second difference has √(1 + 4 + 1) of it.
    return float(1.4826 / math.sqrt(6) * np.median(np.abs(np.diff(values, 2))))


def _second_half(train: Sequence[Line], size_changes: Sequence[float]) -> float:
    loss, rate, step = (_column(train, key) for key in ("loss", "learning_rate", "step"))
    usable = np.isfinite(loss) & np.isfinite(rate)
    if usable.sum() < 4 or loss[usable][0] <= loss[usable][-1]:
        return math.nan
    if any(change < train[-1]["epoch"] for change in size_changes):
        return math.nan
    loss, done = loss[usable], np.cumsum((rate * np.diff(step, prepend=0))[usable])
    middle = np.interp(done[-1] / 2, done, loss)
    return float((middle - loss[-1]) / (loss[0] - loss[-1]))


def _late_gain(
    train: Sequence[Line], validation: Sequence[Line], size_changes: Sequence[float]
) -> float:
    rate, epoch = _column(train, "learning_rate"), _column(train, "epoch")
    top1, at = _column(validation, "top1"), _column(validation, "epoch")
    if len(at) < 2 or not np.isfinite(rate).any():
        return math.nan
    end = epoch[rate >= HIGH_RATE * np.nanmax(rate)][-1]
    start = (1 - LAST_PART) * end
    # Between evaluations top-1 is interpolated: a run may have few of them.
    before, after = np.interp([start, end], at, top1)
    first = at[at <= start].max(initial=0.0)
    last = at[at >= end].min(initial=epoch[-1])
    if any(first <= change <= last for change in size_changes):
        # Top-1 rises with the size of the training images, whatever the rate.
        return math.nan
    return float(after - before)


def _noise(top1: float, count: float) -> float:
    p = top1 / 100
    return max(1.0, 200 * math.sqrt(p * (1 - p) / count)) if count > 0 else math.nan


def _growth(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values[-1] / values[0]) if values.size and values[0] > 0 else math.nan


def _column(lines: Sequence[Line], key: str) -> np.ndarray:
    """Returns one number of each line: float64 [len(lines)], NaN where it is missing or null."""
    values = [line.get(key) for line in lines]
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _last(values: np.ndarray) -> float:
    return float(values[-1]) if values.size else math.nan


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan
