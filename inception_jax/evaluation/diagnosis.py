"""What a run's curves say: is the rate right, is it regularised well, is the network large enough?

`diagnose` is a pure function of the lines of metrics.jsonl and the configuration. It applies the
rules below in their order, and the first that holds gives the verdict; each has its threshold and
reason beside it. The split of the error into what is left on training images (bias) and what comes
on top on new ones (variance) is that of Ng 2018, "Machine Learning Yearning", chapters 20 to 25.
Curves show that something is wrong better than what: a suggestion is the next trial, no certainty.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.evaluation import evidence as evidences
from inception_jax.evaluation.evidence import Evidence, Line

# In the first epoch every image is new, so nothing can be over-fitted yet, and one evaluation is a
# point, no curve.
LEAST_EPOCHS = 2
LEAST_EVALUATIONS = 2

# Before that many updates one sees the warm-up, and BatchNorm's statistics have hardly settled.
LEAST_STEPS = 50

# Losses are in units of guessing (ln K). A run above 0.9 of it has learned next to nothing.
STUCK = 0.9

# A network that does not learn: if the gradient has less than half of its first norm although the
# loss has not fallen, the weights grew (behind BatchNorm a gradient is inversely proportional to
# the norm of its weights: van Laarhoven 2017, arXiv:1706.05350) or units died. A rate that is too
# low leaves the gradient as it was, and lets the loss creep down by more than its noise.
GRADIENT_SHRUNK = 0.5
CREEPS = 0.02

# A loss that falls, but is still above 0.8 of guessing after all epochs, with the gradient at more
# than half of its first norm: the network is hardly moved.
SLOW = 0.8

# The training loss averages a whole report. Over thousands of images noise is far below a fifth of
# guessing; over few it is not: the range of a hundred reports is five deviations, which are known
# roughly only.
UNSTABLE = 0.2
DEVIATIONS = 8

# Of the validation error, the share that the network makes on its training images, too. More than
# 0.8: it does not fit what it has seen. Less than 0.5: more than half is due to new images.
BIAS = 0.8
VARIANCE = 0.5

# A gap of fewer points is usual where training is right, and of no use to close.
LEAST_GAP = 5.0

# With less error than that, percent, neither side of it is worth a verdict.
SMALL_ERROR = 5.0

# With that much on its training images, percent, a network is large enough for them.
FITS = 90.0

# Validation loss above its least, in units of guessing: more than the noise of some hundred images.
# With top-1 lower, too, the network has been getting worse; alone it shows growing confidence (Guo
# et al. 2017, arXiv:1706.04599), no harm to top-1.
LOSS_RISE = 0.05

# A run whose schedule is done to this share counts as finished.
FINISHED = 0.95

# A loss that falls by this share in the second half (of the summed rate) falls as fast as before:
# more steps or a higher rate would go on with it.
STEADY = 0.4

TOO_SHORT = "too short to say"
DIVERGING = "diverging"
RATE_HIGH = "rate too high"
RATE_LOW = "rate too low"
OVER = "over-fitting"
UNDER = "under-fitting"
WELL = "well fitted"
UNCERTAIN = "uncertain"


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer to one of the four questions of who trains a network.

    Attributes:
      question: "learning rate", "regularisation", "dropout" or "capacity".
      answer: a few words; "cannot say" is one of the answers.
      reason: with the numbers.
    """

    question: str
    answer: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A setting to try next, alone.

    Attributes:
      setting: dotted path in the configuration.
      value: to give it.
      reason: what it would do.
      new_run: whether it needs a new workdir, as the run cannot be resumed with it.
    """

    setting: str
    value: Any
    reason: str
    new_run: bool

    def __str__(self) -> str:
        note = "; needs a new workdir" if self.new_run else ""
        return f"--config.{self.setting}={self.value} ({self.reason}{note})"


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a run's curves say.

    Attributes:
      verdict: one of the constants of this module.
      rule: why, with the numbers and the threshold.
      answers: to the four questions.
      suggestions: what to try next, the most promising first.
      evidence: the numbers.
    """

    verdict: str
    rule: str
    answers: tuple[Answer, ...]
    suggestions: tuple[Suggestion, ...]
    evidence: Evidence

    def lines(self) -> list[str]:
        """Returns it for a reader, a line each."""
        return [
            f"diagnosis: {self.verdict}: {self.rule}",
            *(f"  {a.question}: {a.answer}: {a.reason}" for a in self.answers),
            *(f"  try {n}: {s}" for n, s in enumerate(self.suggestions, start=1)),
        ]


