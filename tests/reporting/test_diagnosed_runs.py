"""Short runs with known faults, from training to the diagnosis."""

import contextlib
import pathlib
from collections.abc import Collection
from typing import Any

import pytest

from inception_jax.config import Augment, Config, Evaluation, Log, Model, Schedule, Train
from inception_jax.errors import Preempted
from inception_jax.evaluation.evaluate import EvalResult, Evaluator
from inception_jax.reporting import report
from inception_jax.reporting.diagnosis import Diagnosis
from inception_jax.storage.workdir import Workdir
from inception_jax.training import state
from tests import small

pytestmark = pytest.mark.slow

STEPS = 90


def settings(directory: pathlib.Path, **groups: Any) -> Config:
    """Returns the settings of a run that learns, with some groups replaced."""
    return small.config(
        directory,
        **{
            "augment": Augment(crop="none", flip=False, mixup=0.2),
            "model": Model(name="mini_googlenet", dropout=0.0),
            "schedule": Schedule(name="cosine", learning_rate=0.1),
            "train": Train(batch_size=64, duration=f"{STEPS} steps", label_smoothing=0.1),
            "evaluation": Evaluation(batch_size=360, every="15 steps", train_eval_examples=360),
            "log": Log(every="5 steps"),
        }
        | groups,
    )


def train(
    config: Config, folder: pathlib.Path, *, stop: int = 0, frozen: bool = False
) -> Diagnosis:
    """Trains a run and returns its diagnosis.

    Args:
      config: the settings.
      folder: the workdir.
      stop: step after which the run is interrupted; 0: not interrupted.
      frozen: whether evaluation uses the initial BatchNorm statistics.
    """
    this = small.build(config)
    evaluator, start = Evaluator(this), state.create(this).batch_stats

    def evaluate(variables: Any, names: Collection[str]) -> dict[str, EvalResult]:
        if frozen:
            variables = {**variables, "batch_stats": start}
        return evaluator(variables, names)

    with contextlib.suppress(Preempted):
        small.train(this, Workdir(folder), evaluate, changed=[], stop=lambda step: step == stop)
    return report.write_diagnosis(folder)


def test_mixing_and_smoothing_are_not_diagnosed_as_faults(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The training objective stays high; only the complete run is judged."""
    config = settings(data_directory)
    half = train(config, tmp_path, stop=STEPS // 2)
    assert half.verdict == "too short to judge"
    assert half.advice is None
    complete = train(config, tmp_path)
    assert complete.verdict in ("no fault found", "underfitting"), complete.lines()
    assert complete.evidence.top1 > 85
    if complete.advice:
        assert complete.advice.setting == "train.duration"


def test_no_learning_rate_is_advised_if_nothing_was_learned(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = settings(data_directory, schedule=Schedule(name="constant", learning_rate=1e-9))
    diagnosis = train(config, tmp_path)
    assert diagnosis.verdict == "hardly learned", diagnosis.lines()
    assert diagnosis.advice is None
    assert "tools.find_lr" in "\n".join(diagnosis.lines())


def test_wrong_eval_statistics_are_detected(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = settings(data_directory, augment=Augment(crop="none", flip=False))
    diagnosis = train(config, tmp_path, frozen=True)
    assert diagnosis.verdict == "evaluation differs from training", diagnosis.lines()
    assert diagnosis.evidence.running_top1 - diagnosis.evidence.train_top1 > 10
