"""What can be counted in the predictions of an evaluation: by class, by confusion, by confidence.

Pure functions of NumPy arrays. N is the number of examples, K of classes; a label or guess is a
class's number, from 0 to K - 1.
"""

import dataclasses

import numpy as np

# As in Guo et al. 2017.
BINS = 15


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """How far a network's confidence is the accuracy that it has.

    Guo et al. 2017, "On Calibration of Modern Neural Networks", section 2: the examples are put in
    M bins of equal width by their confidence, the probability of the most probable class.

    Attributes:
      edges: float64 [M + 1], of the bins, from 0 to 1; an edge belongs to the bin below it.
      count: int64 [M], examples in each.
      confidence: float64 [M], mean confidence of each (eq. 3's conf); NaN in an empty one.
      accuracy: float64 [M], share of each that is right (acc); NaN in an empty one.
      error: the expected calibration error (eq. 3): the mean over the examples of the distance
        between their bin's accuracy and confidence, between 0 and 1.
      excess: mean confidence minus accuracy, over all examples: above 0 where the network is
        over-confident.
    """

    edges: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    error: float
    excess: float


def calibration(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> Calibration:
    """Returns how well calibrated N examples' confidence is.

    Args:
      confidence: float [N], in [0, 1]; N at least 1.
      right: bool [N].
      bins: how many there are.
    """
    confidence = confidence.astype(np.float64)
    edges = np.linspace(0, 1, bins + 1)
    # Bin m holds what is in (edges[m], edges[m + 1]].
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, confidence, minlength=bins) / count
        accuracy = np.bincount(place, right, minlength=bins) / count
    error = np.nansum(count * np.abs(accuracy - mean)) / len(confidence)
    return Calibration(
        edges=edges,
        count=count,
        confidence=mean,
        accuracy=accuracy,
        error=float(error),
        excess=float(confidence.mean() - right.mean()),
    )


def confusion(labels: np.ndarray, guesses: np.ndarray, classes: int) -> np.ndarray:
    """Returns how often each class was taken for each: int64 [K, K], true by guessed."""
    pairs = labels.astype(np.int64) * classes + guesses
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def confused_pairs(matrix: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Returns the mistakes that were made most often, as (true, guessed), the most frequent first.

    Args:
      matrix: from `confusion`.
      most: how many at most.
    """
    mistakes = matrix.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes, axis=None, kind="stable")[:most]
    places = np.stack(np.unravel_index(order, mistakes.shape), axis=1)
    return [(int(true), int(guess)) for true, guess in places if mistakes[true, guess]]


def most_confused(matrix: np.ndarray, most: int) -> np.ndarray:
    """Returns the classes that are most confused with each other: int64 [C], C at most `most`.

    They are gathered pair by pair, from the pair that is mixed up most often, both ways together.
    Classes that are confused stand next to each other: each is put beside the one that brought it
    in. All classes, in their order, if there are no more than `most`.

    Args:
      matrix: from `confusion`.
      most: how many at most.
    """
    classes = len(matrix)
    if classes <= most:
        return np.arange(classes)
    mixed = np.triu(matrix + matrix.T, k=1)
    chosen: list[int] = []
    for flat in np.argsort(-mixed, axis=None, kind="stable"):
        pair = [int(each) for each in np.unravel_index(flat, mixed.shape)]
        new = [each for each in pair if each not in chosen]
        if len(chosen) + len(new) > most or not mixed[pair[0], pair[1]]:
            break
        known = [each for each in pair if each in chosen]
        place = chosen.index(known[0]) + 1 if known else len(chosen)
        chosen[place:place] = new
    return np.array(chosen, np.int64)