def diagnose(
    lines: Sequence[Line], config: Config, *, classes: int, train_examples: int
) -> Diagnosis:
    """Returns what a run's curves say.

    Args:
      lines: of its metrics.jsonl, at least one.
      config: its settings.
      classes: how many the data set has.
      train_examples: size of the training split.
    """
    found = evidences.gather(lines, config, classes=classes, train_examples=train_examples)
    verdict, rule = _verdict(found)
    return Diagnosis(
        verdict=verdict,
        rule=rule,
        answers=(
            _learning_rate(verdict, found),
            _regularisation(verdict, found),
            _dropout(verdict, found, config.model.dropout),
            _capacity(verdict, found),
        ),
        suggestions=tuple(_suggestions(verdict, found, config)),
        evidence=found,
    )


def _verdict(e: Evidence) -> tuple[str, str]:
    """Returns the verdict and its rule: the first that holds."""
    for rule in (_broken, _too_short, _stuck, _unstable, _slow, _over_fitting, _unfinished):
        if found := rule(e):
            return found
    return _fit(e)


def _broken(e: Evidence) -> tuple[str, str] | None:
    if math.isnan(e.nonfinite_epoch):
        return None
    return DIVERGING, f"loss or gradient was not finite at epoch {e.nonfinite_epoch:.2f}"


def _too_short(e: Evidence) -> tuple[str, str] | None:
    enough = e.steps >= LEAST_STEPS and e.epochs >= LEAST_EPOCHS
    if enough and e.evaluations >= LEAST_EVALUATIONS:
        return None
    return TOO_SHORT, (
        f"{e.steps} steps, {e.epochs:.2f} epochs and {e.evaluations} evaluations; it takes "
        f"{LEAST_STEPS}, {LEAST_EPOCHS} and {LEAST_EVALUATIONS}"
    )


def _stuck(e: Evidence) -> tuple[str, str] | None:
    if not _learned_nothing(e):
        return None
    state = (
        f"it learned next to nothing: training loss {e.train_loss:.2f} and best validation loss "
        f"{e.validation_loss:.2f} of that of guessing (threshold {STUCK:g})"
    )
    if e.gradient_norm < GRADIENT_SHRUNK:
        return RATE_HIGH, (
            f"{state}, with the gradient's norm at {e.gradient_norm:.2f} of its first value (below "
            f"{GRADIENT_SHRUNK:g}: weights grew or units died)"
        )
    if e.train_loss_spike > _unstable_from(e):
        return RATE_HIGH, (
            f"{state}, with jumps of the loss up to {e.train_loss_spike:.2f} of that of guessing "
            f"(threshold {_unstable_from(e):.2g})"
        )
    if e.train_loss_fall > CREEPS:
        return RATE_LOW, (
            f"{state}, while the loss creeps down (by {e.train_loss_fall:.3f}, more than "
            f"{CREEPS:g}) and the gradient's norm stays at {e.gradient_norm:.2f} of its first value"
        )
    return UNCERTAIN, f"{state}, and no sign of it being moved; labels, rate or start may be wrong"


def _learned_nothing(e: Evidence) -> bool:
    # Mixed and smoothed targets keep the training loss up, BatchNorm's statistics the other.
    return e.train_loss > STUCK and e.validation_loss > STUCK


def _unstable_from(e: Evidence) -> float:
    """Returns the rise of the training loss, in units of guessing, that is more than noise."""
    return max(UNSTABLE, DEVIATIONS * e.train_loss_noise)


