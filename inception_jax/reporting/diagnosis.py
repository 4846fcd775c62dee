"""What a run's evaluations say: did it learn, was it long enough, does it fit?

`diagnose` is a pure function of a run's numbers and its configuration. It applies the rules below
in their order, and the first that holds gives the verdict; each has its threshold and reason beside
it. The split of the error into what is left on training images (bias) and what comes on top on new
ones (variance) is that of Ng 2018, "Machine Learning Yearning", chapters 20 to 25.

Curves show that something is wrong better than what. So there is advice on one setting at most,
where a trial is likely to help and unlikely to harm (benchmarks/diagnosis_cases.py follows it on
runs whose fault is known); what cannot be judged is said instead of guessed. No advice ever goes
against what was advised before, in whichever workdir: each setting is moved in one direction only,
or from both sides toward the same usual value, and no further.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from inception_jax import config as configs
from inception_jax.config import Config, reference
from inception_jax.reporting.evidence import Evidence

# Before that many updates one sees the warm-up, and BatchNorm's statistics have hardly settled.
LEAST_STEPS = 50

# A run was cut short where the experiment's own recipe is longer by this factor.
CUT_SHORT = 2.0

# Training images come out worse in an evaluation by this many points than in training, where they
# are augmented: the statistics or weights that evaluation uses are not those of training.
PARTED = 10.0

# BatchNorm's statistics have settled after that many times their time constant, 1 / (1 - momentum).
SETTLED = 20

# Next to nothing was learned: a loss above this share of the chance loss, and no more than this
# share of the accuracy that there is to gain.
HARDLY = 0.8
LITTLE = 0.25

# The loss of a network that knows nothing is about that of guessing. Twice that comes of statistics
# that have not settled; a rate that is too high gave fourteen times and more.
UNSTABLE = 5.0

# Of the validation error, the share that the network makes on its training images, too. More than
# 0.8: it does not fit what it has seen. Less than 0.5: more than half is due to new images.
BIAS = 0.8
VARIANCE = 0.5

# A gap of fewer points is usual where training is right, and of no use to close.
LEAST_GAP = 5.0

# With less error than that, percent, neither side of it is worth a verdict.
SMALL_ERROR = 5.0

# A validation loss that fell by this share of the chance loss in the second half was improving.
IMPROVING = 0.02

# How many training images to evaluate where that was not done.
SAMPLE = 1000

DIVERGED = "diverged"
TOO_SHORT = "too short to judge"
APART = "evaluation differs from training"
HARDLY_LEARNED = "hardly learned"
OVERFITTING = "overfitting"
UNDERFITTING = "underfitting"
NO_FAULT = "no fault found"
UNKNOWN = "not measured"


@dataclasses.dataclass(frozen=True)
class Advice:
    """A setting to change, alone, in a new workdir: a finished run has no steps left to resume.

    Attributes:
      setting: dotted path in the configuration.
      before: its value in the run.
      value: to give it.
      reason: what that would do.
    """

    setting: str
    before: Any
    value: Any
    reason: str


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a run's evaluations say.

    Attributes:
      verdict: one of the constants of this module.
      reason: with the numbers and the threshold.
      advice: what to try next; None: there is nothing to advise.
      notes: what else there is to know.
      evidence: the numbers.
    """

    verdict: str
    reason: str
    advice: Advice | None
    notes: tuple[str, ...]
    evidence: Evidence

    def lines(self) -> list[str]:
        """Returns it for a reader, a line each."""
        lines = [f"diagnosis: {self.verdict}: {self.reason}"]
        lines += [f"  note: {note}" for note in self.notes]
        if a := self.advice:
            now = a.before if a.before != "" else "unset"
            change = f"{reference.flag(a.setting, a.value)} (now {now})"
            lines.append(f"  try, in a new workdir: {change}: {a.reason}")
        return lines


# A setting, its new value, and the reason.
_Change = tuple[str, Any, str]


@dataclasses.dataclass(frozen=True)
class _Finding:
    """What a rule found; the change is None if there is nothing to advise."""

    verdict: str
    reason: str
    change: _Change | None = None
    notes: tuple[str, ...] = ()


def diagnose(stats: Evidence, config: Config) -> Diagnosis:
    """Returns what a run's evaluations say.

    Args:
      stats: the numbers of the run.
      config: its settings.
    """
    found = next(found for rule in _RULES if (found := rule(stats, config)))
    advice = None
    if found.change:
        setting, value, reason = found.change
        advice = Advice(setting, configs.get(config, setting), value, reason)
    return Diagnosis(found.verdict, found.reason, advice, found.notes, stats)


def _diverged(stats: Evidence, config: Config) -> _Finding | None:
    if math.isnan(stats.nonfinite_step):
        return None
    return _Finding(
        DIVERGED,
        f"loss or gradient was not finite at step {stats.nonfinite_step:,.0f}",
        _lower_rate(config),
    )


def _one_class(stats: Evidence, config: Config) -> _Finding | None:
    if stats.chance_loss > 0:
        return None
    return _Finding(UNKNOWN, "all validation images are of one class, so any network is right")


