import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax import registry
from inception_jax.config import Evaluation
from inception_jax.errors import ConfigError
from inception_jax.training.metrics import (
    EvalMetrics,
    MetricSet,
    TrainMetrics,
    to_host,
    top_k_correct,
)

SCALE = flax.core.freeze({"loss": 1, "top1": 100, "top5": 100})


def _add(metrics: TrainMetrics, **step: jax.Array) -> TrainMetrics:
    return metrics.merge(TrainMetrics.single_step(**step))


# As in training: compiled, and the old metrics' memory is given up.
_add_jit = jax.jit(_add, donate_argnums=0, static_argnames="scale")


def _step(step: int, loss: np.ndarray, norm: float, rng: np.random.Generator) -> dict:
    return {
        "step": jnp.int32(step),
        "values": {
            "loss": jnp.asarray(loss),
            "top1": jnp.asarray(rng.random(loss.shape) < 0.3),
            "top5": jnp.asarray(rng.random(loss.shape) < 0.6),
        },
        "scale": SCALE,
        "gradient_norm": jnp.float32(norm),
    }


def test_train_metrics_are_means_over_examples_and_steps() -> None:
    rng = np.random.default_rng(0)
    steps = [_step(i, rng.random(12, np.float32), float(i), rng) for i in range(1, 8)]
    metrics = TrainMetrics.empty(SCALE)
    for step in steps:
        metrics = _add_jit(metrics, **step)
    expected = {
        name: float(np.mean([np.asarray(step["values"][name], np.float64) for step in steps]))
        for name in SCALE
    }
    found = metrics.compute()
    assert list(found) == ["loss", "top1", "top5", "gradient_norm"]
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["top1"] == pytest.approx(100 * expected["top1"], rel=1e-12)
    assert found["top5"] == pytest.approx(100 * expected["top5"], rel=1e-12)
    assert found["gradient_norm"] == 4.0
    assert metrics.first_nonfinite_step.compute() == -1
    assert all(isinstance(value, int | float) for value in found.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient_norm"])
def test_the_first_non_finite_step_is_kept(bad: float, where: str) -> None:
    rng = np.random.default_rng(0)
    metrics = TrainMetrics.empty(SCALE)
    for i in range(1, 8):
        loss, norm = rng.random(4, np.float32), 1.0
        if i in (3, 5):
            loss[2], norm = (bad, norm) if where == "loss" else (loss[2], bad)
        metrics = _add_jit(metrics, **_step(i, loss, norm, rng))
    assert metrics.first_nonfinite_step.compute() == 3
    # What follows a report still knows.
    assert metrics.cleared().first_nonfinite_step.compute() == 3
    assert np.isnan(metrics.cleared().compute()["loss"])


def test_merging_keeps_structure_shapes_and_types() -> None:
    # A checkpoint and a compiled step take the metrics of any step.
    rng = np.random.default_rng(0)
    empty = TrainMetrics.empty(SCALE)
    merged = _add_jit(TrainMetrics.empty(SCALE), **_step(1, rng.random(4, np.float32), 1.0, rng))

    def avals(metrics: TrainMetrics) -> dict:
        leaves = jax.tree_util.tree_leaves_with_path(metrics)
        assert all(isinstance(leaf, jax.Array) for _, leaf in leaves)
        return {
            jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.weak_type)
            for path, leaf in leaves
        }

    assert avals(merged) == avals(empty)
    jax.tree.map(lambda a, b: None, merged, empty)  # Raises where structures differ.


def test_metrics_of_no_step_are_nan() -> None:
    found = TrainMetrics.empty(SCALE).compute()
    assert all(np.isnan(value) for value in found.values())


def test_shared_labels_count_by_their_share() -> None:
    step = _step(1, np.ones(2, np.float32), 1.0, np.random.default_rng(0))
    step["values"]["top1"] = jnp.asarray([0.75, 0.0], jnp.float32)
    assert TrainMetrics.single_step(**step).compute()["top1"] == 37.5


def _total(batches: Iterable[EvalMetrics]) -> dict[str, float]:
    return functools.reduce(EvalMetrics.plus, to_host(batches)).compute()


