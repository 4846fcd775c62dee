"""The rules on both sides of each threshold, what they advise, and runs that were measured."""

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
from inception_jax.telemetry.writers import read_lines

HERE = pathlib.Path(__file__).parent
CHANCE = math.log(10)


def diagnose(lines: list[dict[str, Any]], config: Config, **more: Any) -> Diagnosis:
    return diagnose_evidence(gather(lines, config, **more), config)


# 20 epochs of 30 steps, 10 classes.
EPOCHS, EXAMPLES = 20, 3000
STEPS = EPOCHS * 30


# What a run gives that has hardly learned.
NOTHING = {"loss": 1.0, "half": 1.0, "top1": 10.0, "running": 10.0}
NOTHING |= {"train_loss": 1.0, "train_top1": 10.0}


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
    """The lines of a run with five evaluations.

    Args:
      top1, loss: of validation at the end, percent and in units of chance.
      half, worst: the loss at half of the steps and before, in the same unit.
      train_top1, train_loss: of training images evaluated like them; None: they were not.
      running: accuracy in training.
      steps: that were trained.
      count: images evaluated, of validation and of training.
    """
    lines: list[dict[str, Any]] = []
    for n, value in enumerate((worst, (worst + half) / 2, half, loss, loss), start=1):
        # The middle of five is at half of the steps.
        step: dict[str, Any] = {"step": round(steps * n / 5 if n > 3 else steps * n / 6)}
        step["epoch"] = step["step"] * 100 / EXAMPLES
        shown = top1 if n > 2 else top1 / 2
        lines += [
            step | {"split": "train", "loss": 5.0, "top1": running, "learning_rate": 0.1},
            step | {"split": "test", "loss": CHANCE * value, "top1": shown, "count": count},
        ]
        if train_top1 is not None:
            sample = {"loss": CHANCE * train_loss, "top1": train_top1, "count": count}
            lines.append(step | {"split": "train_eval"} | sample)
    return lines


def found(curve: dict[str, Any], config: Config | None = None, **known: Any) -> Diagnosis:
    return diagnose(
        curves(**curve), config or plain(), classes=10, train_examples=EXAMPLES, **known
    )


def advised(diagnosis: Diagnosis) -> tuple[str, Any] | None:
    advice = diagnosis.advice
    return (advice.setting, advice.value) if advice else None


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        # The training error over the validation error of 40: 0.8 and 0.5 of it are 32 and 20.
        ({"train_top1": 67.9}, "underfitting"),
        ({"train_top1": 68.1}, "no fault found"),
        ({"train_top1": 79.9}, "no fault found"),
        ({"train_top1": 80.1}, "overfitting"),
        # A gap of five points; the validation error is 9, half of it less than the gap.
        ({"top1": 91.0, "train_top1": 95.9}, "no fault found"),
        ({"top1": 91.0, "train_top1": 96.1}, "overfitting"),
        # With 400 images, the noise at 91% is 2.9 points, with 100 it is 5.9.
        ({"top1": 91.0, "train_top1": 96.5, "count": 400}, "overfitting"),
        ({"top1": 91.0, "train_top1": 96.5, "count": 100}, "no fault found"),
        # An error of five percent is not worth a verdict.
        ({"top1": 94.9, "train_top1": 94.0}, "underfitting"),
        ({"top1": 95.1, "train_top1": 94.0}, "no fault found"),
        # Training images come out worse in an evaluation than in training.
        ({"running": 79.9}, "no fault found"),
        ({"running": 80.1}, "evaluation differs from training"),
        ({"running": 98.0, "train_top1": 50.0, "top1": 50.0}, "evaluation differs from training"),
        ({"running": 98.0, "train_top1": 50.0, "steps": 30}, "evaluation differs from training"),
        # A quarter of the way from 10% is 32.5%.
        (NOTHING | {"loss": 0.81, "train_loss": 0.81, "top1": 32.0}, "hardly learned"),
        (NOTHING | {"loss": 0.81, "train_loss": 0.81, "top1": 33.0}, "underfitting"),
        (NOTHING | {"loss": 0.79, "train_loss": 0.81, "top1": 32.0}, "underfitting"),
        # Learned by heart, which helps nothing.
        (NOTHING | {"train_loss": 0.1, "train_top1": 99.0}, "overfitting"),
        # Too few steps for anything.
        ({"steps": 49}, "too short to judge"),
        ({"steps": 50}, "no fault found"),
    ],
)
def test_each_rule_holds_on_one_side_of_its_threshold(curve: dict[str, Any], expected: str) -> None:
    steps = curve.get("steps", STEPS)
    config = plain(train=Train(batch_size=100, duration=f"{steps} steps"))
    diagnosis = found(curve, config)
    assert diagnosis.verdict == expected, diagnosis.lines()
    assert diagnosis.reason


