"""Handling of non-finite losses and gradients."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.config import Augment, Checkpoint, Log, Optimizer, Schedule, Train
from inception_jax.errors import RunError
from inception_jax.evaluation.evaluate import EvalResult
from inception_jax.input import pipeline
from inception_jax.models.layers import Classifier, ModelOutput
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import NONDETERMINISTIC_FIELDS, read_metrics
from inception_jax.training import (
    checkpoints,
    gradients,
    keys,
    nonfinite,
    run,
    state,
    step,
)
from inception_jax.training.metrics import TrainMetrics
from tests import small

LIMIT = 3


class TwoModules(nn.Module):
    """A network with two top-level modules, one of them with BatchNorm statistics."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="first")
        classifier = Classifier(10, dropout=0.0, train=train, name="last")
        return ModelOutput(classifier(norm(images.reshape(len(images), -1))))


Build = Callable[..., run.Run]


@pytest.fixture
def build(data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """Builds runs of 12 steps; the gradient of `last` is infinite at the `bad` ones."""

    def build(
        *bad: int, optimizer: str = "sgd_nesterov", loss: bool = False, **train: Any
    ) -> run.Run:
        plain = gradients.make_gradient

        def make_gradient(*args: Any, **kwargs: Any) -> Any:
            gradient = plain(*args, **kwargs)

            def broken(*inputs: Any) -> Any:
                output, key = gradient(*inputs), jax.random.key_data(inputs[-1])
                at = [keys.key_for(0, "dropout", number - 1) for number in bad]
                now = [jnp.all(key == jax.random.key_data(each)) for each in at]
                here = functools.reduce(jnp.logical_or, now, jnp.bool_(False))
                last = jax.tree.map(lambda g: jnp.where(here, jnp.inf, g), output.grads["last"])
                value = jnp.where(here & loss, jnp.nan, output.loss)
                return output._replace(grads=output.grads | {"last": last}, loss=value)

            return broken

        options = {"on_nonfinite": "skip", "nonfinite_limit": LIMIT, "ema": "5 steps"}
        config = small.config(
            data_directory,
            augment=Augment(crop="none", flip=False),
            optimizer=Optimizer(name=optimizer, weight_decay=1e-3),
            schedule=Schedule(name="cosine", learning_rate=0.05),
            train=Train(batch_size=64, duration="12 steps", **(options | train)),
            checkpoint=Checkpoint(every="3 steps", keep_last=20),
            log=Log(every="4 steps"),
        )
        monkeypatch.setattr(gradients, "make_gradient", make_gradient if bad else plain)
        built = run.assemble(config, log=lambda _: None)
        return dataclasses.replace(built, model=TwoModules())

    return build


def evaluate(_: Any, names: Collection[str]) -> dict[str, EvalResult]:
    return small.fake_results(names, loss=1.0, top1=10.0, top5=50.0, count=360)


def train(this: run.Run, folder: pathlib.Path) -> list[dict[str, Any]]:
    """Trains and returns the lines of metrics without timings."""
    small.train(this, Workdir(folder), evaluate, changed=[])
    return [
        {name: value for name, value in line.items() if name not in NONDETERMINISTIC_FIELDS}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


train_batches = pipeline.train_batches


class Stopped(BaseException):
    """Simulates a kill."""


def stop_before_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def batches(*args: Any, **kwargs: Any) -> Iterator[Any]:
        yield from itertools.islice(train_batches(*args, **kwargs), step - 1 - kwargs["start"])
        raise Stopped

    monkeypatch.setattr(pipeline, "train_batches", batches)


def last_state(this: run.Run, folder: pathlib.Path) -> state.TrainState:
    with checkpoints.Checkpoints(folder / "checkpoints", read_only=True) as saved:
        return saved.restore(saved.resolve("last"), state.abstract_state(this))[0]


@pytest.mark.parametrize("optimizer", ["sgd_nesterov", "adamw", "muon"])
def test_skipped_step_changes_only_counters(optimizer: str, build: Build) -> None:
    this = build(3, optimizer=optimizer)
    current, train_step = state.create(this), step.make_train_step(this, 8)
    batches = pipeline.train_batches(
        this.dataset.train, batch_size=64, seed=0, start=0, stop=4, mesh=this.mesh
    )
    for number, batch in enumerate(batches, start=1):
        before = jax.device_get(current)
        # optax.scale_by_adam relies on promotion.
        with jax.numpy_dtype_promotion("standard"):
            current, output = train_step(current, batch)
        after = jax.device_get(current)
        assert after.step == number
        assert output.finite.tolist() == [True, True, number != 3]
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
        )
        same = {jax.tree_util.keystr(path) for (path, old), new in pairs if (old == new).all()}
        changed = {
            jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(before)
        } - same
        if number != 3:
            assert any("params" in path for path in changed)
            continue
        # The schedule's count advances: the rate is a function of the step.
        assert {path for path in changed if "opt_state" not in path} == {
            ".step", ".metrics.first_nonfinite_step.step"
        }  # fmt: skip
        counts = {path for path in changed if "opt_state" in path}
        assert counts and all(path.endswith(".count") for path in counts)
    rates = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(after.opt_state)
             if jax.tree_util.keystr(path).endswith(".count")]  # fmt: skip
    # Adam counts its updates, the schedule the steps.
    assert 4 in rates and (3 in rates) == (optimizer != "sgd_nesterov")


