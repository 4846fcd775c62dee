"""What is counted in predictions, against plain loops and scikit-learn."""

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import confusion_matrix

from inception_jax.evaluation import calibration


def test_confusion_equals_scikit_learn() -> None:
    random = np.random.default_rng(0)
    labels, guesses = random.integers(0, 7, size=(2, 500), dtype=np.int32)
    found = calibration.confusion(labels, guesses, 9)
    np.testing.assert_array_equal(found, confusion_matrix(labels, guesses, labels=range(9)))


def test_calibration_equals_definition() -> None:
    """Guo et al. 2017, equation 3, an example at a time."""
    random = np.random.default_rng(1)
    confidence = random.uniform(size=1000).astype(np.float32)
    right = random.uniform(size=1000) < 0.8 * confidence
    found = calibration.calibration(confidence, right, bins=10)
    error = 0.0
    for m in range(10):
        inside = [
            n for n, p in enumerate(confidence.astype(np.float64)) if m / 10 < p <= (m + 1) / 10
        ]
        assert found.count[m] == len(inside)
        accuracy = sum(bool(right[n]) for n in inside) / len(inside)
        mean = sum(float(confidence[n]) for n in inside) / len(inside)
        assert found.accuracy[m] == pytest.approx(accuracy)
        assert found.confidence[m] == pytest.approx(mean)
        error += len(inside) / 1000 * abs(accuracy - mean)
    assert found.error == pytest.approx(error)
    assert found.overconfidence == pytest.approx(confidence.astype(float).mean() - right.mean())
    shares, means = calibration_curve(right, confidence, n_bins=10)
    np.testing.assert_allclose(found.accuracy, shares)
    np.testing.assert_allclose(found.confidence, means, rtol=1e-6)


def test_edge_belongs_to_bin_below() -> None:
    confidence = np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32)
    assert calibration.calibration(confidence, confidence > 0, bins=4).count.tolist() == [
        2,
        1,
        1,
        1,
    ]


def test_empty_bin_is_nan() -> None:
    found = calibration.calibration(np.array([0.95, 0.99]), np.array([True, False]), bins=10)
    assert found.count.tolist() == [0] * 9 + [2]
    assert np.isnan(found.accuracy[:9]).all()
    assert found.error == pytest.approx(0.47)


def matrix(pairs: dict[tuple[int, int], int], classes: int) -> np.ndarray:
    found = 10 * np.eye(classes, dtype=np.int64)
    for place, count in pairs.items():
        found[place] = count
    return found


def test_most_confused_classes_are_adjacent() -> None:
    pairs = {(0, 7): 3, (7, 0): 3, (2, 5): 5, (5, 4): 4, (1, 3): 1}
    found = calibration.most_confused_classes(matrix(pairs, 9), 5)
    # 0 with 7: six times both ways; 2 with 5: five; 4 with 5: four, so it stands beside 5.
    assert found.tolist() == [0, 7, 2, 5, 4]
    assert calibration.most_confused_classes(matrix(pairs, 9), 9).tolist() == list(range(9))
    # The pair of 1 and 3 does not fit any more; classes that nobody confuses are not filled in.
    assert calibration.most_confused_classes(matrix(pairs, 9), 6).tolist() == [0, 7, 2, 5, 4]
    assert calibration.most_confused_classes(matrix(pairs, 9), 8).tolist() == [0, 7, 2, 5, 4, 1, 3]
    assert calibration.most_confused_classes(matrix({}, 9), 5).tolist() == []


def test_confused_pairs_are_sorted_by_frequency() -> None:
    found = calibration.confused_pairs(matrix({(2, 5): 5, (5, 4): 4, (1, 3): 1}, 6), 2)
    assert found == [(2, 5), (5, 4)]
    assert len(calibration.confused_pairs(matrix({(2, 5): 5}, 6), 10)) == 1