def _evaluate(
    loss: np.ndarray, top1: np.ndarray, top5: np.ndarray, batch_size: int
) -> dict[str, float]:
    """Evaluates in batches, the last one padded with examples that must not count."""
    single_batch = jax.jit(EvalMetrics.single_batch)

    def batches() -> Iterator[EvalMetrics]:
        for start in range(0, len(loss), batch_size):
            part = slice(start, start + batch_size)
            missing = batch_size - len(loss[part])
            values = {
                "loss": jnp.asarray(np.append(loss[part], np.full(missing, np.nan, np.float32))),
                "top1": jnp.asarray(np.append(top1[part], np.ones(missing, bool))),
                "top5": jnp.asarray(np.append(top5[part], np.ones(missing, bool))),
            }
            yield single_batch(values, jnp.arange(batch_size) < batch_size - missing)

    return _total(batches())


@pytest.mark.parametrize("batch_size", [1, 7, 20, 103, 128])
def test_evaluation_counts_every_example_once(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    loss = rng.random(103, np.float32)
    top1, top5 = rng.random(103) < 0.3, rng.random(103) < 0.6
    found = _evaluate(loss, top1, top5, batch_size)
    assert found["loss"] == pytest.approx(loss.mean(dtype=np.float64), rel=1e-6)
    assert found["top1"] == int(top1.sum()) / 103
    assert found["top5"] == int(top5.sum()) / 103
    assert found["count"] == 103 and isinstance(found["count"], int)


def test_totals_are_in_double_precision() -> None:
    # 2^24 + 1 is no float32: added up in single precision the ones would vanish.
    found = _total(
        EvalMetrics.single_batch({"loss": jnp.full(1, x, jnp.float32)}, jnp.ones(1, bool))
        for x in (2.0**24, 1.0, 1.0, 1.0)
    )
    assert found["loss"] == (2**24 + 3) / 4


def test_a_batch_of_padding_alone_is_nan() -> None:
    nothing = jnp.zeros(1)
    found = _total([EvalMetrics.single_batch({"loss": nothing}, nothing > 0)])
    assert found["count"] == 0 and np.isnan(found["loss"])


def test_few_batches_are_in_flight() -> None:
    # Each dispatched batch holds its images on the device until the host waits for it.
    read: list[int] = []
    ahead: list[int] = []

    class Leaf:
        def __init__(self, index: int) -> None:
            self.index = index

        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            read.append(self.index)
            return np.asarray(self.index, np.int32)

    def batches() -> Iterator[Leaf]:
        for index in range(20):
            ahead.append(index - len(set(read)))
            yield Leaf(index)

    assert [int(np.asarray(each)) for each in to_host(batches())] == list(range(20))
    assert max(ahead) <= 3


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_correct_equals_a_stable_sort(k: int) -> None:
    # Few distinct values, so that ties are common.
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 4, (300, 8)).astype(np.float32)
    labels = rng.integers(0, 8, 300)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    expected = (order == labels[:, None]).any(axis=1)
    result = top_k_correct(jnp.asarray(logits), jnp.asarray(labels, jnp.int32), k)
    assert result.dtype == bool
    np.testing.assert_array_equal(result, expected)


def test_top_k_correct_of_equal_logits_scores_the_first_classes() -> None:
    labels = jnp.arange(10, dtype=jnp.int32)
    result = top_k_correct(jnp.zeros((10, 10)), labels, 3)
    np.testing.assert_array_equal(result, [True] * 3 + [False] * 7)


def test_top_k_correct_counts_nan_as_wrong() -> None:
    logits = jnp.asarray([[jnp.nan, 1.0, 2.0], [1.0, 2.0, jnp.nan], [0.0, 1.0, jnp.inf]])
    labels = jnp.asarray([0, 1, 2], jnp.int32)
    for k in (1, 5):
        np.testing.assert_array_equal(top_k_correct(logits, labels, k), [False, False, True])


def test_top_5_of_three_classes_is_always_right() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (9, 3)), jnp.float32)
    labels = jnp.arange(9, dtype=jnp.int32) % 3
    assert top_k_correct(logits, labels, 5).all()
    assert not top_k_correct(logits, labels, 2).all()