def test_resume_with_skipped_steps_is_bit_identical(
    build: Build,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two in a row, across a checkpoint (6) and between reports (4, 8), and one at a report's step.
    this = build(6, 7, 12)
    lines = train(this, tmp_path / "full")
    log = capsys.readouterr().err
    for number in (6, 7, 12):
        assert f"step {number} skipped: the gradient of last was not finite" in log
    assert log.count("skipped") == 3
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert len(losses) == 3 and np.isfinite(losses).all()

    # After the first of two in a row, with its checkpoint, and after both.
    for number in (7, 8):
        with monkeypatch.context() as patch:
            stop_before_step(number, patch)
            with pytest.raises(Stopped):
                train(this, tmp_path / "resumed")
    assert train(this, tmp_path / "resumed") == lines
    left, right = (last_state(this, tmp_path / name) for name in ("full", "resumed"))
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(left.model_item()),
        jax.tree.leaves(right.model_item()),
        strict=True,
    ):
        assert np.asarray(old).tobytes() == np.asarray(new).tobytes(), path


def test_too_many_skipped_steps_stop_run_even_after_resume(
    build: Build, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = build(5, 6, 7, 8, loss=True)
    with monkeypatch.context() as patch:
        stop_before_step(7, patch)
        with pytest.raises(Stopped):
            train(this, tmp_path)
    # Two of them are before the checkpoint; the third ends the run and is not saved.
    with pytest.raises(
        RunError, match=r"not finite at step 5, .*the first of 3 in a row.*clip_norm=1\n"
    ):
        train(this, tmp_path)
    with checkpoints.Checkpoints(tmp_path / "checkpoints", read_only=True) as saved:
        assert saved.latest_step() == 6
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["loss"] is None


def test_interval_of_skipped_steps_has_no_metrics(build: Build, tmp_path: pathlib.Path) -> None:
    this = build(5)
    this.config.log.every = "1 step"
    rows = [line for line in train(this, tmp_path) if line["split"] == "train"]
    assert [row["step"] for row in rows] == [n for n in range(1, 13) if n != 5]
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_streak_that_reached_limit_is_kept() -> None:
    """The next report may come much later."""
    current = state.TrainState(
        step=jnp.int32(0),
        params={},
        batch_stats={},
        average={},
        opt_state=(),
        metrics=TrainMetrics.empty({}),
    )
    finite = {1, 4, 5, 10, 11}
    starts = []
    for number in range(1, 12):
        after = current.replace(step=jnp.int32(number))
        current = nonfinite.skip_if_nonfinite(current, after, jnp.bool_(number in finite), LIMIT)
        starts.append(current.metrics.first_nonfinite_step.compute())
    assert starts == [-1, 2, 2, -1, -1, 6, 6, 6, 6, 6, 6]


def test_error_names_layers(build: Build, tmp_path: pathlib.Path) -> None:
    this = build(2, on_nonfinite="stop")
    with pytest.raises(RunError, match=r"the gradient of last was not finite at step 2,"):
        train(this, tmp_path)
    assert not (tmp_path / "checkpoints" / "3").exists()


def test_describe_nonfinite() -> None:
    describe = functools.partial(nonfinite.describe, modules=["a", "b", "c"])
    assert describe(np.array([True] * 4)) == ""
    assert describe(np.array([False, True, True, True])) == "the loss was"
    assert describe(np.array([True, False, True, False])) == "the gradient of a, c was"
    assert describe(np.array([False] * 4)) == "the loss and the gradient of all modules were"


def test_run_with_skipped_steps_resumes_with_stop(
    build: Build, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_before_step(5, patch)
        with pytest.raises(Stopped):
            train(build(3), tmp_path)
    assert (tmp_path / "checkpoints" / "3").exists()
    assert train(build(on_nonfinite="stop"), tmp_path)[-1]["step"] == 12
