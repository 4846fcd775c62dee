"""The training loop on eight simulated devices: resume, evaluation, faults.

The network is `small.Network`: the loop is the same for every network, and the integration tests
run it with a built-in one.
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

from inception_jax.config import Checkpoint, Init, Model, Schedule, View
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
from inception_jax.telemetry.writers import NONDETERMINISTIC_FIELDS, read_metrics
from inception_jax.training import checkpoints as checkpointing
from inception_jax.training import initialization, reporter, run, startup, state, step, workdir
from tests import small


class Stopped(BaseException):
    """Simulates a kill: nothing in the package catches it."""


@pytest.fixture(autouse=True, scope="module")
def compile_once() -> Iterator[None]:
    """Compiles the step of each run once, no matter how often the run is started."""
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
    changed = workdir.check_compatible(workdir.load_previous_run(folder), this.config)
    return small.train(this, folder, evaluator_of(this), changed=changed)


def final_leaves(this: run.Run, folder: Workdir) -> list[tuple[str, np.ndarray]]:
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        step = saved.resolve("last")
        restored, _ = saved.restore(step, state.abstract_state(this))
    paths = jax.tree_util.tree_leaves_with_path(restored)
    return [(jax.tree_util.keystr(path), np.asarray(leaf)) for path, leaf in paths]


def lines_without_timing(folder: Workdir) -> list[dict[str, Any]]:
    lines = read_metrics(folder.path / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in NONDETERMINISTIC_FIELDS} for line in lines]


def assert_same(this: run.Run, folder: Workdir, reference: Workdir) -> None:
    expected = final_leaves(this, reference)
    leaves = final_leaves(this, folder)
    kinds = {re.split(r"\W", path)[1] for path, _ in leaves}
    assert kinds == {field.name for field in dataclasses.fields(state.TrainState)}
    for (path, left), (_, right) in zip(expected, leaves, strict=True):
        assert left.tobytes() == right.tobytes(), path
    assert lines_without_timing(folder) == lines_without_timing(reference)


def stop_before_step(finished: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the input stop the process after a number of finished steps."""
    train_batches = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        remaining = max(0, finished - kwargs["start"])
        yield from itertools.islice(train_batches(*args, **kwargs), remaining)
        raise Stopped

    monkeypatch.setattr(pipeline, "train_batches", batches)


def test_metrics_and_result_are_written(reference: tuple[run.Run, Workdir]) -> None:
    _, folder = reference
    lines = read_metrics(folder.path / "metrics.jsonl")
    at = [(line["step"], line["split"]) for line in lines]
    # 11 steps of 64: a report every 3 and at the end, an evaluation every 5 and at the end.
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


