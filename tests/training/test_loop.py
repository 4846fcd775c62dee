"""Training as a whole, on eight simulated devices: resume, evaluation, faults."""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from inception_jax.config import Checkpoint, Duration, Model, Schedule
from inception_jax.errors import CheckpointError, ConfigError, RunError, UserError
from inception_jax.evaluation.evaluate import Evaluator, evaluate_checkpoint
from inception_jax.input import pipeline
from inception_jax.input.splits import Split
from inception_jax.telemetry.writers import MEASURED, read_lines
from inception_jax.training import checkpoints as checkpointing
from inception_jax.training import loop, run, state, step, workdir
from tests import small


class Stopped(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.fixture(autouse=True, scope="module")
def compile_once() -> Iterator[None]:
    """Compiles the step of each run once, however often the run is started."""
    compiled: dict[run.Run, Any] = {}

    def compile_or_reuse(this: run.Run, *arguments: Any, first: int) -> Any:
        if this not in compiled:
            compiled[this] = step.compile_train_steps(this, *arguments, first=0)
        return compiled[this]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_steps", compile_or_reuse)
        yield


evaluator_of = functools.cache(Evaluator)


@pytest.fixture(scope="module")
def reference(
    data_directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[run.Run, workdir.Workdir]:
    """A run that never stopped."""
    this = run.build(small.config(data_directory), log=lambda _: None)
    folder = workdir.Workdir(tmp_path_factory.mktemp("reference"))
    loop.train(this, folder, evaluator_of(this), changed=[])
    return this, folder


def train_again(this: run.Run, folder: workdir.Workdir) -> dict[str, Any]:
    changed = workdir.check_owner(folder, this.config)
    return loop.train(this, folder, evaluator_of(this), changed=changed)


def final_leaves(this: run.Run, folder: workdir.Workdir) -> list[tuple[str, np.ndarray]]:
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        step = saved.resolve("last")
        restored, _ = saved.restore(step, state.abstract(this))
    paths = jax.tree_util.tree_leaves_with_path(restored)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in paths]


def lines_without_timing(folder: workdir.Workdir) -> list[dict[str, Any]]:
    lines = read_lines(folder.path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def assert_same(this: run.Run, folder: workdir.Workdir, reference: workdir.Workdir) -> None:
    expected = final_leaves(this, reference)
    found = final_leaves(this, folder)
    assert len(found) > 100
    for (path, left), (_, right) in zip(expected, found, strict=True):
        assert left.tobytes() == right.tobytes(), path
    assert lines_without_timing(folder) == lines_without_timing(reference)


def stop_before_step(finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the input of the training step after so many finished ones stop the process."""
    whole = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        left = max(0, finished - kwargs["start"])
        yield from itertools.islice(whole(*args, **kwargs), left)
        raise Stopped

    monkeypatch.setattr(pipeline, "train_batches", batches)


def test_the_run_is_recorded(reference: tuple[run.Run, workdir.Workdir]) -> None:
    _, folder = reference
    lines = read_lines(folder.path / "metrics.jsonl")
    at = [(line["step"], line["split"]) for line in lines]
    # 11 steps of 64: a report each 3 and at the end, an evaluation each 5 and at the end.
    train, test = "train", "test"
    expected = [(3, train), (5, test), (6, train), (9, train), (10, test), (11, train), (11, test)]
    assert at == expected
    for line in lines:
        names = {"step", "epoch", "split", "loss", "top1", "top5", "seconds"}
        assert names <= set(line)
        assert line["epoch"] == line["step"] * 64 / 1437
        assert ("learning_rate" in line) == (line["split"] == "train")
    assert lines[0]["learning_rate"] == pytest.approx(0.05)
    assert all(line["count"] == 360 for line in lines if line["split"] == test)

    result = json.loads((folder.path / "result.json").read_text())
    last = lines[-1]
    assert {k: result[k] for k in ("step", "split", "count", "loss", "top1", "top5")} == {
        k: last[k] for k in ("step", "split", "count", "loss", "top1", "top5")
    }
    assert result["images_per_second"] > 0
    assert result["seconds"] >= sum(result["seconds_by_phase"].values()) * 0.99


def test_each_evaluation_is_handed_on_once_it_is_on_disk(
    reference: tuple[run.Run, workdir.Workdir], tmp_path: pathlib.Path
) -> None:
    this, _ = reference
    seen = []

    def look(result: dict[str, Any]) -> None:
        assert not (tmp_path / "result.json").exists()
        last = [each for each in read_lines(tmp_path / "metrics.jsonl") if each["split"] == "test"][
            -1
        ]
        same = ("step", "epoch", "split", "loss", "top1", "top5", "count")
        assert {key: result[key] for key in same} == {key: last[key] for key in same}
        assert result["seconds_by_phase"]["train"] > 0
        seen.append(result["step"])

    folder = workdir.Workdir(tmp_path)
    loop.train(this, folder, evaluator_of(this), changed=[], on_evaluation=look)
    assert seen == [5, 10, 11]
    assert "report" in json.loads(folder.result.read_text())["seconds_by_phase"]

    # Started once more it is finished: it evaluates again, and says so.
    folder.result.unlink()
    loop.train(this, folder, evaluator_of(this), changed=[], on_evaluation=look)
    assert seen == [5, 10, 11, 11]


def test_training_learns(data_directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.train.length = Duration(epochs=4)
    config.log.every = Duration(epochs=1)
    config.evaluation.every = config.checkpoint.every = Duration(epochs=4)
    this = run.build(config, log=lambda _: None)
    result = loop.train(this, workdir.Workdir(tmp_path), evaluator_of(this), changed=[])
    losses = [
        line["loss"] for line in read_lines(tmp_path / "metrics.jsonl") if line["split"] == "train"
    ]
    assert losses[-1] < losses[0] / 2
    assert result["top1"] > 50  # A guess is 10.


def test_a_run_goes_on_from_records_to_the_same_bits(
    reference: tuple[run.Run, workdir.Workdir],
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, uninterrupted = reference
    folder = workdir.Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(5, patch)
        with pytest.raises(Stopped):
            loop.train(this, folder, evaluator_of(this), changed=[])
    config = small.config(data_directory)
    config.data.storage = "records"
    streamed = run.build(config, log=lambda _: None)
    train_again(streamed, folder)
    assert_same(streamed, folder, uninterrupted)


# Before the first checkpoint (2), inside and at the edges of the intervals of checkpoints (2),
# reports (3), evaluations (5) and epochs (22.5), and with nothing left to do.
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5, 7, 10])
def test_a_stopped_run_ends_the_same(
    step: int,
    reference: tuple[run.Run, workdir.Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = workdir.Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(step, patch)
        with pytest.raises(Stopped):
            train_again(this, folder)
    train_again(this, folder)
    assert_same(this, folder, expected)


def test_a_run_stopped_in_a_save_ends_the_same(
    reference: tuple[run.Run, workdir.Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = workdir.Workdir(tmp_path)
    save = checkpointing.Checkpoints.save

    def stop_at_5(self: Any, state: Any, **kwargs: Any) -> None:
        if int(state.step) == 5:
            raise Stopped
        save(self, state, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing.Checkpoints, "save", stop_at_5)
        with pytest.raises(Stopped):
            train_again(this, folder)
    # The evaluation at step 5 was written already; resuming from step 4 must not write it twice.
    assert lines_without_timing(folder)[-1]["step"] == 5
    train_again(this, folder)
    assert_same(this, folder, expected)


def test_a_finished_run_is_not_trained_again(
    reference: tuple[run.Run, workdir.Workdir],
) -> None:
    this, folder = reference
    before = lines_without_timing(folder)
    result = json.loads(folder.result.read_text())
    folder.result.unlink()
    again = train_again(this, folder)
    assert lines_without_timing(folder) == before
    assert {k: again[k] for k in ("step", "loss", "top1")} == {
        k: result[k] for k in ("step", "loss", "top1")
    }


@pytest.mark.parametrize("which", ["best", "last", "5"])
def test_a_checkpoint_evaluates_as_training_did(
    which: str, reference: tuple[run.Run, workdir.Workdir]
) -> None:
    this, folder = reference
    result = evaluate_checkpoint(this, folder, which)
    evaluations = [line for line in lines_without_timing(folder) if line["split"] == "test"]
    best = max(evaluations, key=lambda line: line["top1"])["step"]
    assert result["step"] == {"best": best, "last": 11, "5": 5}[which]
    assert result == next(line for line in evaluations if line["step"] == result["step"])


def test_a_checkpoint_that_is_not_there_is_named(
    reference: tuple[run.Run, workdir.Workdir], tmp_path: pathlib.Path
) -> None:
    this, folder = reference
    with pytest.raises(CheckpointError, match=r"no checkpoint '7'.*2, 4, 5, 6, 8, 10, 11"):
        evaluate_checkpoint(this, folder, "7")
    with pytest.raises(UserError, match="best, last or the number"):
        evaluate_checkpoint(this, folder, "worst")
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        evaluate_checkpoint(this, workdir.Workdir(tmp_path), "last")


def test_the_last_and_the_best_checkpoints_are_kept(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(
        data_directory, checkpoint=Checkpoint(every=Duration(steps=1), keep_last=2, keep_best=1)
    )
    this = run.build(config, log=lambda _: None)
    # The evaluation at step 5 is the best.
    scores = iter([90.0, 50.0, 50.0])

    config.evaluation.train_examples = 70

    def evaluate(variables: state.Variables, split: Split) -> dict[str, float]:
        if split is this.dataset.evaluation:
            return {"loss": 1.0, "top1": next(scores), "top5": 99.0, "count": 360}
        return {"loss": 0.5, "top1": 95.0, "top5": 99.0, "count": len(split)}

    loop.train(this, workdir.Workdir(tmp_path), evaluate, changed=[])
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [5, 10, 11]
    lines = read_lines(tmp_path / "metrics.jsonl")
    sample = [(line["step"], line["count"]) for line in lines if line["split"] == "train_eval"]
    assert sample == [(5, 70), (10, 70), (11, 70)]


def test_another_rate_and_length_go_on_and_are_recorded(
    reference: tuple[run.Run, workdir.Workdir],
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    folder = workdir.Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(4, patch)
        with pytest.raises(Stopped):
            train_again(this, folder)
    config = small.config(data_directory, schedule=Schedule(name="constant", learning_rate=0.01))
    config.train.length = Duration(steps=6)
    train_again(run.build(config, log=lambda _: None), folder)
    lines = lines_without_timing(folder)
    assert lines[-1]["step"] == 6
    assert lines[-2]["learning_rate"] == pytest.approx(0.01)
    record = json.loads(folder.config.read_text())
    assert record["changes"][0]["step"] == 4
    expected = "config.schedule.learning_rate: 0.05 → 0.01"
    assert expected in record["changes"][0]["settings"]
    assert expected in capsys.readouterr().err


def test_a_run_that_is_made_shorter_than_it_is_just_reports(
    reference: tuple[run.Run, workdir.Workdir], data_directory: pathlib.Path
) -> None:
    _, folder = reference
    before = lines_without_timing(folder)
    config = small.config(data_directory)
    config.train.length = Duration(steps=4)
    result = train_again(run.build(config, log=lambda _: None), folder)
    assert result["step"] == 11
    assert lines_without_timing(folder) == before


def test_a_loss_that_is_not_finite_stops_the_run(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(data_directory, schedule=Schedule(name="constant", learning_rate=1e30))
    this = run.build(config, log=lambda _: None)
    with pytest.raises(RunError, match=r"not finite at step [12],") as error:
        loop.train(this, workdir.Workdir(tmp_path), evaluator_of(this), changed=[])
    assert "learning_rate" in str(error.value)
    assert not (tmp_path / "result.json").exists()
    # The curves show it, too.
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["loss"] is None


def test_the_last_good_checkpoint_outlives_a_loss_that_is_not_finite(
    reference: tuple[run.Run, workdir.Workdir],
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    folder = workdir.Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(4, patch)
        with pytest.raises(Stopped):
            train_again(this, folder)
    config = small.config(data_directory, schedule=Schedule(name="constant", learning_rate=1e30))
    # The first update leaves finite but senseless parameters, which the evaluation shows.
    with pytest.raises(RunError, match=r"the test loss was not finite at step 5,"):
        train_again(run.build(config, log=lambda _: None), folder)
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        assert saved.latest_step() == 4
        restored, _ = saved.restore(4, state.abstract(this))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


def test_evaluation_does_not_depend_on_the_batch_size(
    reference: tuple[run.Run, workdir.Workdir],
) -> None:
    this, folder = reference
    results = []
    for batch_size in (7, 64, 1000):
        config = dataclasses.replace(this.config)
        config.evaluation = dataclasses.replace(config.evaluation, batch_size=batch_size)
        other = dataclasses.replace(this, config=config)
        results.append(evaluate_checkpoint(other, folder, "last"))
    for result in results:
        assert result["count"] == 360
        assert result["top1"] == results[0]["top1"]
        assert result["top5"] == results[0]["top5"]
        assert result["loss"] == pytest.approx(results[0]["loss"], rel=1e-5)


def test_a_run_without_average_trains_and_evaluates(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(data_directory)
    config.train.ema, config.train.length = Duration(), Duration(steps=3)
    this = run.build(config, log=lambda _: None)
    result = loop.train(this, workdir.Workdir(tmp_path), evaluator_of(this), changed=[])
    assert np.isfinite(result["loss"])
    assert evaluate_checkpoint(this, workdir.Workdir(tmp_path), "last")["loss"] == result["loss"]


def test_progressive_resizing_goes_on_to_the_same_bits(
    data_directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.config(data_directory)
    # 11 steps of 64 of 1,437 examples are 0.49 epochs; the size changes after 5 steps.
    config.train.image_sizes, config.train.image_size_epochs = (12, 8), (0.2,)
    this = run.build(config, log=lambda _: None)
    assert [this.train_image_size(step) for step in range(11)] == [12] * 5 + [8] * 6
    assert this.train_image_sizes(0) == [12, 8]
    assert (this.train_image_sizes(7), this.train_image_sizes(11)) == ([8], [])

    whole, parts = workdir.Workdir(tmp_path / "whole"), workdir.Workdir(tmp_path / "parts")
    loop.train(this, whole, evaluator_of(this), changed=[])
    with monkeypatch.context() as patch:
        stop_before_step(7, patch)
        with pytest.raises(Stopped):
            train_again(this, parts)
    train_again(this, parts)
    assert_same(this, parts, whole)


def test_an_image_size_that_is_too_small_is_refused_before_it_is_reached(
    data_directory: pathlib.Path,
) -> None:
    config = small.config(data_directory)
    config.evaluation.image_size = 3
    with pytest.raises(ConfigError, match=r"config\.evaluation\.image_size = 3: .* at least 4 px"):
        run.build(config, log=lambda _: None)
    config = small.config(data_directory, model=Model(name="googlenet"))
    config.train.image_sizes, config.train.image_size_epochs = (64, 24), (0.1,)
    with pytest.raises(ConfigError, match=r"config\.train\.image_sizes = 24: .* at least 31 px"):
        run.build(config, log=lambda _: None)