def test_the_training_objective_is_not_judged() -> None:
    """Mixed and smoothed labels keep it high, however good the network is."""
    lines = curves()
    changed = [
        line | ({"loss": 0.99 * CHANCE} if line["split"] == "train" else {}) for line in lines
    ]
    config = plain(augment=Augment(mixup=1.0), train=Train(batch_size=100, label_smoothing=0.5))
    one, other = (
        diagnose(each, config, classes=10, train_examples=EXAMPLES) for each in (lines, changed)
    )
    assert one == other


def test_an_unfinished_run_is_too_short_to_judge_and_gets_no_advice() -> None:
    for curve in ({}, {"train_top1": 99.0}, {"running": 99.0}, {"loss": 1.0, "top1": 10.0}):
        diagnosis = found(curve | {"steps": STEPS - 1})
        assert diagnosis.verdict == "too short to judge"
        assert diagnosis.advice is None
        assert "599 of 600 steps" in diagnosis.reason
        parted = "so far, training lately reported 99.0% top-1" in "".join(diagnosis.notes)
        assert parted == ("running" in curve)


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
def test_a_recipe_that_was_cut_short_is_not_judged(own: dict[str, Any], expected: Any) -> None:
    diagnosis = found({"train_top1": 72.0}, own_settings=own)
    assert (diagnosis.verdict == "too short to judge") == bool(expected), diagnosis.lines()
    assert advised(diagnosis) == expected


def test_a_loss_that_is_not_finite_is_divergence_however_short() -> None:
    lines = curves()[:3]
    lines[0] |= {"loss": None, "top1": None}
    diagnosis = diagnose(lines, plain(), classes=10, train_examples=EXAMPLES)
    assert diagnosis.verdict == "diverged"
    assert advised(diagnosis) == ("schedule.learning_rate", 0.01)
    # Nothing but that one line: a run that broke before its first report.
    lines = [{"step": 1, "epoch": 0.1, "split": "train", "loss": None}]
    assert diagnose(lines, plain(), classes=10, train_examples=3).verdict == "diverged"


def test_chance_is_what_the_frequency_of_classes_gives() -> None:
    """A network that says the largest class of nine tenths has hardly learned."""
    curve = {"top1": 90.0, "train_top1": 90.0, "loss": 0.325 / CHANCE, "train_loss": 0.325 / CHANCE}
    curve |= {"half": 0.325 / CHANCE, "worst": 0.4 / CHANCE, "running": 90.0}
    diagnosis = found(curve, label_counts=[900, 100])
    assert diagnosis.verdict == "hardly learned"
    assert diagnosis.evidence.chance_top1 == 90
    assert diagnosis.evidence.chance_loss == pytest.approx(0.3251, abs=1e-4)
    assert found(curve).verdict == "underfitting"


def test_images_of_one_class_alone_show_nothing() -> None:
    curve = {"top1": 100.0, "train_top1": 100.0, "running": 100.0, "loss": 0.0}
    diagnosis = found(curve, label_counts=[50, 0])
    assert (diagnosis.verdict, diagnosis.advice) == ("not measured", None)


def test_what_was_not_measured_is_said_and_not_guessed() -> None:
    by_heart = NOTHING | {"running": 99.0, "worst": 9.0}
    for curve in ({}, {"running": 99.0}, {"running": 30.0}, by_heart):
        diagnosis = found(curve | {"train_top1": None})
        assert diagnosis.verdict == "not measured"
        assert "cannot be told apart" in diagnosis.reason
        assert advised(diagnosis) == ("evaluation.train_eval_examples", 1000)
    assert found(NOTHING | {"train_top1": None}).verdict == "hardly learned"
    assert found({"train_top1": None, "top1": 95.1, "running": 99.0}).verdict == "no fault found"


def test_a_loss_far_above_chance_shows_a_rate_that_is_too_high() -> None:
    low, high = (found(NOTHING | {"worst": worst}) for worst in (4.9, 5.1))
    assert low.verdict == high.verdict == "hardly learned"
    assert (advised(low), advised(high)) == (None, ("schedule.learning_rate", 0.01))
    assert any("tools.find_lr" in note for note in low.notes)


@pytest.mark.parametrize(("half", "expected"), [(0.53, "train.duration"), (0.51, "width")])
def test_underfitting_asks_for_steps_as_long_as_they_help(half: float, expected: str) -> None:
    diagnosis = found({"train_top1": 62.0, "half": half})
    assert diagnosis.verdict == "underfitting"
    assert diagnosis.advice is not None
    assert diagnosis.advice.setting.endswith(expected)


