"""Training as a whole, on eight simulated devices: resume, evaluation, faults.

The network is `small.Network`: the loop is the same for every network, and the integration tests
run it with one of the package's own.
"""

import dataclasses
import errno
import functools
import itertools
import json
import os
import pathlib
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from inception_jax.config import Checkpoint, Model, Schedule, View
from inception_jax.errors import (
    CheckpointError,
    ConfigError,
    Preempted,
    RunError,
    UserError,
    WriteError,
)
from inception_jax.evaluation.evaluate import EvalResult, Evaluator, evaluate_checkpoint
from inception_jax.input import pipeline
from inception_jax.storage import append_only, integrity, lock
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry import clock, compilations
from inception_jax.telemetry.writers import MEASURED, read_lines
from inception_jax.training import checkpoints as checkpointing
from inception_jax.training import reporter, run, startup, state, step, workdir
from tests import small


class Stopped(BaseException):
    """Stands for a kill: nothing in the package catches it."""


@pytest.fixture(autouse=True, scope="module")
def compile_once() -> Iterator[None]:
    """Compiles the step of each run once, however often the run is started."""
    compiled: dict[run.Run, Any] = {}

    def compile_or_reuse(this: run.Run, *arguments: Any, first: int, **log: Any) -> Any:
        if this not in compiled:
            compiled[this] = step.compile_train_steps(this, *arguments, first=0, **log)
        return compiled[this]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(startup, "compile_train_steps", compile_or_reuse)
        yield


evaluator_of = functools.cache(Evaluator)


@pytest.fixture(scope="module")
def reference(
    data_directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[run.Run, Workdir]:
    """A run that never stopped."""
    this = small.build(small.config(data_directory))
    folder = Workdir(tmp_path_factory.mktemp("reference"))
    small.train(this, folder, evaluator_of(this), changed=[])
    return this, folder


def train_again(this: run.Run, folder: Workdir) -> dict[str, Any]:
    changed = workdir.check_compatible(workdir.previous(folder), this.config)
    return small.train(this, folder, evaluator_of(this), changed=changed)


def final_leaves(this: run.Run, folder: Workdir) -> list[tuple[str, np.ndarray]]:
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        step = saved.resolve("last")
        restored, _ = saved.restore(step, state.abstract_state(this))
    paths = jax.tree_util.tree_leaves_with_path(restored)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in paths]


def lines_without_timing(folder: Workdir) -> list[dict[str, Any]]:
    lines = read_lines(folder.path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines]


def assert_same(this: run.Run, folder: Workdir, reference: Workdir) -> None:
    expected = final_leaves(this, reference)
    found = final_leaves(this, folder)
    kinds = {re.split(r"\W", path)[1] for path, _ in found}
    assert kinds == {field.name for field in dataclasses.fields(state.TrainState)}
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


def test_the_run_is_recorded(reference: tuple[run.Run, Workdir]) -> None:
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
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    monkeypatch.setattr(reporter, "REPORT_SHARE", 1)  # However slow the machine is.
    seen = []

    def look(result: dict[str, Any], evaluated: EvalResult) -> None:
        assert not (tmp_path / "result.json").exists()
        last = [each for each in read_lines(tmp_path / "metrics.jsonl") if each["split"] == "test"][
            -1
        ]
        same = ("step", "epoch", "split", "loss", "top1", "top5", "count")
        assert {key: result[key] for key in same} == {key: last[key] for key in same}
        assert result["seconds_by_phase"]["train"] > 0
        assert evaluated.metrics["top1"] == pytest.approx(100 * evaluated.predictions.right.mean())
        seen.append(result["step"])

    folder = Workdir(tmp_path)
    small.train(this, folder, evaluator_of(this), changed=[], on_evaluation=look)
    assert seen == [5, 10, 11]
    assert "report" in json.loads(folder.result.read_text())["seconds_by_phase"]

    # Started once more it is finished: it evaluates again, and says so.
    folder.result.unlink()
    small.train(this, folder, evaluator_of(this), changed=[], on_evaluation=look)
    assert seen == [5, 10, 11, 11]


