"""Re-estimated BatchNorm statistics: their values, where they are stored, what stays unchanged."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from inception_jax.config import Evaluation, Train
from inception_jax.evaluation.evaluate import Evaluator, evaluate_checkpoint
from inception_jax.input import pipeline
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import read_metrics
from inception_jax.training import checkpoints, norm, run, state
from tests import small


def settings(data_directory: pathlib.Path, *, examples: int, ema: int = 5) -> Any:
    return small.config(
        data_directory,
        train=Train(batch_size=64, duration="6 steps", ema=f"{ema} steps"),
        evaluation=Evaluation(every="3 steps", norm_examples=examples),
    )


@pytest.mark.parametrize("ema", [0, 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_statistics_are_mean_over_training_batches(
    ema: int, compiled: bool, data_directory: pathlib.Path
) -> None:
    this = small.build(settings(data_directory, examples=100, ema=ema))
    before = state.create(this)
    params = small.random_variables(this.model, this.dataset.image_size)["params"]
    before = before.replace(average=before.average | {"params": params}) if ema else before
    estimate = norm.NormEstimator(this)
    if compiled:
        estimate.compile(jax.eval_shape(before.eval_variables))
    after = estimate(before)

    variables = jax.device_get(before.eval_variables())
    batch_stats = []
    for step in range(2):
        indices = pipeline.train_indices(step, batch_size=64, examples=1437, seed=0)
        images = this.dataset.train.read(indices) / np.float32(255)
        _, updated = this.model.apply(
            variables,
            (images - this.dataset.mean) / this.dataset.std,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        # The network moves its statistics a tenth of the way to those of the batch.
        batch_stats.append(
            jax.tree.map(
                lambda new, old: (new - 0.9 * old) / 0.1,
                updated["batch_stats"],
                variables["batch_stats"],
            )
        )
    expected = jax.tree.map(lambda *each: sum(each) / 2, *batch_stats)
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4),
        after.eval_variables()["batch_stats"],
        expected,
    )
    # Nothing else changes.
    assert after.params is before.params
    if ema:
        assert after.average["params"] is before.average["params"]
        assert after.batch_stats is before.batch_stats


def test_statistics_use_evaluation_image_size(data_directory: pathlib.Path) -> None:
    estimates = []
    for size, kernel in ((0, "linear"), (16, "linear"), (16, "lanczos3"), (0, "lanczos3")):
        config = settings(data_directory, examples=64)
        config.evaluation.image_size, config.data.resize_kernel = size, kernel
        this = small.build(config)
        estimate = norm.NormEstimator(this)
        estimates.append(estimate(state.create(this)).eval_variables()["batch_stats"])
    first, larger, sharper, again = (each["conv1"]["norm"]["var"] for each in estimates)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, larger, rtol=1e-3)
    assert not np.allclose(larger, sharper, rtol=1e-3)


def test_statistics_are_kept_if_disabled_or_without_batchnorm(
    data_directory: pathlib.Path,
) -> None:
    for examples, model in ((0, small.Network()), (100, small.Linear())):
        this = run.assemble(settings(data_directory, examples=examples), log=lambda _: None)
        this = dataclasses.replace(this, model=model)
        now, estimate = state.create(this), norm.NormEstimator(this)
        estimate.compile(jax.eval_shape(now.eval_variables))
        assert estimate(now) is now


@pytest.mark.slow
def test_checkpoint_has_evaluated_statistics_and_training_is_unaffected(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    ends = []
    for examples in (0, 100):
        this = small.build(settings(data_directory, examples=examples))
        folder = Workdir(tmp_path / str(examples))
        small.train(this, folder, Evaluator(this), changed=[])
        lines = [each for each in read_metrics(folder.path / "metrics.jsonl") if "count" in each]
        assert [each["step"] for each in lines] == [3, 6]
        for line in lines:
            result = evaluate_checkpoint(this, folder, str(line["step"]))
            assert result["loss"] == pytest.approx(line["loss"], rel=1e-6)
        with checkpoints.Checkpoints(folder.checkpoints, read_only=True) as saved:
            ends.append(saved.restore(6, state.abstract_state(this))[0])
    without, estimated = ends
    for name in ("params", "opt_state"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(without, name), getattr(estimated, name)
        )
    one, other = (each.eval_variables()["batch_stats"]["conv1"]["norm"]["mean"] for each in ends)
    assert not np.allclose(one, other, rtol=1e-2)


def test_statistics_are_those_of_micro_batches(data_directory: pathlib.Path) -> None:
    estimated = []
    for batch_size, micro_batches in ((64, 4), (16, 1)):
        config = settings(data_directory, examples=100, ema=0)
        config.train.batch_size, config.train.grad_accum_steps = batch_size, micro_batches
        this = small.build(config)
        estimated.append(norm.NormEstimator(this)(state.create(this)).eval_variables())
    jax.tree.map(np.testing.assert_array_equal, *estimated)
