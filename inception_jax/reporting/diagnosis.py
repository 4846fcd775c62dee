"""Diagnoses a run from its evaluations: did it learn, was it long enough, does it fit?

`diagnose` is a pure function of a run's numbers and its configuration. It applies the rules below
in order; the first match gives the verdict. Each threshold is defined with its reason. Splitting
the error into the part that remains on training images (bias) and the part that new images add
(variance) follows Ng 2018, "Machine Learning Yearning", chapters 20 to 25.

Curves show that something is wrong more reliably than what it is. Advice therefore concerns at most
one setting, whose change is likely to help and unlikely to harm (benchmarks/diagnosis_cases.py
follows the advice on runs with known faults); cases that cannot be judged are reported as such.
Advice never contradicts earlier advice, whatever the workdir: each setting moves in one direction
only, or from both sides toward the same usual value and no further.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from inception_jax import config as configs
from inception_jax.config import Config, reference
from inception_jax.reporting.evidence import Evidence

# Fewer updates show only the warm-up, and BatchNorm statistics have barely settled.
MIN_STEPS = 50

# A run was cut short if the experiment's recipe is longer by at least this factor.
CUT_SHORT_FACTOR = 2.0

# If evaluated training images score lower by this many points than augmented ones do in training,
# the statistics or weights used in evaluation do not match those of training.
EVAL_MISMATCH_POINTS = 10.0

# BatchNorm statistics settle after this many time constants of 1 / (1 - momentum) steps.
SETTLING_TIME_CONSTANTS = 20

# Hardly anything was learned if the loss is above this fraction of the chance loss and at most this
# fraction of the possible gain in accuracy was reached.
LEARNED_LOSS_RATIO = 0.8
LEARNED_TOP1_FRACTION = 0.25

# An untrained network has about the loss of a uniform guess. Unsettled statistics gave twice that,
# a learning rate that was too high gave fourteen times and more.
UNSTABLE_LOSS_RATIO = 5.0

# Ratio of the error on training images to the validation error. Above 0.8, the network does not fit
# its training images; below 0.5, more than half of the error is due to new images.
UNDERFITTING_RATIO = 0.8
OVERFITTING_RATIO = 0.5

# A smaller gap, in points, is normal in a healthy run and not worth closing.
MIN_GAP = 5.0

# Below this error, percent, neither bias nor variance is worth a verdict.
SMALL_ERROR = 5.0

# A validation loss is improving if it fell by this fraction of the chance loss in the second half.
IMPROVING_RATIO = 0.02

# Number of training images to evaluate, for runs that evaluated none.
TRAIN_EVAL_EXAMPLES = 1000

DIVERGED = "diverged"
TOO_SHORT = "too short to judge"
EVAL_MISMATCH = "evaluation differs from training"
HARDLY_LEARNED = "hardly learned"
OVERFITTING = "overfitting"
UNDERFITTING = "underfitting"
NO_FAULT = "no fault found"
NOT_MEASURED = "not measured"


@dataclasses.dataclass(frozen=True)
class Advice:
    """A single setting to change, in a new workdir: a finished run has no steps left to resume.

    Attributes:
      setting: dotted path in the configuration.
      before: value in the run.
      value: recommended value.
      reason: expected effect.
    """

    setting: str
    before: Any
    value: Any
    reason: str

    @property
    def change(self) -> str:
        """Returns the flag that makes the change, and the current value."""
        now = self.before if self.before != "" else "unset"
        return f"{reference.flag(self.setting, self.value)} (now {now})"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """The diagnosis of a run.

    Attributes:
      verdict: one of the constants of this module.
      reason: the figures and thresholds behind the verdict.
      advice: what to try next; None: no advice.
      notes: additional information.
      evidence: the numbers used.
    """

    verdict: str
    reason: str
    advice: Advice | None
    notes: tuple[str, ...]
    evidence: Evidence

    def lines(self) -> list[str]:
        """Returns the diagnosis as lines of text."""
        lines = [f"diagnosis: {self.verdict}: {self.reason}"]
        lines += [f"  note: {note}" for note in self.notes]
        if self.advice:
            lines.append(f"  try, in a new workdir: {self.advice.change}: {self.advice.reason}")
        return lines


# A setting, its new value, and the reason.
_Change = tuple[str, Any, str]


@dataclasses.dataclass(frozen=True)
class _Finding:
    """The result of a rule; the change is None if there is no advice."""

    verdict: str
    reason: str
    change: _Change | None = None
    notes: tuple[str, ...] = ()


def diagnose(stats: Evidence, config: Config) -> Diagnosis:
    """Diagnoses a run.

    Args:
      stats: the run's numbers, from `evidence.gather`.
      config: the run's settings.
    """
    finding = next(result for rule in _RULES if (result := rule(stats, config)))
    advice = None
    if finding.change:
        setting, value, reason = finding.change
        advice = Advice(setting, configs.get(config, setting), value, reason)
    return Diagnosis(finding.verdict, finding.reason, advice, finding.notes, stats)


def _diverged(stats: Evidence, config: Config) -> _Finding | None:
    if math.isnan(stats.nonfinite_step):
        return None
    return _Finding(
        DIVERGED,
        f"the loss or a gradient was not finite at step {stats.nonfinite_step:,.0f}",
        _lower_learning_rate(config),
    )


def _one_class(stats: Evidence, config: Config) -> _Finding | None:
    if stats.chance_loss > 0:
        return None
    return _Finding(
        NOT_MEASURED, "all validation images belong to one class, so accuracy is meaningless"
    )


def _unfinished(stats: Evidence, config: Config) -> _Finding | None:
    if stats.steps >= stats.planned_steps:
        return None
    return _Finding(
        TOO_SHORT,
        f"{stats.steps:,} of {stats.planned_steps:,} steps are done, and accuracy may rise "
        "until the last one; rerun the same command to resume",
        notes=(f"so far, {_mismatch_figures(stats)}",) if _has_eval_mismatch(stats) else (),
    )


def _few_steps(stats: Evidence, config: Config) -> _Finding | None:
    if stats.steps >= MIN_STEPS and stats.evaluations:
        return None
    what = f"{stats.steps:,} steps in total" if stats.evaluations else "no evaluation"
    return _Finding(
        TOO_SHORT,
        f"{what}; a diagnosis needs at least {MIN_STEPS} steps and one evaluation",
        _train_longer(stats, config),
    )


def _eval_mismatch(stats: Evidence, config: Config) -> _Finding | None:
    if not _has_eval_mismatch(stats):
        return None
    return _Finding(
        EVAL_MISMATCH,
        f"{_mismatch_figures(stats)}: the averages used in evaluation (BatchNorm statistics or the "
        "EMA of the weights) do not match the trained weights",
        _follow_recent_steps(stats, config),
        (f"validation top-1 ({stats.top1:.1f}%) says nothing about the fit until this is fixed",),
    )


def _unstable(stats: Evidence, config: Config) -> _Finding | None:
    if not (
        _has_barely_learned(stats) and stats.worst_loss > UNSTABLE_LOSS_RATIO * stats.guessing_loss
    ):
        return None
    return _Finding(
        HARDLY_LEARNED,
        f"{_best_figures(stats)}; the loss rose to {stats.worst_loss:.3f} (more than "
        f"{UNSTABLE_LOSS_RATIO:g} × the loss of a uniform guess): the learning rate is probably "
        "too high",
        _lower_learning_rate(config),
    )


def _cut_short(stats: Evidence, config: Config) -> _Finding | None:
    if not stats.recipe_epochs >= CUT_SHORT_FACTOR * stats.epochs:
        return None
    return _Finding(
        TOO_SHORT,
        f"trained for {stats.epochs:.4g} of the {stats.recipe_epochs:g} epochs in the experiment's "
        f"recipe; validation top-1 reached {stats.top1:.1f}%",
        _train_longer(stats, config),
    )


def _hardly_learned(stats: Evidence, config: Config) -> _Finding | None:
    if not _has_barely_learned(stats):
        return None
    if change := _less_regularization(config):
        setting = change[0]
        return _Finding(
            HARDLY_LEARNED,
            f"{_best_figures(stats)}; {setting}={configs.get(config, setting):g} may be too strong",
            change,
        )
    return _Finding(
        HARDLY_LEARNED,
        f"{_best_figures(stats)}; the learning rate may be far too low, or the labels may not "
        "match the images",
        notes=("run tools.find_lr to measure which learning rates work, if any",),
    )


def _overfitting(stats: Evidence, config: Config) -> _Finding | None:
    small = 100 - stats.top1 <= SMALL_ERROR or not stats.gap > max(MIN_GAP, stats.noise)
    if small or 100 - stats.train_top1 >= OVERFITTING_RATIO * (100 - stats.top1):
        return None
    numbers = (
        f"top-1 is {stats.train_top1:.1f}% on training images and {stats.top1:.1f}% on validation "
        f"images, a gap of {stats.gap:.1f} points (noise {stats.noise:.1f})"
    )
    if _near_chance(stats):
        return _Finding(
            OVERFITTING,
            f"{numbers}: the network memorized the training images and does little better than "
            "chance on others; the labels may not match the images",
        )
    return _Finding(
        OVERFITTING,
        numbers,
        _more_regularization(config),
        ("more training images would help most",),
    )


def _fit(stats: Evidence, config: Config) -> _Finding:
    error, train_error = 100 - stats.top1, 100 - stats.train_top1
    if error <= SMALL_ERROR:
        return _Finding(
            NO_FAULT, f"the validation error is {error:.1f}% (at most {SMALL_ERROR:g}%)"
        )
    if math.isnan(train_error):
        return _Finding(
            NOT_MEASURED,
            f"validation top-1 is {stats.top1:.1f}%, and recent training reports gave "
            f"{stats.running_top1:.1f}% on augmented images. Overfitting, underfitting and wrong "
            "statistics cannot be told apart unless training images are evaluated as well",
            (
                "evaluation.train_eval_examples",
                TRAIN_EVAL_EXAMPLES,
                "also evaluates this many training images",
            ),
        )
    errors = (
        f"the error is {train_error:.1f}% on training images and {error:.1f}% on validation images"
    )
    if train_error < UNDERFITTING_RATIO * error:
        return _Finding(NO_FAULT, f"{errors}; bias and variance contribute about equally")
    if stats.loss_half - stats.loss <= IMPROVING_RATIO * stats.chance_loss:
        return _Finding(
            UNDERFITTING,
            f"{errors}; the validation loss barely fell in the second half of training, from "
            f"{stats.loss_half:.3f} to {stats.loss:.3f}",
            _fit_more_closely(config),
        )
    falling = "may still have been falling (there is only one evaluation)"
    if not math.isnan(stats.loss_half):
        half, last = f"{stats.loss_half:.3f}", f"{stats.loss:.3f}"
        falling = f"was still falling, from {half} at the halfway point to {last}"
    return _Finding(
        UNDERFITTING, f"{errors}; the validation loss {falling}", _train_longer(stats, config)
    )


_RULES: tuple[Callable[[Evidence, Config], _Finding | None], ...] = (
    _diverged,
    _one_class,
    _unfinished,
    _eval_mismatch,
    _few_steps,
    _unstable,
    _cut_short,
    _hardly_learned,
    _overfitting,
    _fit,
)


def _has_eval_mismatch(stats: Evidence) -> bool:
    """Returns whether training images score lower in evaluation than in training."""
    return stats.running_top1 - stats.train_top1 > max(EVAL_MISMATCH_POINTS, stats.train_noise)


def _mismatch_figures(stats: Evidence) -> str:
    return (
        f"recent training reports gave {stats.running_top1:.1f}% top-1, but training images "
        f"evaluated like validation images get {stats.train_top1:.1f}% (threshold: "
        f"{max(EVAL_MISMATCH_POINTS, stats.train_noise):.1f} points)"
    )


def _near_chance(stats: Evidence) -> bool:
    """Returns whether validation results are barely better than class frequencies give."""
    return stats.best_loss > LEARNED_LOSS_RATIO * stats.chance_loss and stats.top1 <= _learned_top1(
        stats
    )


def _learned_top1(stats: Evidence) -> float:
    """Returns the highest top-1, percent, at which hardly anything was learned."""
    return stats.chance_top1 + max(stats.noise, LEARNED_TOP1_FRACTION * (100 - stats.chance_top1))


def _has_barely_learned(stats: Evidence) -> bool:
    """Returns whether neither validation nor training images show any learning."""
    if math.isnan(stats.train_loss):
        # The accuracy reported by training is a lower bound.
        return _near_chance(stats) and stats.running_top1 <= _learned_top1(stats)
    return _near_chance(stats) and stats.train_loss > LEARNED_LOSS_RATIO * stats.chance_loss


def _best_figures(stats: Evidence) -> str:
    return (
        f"the lowest validation loss is {stats.best_loss:.3f} (chance: {stats.chance_loss:.3f}), "
        f"and validation top-1 is {stats.top1:.1f}% (chance: {stats.chance_top1:.1f}%)"
    )


def _lower_learning_rate(config: Config) -> _Change:
    rate = config.schedule.learning_rate
    return (
        "schedule.learning_rate",
        _two_digits(rate / 10),
        "a tenth of it; run tools.find_lr to measure which learning rates work",
    )


def _train_longer(stats: Evidence, config: Config) -> _Change:
    """Returns twice the duration, or that of the experiment's recipe."""
    length = configs.parse_duration(config.train.duration)
    assert length is not None, "a run has a duration"
    factor, reason = 2.0, "twice as long"
    if stats.recipe_epochs > stats.epochs:
        factor = stats.recipe_epochs / stats.epochs
        reason = "the duration in the experiment's recipe"
        if length.unit == "epochs":
            # The trained epochs are rounded up to whole steps.
            return "train.duration", str(configs.Duration(stats.recipe_epochs, "epochs")), reason
    longer = length.amount * factor
    amount = longer if length.unit == "epochs" else round(longer)
    return "train.duration", str(configs.Duration(amount, length.unit)), reason