def _unfinished(stats: Evidence, config: Config) -> _Finding | None:
    if stats.steps >= stats.planned_steps:
        return None
    return _Finding(
        TOO_SHORT,
        f"{stats.steps:,} of {stats.planned_steps:,} steps are done, and accuracy may rise "
        "until the last: the same command resumes the run",
        notes=(f"so far, {_apart_numbers(stats)}",) if _is_apart(stats) else (),
    )


def _few_steps(stats: Evidence, config: Config) -> _Finding | None:
    if stats.steps >= LEAST_STEPS and stats.evaluations:
        return None
    what = f"{stats.steps:,} steps in all" if stats.evaluations else "no evaluation"
    return _Finding(
        TOO_SHORT, f"{what}; it takes {LEAST_STEPS} and an evaluation", _longer(stats, config)
    )


def _apart(stats: Evidence, config: Config) -> _Finding | None:
    if not _is_apart(stats):
        return None
    return _Finding(
        APART,
        f"{_apart_numbers(stats)}: the averages that evaluation uses, BatchNorm's statistics or "
        "those of the weights, are not what training arrived at",
        _closer_averages(stats, config),
        (f"validation top-1, {stats.top1:.1f}%, says nothing about the fit until that is fixed",),
    )


def _unstable(stats: Evidence, config: Config) -> _Finding | None:
    if not (_learned_little(stats) and stats.worst_loss > UNSTABLE * stats.guessing_loss):
        return None
    return _Finding(
        HARDLY_LEARNED,
        f"{_best_numbers(stats)}; the loss went up to {stats.worst_loss:.3f} (more than "
        f"{UNSTABLE:g} times that of guessing), as it does where the learning rate is too high",
        _lower_rate(config),
    )


def _cut_short(stats: Evidence, config: Config) -> _Finding | None:
    if not stats.recipe_epochs >= CUT_SHORT * stats.epochs:
        return None
    return _Finding(
        TOO_SHORT,
        f"{stats.epochs:.4g} epochs, of {stats.recipe_epochs:g} that the experiment's own recipe "
        f"has; validation top-1 reached {stats.top1:.1f}%",
        _longer(stats, config),
    )


def _hardly_learned(stats: Evidence, config: Config) -> _Finding | None:
    if not _learned_little(stats):
        return None
    if change := _less_regularization(config):
        setting = change[0]
        return _Finding(
            HARDLY_LEARNED,
            f"{_best_numbers(stats)}; {setting}={configs.get(config, setting):g} may be too strong",
            change,
        )
    return _Finding(
        HARDLY_LEARNED,
        f"{_best_numbers(stats)}; the learning rate may be far too low, or the labels may not "
        "match the images",
        notes=("tools.find_lr measures which learning rates work, if any",),
    )


def _overfitting(stats: Evidence, config: Config) -> _Finding | None:
    small = 100 - stats.top1 <= SMALL_ERROR or not stats.gap > max(LEAST_GAP, stats.noise)
    if small or 100 - stats.train_top1 >= VARIANCE * (100 - stats.top1):
        return None
    numbers = (
        f"top-1 is {stats.train_top1:.1f}% on training images and {stats.top1:.1f}% on validation "
        f"images, a gap of {stats.gap:.1f} points (noise {stats.noise:.1f})"
    )
    if _near_chance(stats):
        return _Finding(
            OVERFITTING,
            f"{numbers}: training images were learned by heart, and of others it knows little "
            "more than chance: the labels may not match the images",
        )
    return _Finding(
        OVERFITTING,
        numbers,
        _more_regularization(config),
        ("more training images help most",),
    )


def _fit(stats: Evidence, config: Config) -> _Finding:
    error, train_error = 100 - stats.top1, 100 - stats.train_top1
    if error <= SMALL_ERROR:
        return _Finding(
            NO_FAULT, f"the validation error is {error:.1f}% (at most {SMALL_ERROR:g}%)"
        )
    if math.isnan(train_error):
        return _Finding(
            UNKNOWN,
            f"validation top-1 is {stats.top1:.1f}%, and training lately reported "
            f"{stats.running_top1:.1f}% on augmented images. Unless training images are evaluated "
            "the way validation images are, overfitting, underfitting and wrong statistics cannot "
            "be told apart",
            ("evaluation.train_eval_examples", SAMPLE, "evaluates this many training images, too"),
        )
    share = (
        f"the error is {train_error:.1f}% on training images and {error:.1f}% on validation images"
    )
    if train_error < BIAS * error:
        return _Finding(NO_FAULT, f"{share}: it is due to both about equally")
    if stats.loss_half - stats.loss <= IMPROVING * stats.chance_loss:
        return _Finding(
            UNDERFITTING,
            f"{share}; the validation loss hardly fell in the second half of the steps, from "
            f"{stats.loss_half:.3f} to {stats.loss:.3f}",
            _closer_fit(config),
        )
    falling = "may still have been falling: there is one evaluation only"
    if not math.isnan(stats.loss_half):
        half, last = f"{stats.loss_half:.3f}", f"{stats.loss:.3f}"
        falling = f"was still falling, from {half} at half of the steps to {last}"
    return _Finding(UNDERFITTING, f"{share}; the validation loss {falling}", _longer(stats, config))


