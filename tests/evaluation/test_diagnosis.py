"""The rules on curves with a known truth, on both sides of each threshold, and on real runs."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from experiments import digits
from inception_jax import config as configs
from inception_jax.config import Augment, Config, Duration, Evaluation, Model, Optimizer, Train
from inception_jax.evaluation.diagnosis import Diagnosis, diagnose
from inception_jax.evaluation.evidence import gather
from inception_jax.telemetry.writers import read_lines

HERE = pathlib.Path(__file__).parent
GUESSING = math.log(10)

# 20 epochs of 10 steps, 10 classes.
EPOCHS, STEPS, EXAMPLES = 20, 30, 3000


def plain(**changes: Any) -> Config:
    groups: dict[str, Any] = {
        "augment": Augment(),
        "model": Model(dropout=0.3),
        "optimizer": Optimizer(weight_decay=5e-4),
        "train": Train(batch_size=100, length=Duration(epochs=EPOCHS)),
    }
    return Config(**(groups | changes))


def curves(
    *,
    train_loss: float = 0.3,
    train_top1: float = 70.0,
    top1: float = 60.0,
    loss: float = 0.5,
    gradient: float = 0.4,
    loss_last: float | None = None,
    top1_last: float | None = None,
    spike: float = 0.0,
    excess: float = 0.0,
    late_rise: float = 0.0,
    steady: bool = False,
    epochs: float = EPOCHS,
    count: int = 10_000,
) -> list[dict[str, Any]]:
    """The lines of a run at a constant rate: all falls in its first fifth, then stays.

    Args:
      train_loss, loss: at the end, of training and validation, in units of guessing.
      train_top1, top1: at the end, percent.
      gradient: norm at the end over that at the start.
      loss_last, top1_last: of the last evaluation alone.
      spike: height of one line's jump in the middle, in units of guessing.
      excess: by how much the loss ends above its least, in the last two epochs.
      late_rise: rise of top-1 over the last fifth, which ends at `top1`.
      steady: let the training loss fall over the whole run.
      epochs: length.
      count: validation images.
    """
    lines = []
    for half in range(1, int(2 * epochs) + 1):
        t = half / (2 * epochs)
        fallen = t if steady else min(1.0, t / 0.2)
        value = 1 - (1 - train_loss) * fallen
        value += spike * (half == int(epochs)) + excess * (t > 1 - 2.1 / epochs)
        step = {"step": half * STEPS // 2, "epoch": half / 2}
        lines.append(
            step
            | {"split": "train", "loss": GUESSING * value, "top1": train_top1 * fallen}
            | {"learning_rate": 0.1, "gradient_norm": 3.0 if half == 1 else 3 * gradient}
        )
        if half % 2 == 0:
            rise = late_rise * min(0.0, (t - 1) / 0.2) if t > 0.8 else -late_rise
            lines.append(
                step
                | {"split": "validation", "loss": GUESSING * (1 - (1 - loss) * fallen)}
                | {"top1": top1 * fallen + rise, "count": count}
            )
    if loss_last is not None:
        lines[-1]["loss"] = GUESSING * loss_last
    if top1_last is not None:
        lines[-1]["top1"] = top1_last
    return lines


def verdict(lines: list[dict[str, Any]], config: Config | None = None) -> Diagnosis:
    return diagnose(lines, config or plain(), classes=10, train_examples=EXAMPLES)


def answers(found: Diagnosis) -> dict[str, str]:
    return {answer.question: answer.answer for answer in found.answers}


def settings(found: Diagnosis) -> dict[str, Any]:
    return {suggestion.setting: suggestion.value for suggestion in found.suggestions}


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        # The training error over the validation error of 40: 0.8 and 0.5 of it are 32 and 20.
        ({"train_top1": 67.9}, "under-fitting"),
        ({"train_top1": 68.1}, "well fitted"),
        ({"train_top1": 79.9}, "well fitted"),
        ({"train_top1": 80.1}, "over-fitting"),
        # A gap of five points; the validation error is 9, half of it less than the gap.
        ({"top1": 91.0, "train_top1": 95.9}, "well fitted"),
        ({"top1": 91.0, "train_top1": 96.1}, "over-fitting"),
        # With 400 images, the noise at 91% is 2.9 points, with 100 it is 5.7, more than the gap.
        ({"top1": 91.0, "train_top1": 96.5, "count": 400}, "over-fitting"),
        ({"top1": 91.0, "train_top1": 96.5, "count": 100}, "well fitted"),
        # An error of five percent is not worth a verdict.
        ({"top1": 94.9, "train_top1": 90.0}, "under-fitting"),
        ({"top1": 95.1, "train_top1": 90.0}, "well fitted"),
        # Getting worse: top-1 by more than one point (the noise), and the loss by 0.05.
        ({"top1_last": 58.5, "loss_last": 0.54}, "well fitted"),
        ({"top1_last": 58.5, "loss_last": 0.56}, "over-fitting"),
        ({"top1_last": 59.5, "loss_last": 0.56}, "well fitted"),
        # Guessing; what the gradient did.
        ({"train_loss": 0.91, "loss": 0.91, "top1": 15.0, "gradient": 0.49}, "rate too high"),
        ({"train_loss": 0.91, "loss": 0.91, "top1": 15.0, "gradient": 0.51}, "rate too low"),
        ({"train_loss": 0.91, "loss": 0.89, "train_top1": 40.0, "top1": 30.0}, "under-fitting"),
        ({"train_loss": 0.985, "loss": 1.0, "top1": 10.0, "gradient": 1.0}, "uncertain"),
        ({"train_loss": 0.975, "loss": 1.0, "top1": 10.0, "gradient": 1.0}, "rate too low"),
        ({"train_loss": 0.95, "loss": 1.0, "gradient": 1.0, "spike": 0.19}, "rate too low"),
        ({"train_loss": 0.95, "loss": 1.0, "gradient": 1.0, "spike": 0.21}, "rate too high"),
        # Creeping.
        ({"train_loss": 0.81, "gradient": 0.51, "steady": True}, "rate too low"),
        ({"train_loss": 0.79, "gradient": 0.51, "steady": True}, "under-fitting"),
        ({"train_loss": 0.81, "gradient": 0.49, "steady": True}, "under-fitting"),
        ({"train_loss": 0.81, "gradient": 0.51, "train_top1": 75.0}, "well fitted"),
        # Ends above its least.
        ({"excess": 0.19}, "well fitted"),
        ({"excess": 0.21}, "diverging"),
        # Still rising when it ended.
        ({"late_rise": 0.9}, "well fitted"),
        ({"late_rise": 1.1}, "under-fitting"),
    ],
)
def test_each_rule_holds_on_one_side_of_its_threshold(curve: dict[str, Any], expected: str) -> None:
    if curve.get("steady"):
        # Top-1 rises with the loss then; it is not what is tested.
        curve = curve | {"train_top1": 50.0}
    found = verdict(curves(**curve))
    assert found.verdict == expected, found.lines()
    assert found.rule


@pytest.mark.parametrize(("epochs", "short"), [(1, True), (2, False)])
def test_two_epochs_are_the_least(epochs: int, short: bool) -> None:
    config = plain(train=Train(batch_size=100, length=Duration(epochs=epochs)))
    lines = curves(epochs=epochs)
    # Two evaluations in either case.
    lines.insert(1, next(line for line in lines if line["split"] == "validation"))
    found = verdict(lines, config)
    assert (found.verdict == "too short to say") == short
    if short:
        assert settings(found) == {"train.length.epochs": 2}


@pytest.mark.parametrize(("steps", "short"), [(49, True), (50, False)])
def test_fifty_steps_are_the_least(steps: int, short: bool) -> None:
    lines = curves()
    for line in lines:
        line["step"] = line["step"] * steps // (EPOCHS * STEPS)
    assert (verdict(lines).verdict == "too short to say") == short


@pytest.mark.parametrize(("planned", "expected"), [(21, "under-fitting"), (22, "too short to say")])
def test_an_unfinished_run_that_improves_is_not_judged(planned: int, expected: str) -> None:
    config = plain(train=Train(batch_size=100, length=Duration(epochs=planned)))
    assert verdict(curves(late_rise=3.0), config).verdict == expected


def test_a_loss_that_is_not_finite_is_divergence_however_short() -> None:
    lines = curves()[:3]
    lines[-1] |= {"loss": None, "top1": None}
    found = verdict(lines)
    assert found.verdict == "diverging"
    assert answers(found)["learning rate"] == "too high"
    assert settings(found)["schedule.learning_rate"] == pytest.approx(0.01)
    # Nothing but that one line: a run that broke before its first report.
    assert (
        verdict([{"step": 1, "epoch": 0.1, "split": "train", "loss": None}]).verdict == "diverging"
    )


def test_a_jump_that_was_overcome_is_at_the_edge_of_the_rate() -> None:
    low, high = (answers(verdict(curves(spike=spike))) for spike in (0.19, 0.21))
    assert (low["learning rate"], high["learning rate"]) == ("works", "at the upper edge")


def test_the_noise_of_reports_on_few_images_is_no_jump() -> None:
    lines = curves()
    losses = [line for line in lines if line["split"] == "train"]
    for line, noise in zip(losses, np.random.default_rng(0).normal(size=len(losses)), strict=True):
        line["loss"] += 0.15 * GUESSING * noise
    found = verdict(lines)
    # The median of 38 is rough.
    assert found.evidence.train_loss_noise == pytest.approx(0.15, rel=0.5)
    assert found.evidence.train_loss_spike > 0.4
    assert answers(found)["learning rate"] == "works"
    losses[20]["loss"] += 1.5 * GUESSING
    assert answers(verdict(lines))["learning rate"] == "at the upper edge"


@pytest.mark.parametrize(
    ("changes", "uncertain"),
    [
        ({"augment": Augment(mixup=0.2)}, True),
        ({"augment": Augment(cutmix=1.0, mix_probability=0.0)}, False),
        ({"augment": Augment(cutout=8)}, True),
        ({"augment": Augment(crop="resized", area_min=0.49)}, True),
        ({"augment": Augment(crop="resized", area_min=0.5)}, False),
        ({"model": Model(dropout=0.51)}, True),
        ({"model": Model(dropout=0.5)}, False),
    ],
)
def test_a_lower_bound_on_training_top1_shows_no_under_fitting(
    changes: dict[str, Any], uncertain: bool
) -> None:
    found = verdict(curves(train_top1=50.0), plain(**changes))
    assert found.verdict == ("uncertain" if uncertain else "under-fitting")
    assert ("evaluation.train_examples" in settings(found)) == uncertain
    # But a gap that is seen nevertheless is one.
    assert verdict(curves(train_top1=95.0), plain(**changes)).verdict == "over-fitting"


@pytest.mark.parametrize(
    ("top1", "expected"), [(62.0, "under-fitting"), (75.0, "well fitted"), (90.0, "over-fitting")]
)
def test_training_images_evaluated_as_they_are_decide(top1: float, expected: str) -> None:
    lines = curves(train_top1=50.0)
    last = lines[-1]
    lines.append({"step": last["step"], "epoch": last["epoch"], "split": "train_eval"})
    lines[-1] |= {"loss": 1.0, "top1": top1, "count": 500}
    config = plain(augment=Augment(mixup=0.2), evaluation=Evaluation(train_examples=500))
    found = verdict(lines, config)
    assert found.verdict == expected
    assert found.evidence.gap == pytest.approx(top1 - 60.0)


def test_the_four_answers_and_remedies_of_over_fitting() -> None:
    config = plain(augment=Augment(crop="none"), model=Model(dropout=0.1))
    found = verdict(curves(train_top1=99.0), config)
    assert answers(found) == {
        "learning rate": "works",
        "regularisation": "too weak",
        "dropout": "could be more",
        "capacity": "enough",
    }
    assert settings(found) == {
        "augment.crop": "pad",
        "augment.cutmix": 1.0,
        "optimizer.weight_decay": 0.0015,
        "model.dropout": 0.3,
        "train.label_smoothing": 0.1,
    }


def test_the_four_answers_and_remedies_of_under_fitting() -> None:
    found = verdict(curves(train_top1=60.0))
    assert answers(found) == {
        "learning rate": "works",
        "regularisation": "perhaps too strong",
        "dropout": "perhaps too strong",
        "capacity": "perhaps too small",
    }
    assert settings(found) == {
        "model.dropout": 0.15,
        "optimizer.weight_decay": 0.00017,
        "model.width": 1.5,
        "train.length.epochs": 40,
    }
    assert [s.setting for s in found.suggestions if s.new_run] == ["model.width"]
    assert "needs a new workdir" in "\n".join(found.lines())


@pytest.mark.parametrize(
    ("name", "decay", "more"),
    [
        ("sgd", 5e-4, 1.5e-3),
        ("sgd", 0.0, 5e-4),
        ("sgd", 2e-3, None),
        ("adam", 1e-5, None),
        ("adamw", 0.02, 0.06),
        ("adamw", 0.05, None),
        ("adamw", 0.0, 0.01),
        ("muon", 0.05, 0.15),
        ("muon", 0.15, None),
    ],
)
def test_more_weight_decay_is_advised_where_it_acts(
    name: str, decay: float, more: float | None
) -> None:
    config = plain(optimizer=Optimizer(name=name, weight_decay=decay))
    found = settings(verdict(curves(train_top1=99.0), config))
    assert found.get("optimizer.weight_decay") == more


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "muon"])
@pytest.mark.parametrize(
    "curve",
    [
        {},
        {"train_top1": 99.0},
        {"train_top1": 50.0},
        {"excess": 0.5},
        {"train_loss": 0.95, "loss": 1.0, "gradient": 1.0},
        {"late_rise": 5.0, "steady": True},
        {"epochs": 1},
    ],
)
def test_every_suggestion_is_a_setting_with_another_valid_value(
    curve: dict[str, Any], optimizer: str
) -> None:
    config = plain(optimizer=Optimizer(name=optimizer, weight_decay=5e-4))
    for suggestion in verdict(curves(**curve), config).suggestions:
        assert configs.get(config, suggestion.setting) != suggestion.value
        changed = configs.from_dict(configs.to_dict(config))
        group, _, name = suggestion.setting.rpartition(".")
        setattr(configs.get(changed, group), name, suggestion.value)
        configs.validate(changed)


def test_one_evaluation_at_the_end_asks_for_more_of_them() -> None:
    lines = curves()
    last = [line for line in lines if line["split"] == "validation"][-1]
    found = verdict([line for line in lines if line["split"] == "train"] + [last])
    assert found.verdict == "too short to say"
    assert settings(found) == {"evaluation.every.epochs": EPOCHS / 4}


@pytest.mark.parametrize(("change", "judged"), [(0.2, True), (0.9, False)])
def test_a_rise_with_the_size_of_the_images_is_no_late_gain(change: float, judged: bool) -> None:
    config = plain()
    config.train.image_sizes, config.train.image_size_epochs = (32, 64), (change * EPOCHS,)
    found = verdict(curves(late_rise=5.0, train_top1=50.0), config)
    assert (found.evidence.late_gain > found.evidence.noise) == judged


def test_what_growing_images_hide_is_not_judged() -> None:
    """Loss and top-1 change with the size of the images, whatever the rate and the capacity."""
    config = plain()
    config.train.image_sizes, config.train.image_size_epochs = (32, 64), (0.9 * EPOCHS,)
    found = verdict(curves(train_top1=60.0, steady=True), config)
    assert found.verdict == "under-fitting"
    assert math.isnan(found.evidence.second_half)
    assert answers(found) == {
        "learning rate": "works",
        "regularisation": "cannot say",
        "dropout": "cannot say",
        "capacity": "cannot say",
    }
    assert settings(found) == {"train.length.epochs": 40, "model.dropout": 0.15}


def test_evidence_is_what_arithmetic_gives() -> None:
    rates = [0.1, 0.1, 0.1, 0.02]
    train = [
        {"step": 10 * n, "epoch": float(n), "split": "train", "loss": 2.5 - 0.5 * n}
        | {"top1": 10.0 * n, "learning_rate": rate, "gradient_norm": 4.0 / n}
        for n, rate in enumerate(rates, start=1)
    ]
    validation = [
        {"step": 10 * n, "epoch": float(n), "split": "validation", "loss": loss, "count": 2500}
        | {"top1": top1}
        for n, (loss, top1) in enumerate([(2.0, 20), (1.0, 60), (1.2, 55), (1.5, 50)], start=1)
    ]
    found = gather(
        [*train, *validation],
        plain(
            model=Model(aux_heads=True),
            train=Train(batch_size=100, length=Duration(epochs=8), aux_weight=0.3),
        ),
        classes=10,
        train_examples=1000,
    )
    assert found.done == 0.5
    # Two heads of weight 0.3: guessing costs 1.6 ln 10.
    assert found.train_loss == pytest.approx(0.5 / (1.6 * GUESSING))
    assert found.train_loss_fall == pytest.approx(1.5 / (1.6 * GUESSING))
    assert found.gradient_norm == pytest.approx(0.25)
    assert found.validation_loss_rise == pytest.approx(0.5 / GUESSING)
    assert found.validation_drop == 10
    assert found.noise == pytest.approx(2.0)  # 2 sqrt(0.5 * 0.5 / 2500)
    assert found.gap == pytest.approx(-10.0)
    assert found.error_share == pytest.approx(60 / 50)
    # The rate is high until epoch 3; a fifth of that is from 2.4, where top-1 is 58, to 3.
    assert found.late_gain == pytest.approx(55 - 58)
    # The rate sums up to 1, 2, 3 and 3.2; at 1.6 the loss is 1.7, of 2.0 to 0.5.
    assert found.second_half == pytest.approx((1.7 - 0.5) / 1.5)


def real(name: str) -> list[dict[str, Any]]:
    return read_lines(HERE / "curves" / f"{name}.jsonl")


def test_real_runs_of_known_faults() -> None:
    """On the digits at 5 and 5e-5, where 0.05 is right; and on 500 images without augmentation."""
    config = digits.get_config()
    config.schedule.learning_rate = 5.0
    found = diagnose(real("rate_too_high"), config, classes=10, train_examples=1437)
    assert found.verdict == "rate too high"
    assert settings(found)["schedule.learning_rate"] == 0.5
    config.schedule.learning_rate = 5e-5
    found = diagnose(real("rate_too_low"), config, classes=10, train_examples=1437)
    assert found.verdict == "rate too low"
    assert settings(found)["schedule.learning_rate"] == 5e-4
    config = dataclasses.replace(config, augment=Augment(crop="none"), model=Model(dropout=0.0))
    config.train = Train(batch_size=32, length=Duration(epochs=30))
    found = diagnose(real("over_fitting"), config, classes=10, train_examples=500)
    assert found.verdict == "over-fitting"
    assert answers(found)["capacity"] == "enough"


def test_three_real_epochs_of_tiny_imagenet_are_too_few() -> None:
    config = plain(train=Train(batch_size=128, length=Duration(epochs=3)))
    found = diagnose(real("three_epochs"), config, classes=200, train_examples=100_000)
    assert found.verdict == "under-fitting"
    assert found.suggestions[0].setting == "train.length.epochs"
    assert answers(found)["capacity"] == "cannot say"
    assert np.isfinite(found.evidence.gap)