def _follow_recent_steps(stats: Evidence, config: Config) -> _Change | None:
    """Returns the change that makes the averages used in evaluation follow recent steps."""
    momentum = config.model.norm_momentum
    if momentum > 0.9:
        return "model.norm_momentum", 0.9, "BatchNorm statistics then follow the most recent steps"
    if stats.steps < SETTLING_TIME_CONSTANTS / (1 - momentum):
        return _train_longer(stats, config)
    if configs.parse_duration(config.train.ema):
        return "train.ema", "", "evaluates the weights themselves instead of their average"
    return None


def _more_regularization(config: Config) -> _Change | None:
    if not (config.augment.cutmix or config.augment.mixup):
        return "augment.mixup", 0.2, "mixes images, so that none can be memorized"
    if config.model.dropout < 0.5:
        return "model.dropout", 0.5, "drops features before the last layer"
    if not config.train.label_smoothing:
        return (
            "train.label_smoothing",
            0.1,
            "makes predictions less confident, which usually lowers the loss",
        )
    return None


def _less_regularization(config: Config) -> _Change | None:
    """Returns the usual value of a regularizer that is far stronger than usual, if any."""
    if config.model.dropout > 0.5:
        return "model.dropout", 0.5, "more than 0.5 rarely helps"
    if config.train.label_smoothing > 0.2:
        return "train.label_smoothing", 0.1, "the usual value"
    if config.augment.mixup > 0.4:
        return "augment.mixup", 0.2, "the usual value"
    # The decoupled weight decay of adamw and muon is usually larger.
    if config.optimizer.weight_decay > 5e-3 and config.optimizer.name.startswith("sgd"):
        return "optimizer.weight_decay", 5e-4, "the usual value"
    return None


def _fit_more_closely(config: Config) -> _Change:
    """Returns the change that lets a network fit its training images more closely."""
    width = _two_digits(1.5 * config.model.width)
    return _less_regularization(config) or ("model.width", width, "2.25 × the multiply-adds")


def _two_digits(value: float) -> float:
    """Returns a value rounded to two significant digits."""
    return float(f"{value:.2g}")