def test_an_evaluation_with_times_of_its_own_is_resumed_with_the_others(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, without = reference
    rare = View(split="train", examples=50, every="4 steps")
    monkeypatch.setattr(this.config, "evaluations", {"rare": rare})
    evaluator = Evaluator(this)
    whole, parts = Workdir(tmp_path / "whole"), Workdir(tmp_path / "parts")
    result = small.train(this, whole, evaluator, changed=[])
    lines = lines_without_timing(whole)
    found = [line for line in lines if line["split"] == "rare"]
    assert [line["step"] for line in found] == [4, 8, 11]
    # The run's own are as they were.
    assert [line for line in lines if line["split"] != "rare"] == lines_without_timing(without)
    assert result["evaluations"] == {
        "rare": {name: found[-1][name] for name in ("loss", "top1", "top5", "count")}
    }
    assert result["evaluations"]["rare"]["count"] == 50
    with monkeypatch.context() as patch:
        stop_before_step(9, patch)
        with pytest.raises(Stopped):
            small.train(this, parts, evaluator, changed=[])
    small.train(this, parts, evaluator, changed=[])
    assert_same(this, parts, whole)
    assert evaluate_checkpoint(this, parts, "last")["evaluations"] == result["evaluations"]


def test_reports_that_take_long_are_written_less_often_and_at_the_end(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    seconds = itertools.count()
    reports, cost = [], 0

    def show(result: dict[str, Any], _: EvalResult) -> None:
        nonlocal cost
        reports.append(result["step"])
        cost += 1000

    monkeypatch.setattr(
        startup, "Clock", functools.partial(clock.Clock, now=lambda: next(seconds) + cost)
    )
    monkeypatch.setattr(this.config.evaluation, "every", "2 steps")
    small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[], on_evaluation=show)
    assert reports == [2, 11]
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "test"] == [2, 4, 6, 8, 10, 11]


