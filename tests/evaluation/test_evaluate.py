import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from inception_jax.datasets.splits import Split
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.input import augment, pipeline
from inception_jax.training import run, state
from tests import small


def test_an_evaluation_is_what_counting_by_hand_gives(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory))
    this.config.evaluation.train_examples = 150
    variables = state.create(this).eval_variables()
    evaluator = Evaluator(this)
    check(evaluator(variables), this, variables, this.dataset.evaluation, 360)
    # One full batch of 100 and a half one.
    sample = this.train_sample()
    check(evaluator(variables, sample), this, variables, this.dataset.train, 150)
    this.config.evaluation.train_examples = 10**6
    assert len(this.train_sample()) == len(this.dataset.train)
    this.config.evaluation.train_examples = 0
    assert this.train_sample() is None


@pytest.mark.parametrize(
    ("examples", "limit", "batch"),
    [(8, 250, 8), (1, 250, 1), (250, 250, 250), (251, 250, 126), (500, 250, 250), (10, 1, 1)],
)
def test_an_evaluation_batch_is_no_larger_than_it_needs(
    examples: int, limit: int, batch: int
) -> None:
    assert pipeline.eval_batch_size(examples, limit=limit) == batch


def test_small_splits_are_not_filled_up_to_the_largest_batch(
    data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = small.build(small.config(data_directory))
    variables = state.create(this).eval_variables()
    expected = Evaluator(this)(variables)
    whole, sizes = pipeline.eval_batches, set()

    def batches(*args: Any, **kwargs: Any) -> Iterator[dict[str, jax.Array]]:
        for batch in whole(*args, **kwargs):
            sizes.add(len(batch["label"]))
            yield batch

    monkeypatch.setattr(pipeline, "eval_batches", batches)
    this.config.evaluation.batch_size = 1000
    this.config.evaluation.train_examples = 100
    evaluator = Evaluator(this)
    found = evaluator(variables)
    # Both splits by one program.
    evaluator(variables, this.train_sample())
    assert sizes == {360}
    assert found == pytest.approx(expected, rel=1e-6)


def test_what_is_left_of_each_example_is_what_plain_numpy_finds(
    data_directory: pathlib.Path,
) -> None:
    this = small.build(small.config(data_directory))
    variables = state.create(this).eval_variables()
    evaluator = Evaluator(this)
    assert Evaluator(this).predictions is None
    metrics = evaluator(variables)
    found = evaluator.predictions
    assert found is not None

    split, dataset = this.dataset.evaluation, this.dataset
    images = (split.read(np.arange(len(split))) / np.float32(255) - dataset.mean) / dataset.std
    output = this.model.apply(jax.device_get(variables), images, train=False)
    logits = np.asarray(output.logits, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(split))
    np.testing.assert_array_equal(found.labels, split.labels)
    np.testing.assert_array_equal(found.guesses, np.argsort(-logits, axis=1)[:, :5])
    best = np.take_along_axis(probabilities, found.guesses, axis=1)
    np.testing.assert_allclose(found.probabilities, best, rtol=1e-4)
    np.testing.assert_allclose(found.own, probabilities[rows, split.labels], rtol=1e-4)

    # And it is what the metrics are made of.
    assert metrics["top1"] == pytest.approx(100 * found.right.mean())
    among = (found.guesses == found.labels[:, None]).any(axis=1)
    assert metrics["top5"] == pytest.approx(100 * among.mean())
    assert metrics["loss"] == pytest.approx(-np.log(found.own).mean(), rel=1e-4)

    # Of other examples nothing is left.
    evaluator(variables, this.dataset.train)
    assert evaluator.predictions is found


def check(
    found: dict[str, float], this: run.Run, variables: state.Variables, split: Split, count: int
) -> None:
    """Checks metrics against plain NumPy on the first `count` examples of a split."""
    dataset = this.dataset
    images = (split.read(np.arange(count)).astype(np.float32) / 255 - dataset.mean) / dataset.std
    logits = np.asarray(
        this.model.apply(jax.device_get(variables), images, train=False).logits, np.float64
    )
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = log_p[np.arange(count), split.labels[:count]]
    rank = (log_p > own[:, None]).sum(1)
    assert found["count"] == count
    assert found["loss"] == pytest.approx(-own.mean(), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * (rank < 1).mean())
    assert found["top5"] == pytest.approx(100 * (rank < 5).mean())


def test_flip_averaging_is_reported_apart(data_directory: pathlib.Path) -> None:
    plain = Evaluator(small.build(small.config(data_directory)))
    config = small.config(data_directory)
    config.evaluation.flip = True
    this = small.build(config)
    variables = state.create(this).eval_variables()
    found = Evaluator(this)(variables)
    assert {name: found[name] for name in ("loss", "top1", "top5", "count")} == plain(variables)

    split, dataset = this.dataset.evaluation, this.dataset
    images = (split.read(np.arange(len(split))) / np.float32(255) - dataset.mean) / dataset.std
    one, other = (
        np.asarray(this.model.apply(jax.device_get(variables), view, train=False).logits)
        for view in (images, images[:, :, ::-1])
    )
    logits = (one + other).astype(np.float64) / 2
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = log_p[np.arange(len(split)), split.labels]
    assert found["flip_loss"] == pytest.approx(-own.mean(), rel=1e-5)
    assert found["flip_loss"] != found["loss"]
    assert found["flip_top1"] == pytest.approx(100 * (log_p.argmax(1) == split.labels).mean())


def test_images_are_resized_for_evaluation(data_directory: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.evaluation.image_size = 12
    this = small.build(config)
    variables = state.create(this).eval_variables()
    split, dataset = this.dataset.evaluation, this.dataset
    resized = augment.resize(split.read(np.arange(len(split))), 12)
    assert resized.shape == (360, 12, 12, 3)
    images = (np.asarray(resized) / np.float32(255) - dataset.mean) / dataset.std
    logits = this.model.apply(jax.device_get(variables), images, train=False).logits
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    # Not top-1: a network that was not trained may say one class to all images of any size.
    assert Evaluator(this)(variables)["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_average_is_evaluated_where_there_is_one(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory))
    now = state.create(this)
    average = small.draw(this.model, this.dataset.image_size, seed=1)
    assert now.replace(average=average).eval_variables() is average
    alone = now.replace(average={}).eval_variables()
    assert alone == {"params": now.params, "batch_stats": now.batch_stats}
