"""The diagnosis rules on both sides of each threshold, their advice, and measured runs."""

import itertools
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest

from inception_jax import config as configs
from inception_jax.config import Augment, Config, Model, Train
from inception_jax.reporting.diagnosis import Diagnosis
from inception_jax.reporting.diagnosis import diagnose as diagnose_evidence
from inception_jax.reporting.evidence import gather
from inception_jax.telemetry.writers import read_metrics

HERE = pathlib.Path(__file__).parent
CHANCE = math.log(10)


def diagnose(lines: list[dict[str, Any]], config: Config, **more: Any) -> Diagnosis:
    return diagnose_evidence(gather(lines, config, **more), config)


# 20 epochs of 30 steps, 10 classes.
EPOCHS, EXAMPLES = 20, 3000
STEPS = EPOCHS * 30


# Values of a run that hardly learned anything.
UNTRAINED = {"loss": 1.0, "half": 1.0, "top1": 10.0, "running": 10.0}
UNTRAINED |= {"train_loss": 1.0, "train_top1": 10.0}


def plain(**changes: Any) -> Config:
    groups: dict[str, Any] = {
        "augment": Augment(),
        "model": Model(dropout=0.3),
        "train": Train(batch_size=100, duration=f"{EPOCHS} epochs"),
    }
    return Config(**(groups | changes))


def curves(
    *,
    top1: float = 60.0,
    loss: float = 0.5,
    half: float = 0.51,
    train_top1: float | None = 70.0,
    train_loss: float = 0.4,
    running: float = 60.0,
    worst: float = 1.0,
    steps: int = STEPS,
    count: int = 10_000,
) -> list[dict[str, Any]]:
    """Returns the metrics of a run with five evaluations.

    Args:
      top1, loss: final validation results, in percent and relative to the chance loss.
      half, worst: loss at half of the steps and before, relative to the chance loss.
      train_top1, train_loss: results on training images; None: not evaluated.
      running: accuracy reported by training, percent.
      steps: steps trained.
      count: number of evaluated validation images and of training images.
    """
    lines: list[dict[str, Any]] = []
    for n, value in enumerate((worst, (worst + half) / 2, half, loss, loss), start=1):
        # The third of five evaluations is at half of the steps.
        step: dict[str, Any] = {"step": round(steps * n / 5 if n > 3 else steps * n / 6)}
        step["epoch"] = step["step"] * 100 / EXAMPLES
        measured = top1 if n > 2 else top1 / 2
        lines += [
            step | {"split": "train", "loss": 5.0, "top1": running, "learning_rate": 0.1},
            step | {"split": "test", "loss": CHANCE * value, "top1": measured, "count": count},
        ]
        if train_top1 is not None:
            sample = {"loss": CHANCE * train_loss, "top1": train_top1, "count": count}
            lines.append(step | {"split": "train_eval"} | sample)
    return lines


def diagnose_curves(curve: dict[str, Any], config: Config | None = None, **known: Any) -> Diagnosis:
    return diagnose(
        curves(**curve), config or plain(), classes=10, train_examples=EXAMPLES, **known
    )