def test_training_learns(data_directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.train.duration = "12 epochs"
    config.log.every = "1 epoch"
    config.evaluation.every = config.checkpoint.every = "12 epochs"
    this = small.build(config)
    result = small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    losses = [
        line["loss"] for line in read_lines(tmp_path / "metrics.jsonl") if line["split"] == "train"
    ]
    assert losses[-1] < losses[0] / 2
    assert result["top1"] > 50  # A guess is 10.


def test_a_run_goes_on_from_records_to_the_same_bits(
    reference: tuple[run.Run, Workdir],
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, uninterrupted = reference
    folder = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(5, patch)
        with pytest.raises(Stopped):
            small.train(this, folder, evaluator_of(this), changed=[])
    config = small.config(data_directory)
    config.data.storage = "records"
    streamed = small.build(config)
    train_again(streamed, folder)
    assert_same(streamed, folder, uninterrupted)


# Before the first checkpoint (2), inside and at the edges of the intervals of checkpoints (2),
# reports (3), evaluations (5) and epochs (22.5), and with nothing left to do.
@pytest.mark.parametrize("step", [0, 1, 2, 3, 4, 5, 7, 10])
def test_a_stopped_run_ends_the_same(
    step: int,
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(step, patch)
        with pytest.raises(Stopped):
            train_again(this, folder)
    train_again(this, folder)
    assert_same(this, folder, expected)


# The first step, one with nothing due, one with a checkpoint due, and one with an evaluation due.
@pytest.mark.parametrize("step", [1, 7, 8, 5])
def test_a_run_that_is_asked_to_stop_saves_the_step(
    step: int, reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    with pytest.raises(Preempted, match=f"after step {step} of 11, which is saved"):
        small.train(this, folder, evaluator_of(this), changed=[], stop=lambda now: now == step)
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        assert saved.latest_step() == step
    assert not folder.result.exists()
    train_again(this, folder)
    assert_same(this, folder, expected)


def test_the_last_step_is_not_asked_to_stop(
    reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    asked: list[int] = []
    result = small.train(this, folder, evaluator_of(this), changed=[], stop=asked.append)
    assert asked == list(range(1, 11))
    assert result["step"] == 11
    assert_same(this, folder, expected)


def test_saving_does_not_tell_the_preemption_service_an_old_step(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    asked: list[int] = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    assert asked == []


def test_a_run_stopped_in_a_save_ends_the_same(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
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
    reference: tuple[run.Run, Workdir],
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
    which: str, reference: tuple[run.Run, Workdir]
) -> None:
    this, folder = reference
    result = evaluate_checkpoint(this, folder, which)
    evaluations = [line for line in lines_without_timing(folder) if line["split"] == "test"]
    most = max(line["top1"] for line in evaluations)
    # Of several that are equally good, any is the best.
    best = [line["step"] for line in evaluations if line["top1"] == most]
    assert result["step"] in {"best": best, "last": [11], "5": [5]}[which]
    role = result.pop("checkpoint")
    assert which in role if which != "5" else role in ("best", "")
    assert result == next(line for line in evaluations if line["step"] == result["step"])


def test_a_checkpoint_that_is_not_there_is_named(
    reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, folder = reference
    with pytest.raises(CheckpointError, match=r"no checkpoint '7'.*2, 4, 5, 6, 8, 10, 11"):
        evaluate_checkpoint(this, folder, "7")
    with pytest.raises(UserError, match="best, last or the number"):
        evaluate_checkpoint(this, folder, "worst")
    with pytest.raises(CheckpointError, match="no checkpoints here"):
        evaluate_checkpoint(this, Workdir(tmp_path), "last")


def test_the_last_and_the_best_checkpoints_are_kept(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(
        data_directory, checkpoint=Checkpoint(every="1 step", keep_last=2, keep_best=1)
    )
    this = small.build(config)
    # The evaluation at step 5 is the best.
    scores = iter([90.0, 50.0, 50.0])

    config.evaluation.train_eval_examples = 70

    def evaluate(_: state.Variables, names: Collection[str]) -> dict[str, EvalResult]:
        assert list(names) == ["test", "train_eval"]
        main = small.evaluated(["test"], loss=1.0, top1=next(scores), top5=99.0, count=360)
        return main | small.evaluated(["train_eval"], loss=0.5, top1=95.0, top5=99.0, count=70)

    small.train(this, Workdir(tmp_path), evaluate, changed=[])
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [5, 10, 11]
    lines = read_lines(tmp_path / "metrics.jsonl")
    sample = [(line["step"], line["count"]) for line in lines if line["split"] == "train_eval"]
    assert sample == [(5, 70), (10, 70), (11, 70)]


def test_another_rate_and_length_go_on_and_are_recorded(
    reference: tuple[run.Run, Workdir],
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    folder = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(4, patch)
        with pytest.raises(Stopped):
            train_again(this, folder)
    config = small.config(data_directory, schedule=Schedule(name="constant", learning_rate=0.01))
    config.train.duration = "6 steps"
    train_again(small.build(config), folder)
    lines = lines_without_timing(folder)
    assert lines[-1]["step"] == 6
    assert lines[-2]["learning_rate"] == pytest.approx(0.01)
    record = json.loads(folder.config.read_text())
    assert record["changes"][0]["step"] == 4
    expected = "config.schedule.learning_rate: 0.05 → 0.01"
    assert expected in record["changes"][0]["settings"]
    said = capsys.readouterr().err
    assert expected in said
    # A lower rate is no reason to warn. And the parameters are listed where the run begins only.
    assert "warning" not in said
    assert said.count("Total: ") == 1


@pytest.mark.slow
def test_a_finished_schedule_that_is_stretched_is_warned_of(
    reference: tuple[run.Run, Workdir],
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
) -> None:
    shutil.copytree(reference[1].path, tmp_path / "run")
    config = small.config(data_directory)
    config.train.duration = "20 steps"
    this = small.build(config)
    capsys.readouterr()
    train_again(this, Workdir(tmp_path / "run"))
    before, now = (f"{float(each.schedule(n)):.2g}" for each, n in ((reference[0], 10), (this, 11)))
    assert float(now) > 2 * float(before)
    said = capsys.readouterr().err
    assert f"warning: the learning rate rises from {before} to {now} at step 11, as" in said


@pytest.mark.slow
def test_compiling_is_said_with_what_it_takes(
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilations, "_file", lambda: tmp_path / "seconds.json")
    config = small.config(data_directory)
    this = dataclasses.replace(small.build(config), model=small.Linear())
    like, _ = state.lower_init(this)
    said: list[str] = []
    with futures.ThreadPoolExecutor(1) as background:
        for _ in range(2):
            steps = step.compile_train_steps(this, like, background, first=0, log=said.append)
            steps[8].result()
    assert said[0].startswith("training step for 8 px: compiling, or loading it from the")
    assert re.fullmatch(
        r"training step for 8 px: (compiled|loaded from the compilation cache) in \d+\.\d s",
        said[1],
    )
    # The program was kept, or is not worth it.
    (tmp_path / "seconds.json").write_text(
        json.dumps({f"training step for 8 px, {this.compile_kind()}": 33.3})
    )
    with futures.ThreadPoolExecutor(1) as background:
        step.compile_train_steps(this, like, background, first=0, log=said.append)
    assert "compiling (the first time about 33 s, as last measured), or" in "\n".join(said[4:])


@pytest.mark.slow
def test_a_run_that_is_made_shorter_than_it_is_just_reports(
    reference: tuple[run.Run, Workdir], data_directory: pathlib.Path
) -> None:
    _, folder = reference
    before = lines_without_timing(folder)
    config = small.config(data_directory)
    config.train.duration = "4 steps"
    result = train_again(small.build(config), folder)
    assert result["step"] == 11
    assert lines_without_timing(folder) == before


def test_a_loss_that_is_not_finite_stops_the_run(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(data_directory, schedule=Schedule(name="constant", learning_rate=1e30))
    this = small.build(config)
    with pytest.raises(RunError, match=r"not finite at step [12],") as error:
        small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    assert "learning_rate" in str(error.value)
    assert not (tmp_path / "result.json").exists()
    # The curves show it, too.
    assert read_lines(tmp_path / "metrics.jsonl")[-1]["loss"] is None


def test_the_last_good_checkpoint_outlives_a_loss_that_is_not_finite(
    reference: tuple[run.Run, Workdir],
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    folder = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        stop_before_step(4, patch)
        with pytest.raises(Stopped):
            train_again(this, folder)
    config = small.config(data_directory, schedule=Schedule(name="constant", learning_rate=1e30))
    # The first update leaves finite but senseless parameters, which the evaluation shows.
    with pytest.raises(RunError, match=r"the test loss was not finite at step 5,"):
        train_again(small.build(config), folder)
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        assert saved.latest_step() == 4
        restored, _ = saved.restore(4, state.abstract_state(this))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


# Storage that fails while a run is going on.


def fill_disk(patch: pytest.MonkeyPatch, *, steps: range) -> list[int]:
    """Makes writes fail while the training steps after so many finished ones are going on.

    Returns:
      A list that fills with the steps at which writing failed.
    """
    now, failed = [0], list[int]()
    whole = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(whole(*args, **kwargs), kwargs["start"]):
            now[0] = number
            yield batch

    def failing(write: Any, step_of: Callable[[Any], int]) -> Any:
        def write_or_fail(target: Any, *what: Any, **options: Any) -> None:
            if step_of(target) in steps:
                failed.append(step_of(target))
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(target, *what, **options)

        return write_or_fail

    patch.setattr(pipeline, "train_batches", batches)
    # A checkpoint is written in the background, while later steps are going on.
    saved = failing(integrity.write_manifest, lambda path: int(path.name.partition(".")[0]) - 1)
    patch.setattr(integrity, "write_manifest", saved)
    appended = append_only.AppendOnlyFile
    patch.setattr(appended, "append", failing(appended.append, lambda _: now[0]))
    return failed


def test_a_full_disk_stops_a_run_that_then_goes_on_to_the_same_bits(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        assert not fill_disk(patch, steps=range(5, 8))
        with pytest.raises(WriteError, match="No space left on device"):
            train_again(this, folder)
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        assert saved.resolve("last") == 5
    train_again(this, folder)
    assert_same(this, folder, expected)


def test_a_run_outlives_a_full_disk_where_it_is_told_to(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    monkeypatch.setattr(this.config.checkpoint, "on_write_error", "continue")
    with monkeypatch.context() as patch:
        failed = fill_disk(patch, steps=range(3, 8))
        small.train(this, folder, evaluator_of(this), changed=[])
    assert {3, 5, 7} <= set(failed)
    said = capsys.readouterr().err
    assert "No space left on device" in said and "Training goes on" in said
    there = sorted(int(path.name) for path in folder.checkpoints.iterdir())
    assert there == [2, 10, 11]
    assert_same(this, folder, expected)


def test_the_last_checkpoint_must_be_written(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    monkeypatch.setattr(this.config.checkpoint, "on_write_error", "continue")
    with monkeypatch.context() as patch:
        fill_disk(patch, steps=range(10, 11))
        with pytest.raises(WriteError, match="No space left on device"):
            train_again(this, folder)
    assert not folder.result.exists()
    train_again(this, folder)
    assert_same(this, folder, expected)


@pytest.mark.parametrize("stop_at", [7, 11])
def test_a_run_that_ends_without_its_checkpoint_says_so(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    """Stopped by a signal or done: that it outlives failures in between does not help it then."""
    this, _ = reference
    monkeypatch.setattr(this.config.checkpoint, "on_write_error", "continue")
    save = checkpointing.Checkpoints.save

    def fail(self: checkpointing.Checkpoints, state: Any, **more: Any) -> None:
        if int(state.step) == stop_at:
            raise WriteError("no space for the checkpoint")
        save(self, state, **more)

    monkeypatch.setattr(checkpointing.Checkpoints, "save", fail)
    with pytest.raises(WriteError, match="no space for the checkpoint"):
        small.train(
            this,
            Workdir(tmp_path),
            evaluator_of(this),
            changed=[],
            stop=lambda step: step == stop_at,
        )


def test_a_report_that_cannot_be_written_stops_no_run_that_is_told_to_go_on(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    monkeypatch.setattr(reporter, "REPORT_SHARE", 1)  # However slow the machine is.
    steps = []

    def show(result: dict[str, Any], _: EvalResult) -> None:
        steps.append(result["step"])
        if result["step"] < 11:
            raise WriteError("no space for a report")

    with pytest.raises(WriteError, match="no space for a report"):
        small.train(
            this,
            Workdir(tmp_path / "stop"),
            evaluator_of(this),
            changed=[],
            on_evaluation=show,
        )
    monkeypatch.setattr(this.config.checkpoint, "on_write_error", "continue")
    folder = Workdir(tmp_path / "continue")
    small.train(this, folder, evaluator_of(this), changed=[], on_evaluation=show)
    assert steps == [5, 5, 10, 11]


def test_a_folder_that_vanishes_stops_the_run_and_is_not_made_anew(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder, elsewhere = Workdir(tmp_path / "run"), tmp_path / "elsewhere"
    whole = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(whole(*args, **kwargs)):
            if number == 4:
                while not (folder.checkpoints / "4").exists():
                    time.sleep(0.01)
                folder.path.rename(elsewhere)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", batches)
        with pytest.raises(WriteError, match=r"run: .*removed"):
            train_again(this, folder)
    assert not folder.path.exists()
    elsewhere.rename(folder.path)
    train_again(this, folder)
    assert_same(this, folder, expected)


def test_a_damaged_checkpoint_costs_steps_and_no_bits(
    reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, expected = reference
    folder = Workdir(shutil.copytree(expected.path, tmp_path / "run"))
    largest = max((folder.checkpoints / "11").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert evaluate_checkpoint(this, folder, "last")["step"] == 10
    train_again(this, folder)
    assert (folder.checkpoints / "11.damaged").is_dir()
    assert_same(this, folder, expected)


def test_a_clock_that_jumps_changes_no_line(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    clock, offset = time.time, [0.0]
    whole = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(whole(*args, **kwargs)):
            if number in (4, 8):
                # Orbax opens its folders within a limit of its own.
                time.sleep(0.2)
                offset[0] = 1e5 if number == 4 else -1e5
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", batches)
        patch.setattr(time, "time", lambda: clock() + offset[0])
        patch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
        train_again(this, folder)
    assert_same(this, folder, expected)
    seconds = [line["seconds"] for line in read_lines(folder.path / "metrics.jsonl")]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 300


def test_a_second_trainer_is_refused(
    reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, expected = reference
    before = (expected.path / "metrics.jsonl").read_bytes()
    with (
        lock.lock_workdir(expected.path, print),
        pytest.raises(UserError, match="another process is training in this folder"),
    ):
        train_again(this, expected)
    assert (expected.path / "metrics.jsonl").read_bytes() == before


def test_evaluation_does_not_depend_on_the_batch_size(
    reference: tuple[run.Run, Workdir],
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
    config.train.ema, config.train.duration = "", "3 steps"
    this = small.build(config)
    result = small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    assert np.isfinite(result["loss"])
    assert evaluate_checkpoint(this, Workdir(tmp_path), "last")["loss"] == result["loss"]


@pytest.mark.slow
def test_progressive_resizing_goes_on_to_the_same_bits(
    data_directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.config(data_directory)
    # 11 steps of 64 of 1,437 examples are 0.49 epochs; the size changes after 5 steps.
    config.train.image_sizes, config.train.image_size_boundaries = (12, 8), ("0.2 epochs",)
    this = small.build(config)
    assert [this.train_image_size(step) for step in range(11)] == [12] * 5 + [8] * 6
    assert this.train_image_sizes(0) == [12, 8]
    assert (this.train_image_sizes(7), this.train_image_sizes(11)) == ([8], [])

    whole, parts = Workdir(tmp_path / "whole"), Workdir(tmp_path / "parts")
    small.train(this, whole, evaluator_of(this), changed=[])
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
        small.build(config)
    config = small.config(data_directory, model=Model(name="googlenet"))
    config.data.image_size = 32
    config.train.image_sizes, config.train.image_size_boundaries = (64, 24), ("0.1 epochs",)
    with pytest.raises(ConfigError, match=r"config\.train\.image_sizes = 24: .* at least 31 px"):
        small.build(config)
