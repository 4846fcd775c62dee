"""Calibration and confusion against plain loops and scikit-learn."""

import tracemalloc

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from inception_jax.evaluation import calibration


def test_confusion_equals_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, 7, size=(2, 500), dtype=np.int32)
    result = calibration.confusion(labels, predicted, 9)
    np.testing.assert_array_equal(result, confusion_matrix(labels, predicted, labels=range(9)))


def test_calibration_equals_definition() -> None:
    """Guo et al. 2017, equation 3, one example at a time."""
    random = np.random.default_rng(1)
    confidence = random.uniform(size=1000).astype(np.float32)
    correct = random.uniform(size=1000) < 0.8 * confidence
    result = calibration.calibration(confidence, correct, bins=10)
    error = 0.0
    for m in range(10):
        inside = [
            n for n, p in enumerate(confidence.astype(np.float64)) if m / 10 < p <= (m + 1) / 10
        ]
        assert result.count[m] == len(inside)
        accuracy = sum(bool(correct[n]) for n in inside) / len(inside)
        mean = sum(float(confidence[n]) for n in inside) / len(inside)
        assert result.accuracy[m] == pytest.approx(accuracy)
        assert result.confidence[m] == pytest.approx(mean)
        error += len(inside) / 1000 * abs(accuracy - mean)
    assert result.error == pytest.approx(error)
    assert result.overconfidence == pytest.approx(confidence.astype(float).mean() - correct.mean())
    fractions, means = calibration_curve(correct, confidence, n_bins=10)
    np.testing.assert_allclose(result.accuracy, fractions)
    np.testing.assert_allclose(result.confidence, means, rtol=1e-6)


def test_edge_belongs_to_bin_below() -> None:
    confidence = np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32)
    assert calibration.calibration(confidence, confidence > 0, bins=4).count.tolist() == [
        2,
        1,
        1,
        1,
    ]


def test_empty_bin_is_nan() -> None:
    result = calibration.calibration(np.array([0.95, 0.99]), np.array([True, False]), bins=10)
    assert result.count.tolist() == [0] * 9 + [2]
    assert np.isnan(result.accuracy[:9]).all()
    assert result.error == pytest.approx(0.47)


def matrix(pairs: dict[tuple[int, int], int], classes: int) -> np.ndarray:
    result = 10 * np.eye(classes, dtype=np.int64)
    for pair, count in pairs.items():
        result[pair] = count
    return result


def test_most_confused_classes_are_adjacent() -> None:
    pairs = {(0, 7): 3, (7, 0): 3, (2, 5): 5, (5, 4): 4, (1, 3): 1}
    result = calibration.most_confused_classes(matrix(pairs, 9), 5)
    # 0 with 7: six times in both directions; 2 with 5: five; 4 with 5: four, so it is next to 5.
    assert result.tolist() == [0, 7, 2, 5, 4]
    assert calibration.most_confused_classes(matrix(pairs, 9), 9).tolist() == list(range(9))
    # The pair of 1 and 3 does not fit; classes that are never confused are not added.
    assert calibration.most_confused_classes(matrix(pairs, 9), 6).tolist() == [0, 7, 2, 5, 4]
    assert calibration.most_confused_classes(matrix(pairs, 9), 8).tolist() == [0, 7, 2, 5, 4, 1, 3]
    assert calibration.most_confused_classes(matrix({}, 9), 5).tolist() == []


def test_confused_pairs_are_sorted_by_frequency() -> None:
    result = calibration.confused_pairs(matrix({(2, 5): 5, (5, 4): 4, (1, 3): 1}, 6), 2)
    assert result == [(2, 5), (5, 4)]
    assert len(calibration.confused_pairs(matrix({(2, 5): 5}, 6), 10)) == 1


def test_mistakes_of_many_classes_are_found_in_little_memory() -> None:
    """Only pairs that occur are sorted."""
    classes = 2000
    counts = matrix({(5, 1999): 2, (1999, 5): 1, (7, 8): 2}, classes)
    tracemalloc.start()
    assert calibration.confused_pairs(counts, 10) == [(5, 1999), (7, 8), (1999, 5)]
    assert calibration.most_confused_classes(counts, 4).tolist() == [5, 1999, 7, 8]
    assert tracemalloc.get_traced_memory()[1] < 2.5 * counts.nbytes
    tracemalloc.stop()