def advised(diagnosis: Diagnosis) -> tuple[str, Any] | None:
    advice = diagnosis.advice
    return (advice.setting, advice.value) if advice else None


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        # Training error relative to a validation error of 40: 0.8 and 0.5 of it are 32 and 20.
        ({"train_top1": 67.9}, "underfitting"),
        ({"train_top1": 68.1}, "no fault found"),
        ({"train_top1": 79.9}, "no fault found"),
        ({"train_top1": 80.1}, "overfitting"),
        # A gap of five points; the validation error is 9, half of which is less than the gap.
        ({"top1": 91.0, "train_top1": 95.9}, "no fault found"),
        ({"top1": 91.0, "train_top1": 96.1}, "overfitting"),
        # The noise at 91% is 2.9 points with 400 images and 5.9 with 100.
        ({"top1": 91.0, "train_top1": 96.5, "count": 400}, "overfitting"),
        ({"top1": 91.0, "train_top1": 96.5, "count": 100}, "no fault found"),
        # An error below five percent is not worth a verdict.
        ({"top1": 94.9, "train_top1": 94.0}, "underfitting"),
        ({"top1": 95.1, "train_top1": 94.0}, "no fault found"),
        # Training images score lower in evaluation than in training.
        ({"running": 79.9}, "no fault found"),
        ({"running": 80.1}, "evaluation differs from training"),
        ({"running": 98.0, "train_top1": 50.0, "top1": 50.0}, "evaluation differs from training"),
        ({"running": 98.0, "train_top1": 50.0, "steps": 30}, "evaluation differs from training"),
        # A quarter of the way from 10% is 32.5%.
        (UNTRAINED | {"loss": 0.81, "train_loss": 0.81, "top1": 32.0}, "hardly learned"),
        (UNTRAINED | {"loss": 0.81, "train_loss": 0.81, "top1": 33.0}, "underfitting"),
        (UNTRAINED | {"loss": 0.79, "train_loss": 0.81, "top1": 32.0}, "underfitting"),
        # Memorized without generalizing.
        (UNTRAINED | {"train_loss": 0.1, "train_top1": 99.0}, "overfitting"),
        # Too few steps.
        ({"steps": 49}, "too short to judge"),
        ({"steps": 50}, "no fault found"),
    ],
)
def test_each_rule_applies_on_one_side_of_its_threshold(
    curve: dict[str, Any], expected: str
) -> None:
    steps = curve.get("steps", STEPS)
    config = plain(train=Train(batch_size=100, duration=f"{steps} steps"))
    diagnosis = diagnose_curves(curve, config)
    assert diagnosis.verdict == expected, diagnosis.lines()
    assert diagnosis.reason


def test_training_objective_is_ignored() -> None:
    """Mixed and smoothed labels keep the objective high, however good the network is."""
    lines = curves()
    changed = [
        line | ({"loss": 0.99 * CHANCE} if line["split"] == "train" else {}) for line in lines
    ]
    config = plain(augment=Augment(mixup=1.0), train=Train(batch_size=100, label_smoothing=0.5))
    one, other = (
        diagnose(each, config, classes=10, train_examples=EXAMPLES) for each in (lines, changed)
    )
    # Not `==`: some evidence is NaN, which differs from itself.
    assert repr(one) == repr(other)


def test_unfinished_run_is_too_short_to_judge() -> None:
    for curve in ({}, {"train_top1": 99.0}, {"running": 99.0}, {"loss": 1.0, "top1": 10.0}):
        diagnosis = diagnose_curves(curve | {"steps": STEPS - 1})
        assert diagnosis.verdict == "too short to judge"
        assert diagnosis.advice is None
        assert "599 of 600 steps" in diagnosis.reason
        noted = "so far, recent training reports gave 99.0% top-1" in "".join(diagnosis.notes)
        assert noted == ("running" in curve)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({"train.duration": "60 epochs"}, ("train.duration", "60 epochs")),
        ({"train.duration": "1200 steps"}, ("train.duration", "40 epochs")),
        ({"train.duration": "39 epochs"}, None),
        ({"train.duration": "10 epochs"}, None),
        ({"schedule.learning_rate": 0.5}, None),
    ],
)
def test_shortened_recipe_is_too_short_to_judge(own: dict[str, Any], expected: Any) -> None:
    diagnosis = diagnose_curves({"train_top1": 72.0}, recipe_settings=own)
    assert (diagnosis.verdict == "too short to judge") == bool(expected), diagnosis.lines()
    assert advised(diagnosis) == expected


def test_nonfinite_loss_is_divergence_at_any_length() -> None:
    lines = curves()[:3]
    lines[0] |= {"loss": None, "top1": None}
    diagnosis = diagnose(lines, plain(), classes=10, train_examples=EXAMPLES)
    assert diagnosis.verdict == "diverged"
    assert advised(diagnosis) == ("schedule.learning_rate", 0.01)
    # A single line: a run that diverged before its first report.
    lines = [{"step": 1, "epoch": 0.1, "split": "train", "loss": None}]
    assert diagnose(lines, plain(), classes=10, train_examples=3).verdict == "diverged"


def test_chance_level_follows_class_frequencies() -> None:
    """A network that always predicts a class with 90% of the images has hardly learned."""
    curve = {"top1": 90.0, "train_top1": 90.0, "loss": 0.325 / CHANCE, "train_loss": 0.325 / CHANCE}
    curve |= {"half": 0.325 / CHANCE, "worst": 0.4 / CHANCE, "running": 90.0}
    diagnosis = diagnose_curves(curve, label_counts=[900, 100])
    assert diagnosis.verdict == "hardly learned"
    assert diagnosis.evidence.chance_top1 == 90
    assert diagnosis.evidence.chance_loss == pytest.approx(0.3251, abs=1e-4)
    assert diagnose_curves(curve).verdict == "underfitting"