# Metrics of one's own.


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Registers metrics for one test."""
    registry.METRICS.names()  # The package's own are there.
    monkeypatch.setattr(registry.METRICS, "_parts", dict(registry.METRICS._parts))
    return registry.register_metric


def test_a_metric_of_ones_own_is_averaged_with_its_options(register: Callable[..., Any]) -> None:
    @register("among", options={"k": 3}, percent=True)
    def among(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
        return top_k_correct(logits, labels, k)

    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(50, 8)), rng.integers(0, 8, 50)
    for options, k in (({}, 3), ({"k": 6}, 6)):
        metrics = MetricSet(Evaluation(metrics=("top1", "among"), options=options), 8)
        assert metrics.scale == {"loss": 1, "top1": 100, "among": 100} and not metrics.needs_logits
        values = metrics.per_example(jnp.asarray(logits), jnp.asarray(labels, jnp.int32))
        sums = EvalMetrics.single_batch(values, jnp.ones(50, bool))
        expected = (np.argsort(-logits)[:, :k] == labels[:, None]).any(axis=1).mean()
        assert metrics.in_units(sums.compute())["among"] == pytest.approx(100 * expected)


def test_a_metric_over_the_split_takes_its_logits(register: Callable[..., Any]) -> None:
    @register("macro", over="split", percent=True)
    def macro(logits: np.ndarray, labels: np.ndarray) -> float:
        right = logits.argmax(axis=1) == labels
        return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))

    metrics = MetricSet(Evaluation(metrics=("top1", "macro")), 3)
    assert metrics.needs_logits and metrics.scale == {"loss": 1, "top1": 100}
    logits = np.eye(3, dtype=np.float32)[[0, 0, 0, 1, 0]]
    found = metrics.over_split(logits, np.array([0, 0, 0, 1, 2], np.int32))
    assert metrics.in_units(found) == {"macro": pytest.approx(200 / 3)}


def test_metrics_that_say_nothing_of_few_classes_are_left_out() -> None:
    assert list(MetricSet(Evaluation(), 5).scale) == ["loss", "top1"]
    assert list(MetricSet(Evaluation(), 6).scale) == ["loss", "top1", "top5"]


@pytest.mark.parametrize(
    ("function", "over", "words"),
    [
        (lambda logits, labels: logits, "example", r"returned float32 \[9, 4\] for logits float32"),
        (
            lambda logits, labels: logits.mean(),
            "example",
            r"float32 \[\].*; expected float or bool",
        ),
        (lambda logits, labels: labels, "example", r"int32 \[9\].*; expected float or bool \[9\]"),
        (lambda logits, labels: None, "example", "returned None for logits"),
        (lambda logits, labels: (labels, labels), "example", "returned a tuple for logits"),
        (lambda logits, labels: float(logits[0, 0]), "example", "failed on logits float32 .* jit"),
        (lambda logits, labels: logits, "split", r"float32 \[9, 4\].*; expected a number"),
        (lambda logits, labels: "much", "split", "returned a str for logits.*; expected a number"),
        (lambda logits: 1.0, "split", "failed on logits .* NumPy arrays: TypeError"),
    ],
)
def test_a_function_that_is_no_metric_is_named_with_what_it_returned(
    register: Callable[..., Any], function: Callable[..., Any], over: str, words: str
) -> None:
    register("wrong", over=over)(function)
    with pytest.raises(ConfigError, match=f"metric 'wrong' \\(.*test_metrics.py, line .*{words}"):
        MetricSet(Evaluation(metrics=("top1", "wrong")), 4)


def test_a_metric_has_a_name_of_its_own(register: Callable[..., Any]) -> None:
    for name in ("seconds", "a/b", "gradient_norm"):
        with pytest.raises(ConfigError, match="stands for something else"):
            register(name)
    with pytest.raises(ConfigError, match=r"over='splits'.*Did you mean split"):
        register("mine", over="splits")
    with pytest.raises(ConfigError, match=r"'top1', which .*metrics\.py, line"):
        register("top1")(lambda logits, labels: labels > 0)
