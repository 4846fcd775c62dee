from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.training.metrics import EvalMetrics, TrainMetrics


def _add(metrics: TrainMetrics, **step: jax.Array) -> TrainMetrics:
    return metrics.merge(TrainMetrics.single_step(**step))


# As in training: compiled, and the old metrics' memory is given up.
_add_jit = jax.jit(_add, donate_argnums=0)


def _step(step: int, loss: np.ndarray, norm: float, rng: np.random.Generator) -> dict:
    return {
        "step": jnp.int32(step),
        "loss": jnp.asarray(loss),
        "top1": jnp.asarray(rng.random(loss.shape) < 0.3),
        "top5": jnp.asarray(rng.random(loss.shape) < 0.6),
        "gradient_norm": jnp.float32(norm),
    }


def test_train_metrics_are_means_over_examples_and_steps() -> None:
    rng = np.random.default_rng(0)
    steps = [_step(i, rng.random(12, np.float32), float(i), rng) for i in range(1, 8)]
    metrics = TrainMetrics.empty()
    for step in steps:
        metrics = _add_jit(metrics, **step)
    expected = {
        name: float(np.mean([np.asarray(step[name], np.float64) for step in steps]))
        for name in ("loss", "top1", "top5", "gradient_norm")
    }
    found = metrics.compute()
    assert found.keys() == expected.keys() | {"first_nonfinite_step"}
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert found["top1"] == pytest.approx(100 * expected["top1"], rel=1e-12)
    assert found["top5"] == pytest.approx(100 * expected["top5"], rel=1e-12)
    assert found["gradient_norm"] == 4.0
    assert found["first_nonfinite_step"] == -1
    assert all(isinstance(value, int | float) for value in found.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["loss", "gradient_norm"])
def test_the_first_non_finite_step_is_kept(bad: float, where: str) -> None:
    rng = np.random.default_rng(0)
    metrics = TrainMetrics.empty()
    for i in range(1, 8):
        loss, norm = rng.random(4, np.float32), 1.0
        if i in (3, 5):
            loss[2], norm = (bad, norm) if where == "loss" else (loss[2], bad)
        metrics = _add_jit(metrics, **_step(i, loss, norm, rng))
    assert metrics.compute()["first_nonfinite_step"] == 3


def test_merging_keeps_structure_shapes_and_types() -> None:
    # A checkpoint and a compiled step take the metrics of any step.
    rng = np.random.default_rng(0)
    empty = TrainMetrics.empty()
    merged = _add_jit(TrainMetrics.empty(), **_step(1, rng.random(4, np.float32), 1.0, rng))

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
    found = TrainMetrics.empty().compute()
    assert found.pop("first_nonfinite_step") == -1
    assert all(np.isnan(value) for value in found.values())


def test_shared_labels_count_by_their_share() -> None:
    step = _step(1, np.ones(2, np.float32), 1.0, np.random.default_rng(0))
    step["top1"] = jnp.asarray([0.75, 0.0], jnp.float32)
    assert TrainMetrics.single_step(**step).compute()["top1"] == 37.5


def _evaluate(
    loss: np.ndarray, top1: np.ndarray, top5: np.ndarray, batch_size: int
) -> dict[str, float]:
    """Evaluates in batches, the last one padded with examples that must not count."""
    single_batch = jax.jit(EvalMetrics.single_batch)

    def batches() -> Iterator[dict[str, EvalMetrics]]:
        for start in range(0, len(loss), batch_size):
            part = slice(start, start + batch_size)
            missing = batch_size - len(loss[part])
            batch = single_batch(
                loss=jnp.asarray(np.append(loss[part], np.full(missing, np.nan, np.float32))),
                top1=jnp.asarray(np.append(top1[part], np.ones(missing, bool))),
                top5=jnp.asarray(np.append(top5[part], np.ones(missing, bool))),
                mask=jnp.arange(batch_size) < batch_size - missing,
            )
            yield {"plain": batch}

    return EvalMetrics.total(batches())["plain"].compute()


@pytest.mark.parametrize("batch_size", [1, 7, 20, 103, 128])
def test_evaluation_counts_every_example_once(batch_size: int) -> None:
    rng = np.random.default_rng(0)
    loss = rng.random(103, np.float32)
    top1, top5 = rng.random(103) < 0.3, rng.random(103) < 0.6
    found = _evaluate(loss, top1, top5, batch_size)
    assert found["loss"] == pytest.approx(loss.mean(dtype=np.float64), rel=1e-6)
    assert found["top1"] == 100 * (int(top1.sum()) / 103)
    assert found["top5"] == 100 * (int(top5.sum()) / 103)
    assert found["count"] == 103 and isinstance(found["count"], int)


def test_totals_are_in_double_precision() -> None:
    # 2^24 + 1 is no float32: added up in single precision the ones would vanish.
    ones = {"top1": jnp.ones(1, bool), "top5": jnp.ones(1, bool), "mask": jnp.ones(1, bool)}
    losses = [2.0**24, 1.0, 1.0, 1.0]
    batches = [EvalMetrics.single_batch(loss=jnp.full(1, x, jnp.float32), **ones) for x in losses]
    assert (
        EvalMetrics.total([{"": batch} for batch in batches])[""].compute()["loss"]
        == (2**24 + 3) / 4
    )


def test_a_batch_of_padding_alone_is_nan() -> None:
    nothing = np.zeros(0)
    nobody = EvalMetrics.single_batch(
        loss=nothing, top1=nothing > 0, top5=nothing > 0, mask=nothing > 0
    )
    found = EvalMetrics.total([{"plain": nobody}])["plain"].compute()
    assert found["count"] == 0 and np.isnan(found["loss"])


def test_what_is_evaluated_side_by_side_is_summed_apart() -> None:
    one = {"top1": jnp.ones(1, bool), "top5": jnp.ones(1, bool), "mask": jnp.ones(1, bool)}
    batch = {
        name: EvalMetrics.single_batch(loss=jnp.full(1, loss, jnp.float32), **one)
        for name, loss in (("plain", 1.0), ("flip", 3.0))
    }
    found = EvalMetrics.total([batch, batch])
    assert {name: sums.compute()["loss"] for name, sums in found.items()} == {
        "plain": 1.0,
        "flip": 3.0,
    }


def test_few_batches_are_in_flight() -> None:
    # Each dispatched batch holds its images on the device until the host waits for it.
    read: list[int] = []
    ahead: list[int] = []

    class Leaf:
        dtype = np.dtype(np.int32)

        def __init__(self, index: int) -> None:
            self.index = index

        def __array__(self, *args: object, **kwargs: object) -> np.ndarray:
            read.append(self.index)
            return np.asarray(1, np.int32)

    def batches() -> Iterator[dict[str, EvalMetrics]]:
        for index in range(20):
            ahead.append(index - len(set(read)))
            leaf = Leaf(index)
            yield {"plain": EvalMetrics(loss=leaf, top1=leaf, top5=leaf, count=leaf)}

    assert EvalMetrics.total(batches())["plain"].compute()["count"] == 20
    assert max(ahead) <= 3
