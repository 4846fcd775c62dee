"""The moving average against a loop in Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.training import ema


@pytest.mark.parametrize("time_constant", [1, 5, 1000])
def test_decay_rises_to_limit_of_time_constant(time_constant: int) -> None:
    for step in (0, 1, 7, 40, 100_000):
        expected = min(1 - 1 / time_constant, (1 + step) / (10 + step))
        for form in (step, jnp.int32(step)):
            result = ema.decay(form, time_constant)
            assert result.dtype == jnp.float32
            np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_update_equals_explicit_loop() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(30, 3)).astype(np.float32)
    tree = {"params": {"kernel": jnp.asarray(values[0])}, "batch_stats": {"mean": jnp.zeros(())}}
    expected, statistic = values[0].astype(np.float64), 0.0

    @jax.jit
    def step(average: dict, value: jax.Array, count: jax.Array) -> dict:
        new = {"params": {"kernel": value}, "batch_stats": {"mean": value[0]}}
        return ema.update(average, new, ema.decay(count, 10))

    for count, value in enumerate(values):
        tree = step(tree, value, jnp.int32(count))
        keep = min(0.9, (1 + count) / (10 + count))
        expected = keep * expected + (1 - keep) * value
        statistic = keep * statistic + (1 - keep) * float(value[0])
    np.testing.assert_allclose(tree["params"]["kernel"], expected, rtol=1e-5)
    np.testing.assert_allclose(tree["batch_stats"]["mean"], statistic, rtol=1e-5)


def test_average_of_constant_is_constant() -> None:
    values = {"kernel": jnp.full((2, 2), 3.5)}
    result = ema.update(values, values, ema.decay(3, 100))
    np.testing.assert_allclose(result["kernel"], values["kernel"], rtol=1e-6)


def test_time_constant_of_one_step_keeps_last_value() -> None:
    result = ema.update({"a": jnp.ones(2)}, {"a": jnp.zeros(2)}, ema.decay(5, 1))
    np.testing.assert_array_equal(result["a"], [0, 0])


def test_running_statistics_forget_initial_values_within_a_few_steps() -> None:
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(100, 3)).astype(np.float32)
    running, expected = jnp.ones(3), np.ones(3)

    @jax.jit
    def step(running: jax.Array, batch: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        after = 0.9 * running + (1 - 0.9) * batch
        return ema.correct_start(running, after, count, 0.9), after

    for count, batch in enumerate(batches):
        running, after = step(running, batch, jnp.int32(count))
        keep = min(0.9, (1 + count) / (10 + count))
        expected = keep * expected + (1 - keep) * batch
        np.testing.assert_allclose(running, expected, rtol=1e-4, atol=1e-5)
        # After 80 steps the statistics are bit-identical to uncorrected ones.
        assert np.array_equal(running, after) == (count >= 80)


def test_start_is_not_corrected_for_small_momentum() -> None:
    before, after = {"mean": jnp.zeros(2)}, {"mean": jnp.ones(2)}
    result = ema.correct_start(before, after, jnp.int32(0), 0.05)
    np.testing.assert_array_equal(result["mean"], after["mean"])
