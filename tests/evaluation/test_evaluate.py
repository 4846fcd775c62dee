import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest

from inception_jax import registry
from inception_jax.config import View
from inception_jax.datasets.splits import RecordSplit, Split, SubsetSplit
from inception_jax.errors import ConfigError
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.input import augment, pipeline
from inception_jax.training import run, state
from tests import small


def test_an_evaluation_is_what_counting_by_hand_gives(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory))
    this.config.evaluation.train_eval_examples = 150
    variables = state.create(this).eval_variables()
    evaluator = Evaluator(this)
    found = evaluator(variables)
    assert list(found) == ["test", "train_eval"]
    check(found["test"].metrics, this, variables, this.dataset.evaluation, 360)
    # One full batch of 100 and a half one.
    check(found["train_eval"].metrics, this, variables, this.dataset.train, 150)
    assert list(evaluator(variables, ["train_eval"])) == ["train_eval"]
    this.config.evaluation.train_eval_examples = 10**6
    assert len(Evaluator(this).splits["train_eval"]) == len(this.dataset.train)
    this.config.evaluation.train_eval_examples = 0
    assert list(Evaluator(this).views) == ["test"]


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
    expected = Evaluator(this)(variables)["test"].metrics
    whole, sizes = pipeline.eval_batches, set()

    def batches(*args: Any, **kwargs: Any) -> Iterator[dict[str, jax.Array]]:
        for batch in whole(*args, **kwargs):
            sizes.add(len(batch["label"]))
            yield batch

    monkeypatch.setattr(pipeline, "eval_batches", batches)
    this.config.evaluation.batch_size = 1000
    this.config.evaluation.train_eval_examples = 100
    # Both splits by one program.
    found = Evaluator(this)(variables)
    assert sizes == {360}
    assert found["test"].metrics == pytest.approx(expected, rel=1e-6)


def test_what_is_left_of_each_example_is_what_plain_numpy_finds(
    data_directory: pathlib.Path,
) -> None:
    this = small.build(small.config(data_directory))
    variables = state.create(this).eval_variables()
    result = Evaluator(this)(variables)["test"]
    metrics, found = result.metrics, result.predictions

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


def test_evaluations_have_images_of_their_own(data_directory: pathlib.Path) -> None:
    plain = Evaluator(small.build(small.config(data_directory)))
    config = small.config(data_directory)
    config.evaluation.flip_tta = True
    config.evaluations = {
        "small": View(size=4, examples=50),
        "small_mirror": View(size=4, examples=50, flip_tta=True),
        "all_train": View(split="train"),
    }
    this = small.build(config)
    variables = state.create(this).eval_variables()
    evaluator = Evaluator(this)
    found = evaluator(variables)
    assert found.keys() == {"test", "flip", *config.evaluations}
    assert found["test"].metrics == plain(variables)["test"].metrics
    # Compiled ahead, and one program for each size.
    evaluator.compile(jax.eval_shape(lambda: variables))
    assert set(evaluator._forward) == {4, 8}
    again = evaluator(variables)
    assert {n: each.metrics for n, each in again.items()} == {
        n: each.metrics for n, each in found.items()
    }

    def expected(split: Split, count: int, size: int, flip: bool) -> tuple[float, float]:
        images = np.asarray(augment.resize(split.read(np.arange(count)), size), np.float32)
        images = (images / np.float32(255) - this.dataset.mean) / this.dataset.std
        views = (images, images[:, :, ::-1]) if flip else (images,)
        logits = np.mean(
            [this.model.apply(jax.device_get(variables), each).logits for each in views],
            axis=0,
            dtype=np.float64,
        )
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        labels = split.labels[:count]
        own = log_p[np.arange(count), labels]
        return -own.mean(), 100 * (log_p.argmax(1) == labels).mean()

    test, train = this.dataset.evaluation, this.dataset.train
    for name, inputs in {
        "flip": (test, 360, 8, True),
        "small": (test, 50, 4, False),
        "small_mirror": (test, 50, 4, True),
        "all_train": (train, 1437, 8, False),
    }.items():
        metrics = found[name].metrics
        loss, top1 = expected(*inputs)
        assert metrics["count"] == inputs[1]
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5), name
        assert metrics["top1"] == pytest.approx(top1), name
    assert found["flip"].metrics["loss"] != found["test"].metrics["loss"]


def test_an_evaluation_of_a_split_that_is_not_there_is_refused(
    data_directory: pathlib.Path,
) -> None:
    config = small.config(data_directory)
    config.evaluations = {"other": View(split="validation")}
    this = small.build(config)
    with pytest.raises(ConfigError, match="digits has no split 'validation'; it has train, test"):
        Evaluator(this)
    config.evaluations = {"test": View()}
    with pytest.raises(ConfigError, match=r"config\.evaluations\.test: .* another name"):
        Evaluator(this)


def test_an_evaluation_cuts_its_own_square(data_directory: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.data.storage, config.data.holdout = "records", 100
    config.evaluations = {"cut": View(crop=0.5, examples=10), "cut_train": View("train", crop=0.5)}
    evaluator = Evaluator(small.build(config))
    for name, source in (("cut", "holdout"), ("cut_train", "train")):
        split = evaluator.splits[name]
        inside = split.whole if isinstance(split, SubsetSplit) else split
        while isinstance(inside, SubsetSplit):
            inside = inside.whole
        assert isinstance(inside, RecordSplit) and inside.crop == 0.5
        own = evaluator._run.dataset.splits[source]
        assert split.names == own.names[: len(split)]
        assert (split.read(np.arange(5)) != own.read(np.arange(5))).any()


def test_a_metric_over_the_split_is_exact(
    data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.METRICS.names()
    monkeypatch.setattr(registry.METRICS, "_parts", dict(registry.METRICS._parts))

    @registry.register_metric("macro", over="split", percent=True)
    def macro(logits: np.ndarray, labels: np.ndarray) -> float:
        right = logits.argmax(axis=1) == labels
        return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))

    config = small.config(data_directory)
    config.evaluation.metrics = ("top1", "macro")
    this = small.build(config)
    result = Evaluator(this)(state.create(this).eval_variables())["test"]
    assert list(result.metrics) == ["loss", "top1", "macro", "count"]
    found = result.predictions
    by_class = [found.right[found.labels == label].mean() for label in range(10)]
    assert result.metrics["macro"] == pytest.approx(100 * np.mean(by_class))


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
    assert Evaluator(this)(variables)["test"].metrics["loss"] == pytest.approx(
        float(loss), rel=1e-5
    )


def test_the_average_is_evaluated_where_there_is_one(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory))
    now = state.create(this)
    average = small.draw(this.model, this.dataset.image_size, seed=1)
    assert now.replace(average=average).eval_variables() is average
    alone = now.replace(average={}).eval_variables()
    assert alone == {"params": now.params, "batch_stats": now.batch_stats}
