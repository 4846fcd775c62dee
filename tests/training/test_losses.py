"""Losses against numpy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax.training import losses


def logits_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_cross_entropy_is_negative_log_probability() -> None:
    logits = logits_of((6, 5))
    labels = np.array([0, 1, 2, 3, 4, 0])
    result = losses.cross_entropy(jnp.asarray(logits), jax.nn.one_hot(labels, 5))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, -log_softmax(logits)[np.arange(6), labels], rtol=1e-5)


def test_cross_entropy_is_linear_in_targets() -> None:
    logits = logits_of((4, 3))
    targets = np.array([[0.3, 0.7, 0], [1, 0, 0], [0.2, 0.2, 0.6], [0, 0, 1]], np.float32)
    result = losses.cross_entropy(jnp.asarray(logits), jnp.asarray(targets))
    np.testing.assert_allclose(result, -(targets * log_softmax(logits)).sum(axis=1), rtol=1e-5)


def test_cross_entropy_of_bfloat16_logits_is_computed_in_float32() -> None:
    logits = jnp.asarray(logits_of((8, 200)), jnp.bfloat16)
    targets = jax.nn.one_hot(np.arange(8), 200)
    result = losses.cross_entropy(logits, targets)
    exact = -log_softmax(np.asarray(logits, np.float32))[np.arange(8), np.arange(8)]
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, exact, rtol=1e-5)


def test_cross_entropy_is_finite_for_large_logits() -> None:
    logits = jnp.asarray([[1e4, -1e4], [-1e4, 1e4]])
    result = losses.cross_entropy(logits, jnp.asarray([[1.0, 0.0], [1.0, 0.0]]))
    np.testing.assert_allclose(result, [0, 2e4])


def test_objective_adds_the_weighted_auxiliary_losses() -> None:
    main, first, second = (logits_of((5, 7), seed) for seed in range(3))
    labels = np.arange(5)
    smoothed = 0.9 * np.eye(7)[labels] + 0.1 / 7
    of_head = [-(smoothed * log_softmax(head)).sum(axis=1) for head in (main, first, second)]
    result = losses.objective(
        jnp.asarray(main),
        (jnp.asarray(first), jnp.asarray(second)),
        jax.nn.one_hot(labels, 7),
        label_smoothing=0.1,
        aux_weight=0.3,
    )
    np.testing.assert_allclose(result, of_head[0] + 0.3 * (of_head[1] + of_head[2]), rtol=1e-5)


def test_objective_and_its_gradient_equal_pytorch() -> None:
    torch = pytest.importorskip("torch")
    logits, labels = logits_of((6, 10)), np.array([3, 1, 4, 1, 5, 9])

    def ours(logits: jax.Array) -> jax.Array:
        targets = jax.nn.one_hot(labels, 10)
        return losses.objective(logits, (), targets, label_smoothing=0.1, aux_weight=0.3).sum()

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(logits))
    tensor = torch.tensor(logits, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(
        tensor, torch.tensor(labels), label_smoothing=0.1, reduction="sum"
    )
    loss.backward()
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), atol=1e-5)
