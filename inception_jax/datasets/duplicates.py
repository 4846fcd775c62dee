"""Finds equal images, in two splits or with different labels, by their digests.

Evaluating on an image that was trained on says nothing about new images.
"""

import dataclasses

import numpy as np

from inception_jax.datasets.splits import Split

# Maximum number of pairs that are listed.
_MAX_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once.

    Attributes:
      total: number of such images.
      pairs: file names of up to ten of them, each with that of an equal image.
    """

    total: int
    pairs: list[tuple[str, str]]

    def __str__(self) -> str:
        more = f" and {self.total - len(self.pairs):,} more" if self.total > len(self.pairs) else ""
        return ", ".join(f"{one} = {two}" for one, two in self.pairs) + more


def between(split: Split, other: Split) -> Duplicates | None:
    """Returns the images of `split` that are also in `other`.

    Args:
      split, other: splits of one data set.

    Returns:
      Pairs that start with the image of `split`; None if digests are missing.
    """
    digests, others = split.digests, other.digests
    if digests is None or others is None:
        return None
    order = np.argsort(others, kind="stable")
    # Index of the first digest that is not smaller, or of the last.
    places = np.minimum(np.searchsorted(others[order], digests), len(others) - 1)
    matches = np.flatnonzero(others[order][places] == digests)
    pairs = [(split.names[n], other.names[order[places[n]]]) for n in matches[:_MAX_NAMED]]
    return Duplicates(len(matches), pairs)


def with_conflicting_labels(split: Split) -> Duplicates | None:
    """Returns the images that occur in a split with different labels.

    Returns:
      Pairs of equal images with different labels; None if digests are missing.
    """
    digests = split.digests
    if digests is None:
        return None
    order = np.argsort(digests, kind="stable")
    labels = split.labels[order]
    first = np.flatnonzero(np.diff(digests[order], prepend=~digests[order[:1]]))
    sizes = np.diff(first, append=len(order))
    most, least = np.maximum.reduceat(labels, first), np.minimum.reduceat(labels, first)
    differ = np.flatnonzero(most != least)
    pairs = []
    for group in differ[:_MAX_NAMED]:
        members = order[first[group] : first[group] + sizes[group]]
        one = members[0]
        two = next(n for n in members if split.labels[n] != split.labels[one])
        pairs.append((split.names[one], split.names[two]))
    return Duplicates(int(sizes[differ].sum()), pairs)
