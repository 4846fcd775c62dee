import dataclasses
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


def test_split_without_labels_is_refused(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory))
    this.config.evaluations = {"hidden": View(split="train")}
    assert list(Evaluator(this).splits) == ["test", "hidden"]
    train = this.dataset.train
    labels = np.where(np.arange(len(train)) == 5, np.int32(-1), train.labels)
    splits = {**this.dataset.splits, "train": dataclasses.replace(train, labels=labels)}
    this = dataclasses.replace(this, dataset=dataclasses.replace(this.dataset, splits=splits))
    with pytest.raises(
        ConfigError, match=r"config\.evaluations\.hidden\.split = 'train': has imag"
    ):
        Evaluator(this)


def test_evaluation_equals_counting_by_hand(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory))
    this.config.evaluation.train_eval_examples = 150
    variables = state.create(this).eval_variables()
    evaluator = Evaluator(this)
    results = evaluator(variables)
    assert list(results) == ["test", "train_eval"]
    check(results["test"].metrics, this, variables, this.dataset.evaluation, 360)
    # One full batch of 100 and half of another.
    check(results["train_eval"].metrics, this, variables, this.dataset.train, 150)
    assert list(evaluator(variables, ["train_eval"])) == ["train_eval"]
    this.config.evaluation.train_eval_examples = 10**6
    assert len(Evaluator(this).splits["train_eval"]) == len(this.dataset.train)
    this.config.evaluation.train_eval_examples = 0
    assert list(Evaluator(this).views) == ["test"]


@pytest.mark.parametrize(
    ("examples", "limit", "batch"),
    [(8, 250, 8), (1, 250, 1), (250, 250, 250), (251, 250, 126), (500, 250, 250), (10, 1, 1)],
)
def test_evaluation_batch_is_no_larger_than_necessary(
    examples: int, limit: int, batch: int
) -> None:
    assert pipeline.eval_batch_size(examples, limit=limit) == batch