_RULES: tuple[Callable[[Evidence, Config], _Finding | None], ...] = (
    _diverged,
    _one_class,
    _unfinished,
    _apart,
    _few_steps,
    _unstable,
    _cut_short,
    _hardly_learned,
    _overfitting,
    _fit,
)


def _is_apart(stats: Evidence) -> bool:
    """Whether training images come out worse in an evaluation than in training."""
    return stats.running_top1 - stats.train_top1 > max(PARTED, stats.train_noise)


def _apart_numbers(stats: Evidence) -> str:
    return (
        f"training lately reported {stats.running_top1:.1f}% top-1, but training images evaluated "
        f"like validation images get {stats.train_top1:.1f}% (threshold "
        f"{max(PARTED, stats.train_noise):.1f} points)"
    )


def _near_chance(stats: Evidence) -> bool:
    """Whether validation shows little more than how frequent the classes are."""
    return stats.best_loss > HARDLY * stats.chance_loss and stats.top1 <= _little_top1(stats)


def _little_top1(stats: Evidence) -> float:
    """Returns the most top-1, percent, that counts as next to nothing learned."""
    return stats.chance_top1 + max(stats.noise, LITTLE * (100 - stats.chance_top1))


def _learned_little(stats: Evidence) -> bool:
    """Whether neither validation nor training images show that anything was learned."""
    if math.isnan(stats.train_loss):
        # What training reports is a lower bound.
        return _near_chance(stats) and stats.running_top1 <= _little_top1(stats)
    return _near_chance(stats) and stats.train_loss > HARDLY * stats.chance_loss


def _best_numbers(stats: Evidence) -> str:
    return (
        f"the least validation loss is {stats.best_loss:.3f} (chance: {stats.chance_loss:.3f}), "
        f"and validation top-1 {stats.top1:.1f}% (chance: {stats.chance_top1:.1f}%)"
    )


def _lower_rate(config: Config) -> _Change:
    rate = config.schedule.learning_rate
    return (
        "schedule.learning_rate",
        _round(rate / 10),
        "a tenth of it; tools.find_lr measures which work",
    )


def _longer(stats: Evidence, config: Config) -> _Change:
    """Returns twice the length, or that of the experiment's own recipe."""
    length = configs.parse_duration(config.train.duration)
    assert length is not None, "a run has a duration"
    factor, reason = 2.0, "twice as long"
    if stats.recipe_epochs > stats.epochs:
        factor = stats.recipe_epochs / stats.epochs
        reason = "the length of the experiment's own recipe"
        if length.unit == "epochs":
            # What was trained is rounded up to whole steps.
            return "train.duration", str(configs.Duration(stats.recipe_epochs, "epochs")), reason
    longer = length.amount * factor
    amount = longer if length.unit == "epochs" else round(longer)
    return "train.duration", str(configs.Duration(amount, length.unit)), reason


def _closer_averages(stats: Evidence, config: Config) -> _Change | None:
    """Returns what brings the averages that evaluation uses closer to the last steps."""
    momentum = config.model.norm_momentum
    if momentum > 0.9:
        return "model.norm_momentum", 0.9, "BatchNorm's statistics are of the last steps then"
    if stats.steps < SETTLED / (1 - momentum):
        return _longer(stats, config)
    if configs.parse_duration(config.train.ema):
        return "train.ema", "", "evaluates the weights themselves, not their average"
    return None


def _more_regularization(config: Config) -> _Change | None:
    if not (config.augment.cutmix or config.augment.mixup):
        return "augment.mixup", 0.2, "mixes images, so that none can be learned by heart"
    if config.model.dropout < 0.5:
        return "model.dropout", 0.5, "drops features before the last layer"
    if not config.train.label_smoothing:
        return "train.label_smoothing", 0.1, "less confident, mostly a better loss"
    return None


def _less_regularization(config: Config) -> _Change | None:
    """Returns the usual value of a setting that is far stronger than usual, if there is one."""
    if config.model.dropout > 0.5:
        return "model.dropout", 0.5, "more than half is rarely better"
    if config.train.label_smoothing > 0.2:
        return "train.label_smoothing", 0.1, "the usual value"
    if config.augment.mixup > 0.4:
        return "augment.mixup", 0.2, "the usual value"
    # Decoupled decay, of adamw and muon, is usually larger.
    if config.optimizer.weight_decay > 5e-3 and config.optimizer.name.startswith("sgd"):
        return "optimizer.weight_decay", 5e-4, "the usual value"
    return None


def _closer_fit(config: Config) -> _Change:
    """Returns what lets a network fit its training images more closely."""
    width = _round(1.5 * config.model.width)
    return _less_regularization(config) or ("model.width", width, "2.25 times the operations")


def _round(value: float) -> float:
    """Returns a value with two digits, as one would type it."""
    return float(f"{value:.2g}")