def test_single_class_validation_is_not_judged() -> None:
    curve = {"top1": 100.0, "train_top1": 100.0, "running": 100.0, "loss": 0.0}
    diagnosis = diagnose_curves(curve, label_counts=[50, 0])
    assert (diagnosis.verdict, diagnosis.advice) == ("not measured", None)


def test_missing_train_eval_is_reported_as_not_measured() -> None:
    memorized = UNTRAINED | {"running": 99.0, "worst": 9.0}
    for curve in ({}, {"running": 99.0}, {"running": 30.0}, memorized):
        diagnosis = diagnose_curves(curve | {"train_top1": None})
        assert diagnosis.verdict == "not measured"
        assert "cannot be told apart" in diagnosis.reason
        assert advised(diagnosis) == ("evaluation.train_eval_examples", 1000)
    assert diagnose_curves(UNTRAINED | {"train_top1": None}).verdict == "hardly learned"
    assert (
        diagnose_curves({"train_top1": None, "top1": 95.1, "running": 99.0}).verdict
        == "no fault found"
    )


def test_loss_far_above_chance_means_high_learning_rate() -> None:
    low, high = (diagnose_curves(UNTRAINED | {"worst": worst}) for worst in (4.9, 5.1))
    assert low.verdict == high.verdict == "hardly learned"
    assert (advised(low), advised(high)) == (None, ("schedule.learning_rate", 0.01))
    assert any("tools.find_lr" in note for note in low.notes)


@pytest.mark.parametrize(("half", "expected"), [(0.53, "train.duration"), (0.51, "width")])
def test_underfitting_advises_more_steps_while_improving(half: float, expected: str) -> None:
    diagnosis = diagnose_curves({"train_top1": 62.0, "half": half})
    assert diagnosis.verdict == "underfitting"
    assert diagnosis.advice is not None
    assert diagnosis.advice.setting.endswith(expected)


def test_hardly_learned_advises_weaker_regularization() -> None:
    config = plain(model=Model(dropout=0.9))
    config.optimizer.weight_decay = 0.1
    diagnosis = diagnose_curves(UNTRAINED, config)
    assert "model.dropout=0.9 may be too strong" in diagnosis.reason
    assert advised(diagnosis) == ("model.dropout", 0.5)
    config.model.dropout = 0.5
    assert advised(diagnose_curves(UNTRAINED, config)) == ("optimizer.weight_decay", 5e-4)
    config.optimizer.name = "adamw"
    assert advised(diagnose_curves(UNTRAINED, config)) is None


def test_single_evaluation_advises_more_steps() -> None:
    lines = curves(train_top1=61.0)
    last = [line for line in lines if line["step"] == STEPS]
    diagnosis = diagnose(last, plain(), classes=10, train_examples=EXAMPLES)
    assert diagnosis.verdict == "underfitting"
    assert "there is only one evaluation" in diagnosis.reason
    assert advised(diagnosis) == ("train.duration", f"{2 * EPOCHS} epochs")


# A curve for each finding.
CURVES: list[dict[str, Any]] = [
    {},
    {"train_top1": None},
    {"train_top1": 99.0},
    {"train_top1": 61.0},
    {"train_top1": 61.0, "half": 0.8},
    {"running": 99.0},
    {"running": 99.0, "steps": 100},
    {"steps": 40},
    UNTRAINED,
    UNTRAINED | {"worst": 9.0},
]


def settings(steps: int) -> Iterator[Config]:
    """Yields settings with values on both sides of all possible advice."""
    lengths = (f"{steps / 30} epochs", f"{steps} steps", f"{100 * steps} examples")
    values = itertools.product(
        (0.0, 0.2, 2.0), (0.0, 0.5, 0.9), (0.0, 0.1, 0.5), (0.5, 0.9, 0.99), (1, 9)
    )
    for length, each in zip(itertools.cycle(lengths), values, strict=False):
        mixup, dropout, smoothing, momentum, factor = each
        ema = f"{factor - 1} steps"
        config = plain(
            augment=Augment(mixup=mixup),
            model=Model(dropout=dropout, norm_momentum=momentum, width=float(factor)),
            train=Train(batch_size=100, duration=length, label_smoothing=smoothing, ema=ema),
        )
        config.optimizer.weight_decay = 0.01 * (factor - 1)
        config.schedule.learning_rate = 0.1 * factor
        yield config