def _unstable(e: Evidence) -> tuple[str, str] | None:
    if not e.train_loss_excess > _unstable_from(e):
        return None
    return DIVERGING, (
        f"training loss ends {e.train_loss_excess:.2f} of guessing above its least (threshold "
        f"{_unstable_from(e):.2g})"
    )


def _slow(e: Evidence) -> tuple[str, str] | None:
    hardly_moved = e.train_loss > SLOW and e.gradient_norm > GRADIENT_SHRUNK
    if not (hardly_moved and e.second_half > STEADY):
        return None
    return RATE_LOW, (
        f"training loss is still {e.train_loss:.2f} of guessing (threshold {SLOW:g}) and falls "
        f"steadily ({100 * e.second_half:.0f}% of its fall in the second half), with the "
        f"gradient's norm at {e.gradient_norm:.2f} of its first value"
    )


def _over_fitting(e: Evidence) -> tuple[str, str] | None:
    if e.validation_drop > e.noise and e.validation_loss_rise > LOSS_RISE and e.gap > e.noise:
        return OVER, (
            f"validation top-1 fell by {e.validation_drop:.1f} points from its best (noise "
            f"{e.noise:.1f}), and its loss rose by {e.validation_loss_rise:.2f} of guessing "
            f"(threshold {LOSS_RISE:g})"
        )
    if e.error_share < VARIANCE and e.gap > max(LEAST_GAP, e.noise):
        bound = "at least " if e.train_is_bound else ""
        return OVER, (
            f"training top-1 {e.train_top1:.1f}% is {bound}{e.gap:.1f} points above validation "
            f"(threshold {max(LEAST_GAP, e.noise):.1f}), and the training error less than half of "
            f"the validation error ({e.error_share:.2f})"
        )
    return None


def _unfinished(e: Evidence) -> tuple[str, str] | None:
    if e.done >= FINISHED or not e.late_gain > e.noise:
        return None
    return TOO_SHORT, (
        f"{100 * e.done:.0f}% of the planned steps are done, and validation top-1 is still rising "
        f"(by {e.late_gain:.1f} points lately, noise {e.noise:.1f})"
    )


def _fit(e: Evidence) -> tuple[str, str]:
    share = (
        f"the training error is {e.error_share:.2f} of the validation error "
        f"(under-fitting from {BIAS:g}, over-fitting below {VARIANCE:g})"
    )
    if 100 - e.validation_top1 <= SMALL_ERROR:
        return WELL, f"validation error {100 - e.validation_top1:.1f}%, at most {SMALL_ERROR:g}%"
    if _rising(e) and e.error_share >= VARIANCE:
        return UNDER, (
            f"validation top-1 was still rising, by {e.late_gain:.1f} points in the last fifth of "
            f"the time at a high rate (noise {e.noise:.1f}): the run was too short, or slow"
        )
    if e.train_is_bound and e.error_share >= VARIANCE:
        return UNCERTAIN, (
            "training images are mixed or otherwise so changed that training top-1 "
            f"({e.train_top1:.1f}%, validation {e.validation_top1:.1f}%) is only a lower bound; "
            "config.evaluation.train_examples measures it"
        )
    if e.error_share >= BIAS:
        return UNDER, share
    if math.isnan(e.error_share):
        return UNCERTAIN, "top-1 is not known"
    return WELL, share


def _rising(e: Evidence) -> bool:
    """Whether validation was still rising before the rate fell."""
    return e.late_gain > e.noise


def _levelled_off(e: Evidence) -> bool:
    """Whether it no longer was; where the gain is not known, neither holds."""
    return e.late_gain <= e.noise