def test_each_evaluation_is_published_once_it_is_on_disk(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    monkeypatch.setattr(reporter, "REPORT_TIME_FRACTION", 1)  # Even on a slow machine.
    seen = []

    def look(result: dict[str, Any], evaluated: EvalResult) -> None:
        assert not (tmp_path / "result.json").exists()
        last = [
            each for each in read_metrics(tmp_path / "metrics.jsonl") if each["split"] == "test"
        ][-1]
        same = ("step", "epoch", "split", "loss", "top1", "top5", "count")
        assert {key: result[key] for key in same} == {key: last[key] for key in same}
        assert result["seconds_by_phase"]["train"] > 0
        assert evaluated.metrics["top1"] == pytest.approx(
            100 * evaluated.predictions.correct.mean()
        )
        seen.append(result["step"])

    folder = Workdir(tmp_path)
    small.train(this, folder, evaluator_of(this), changed=[], on_evaluation=look)
    assert seen == [5, 10, 11]
    assert "report" in json.loads(folder.result.read_text())["seconds_by_phase"]

    # A finished run started again evaluates and publishes once more.
    folder.result.unlink()
    small.train(this, folder, evaluator_of(this), changed=[], on_evaluation=look)
    assert seen == [5, 10, 11, 11]


def test_evaluation_with_own_period_is_resumed(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, without = reference
    rare = View(split="train", examples=50, every="4 steps")
    same = View(split="train", examples=50, every="0 steps")  # As often as the main one.
    monkeypatch.setattr(this.config, "evaluations", {"rare": rare, "same": same})
    evaluator = Evaluator(this)
    full, resumed = Workdir(tmp_path / "full"), Workdir(tmp_path / "resumed")
    result = small.train(this, full, evaluator, changed=[])
    lines = lines_without_timing(full)
    others = {name: [line for line in lines if line["split"] == name] for name in ("rare", "same")}
    assert [line["step"] for line in others["rare"]] == [4, 8, 11]
    assert [line["step"] for line in others["same"]] == [5, 10, 11]
    # The main evaluations are unchanged.
    assert [line for line in lines if line["split"] not in others] == lines_without_timing(without)
    assert result["evaluations"] == {
        name: {key: rows[-1][key] for key in ("loss", "top1", "top5", "count")}
        for name, rows in others.items()
    }
    assert result["evaluations"]["rare"]["count"] == 50
    with monkeypatch.context() as patch:
        stop_before_step(9, patch)
        with pytest.raises(Stopped):
            small.train(this, resumed, evaluator, changed=[])
    small.train(this, resumed, evaluator, changed=[])
    assert_same(this, resumed, full)
    assert evaluate_checkpoint(this, resumed, "last")["evaluations"] == result["evaluations"]


def test_slow_reports_are_written_less_often_and_at_the_end(
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
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["split"] == "test"] == [2, 4, 6, 8, 10, 11]


def test_training_learns(data_directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.train.duration = "6 epochs"
    config.log.every = "1 epoch"
    config.evaluation.every = config.checkpoint.every = "6 epochs"
    this = small.build(config)
    result = small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    losses = [
        line["loss"]
        for line in read_metrics(tmp_path / "metrics.jsonl")
        if line["split"] == "train"
    ]
    assert losses[-1] < losses[0] / 2
    assert result["top1"] > 50  # Chance is 10.


def test_resume_from_records_is_bit_identical(
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


def test_resume_of_a_run_with_every_technique_is_bit_identical(
    data_directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init = Init(identity_convs=True, whiten=True, whiten_bias="4 steps")
    config = small.config(data_directory, init=init)
    # The second epoch begins at step 22.5.
    config.train.duration = "25 steps"
    config.augment.flip = config.augment.alternating_flip = True
    config.optimizer.norm_bias_lr_ratio = 4.0
    config.evaluations = {"shifted": View(shift_tta=1)}
    this = small.build(config)
    full, resumed = Workdir(tmp_path / "full"), Workdir(tmp_path / "resumed")
    small.train(this, full, evaluator_of(this), changed=[])
    for finished in (3, 23):  # Before and after the biases are frozen and the second epoch.
        with monkeypatch.context() as patch:
            stop_before_step(finished, patch)
            with pytest.raises(Stopped):
                train_again(this, resumed)
    # Alternating flips do not depend on how the images are stored.
    config.data.storage = "records"
    streamed = small.build(config)
    train_again(streamed, resumed)
    assert_same(streamed, resumed, full)
    first = initialization.create_state(this).params["conv1"]["conv"]["kernel"]
    kernels = dict(final_leaves(streamed, resumed))
    np.testing.assert_array_equal(kernels[".params['conv1']['conv']['kernel']"], first)


# Before the first checkpoint (2), within and at the boundaries of the intervals of checkpoints (2),
# reports (3), evaluations (5) and epochs (22.5), and with no steps remaining.
@pytest.mark.parametrize("step", [0, 2, 3, 4, 5, 7, 10])
def test_resume_is_bit_identical_at_every_kind_of_step(
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
def test_preempted_run_saves_its_step(
    step: int, reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    with pytest.raises(Preempted, match=f"after step {step} of 11; the state is saved"):
        small.train(this, folder, evaluator_of(this), changed=[], stop=lambda now: now == step)
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        assert saved.latest_step() == step
    assert not folder.result.exists()
    train_again(this, folder)
    assert_same(this, folder, expected)


def test_stop_is_not_queried_after_last_step(
    reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    asked: list[int] = []
    result = small.train(this, folder, evaluator_of(this), changed=[], stop=asked.append)
    assert asked == list(range(1, 11))
    assert result["step"] == 11
    assert_same(this, folder, expected)


def test_saving_does_not_query_preemption_service(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    asked: list[int] = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    assert asked == []


def test_resume_after_kill_during_save_is_bit_identical(
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
    # The evaluation at step 5 is already written; resuming from step 4 must not write it twice.
    assert lines_without_timing(folder)[-1]["step"] == 5
    train_again(this, folder)
    assert_same(this, folder, expected)


def test_finished_run_is_not_trained_again(
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
def test_checkpoint_evaluation_equals_evaluation_in_training(
    which: str, reference: tuple[run.Run, Workdir]
) -> None:
    this, folder = reference
    result = evaluate_checkpoint(this, folder, which)
    evaluations = [line for line in lines_without_timing(folder) if line["split"] == "test"]
    most = max(line["top1"] for line in evaluations)
    # Among ties, any is the best.
    best = [line["step"] for line in evaluations if line["top1"] == most]
    assert result["step"] in {"best": best, "last": [11], "5": [5]}[which]
    role = result.pop("checkpoint")
    assert which in role if which != "5" else role in ("best", "")
    assert result == next(line for line in evaluations if line["step"] == result["step"])


def test_missing_checkpoint_is_named(
    reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    this, folder = reference
    with pytest.raises(CheckpointError, match=r"no checkpoint '7'.*2, 4, 5, 6, 8, 10, 11"):
        evaluate_checkpoint(this, folder, "7")
    with pytest.raises(UserError, match="best, last or a step number"):
        evaluate_checkpoint(this, folder, "worst")
    with pytest.raises(CheckpointError, match="no checkpoints found"):
        evaluate_checkpoint(this, Workdir(tmp_path), "last")


def test_last_and_best_checkpoints_are_kept(
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
        main = small.fake_results(["test"], loss=1.0, top1=next(scores), top5=99.0, count=360)
        return main | small.fake_results(["train_eval"], loss=0.5, top1=95.0, top5=99.0, count=70)

    small.train(this, Workdir(tmp_path), evaluate, changed=[])
    kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert kept == [5, 10, 11]
    lines = read_metrics(tmp_path / "metrics.jsonl")
    sample = [(line["step"], line["count"]) for line in lines if line["split"] == "train_eval"]
    assert sample == [(5, 70), (10, 70), (11, 70)]


def test_changed_rate_and_length_are_used_and_recorded_on_resume(
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
    log = capsys.readouterr().err
    assert expected in log
    # A lower rate gives no warning, and parameters are listed only at the start of a run.
    assert "warning" not in log
    assert log.count("Total: ") == 1


@pytest.mark.slow
def test_stretching_a_finished_schedule_logs_warning(
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
    log = capsys.readouterr().err
    assert f"warning: the learning rate rises from {before} to {now} at step 11 because" in log


def test_evaluation_is_compiled_after_the_first_step(
    reference: tuple[run.Run, Workdir], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this, _ = reference
    events: list[str] = []
    compile_train_steps = vars(startup)["compile_train_steps"]  # That of `compile_once`.

    def recorded(*arguments: Any, **more: Any) -> dict[int, futures.Future[Any]]:
        def record(step: Any) -> Any:
            def run_step(*arguments: Any) -> Any:
                result = jax.block_until_ready(step(*arguments))
                events.append("step")
                return result

            return run_step

        steps: dict[int, futures.Future[Any]] = {}
        for size, compiled in compile_train_steps(*arguments, **more).items():
            steps[size] = futures.Future()
            steps[size].set_result(record(compiled.result()))
        return steps

    class Recorded:
        def compile(self, variables: Any) -> None:
            events.append("compile")

        def __call__(self, variables: Any, names: Collection[str]) -> Any:
            events.append("evaluate")
            return evaluator_of(this)(variables, names)

    monkeypatch.setattr(startup, "compile_train_steps", recorded)
    small.train(this, Workdir(tmp_path / "run"), Recorded())
    assert events[:1] == ["step"] and events.count("compile") == 1
    assert events.index("compile") < events.index("evaluate")


@pytest.mark.slow
def test_compilation_is_logged_with_its_time(
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compilations, "_seconds_file", lambda: tmp_path / "seconds.json")
    config = small.config(data_directory)
    this = dataclasses.replace(small.build(config), model=small.Linear())
    abstract, _ = state.lower_init(this)
    log: list[str] = []
    with futures.ThreadPoolExecutor(1) as background:
        for _ in range(2):
            steps = step.compile_train_steps(this, abstract, background, first=0, log=log.append)
            steps[8].result()
    assert log[0].startswith("training step for 8 px: compiling, or loading from the")
    assert re.fullmatch(
        r"training step for 8 px: (compiled|loaded from the compilation cache) in \d+\.\d s",
        log[1],
    )
    # The second time it is loaded from the cache, or compiles too fast to be cached.
    (tmp_path / "seconds.json").write_text(
        json.dumps({f"training step for 8 px, {this.compilation_key()}": 33.3})
    )
    with futures.ThreadPoolExecutor(1) as background:
        step.compile_train_steps(this, abstract, background, first=0, log=log.append)
    assert "compiling (about 33 s last time), or" in "\n".join(log[4:])


def test_failed_compilation_of_a_later_size_is_logged_at_once(
    data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: 96 px")

    monkeypatch.setattr(compilations, "compile_and_log", fail)
    this = dataclasses.replace(small.build(small.config(data_directory)), model=small.Linear())
    abstract, _ = state.lower_init(this)
    log: list[str] = []
    with futures.ThreadPoolExecutor(1) as background:
        step.compile_train_steps(this, abstract, background, first=0, log=log.append)
    assert (
        log[-1]
        == "training step for 8 px: compiling failed: RuntimeError: RESOURCE_EXHAUSTED: 96 px"
    )


@pytest.mark.slow
def test_run_shortened_below_its_step_only_reports(
    reference: tuple[run.Run, Workdir], data_directory: pathlib.Path
) -> None:
    _, folder = reference
    before = lines_without_timing(folder)
    config = small.config(data_directory)
    config.train.duration = "4 steps"
    result = train_again(small.build(config), folder)
    assert result["step"] == 11
    assert lines_without_timing(folder) == before


def test_run_shortened_to_a_step_without_evaluation_reports_one(
    reference: tuple[run.Run, Workdir], data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    this, folder = reference[0], Workdir(tmp_path)
    with pytest.raises(Preempted):
        small.train(this, folder, evaluator_of(this), changed=[], stop=lambda now: now == 4)
    config = small.config(data_directory)
    config.train.duration = "3 steps"
    result = train_again(small.build(config), folder)
    for _ in range(2):
        rows = [line for line in lines_without_timing(folder) if line["split"] != "train"]
        assert [(row["step"], row["top1"]) for row in rows] == [(4, result["top1"])]
        train_again(small.build(config), folder)


def test_nonfinite_loss_stops_run(data_directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small.config(data_directory, schedule=Schedule(name="constant", learning_rate=1e30))
    this = small.build(config)
    with pytest.raises(RunError, match=r"not finite at step [12],") as error:
        small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    assert "learning_rate" in str(error.value)
    assert not (tmp_path / "result.json").exists()
    # The curves also show it.
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] is None


def test_last_finite_checkpoint_survives_nonfinite_loss(
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
    # The first update gives finite but useless parameters, which the evaluation reveals.
    with pytest.raises(RunError, match=r"the test loss was not finite at step 5,"):
        train_again(small.build(config), folder)
    with checkpointing.Checkpoints(folder.checkpoints, read_only=True) as saved:
        assert saved.latest_step() == 4
        restored, _ = saved.restore(4, state.abstract_state(this))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(restored.params))


# Storage failures during a run.


def fill_disk(patch: pytest.MonkeyPatch, *, steps: range) -> list[int]:
    """Makes writes fail during the given training steps.

    Returns:
      A list that receives the steps at which writing failed.
    """
    now, failed = [0], list[int]()
    train_batches = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(train_batches(*args, **kwargs), kwargs["start"]):
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
    # A checkpoint is written in the background, during later steps.
    saved = failing(integrity.write_manifest, lambda path: int(path.name.partition(".")[0]) - 1)
    patch.setattr(integrity, "write_manifest", saved)
    appended = append_only.AppendOnlyFile
    patch.setattr(appended, "append", failing(appended.append, lambda _: now[0]))
    return failed


def test_resume_after_full_disk_is_bit_identical(
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


def test_run_continues_on_full_disk_if_configured(
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
    log = capsys.readouterr().err
    assert "No space left on device" in log and "Training continues" in log
    steps = sorted(int(path.name) for path in folder.checkpoints.iterdir())
    assert steps == [2, 10, 11]
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
def test_failed_final_checkpoint_is_raised(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    stop_at: int,
) -> None:
    """Whether stopped by a signal or finished, even if earlier failures are tolerated."""
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


def test_failed_report_does_not_stop_run_if_configured(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, _ = reference
    monkeypatch.setattr(reporter, "REPORT_TIME_FRACTION", 1)  # Even on a slow machine.
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


def test_removed_workdir_stops_run_and_is_not_recreated(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder, elsewhere = Workdir(tmp_path / "run"), tmp_path / "elsewhere"
    train_batches = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(train_batches(*args, **kwargs)):
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


def test_resume_after_corrupt_checkpoint_is_bit_identical(
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


def test_clock_jumps_change_no_metrics(
    reference: tuple[run.Run, Workdir],
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    this, expected = reference
    folder = Workdir(tmp_path)
    clock, offset = time.time, [0.0]
    train_batches = pipeline.train_batches

    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        for number, batch in enumerate(train_batches(*args, **kwargs)):
            if number in (4, 8):
                # Orbax has its own timeout for creating directories.
                time.sleep(0.2)
                offset[0] = 1e5 if number == 4 else -1e5
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_batches", batches)
        patch.setattr(time, "time", lambda: clock() + offset[0])
        patch.setattr(time, "time_ns", lambda: int(time.time() * 1e9))
        train_again(this, folder)
    assert_same(this, folder, expected)
    seconds = [line["seconds"] for line in read_metrics(folder.path / "metrics.jsonl")]
    assert seconds == sorted(seconds) and 0 < seconds[-1] < 300


def test_second_trainer_is_rejected(
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


def test_run_without_ema_trains_and_evaluates(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(data_directory)
    config.train.ema, config.train.duration = "", "3 steps"
    this = small.build(config)
    result = small.train(this, Workdir(tmp_path), evaluator_of(this), changed=[])
    assert np.isfinite(result["loss"])
    assert evaluate_checkpoint(this, Workdir(tmp_path), "last")["loss"] == result["loss"]


@pytest.mark.slow
def test_resume_with_progressive_resizing_is_bit_identical(
    data_directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small.config(data_directory)
    # 11 steps of 64 of 1,437 examples are 0.49 epochs; the size changes after 5 steps.
    config.train.image_sizes, config.train.image_size_boundaries = (12, 8), ("0.2 epochs",)
    this = small.build(config)
    assert [this.train_image_size(step) for step in range(11)] == [12] * 5 + [8] * 6
    assert this.train_image_sizes(0) == [12, 8]
    assert (this.train_image_sizes(7), this.train_image_sizes(11)) == ([8], [])

    full, resumed = Workdir(tmp_path / "full"), Workdir(tmp_path / "resumed")
    small.train(this, full, evaluator_of(this), changed=[])
    with monkeypatch.context() as patch:
        stop_before_step(7, patch)
        with pytest.raises(Stopped):
            train_again(this, resumed)
    train_again(this, resumed)
    assert_same(this, resumed, full)


def test_image_size_that_the_run_never_reaches_is_logged(data_directory: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.train.image_sizes, config.train.image_size_boundaries = (12, 8), ("5 epochs",)
    config.train.duration, lines = "11 steps", list[str]()
    run.assemble(config, log=lines.append)
    assert "config.train.image_sizes: the run ends before its boundary to 8 px" in lines


def test_too_small_image_size_is_rejected_at_start(
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