def test_small_splits_are_not_padded_to_batch_size(
    data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = small.build(small.config(data_directory))
    variables = state.create(this).eval_variables()
    expected = Evaluator(this)(variables)["test"].metrics
    eval_batches, sizes = pipeline.eval_batches, set()

    def batches(*args: Any, **kwargs: Any) -> Iterator[dict[str, jax.Array]]:
        for batch in eval_batches(*args, **kwargs):
            sizes.add(len(batch["label"]))
            yield batch

    monkeypatch.setattr(pipeline, "eval_batches", batches)
    this.config.evaluation.batch_size = 1000
    this.config.evaluation.train_eval_examples = 100
    # One program for both splits.
    results = Evaluator(this)(variables)
    assert sizes == {360}
    assert results["test"].metrics == pytest.approx(expected, rel=1e-6)


def test_predictions_equal_numpy(
    data_directory: pathlib.Path,
) -> None:
    this = small.build(small.config(data_directory))
    variables = state.create(this).eval_variables()
    result = Evaluator(this)(variables)["test"]
    metrics, predictions = result.metrics, result.predictions

    split, dataset = this.dataset.evaluation, this.dataset
    images = (split.read(np.arange(len(split))) / np.float32(255) - dataset.mean) / dataset.std
    output = this.model.apply(jax.device_get(variables), images, train=False)
    logits = np.asarray(output.logits, np.float64)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    rows = np.arange(len(split))
    np.testing.assert_array_equal(predictions.labels, split.labels)
    np.testing.assert_array_equal(predictions.top_classes, np.argsort(-logits, axis=1)[:, :5])
    best = np.take_along_axis(probabilities, predictions.top_classes, axis=1)
    np.testing.assert_allclose(predictions.top_probs, best, rtol=1e-4)
    np.testing.assert_allclose(predictions.true_prob, probabilities[rows, split.labels], rtol=1e-4)

    # The metrics follow from them.
    assert metrics["top1"] == pytest.approx(100 * predictions.correct.mean())
    in_top5 = (predictions.top_classes == predictions.labels[:, None]).any(axis=1)
    assert metrics["top5"] == pytest.approx(100 * in_top5.mean())
    assert metrics["loss"] == pytest.approx(-np.log(predictions.true_prob).mean(), rel=1e-4)


def check(
    metrics: dict[str, float], this: run.Run, variables: state.Variables, split: Split, count: int
) -> None:
    """Checks metrics against plain NumPy on the first `count` examples of a split."""
    dataset = this.dataset
    images = (split.read(np.arange(count)).astype(np.float32) / 255 - dataset.mean) / dataset.std
    logits = np.asarray(
        this.model.apply(jax.device_get(variables), images, train=False).logits, np.float64
    )
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    true_log_p = log_p[np.arange(count), split.labels[:count]]
    rank = (log_p > true_log_p[:, None]).sum(1)
    assert metrics["count"] == count
    assert metrics["loss"] == pytest.approx(-true_log_p.mean(), rel=1e-5)
    assert metrics["top1"] == pytest.approx(100 * (rank < 1).mean())
    assert metrics["top5"] == pytest.approx(100 * (rank < 5).mean())


def test_evaluations_use_their_own_images(data_directory: pathlib.Path) -> None:
    plain = Evaluator(small.build(small.config(data_directory)))
    config = small.config(data_directory)
    config.evaluation.flip_tta = True
    config.evaluations = {
        "small": View(size=4, examples=50),
        "small_mirror": View(size=4, examples=50, flip_tta=True),
        "all_train": View(split="train"),
        "shifted": View(shift_tta=2),
        "shifted_mirror": View(shift_tta=1, flip_tta=True),
    }
    this = small.build(config)
    variables = state.create(this).eval_variables()
    evaluator = Evaluator(this)
    results = evaluator(variables)
    assert results.keys() == {"test", "flip", *config.evaluations}
    assert results["test"].metrics == plain(variables)["test"].metrics
    # Compiled in advance, with one program per size.
    evaluator.compile(jax.eval_shape(lambda: variables))
    assert set(evaluator._forward) == {4, 8}
    again = evaluator(variables)
    assert {n: each.metrics for n, each in again.items()} == {
        n: each.metrics for n, each in results.items()
    }

    def expected(
        split: Split, count: int, size: int, flip: bool, shift: int = 0
    ) -> tuple[float, float]:
        images = np.asarray(augment.resize(split.read(np.arange(count)), size), np.float32)
        images = (images / np.float32(255) - this.dataset.mean) / this.dataset.std
        border = ((0, 0), (shift, shift), (shift, shift), (0, 0))
        padded = np.pad(images, border, mode="reflect")
        up_left, down_right = padded[:, 2 * shift :, 2 * shift :], padded[:, :size, :size]
        views = [(0.5, images), (0.25, up_left), (0.25, down_right)] if shift else [(1, images)]
        if flip:
            views = [(w / 2, x) for w, each in views for x in (each, each[:, :, ::-1])]
        logits = np.zeros((count, 10))
        for weight, each in views:
            logits += weight * np.asarray(
                this.model.apply(jax.device_get(variables), each).logits, np.float64
            )
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        labels = split.labels[:count]
        true_log_p = log_p[np.arange(count), labels]
        return -true_log_p.mean(), 100 * (log_p.argmax(1) == labels).mean()

    test, train = this.dataset.evaluation, this.dataset.train
    for name, inputs in {
        "flip": (test, 360, 8, True),
        "small": (test, 50, 4, False),
        "small_mirror": (test, 50, 4, True),
        "all_train": (train, 1437, 8, False),
        "shifted": (test, 360, 8, False, 2),
        "shifted_mirror": (test, 360, 8, True, 1),
    }.items():
        metrics = results[name].metrics
        loss, top1 = expected(*inputs)
        assert metrics["count"] == inputs[1]
        assert metrics["loss"] == pytest.approx(loss, rel=1e-5), name
        assert metrics["top1"] == pytest.approx(top1), name
    losses = [results[name].metrics["loss"] for name in ("test", "flip", "shifted")]
    assert len(set(losses)) == 3


def test_evaluation_of_missing_split_is_rejected(
    data_directory: pathlib.Path,
) -> None:
    config = small.config(data_directory)
    config.evaluations = {"other": View(split="validation")}
    this = small.build(config)
    with pytest.raises(ConfigError, match=r"digits: split 'validation' not found\. .*train, test"):
        Evaluator(this)
    config.evaluations = {"test": View()}
    with pytest.raises(ConfigError, match=r"config\.evaluations\.test: .* another name"):
        Evaluator(this)


def test_evaluation_uses_its_own_crop(data_directory: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.data.storage, config.data.holdout = "records", 100
    config.evaluations = {"cut": View(crop=0.5, examples=10), "cut_train": View("train", crop=0.5)}
    evaluator = Evaluator(small.build(config))
    for name, source in (("cut", "holdout"), ("cut_train", "train")):
        split = evaluator.splits[name]
        inside = split.base if isinstance(split, SubsetSplit) else split
        while isinstance(inside, SubsetSplit):
            inside = inside.base
        assert isinstance(inside, RecordSplit) and inside.crop == 0.5
        full_crop = evaluator._run.dataset.splits[source]
        assert split.names == full_crop.names[: len(split)]
        assert (split.read(np.arange(5)) != full_crop.read(np.arange(5))).any()


def test_split_metric_is_exact(
    data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.METRICS.names()
    monkeypatch.setattr(registry.METRICS, "_parts", dict(registry.METRICS._parts))

    @registry.register_metric("macro", over="split", percent=True)
    def macro(logits: np.ndarray, labels: np.ndarray) -> float:
        correct = logits.argmax(axis=1) == labels
        return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))

    config = small.config(data_directory)
    config.evaluation.metrics = ("top1", "macro")
    this = small.build(config)
    result = Evaluator(this)(state.create(this).eval_variables())["test"]
    assert list(result.metrics) == ["loss", "top1", "macro", "count"]
    predictions = result.predictions
    by_class = [predictions.correct[predictions.labels == label].mean() for label in range(10)]
    assert result.metrics["macro"] == pytest.approx(100 * np.mean(by_class))


@pytest.mark.parametrize("kernel", ["linear", "lanczos3"])
def test_images_are_resized_for_evaluation(kernel: str, data_directory: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.evaluation.image_size, config.data.resize_kernel = 12, kernel
    this = small.build(config)
    variables = state.create(this).eval_variables()
    split, dataset = this.dataset.evaluation, this.dataset
    resized = augment.resize(split.read(np.arange(len(split))), 12, kernel)
    assert resized.shape == (360, 12, 12, 3)
    images = (np.asarray(resized) / np.float32(255) - dataset.mean) / dataset.std
    logits = this.model.apply(jax.device_get(variables), images, train=False).logits
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, split.labels).mean()
    # Not top-1: an untrained network may predict the same class for all images of any size.
    assert Evaluator(this)(variables)["test"].metrics["loss"] == pytest.approx(
        float(loss), rel=1e-5
    )


def test_average_is_evaluated_if_available(data_directory: pathlib.Path) -> None:
    this = small.build(small.config(data_directory))
    now = state.create(this)
    average = small.random_variables(this.model, this.dataset.image_size, seed=1)
    assert now.replace(average=average).eval_variables() is average
    alone = now.replace(average={}).eval_variables()
    assert alone == {"params": now.params, "batch_stats": now.batch_stats}