def test_where_hardly_anything_was_learned_the_strongest_setting_comes_first() -> None:
    config = plain(model=Model(dropout=0.9))
    config.optimizer.weight_decay = 0.1
    diagnosis = found(NOTHING, config)
    assert "model.dropout=0.9 may be too strong" in diagnosis.reason
    assert advised(diagnosis) == ("model.dropout", 0.5)
    config.model.dropout = 0.5
    assert advised(found(NOTHING, config)) == ("optimizer.weight_decay", 5e-4)
    config.optimizer.name = "adamw"
    assert advised(found(NOTHING, config)) is None


def test_with_one_evaluation_more_steps_come_first() -> None:
    lines = curves(train_top1=61.0)
    last = [line for line in lines if line["step"] == STEPS]
    diagnosis = diagnose(last, plain(), classes=10, train_examples=EXAMPLES)
    assert diagnosis.verdict == "underfitting"
    assert "there is one evaluation only" in diagnosis.reason
    assert advised(diagnosis) == ("train.duration", f"{2 * EPOCHS} epochs")


# One of each finding.
CURVES: list[dict[str, Any]] = [
    {},
    {"train_top1": None},
    {"train_top1": 99.0},
    {"train_top1": 61.0},
    {"train_top1": 61.0, "half": 0.8},
    {"running": 99.0},
    {"running": 99.0, "steps": 100},
    {"steps": 40},
    NOTHING,
    NOTHING | {"worst": 9.0},
]


def settings(steps: int) -> Iterator[Config]:
    """Yields settings with values on both sides of all that is ever advised."""
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


def test_all_advice_is_valid_and_none_goes_against_any_other() -> None:
    """Whatever was advised before, and for whichever run: nothing leads back over it."""

    def amount(value: float | str) -> float:
        if not isinstance(value, str):
            return value
        duration = configs.parse_duration(value)
        return duration.amount if duration else 0.0

    advised: dict[tuple[str, Any, Any], Config] = {}
    for curve in CURVES:
        for config in settings(curve.get("steps", STEPS)):
            if advice := found(curve, config).advice:
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


def test_evidence_is_what_arithmetic_gives() -> None:
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
    found = gather(
        [*train, *validation, sample[0] | {"count": 98}],
        plain(train=Train(batch_size=100, duration="8 epochs")),
        classes=10,
        train_examples=1000,
        label_counts=[1, 3],
        own_settings={"train.duration": "12 epochs"},
    )
    assert (found.steps, found.planned_steps, found.recipe_epochs) == (40, 80, 12)
    assert found.chance_loss == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))
    assert found.chance_top1 == 75
    assert (found.loss, found.best_loss, found.worst_loss) == (1.5, 1.0, 2.0)
    assert (found.top1, found.train_top1, found.gap) == (50.0, 70.0, 20.0)
    assert found.noise == pytest.approx(2.0)  # 200 sqrt(0.5 * 0.5 / 2500)
    assert found.train_noise == pytest.approx(200 * math.sqrt(0.696 * 0.304 / 98), rel=1e-3)
    # Between the evaluations at 20 steps and later; the last two reports.
    assert found.loss_half == 1.0
    assert found.running_top1 == 40.0


@pytest.mark.parametrize(
    ("name", "rate", "verdict", "expected"),
    [
        ("rate_too_high", 5.0, "hardly learned", ("schedule.learning_rate", 0.5)),
        ("rate_too_low", 5e-5, "hardly learned", None),
        # All of 500 images right in training, and 35% of the others.
        ("over_fitting", 0.05, "not measured", ("evaluation.train_eval_examples", 1000)),
        ("three_epochs", 0.1, "not measured", ("evaluation.train_eval_examples", 1000)),
    ],
)
def test_runs_of_older_versions_are_judged_by_what_they_measured(
    name: str, rate: float, verdict: str, expected: tuple[str, Any] | None
) -> None:
    """On the digits at 5 and 5e-5, where 0.05 is right; on 500 of them; and on Tiny ImageNet."""
    lines = read_lines(HERE / "curves" / f"{name}.jsonl")
    config = plain(train=Train(batch_size=32, duration=f"{lines[-1]['step']} steps"))
    config.schedule.learning_rate = rate
    classes = 200 if name == "three_epochs" else 10
    diagnosis = diagnose(lines, config, classes=classes, train_examples=EXAMPLES)
    assert (diagnosis.verdict, advised(diagnosis)) == (verdict, expected), diagnosis.lines()
