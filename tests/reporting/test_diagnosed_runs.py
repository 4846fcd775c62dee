"""Short runs with a known fault, from training to the diagnosis, and its advice followed."""

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
    """Returns the settings of a run that learns, but for the groups given."""
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
    """Trains a run, and returns its diagnosis.

    Args:
      config: its settings.
      folder: its workdir.
      stop: the step after which it is interrupted; 0: none.
      frozen: whether evaluation takes the statistics that BatchNorm began with.
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


def test_mixing_and_smoothing_are_not_taken_for_a_fault(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The training objective stays high; and only the whole run is judged."""
    config = settings(data_directory)
    half = train(config, tmp_path, stop=STEPS // 2)
    assert half.verdict == "too short to judge"
    assert half.advice is None
    whole = train(config, tmp_path)
    assert whole.verdict in ("no fault found", "underfitting"), whole.lines()
    assert whole.evidence.top1 > 85
    if whole.advice:
        assert whole.advice.setting == "train.duration.steps"


def test_no_rate_is_guessed_where_nothing_was_learned(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = settings(data_directory, schedule=Schedule(name="constant", learning_rate=1e-9))
    diagnosis = train(config, tmp_path)
    assert diagnosis.verdict == "hardly learned", diagnosis.lines()
    assert diagnosis.advice is None
    assert "tools.find_lr" in "\n".join(diagnosis.lines())


def test_statistics_that_part_from_training_are_seen(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = settings(data_directory, augment=Augment(crop="none", flip=False))
    diagnosis = train(config, tmp_path, frozen=True)
    assert diagnosis.verdict == "evaluation differs from training", diagnosis.lines()
    assert diagnosis.evidence.running_top1 - diagnosis.evidence.train_top1 > 10