def test_all_advice_is_valid_and_consistent() -> None:
    """Whatever the runs, advice never reverses earlier advice."""

    def amount(value: float | str) -> float:
        if not isinstance(value, str):
            return value
        duration = configs.parse_duration(value)
        return duration.amount if duration else 0.0

    advised: dict[tuple[str, Any, Any], Config] = {}
    for curve in CURVES:
        for config in settings(curve.get("steps", STEPS)):
            if advice := diagnose_curves(curve, config).advice:
                advised[advice.setting, advice.before, advice.value] = config
    raised: dict[str, float] = {}
    lowered: dict[str, float] = {}
    for (setting, before, value), config in advised.items():
        group, _, name = setting.rpartition(".")
        setattr(configs.get(config, group), name, value)
        configs.validate(config)
        new, old = amount(value), amount(before)
        if new > old:
            raised[setting] = max(new, raised.get(setting, -math.inf))
        else:
            assert new < old
            lowered[setting] = min(new, lowered.get(setting, math.inf))
    assert {"schedule.learning_rate", "model.norm_momentum", "train.ema"} <= set(lowered)
    assert {"train.duration", "augment.mixup", "model.width"} <= set(raised)
    assert set(raised) & set(lowered)
    for setting in set(raised) & set(lowered):
        assert raised[setting] <= lowered[setting], setting


def test_evidence_matches_arithmetic() -> None:
    train = [
        {"step": 10 * n, "epoch": float(n), "split": "train", "loss": 9.0, "top1": 10.0 * n}
        for n in range(1, 5)
    ]
    validation = [
        {"step": 10 * n, "epoch": float(n), "split": "validation", "loss": loss, "count": 2500}
        | {"top1": top1}
        for n, (loss, top1) in enumerate([(2.0, 20), (1.0, 60), (1.2, 55), (1.5, 50)], start=1)
    ]
    sample = [{"step": 40, "epoch": 4.0, "split": "train_eval", "loss": 1.1, "top1": 70.0}]
    evidence = gather(
        [*train, *validation, sample[0] | {"count": 98}],
        plain(train=Train(batch_size=100, duration="8 epochs")),
        classes=10,
        train_examples=1000,
        label_counts=[1, 3],
        recipe_settings={"train.duration": "12 epochs"},
    )
    assert (evidence.steps, evidence.planned_steps, evidence.recipe_epochs) == (40, 80, 12)
    assert evidence.chance_loss == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert evidence.chance_top1 == 75
    assert (evidence.loss, evidence.best_loss, evidence.worst_loss) == (1.5, 1.0, 2.0)
    assert (evidence.top1, evidence.train_top1, evidence.gap) == (50.0, 70.0, 20.0)
    assert evidence.noise == pytest.approx(2.0)  # 200 sqrt(0.5 * 0.5 / 2500)
    assert evidence.train_noise == pytest.approx(200 * math.sqrt(0.696 * 0.304 / 98), rel=1e-3)
    # At the evaluation of step 20; mean of the last two training reports.
    assert evidence.loss_half == 1.0
    assert evidence.running_top1 == 40.0


@pytest.mark.parametrize(
    ("name", "rate", "verdict", "expected"),
    [
        ("rate_too_high", 5.0, "hardly learned", ("schedule.learning_rate", 0.5)),
        ("rate_too_low", 5e-5, "hardly learned", None),
        # All 500 images correct in training, and 35% of the others.
        ("over_fitting", 0.05, "not measured", ("evaluation.train_eval_examples", 1000)),
        ("three_epochs", 0.1, "not measured", ("evaluation.train_eval_examples", 1000)),
    ],
)
def test_runs_of_older_versions_are_diagnosed(
    name: str, rate: float, verdict: str, expected: tuple[str, Any] | None
) -> None:
    """Digits at rates 5 and 5e-5 (0.05 is right), 500 of the digits, and Tiny ImageNet."""
    lines = read_metrics(HERE / "curves" / f"{name}.jsonl")
    config = plain(train=Train(batch_size=32, duration=f"{lines[-1]['step']} steps"))
    config.schedule.learning_rate = rate
    classes = 200 if name == "three_epochs" else 10
    diagnosis = diagnose(lines, config, classes=classes, train_examples=EXAMPLES)
    assert (diagnosis.verdict, advised(diagnosis)) == (verdict, expected), diagnosis.lines()