def _learning_rate(verdict: str, e: Evidence) -> Answer:
    question, seen = "learning rate", "that is the verdict; tools.find_lr measures which rates work"
    if verdict in (DIVERGING, RATE_HIGH):
        return Answer(question, "too high", seen)
    if verdict == RATE_LOW:
        return Answer(question, "too low", seen)
    if verdict == TOO_SHORT or _learned_nothing(e):
        return Answer(question, "cannot say", "tools.find_lr measures which rates work")
    if e.train_loss_spike > _unstable_from(e):
        return Answer(
            question,
            "at the upper edge",
            f"training loss once jumped by {e.train_loss_spike:.2f} of guessing (threshold "
            f"{_unstable_from(e):.2g}), and recovered",
        )
    if verdict == UNDER and e.second_half > STEADY:
        return Answer(
            question,
            "perhaps too low",
            f"{100 * e.second_half:.0f}% of the loss's fall is in the second half (threshold "
            f"{100 * STEADY:.0f}%), so it fell as fast as at first: higher, or longer",
        )
    return Answer(question, "works", "training loss fell without jumps; find_lr tells if more does")


def _regularisation(verdict: str, e: Evidence) -> Answer:
    question = "regularisation"
    gap = f"gap {e.gap:.1f} points, training error {e.error_share:.2f} of the validation error"
    if verdict == OVER:
        return Answer(question, "too weak", gap)
    if verdict not in (UNDER, WELL):
        return Answer(question, "cannot say", "the verdict on the fit comes first")
    if verdict == UNDER and _rising(e):
        return Answer(question, "cannot say", "the run ended while it was improving")
    if verdict == UNDER and not _levelled_off(e):
        return Answer(question, "cannot say", "whether the run had levelled off is not known")
    if verdict == UNDER:
        answer = "cannot say" if e.train_is_bound else "perhaps too strong"
        return Answer(question, answer, gap)
    if e.validation_loss_rise > LOSS_RISE:
        return Answer(
            question,
            "right for top-1",
            f"validation loss rose by {e.validation_loss_rise:.2f} of guessing at no lower top-1: "
            "over-confident; label smoothing mends that",
        )
    return Answer(question, "right", gap)


def _dropout(verdict: str, e: Evidence, dropout: float) -> Answer:
    question, at = "dropout", f"model.dropout is {dropout:g}"
    if verdict == OVER and dropout < 0.5:
        return Answer(question, "could be more", f"{at}, and the network over-fits")
    if verdict == UNDER and dropout > 0.2 and _levelled_off(e):
        return Answer(question, "perhaps too strong", f"{at}, and the network under-fits")
    if verdict in (OVER, WELL):
        return Answer(question, "no sign against it", f"{at}; a run without it would tell more")
    return Answer(question, "cannot say", f"{at}; its part shows only in a run without it")


def _capacity(verdict: str, e: Evidence) -> Answer:
    question = "capacity"
    if verdict == OVER or e.train_top1 >= FITS:
        return Answer(question, "enough", f"training top-1 is {e.train_top1:.1f}%")
    if verdict == WELL:
        return Answer(question, "enough", "the error is small or evenly split")
    if verdict == UNDER and _levelled_off(e) and not e.train_is_bound:
        return Answer(
            question,
            "perhaps too small",
            f"training top-1 stays at {e.train_top1:.1f}%, and validation had levelled off",
        )
    return Answer(question, "cannot say", "the network was not trained to its limit")


def _suggestions(verdict: str, e: Evidence, config: Config) -> Iterator[Suggestion]:
    """Yields what to try next, the most promising first."""
    changes = {
        DIVERGING: _lower_rate,
        RATE_HIGH: _lower_rate,
        RATE_LOW: _higher_rate,
        OVER: _more_regularisation,
        UNDER: _better_fit,
        UNCERTAIN: _measure,
        WELL: _more_still,
        TOO_SHORT: _go_on,
    }
    resumable = {path: field.metadata["resumable"] for path, _, field in configs.leaves()}
    for setting, value, reason in changes[verdict](config, e):
        yield Suggestion(setting, value, reason, new_run=not resumable[setting])


_Change = tuple[str, Any, str]

# The weight decay to begin with and the most to suggest; those of SGD are the default. A decoupled
# one acts times the rate. Adam rescales an L2 term with the gradient; there it is no remedy
# (Loshchilov & Hutter 2019).
_DECAYS = {"adam": (1.0, 0.0), "adamw": (0.01, 0.1), "muon": (0.02, 0.2)}


