"""Computes calibration and confusion from the predictions of an evaluation.

Pure functions of NumPy arrays. N is the number of examples, K of classes; a label or prediction is
a class number from 0 to K - 1.
"""

import dataclasses

import numpy as np

# As in Guo et al. 2017.
NUM_BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Calibration of predicted confidences.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2: the examples are put in
    M bins of equal width by their confidence, the probability of the most probable class.

    Attributes:
      edges: float64 [M + 1], bin edges from 0 to 1; an edge belongs to the bin below it.
      count: int64 [M], number of examples in each bin.
      confidence: float64 [M], mean confidence of each bin (eq. 3's conf); NaN if empty.
      accuracy: float64 [M], fraction of each bin that is correct (acc); NaN if empty.
      error: expected calibration error (eq. 3) in [0, 1]: the mean over the examples of the
        absolute difference between accuracy and confidence of their bin.
      overconfidence: mean confidence minus accuracy over all examples.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float
    overconfidence: float


def calibration(confidence: np.ndarray, correct: np.ndarray, bins: int = NUM_BINS) -> Calibration:
    """Computes the calibration of N predictions.

    Args:
      confidence: float [N], in [0, 1]; N at least 1.
      correct: bool [N], whether each prediction is correct.
      bins: number of bins.

    >>> result = calibration(np.array([0.6, 0.9]), np.array([False, True]), bins=2)
    >>> result.count.tolist(), round(result.error, 3)
    ([0, 2], 0.25)
    """
    confidence = confidence.astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    # Bin m contains (edges[m], edges[m + 1]].
    bin_index = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(bin_index, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(bin_index, confidence, minlength=bins) / count
        accuracy = np.bincount(bin_index, correct, minlength=bins) / count
    error = np.nansum(count * np.abs(accuracy - mean)) / len(confidence)
    return Calibration(
        edges=edges,
        count=count,
        confidence=mean,
        accuracy=accuracy,
        error=float(error),
        overconfidence=float(confidence.mean() - correct.mean()),
    )


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Returns the confusion matrix: int64 [K, K], rows true, columns predicted.

    >>> confusion(np.array([0, 1, 1]), np.array([0, 0, 1]), 2).tolist()
    [[1, 0], [1, 1]]
    """
    pairs = labels.astype(np.int64) * classes + predicted
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def confused_pairs(matrix: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """Returns the most frequent mistakes as (true, predicted), the most frequent first.

    Args:
      matrix: int [K, K], from `confusion`.
      limit: maximum number of pairs.
    """
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    return _most_frequent(mistakes)[:limit]


def _most_frequent(counts: np.ndarray) -> list[tuple[int, int]]:
    """Returns the positions of the counts [K, K] that are not 0, the largest first."""
    # Of many classes, few pairs occur.
    cells = np.flatnonzero(counts)
    cells = cells[np.argsort(-counts.ravel()[cells], kind="stable")]
    rows, columns = np.unravel_index(cells, counts.shape)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def most_confused_classes(matrix: np.ndarray, limit: int) -> np.ndarray:
    """Returns the classes most often confused with each other: int64 [C], C at most `limit`.

    They are added pair by pair, starting with the pair confused most often, counting both
    directions. Each class is placed next to the one that it is confused with. If there are at most
    `limit` classes, all are returned in their order.

    Args:
      matrix: from `confusion`.
      limit: maximum number of classes.
    """
    classes = len(matrix)
    if classes <= limit:
        return np.arange(classes)
    mixed = np.triu(matrix + matrix.T, k=1)
    chosen: list[int] = []
    for pair in _most_frequent(mixed):
        new = [each for each in pair if each not in chosen]
        if len(chosen) + len(new) > limit:
            break
        known = [each for each in pair if each in chosen]
        place = chosen.index(known[0]) + 1 if known else len(chosen)
        chosen[place:place] = new
    return np.array(chosen, np.int64)
