"""Operations sampled by the policies: frequencies and magnitudes."""

import collections

import jax
import numpy as np
import pytest

from inception_jax.input import image_ops, policies
from inception_jax.input.image_ops import Op

SIGNED = set(Op) - {Op.IDENTITY, Op.POSTERIZE, Op.SOLARIZE, Op.AUTOCONTRAST, Op.EQUALIZE}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[np.ndarray, np.ndarray]]:
    """Collects the (operations, values) of a policy; leaves images unchanged."""
    calls: list[tuple[np.ndarray, np.ndarray]] = []

    def record(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
        jax.debug.callback(
            lambda *arrays: calls.append(tuple(map(np.asarray, arrays))), operations, values
        )
        return images

    monkeypatch.setattr(policies, "apply", record)
    return calls


def test_values_match_torchvision() -> None:
    """Values of RandAugment's and TrivialAugmentWide's _augmentation_space at some bins."""
    values = policies.randaugment_values(48, 64)
    expected = {
        Op.SHEAR_X: 0.09,
        Op.TRANSLATE_X: 8,  # int(0.3 * 150 / 331 * 64)
        Op.TRANSLATE_Y: 6,
        Op.ROTATE: 9,
        Op.SHARPNESS: 0.27,
        Op.POSTERIZE: 7,
        Op.SOLARIZE: 178.5,
        Op.EQUALIZE: 0,
    }
    for op, value in expected.items():
        assert values[op, 9] == pytest.approx(value)
    # NumPy and torch round halves to even: 4 * 3.75 / 30 = 0.5, 1.5, ... never at integer bins.
    assert values[Op.POSTERIZE].tolist() == [8] * 4 + [7] * 8 + [6] * 7 + [5] * 8 + [4] * 4
    wide = policies.trivialaugment_values()
    assert wide[:, 30] == pytest.approx(
        [0, 0.99, 0.99, 32, 32, 135, 0.99, 0.99, 0.99, 0.99, 2, 0, 0, 0]
    )
    assert wide[:, 0] == pytest.approx([0] * 10 + [8, 255, 0, 0])


def test_randaugment_operations_and_signs_are_uniform(drawn: list) -> None:
    images = np.zeros((4000, 4, 4, 3), np.uint8)
    policies.randaugment(jax.random.key(0), images, 3, 20)
    jax.effects_barrier()
    assert len(drawn) == 3
    operations, values = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    counts = np.bincount(operations, minlength=len(Op))
    expected = len(operations) / len(Op)
    # The 99.9th percentile of chi-squared with 13 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 34.5
    wanted = policies.randaugment_values(4, 4)[operations, 20]
    np.testing.assert_array_equal(np.abs(values), wanted)
    for op in Op:
        negative = np.signbit(values[operations == op]).mean()
        assert 0.43 < negative < 0.57 if op in SIGNED else negative == 0
    # The positions within an image are sampled independently.
    assert (drawn[0][0] == drawn[1][0]).mean() == pytest.approx(1 / len(Op), abs=0.02)


def test_trivialaugment_samples_one_operation_and_magnitude(drawn: list) -> None:
    images = np.zeros((20000, 4, 4, 3), np.uint8)
    policies.trivialaugment(jax.random.key(1), images)
    jax.effects_barrier()
    ((operations, values),) = drawn
    counts = np.bincount(operations, minlength=len(Op))
    expected = len(operations) / len(Op)
    assert ((counts - expected) ** 2 / expected).sum() < 34.5
    actual = collections.Counter(np.abs(values[operations == Op.ROTATE]).round(1).tolist())
    assert sorted(actual) == pytest.approx(np.arange(31) * 4.5, abs=1e-3)
    expected = actual.total() / 31
    # The 99.9th percentile of chi-squared with 30 degrees of freedom.
    assert sum((count - expected) ** 2 / expected for count in actual.values()) < 59.7


def test_randaugment_applies_operations_in_sequence() -> None:
    images = np.random.default_rng(2).integers(0, 256, (64, 8, 8, 3), np.uint8)
    key = jax.random.key(2)
    # One operation at a time would compile everything once for each.
    randaugment = jax.jit(policies.randaugment, static_argnums=(2, 3))
    apply = jax.jit(image_ops.apply)
    once, twice = (randaugment(key, images, ops, 9) for ops in (1, 2))
    op_key, sign_key = jax.random.split(key)
    for ops, result in ((1, once), (2, twice)):
        operations = jax.random.randint(op_key, (ops, 64), 0, len(Op))
        negative = np.asarray(jax.random.bernoulli(sign_key, 0.5, (ops, 64)))
        expected = images
        for place in range(ops):
            op = np.asarray(operations[place])
            value = policies.randaugment_values(8, 8)[op, 9]
            flipped = np.array([Op(o) in SIGNED for o in op]) & negative[place]
            value = np.where(flipped, -value, value)
            expected = np.asarray(apply(expected, operations[place], value))
        np.testing.assert_array_equal(result, expected)