def _lower_rate(config: Config, e: Evidence) -> Iterator[_Change]:
    rate = config.schedule.learning_rate
    yield "schedule.learning_rate", _round(rate / 10), "a tenth; tools.find_lr measures it"
    if not config.optimizer.clip_norm:
        yield "optimizer.clip_norm", 1.0, "bounds single large gradients"
    if not config.schedule.warmup:
        yield "schedule.warmup.epochs", 1.0, "the first steps are the least stable"


def _higher_rate(config: Config, e: Evidence) -> Iterator[_Change]:
    rate = config.schedule.learning_rate
    yield "schedule.learning_rate", _round(rate * 10), "ten times; tools.find_lr measures it"


def _more_regularisation(config: Config, e: Evidence) -> Iterator[_Change]:
    """The order is that of the gains known on Tiny ImageNet, each alone."""
    decay, augment, dropout = config.optimizer.weight_decay, config.augment, config.model.dropout
    if augment.crop == "none":
        yield "augment.crop", "pad", "new images from old; flip too, where a mirror image is valid"
    if not (augment.cutmix or augment.mixup):
        yield "augment.cutmix", 1.0, "mixed images; train longer with them"
    first, most = _DECAYS.get(config.optimizer.name, (5e-4, 5e-3))
    more = _round(3 * decay) if decay else first
    if more <= most:
        yield "optimizer.weight_decay", more, "smaller weights"
    if dropout < 0.5:
        yield "model.dropout", _round(min(0.5, dropout + 0.2)), "acts on the last layer alone"
    if not config.train.label_smoothing:
        yield "train.label_smoothing", 0.1, "less confident, mostly a better loss"


def _better_fit(config: Config, e: Evidence) -> Iterator[_Change]:
    longer = _longer(config)
    if _rising(e):
        yield *longer, "validation was still rising when the rate fell"
    elif not _levelled_off(e):
        yield *longer, "whether validation was still rising is not known; the first to rule out"
    if e.second_half > STEADY:
        rate = _round(3 * config.schedule.learning_rate)
        yield "schedule.learning_rate", rate, "if tools.find_lr allows it"
    if config.model.dropout > 0.2:
        yield "model.dropout", _round(config.model.dropout / 2), "fits more closely"
    if config.optimizer.weight_decay > 1e-4 and _levelled_off(e):
        yield "optimizer.weight_decay", _round(config.optimizer.weight_decay / 3), "fits closer"
    if _levelled_off(e):
        yield "model.width", _round(1.5 * config.model.width), "2.25 times the operations"
        yield *longer, "more steps at a high rate"


def _measure(config: Config, e: Evidence) -> Iterator[_Change]:
    if _learned_nothing(e):
        yield from _lower_rate(config, e)
        return
    if e.train_is_bound:
        yield "evaluation.train_examples", 10_000, "measures top-1 on plain training images"
    if config.model.dropout > 0.5:
        yield "model.dropout", _round(config.model.dropout / 2), "more than half is rarely better"


def _more_still(config: Config, e: Evidence) -> Iterator[_Change]:
    if _rising(e):
        yield *_longer(config), "validation was still rising when the rate fell"


def _go_on(config: Config, e: Evidence) -> Iterator[_Change]:
    if e.epochs >= LEAST_EPOCHS and e.evaluations < LEAST_EVALUATIONS:
        ((unit, value),) = config.train.length.given().items()
        quarter = value / 4 if unit == "epochs" else max(1, value // 4)
        yield f"evaluation.every.{unit}", quarter, "a curve that can be judged"
    elif e.done >= FINISHED:
        yield *_longer(config), "a curve that can be judged"


def _longer(config: Config) -> tuple[str, float | int]:
    ((unit, value),) = config.train.length.given().items()
    return f"train.length.{unit}", 2 * value


def _round(value: float) -> float:
    """Returns a value with two digits, as one would type it."""
    return float(f"{value:.2g}")
