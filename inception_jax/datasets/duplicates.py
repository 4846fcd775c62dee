"""Equal images: in two splits, or in one with different labels, found by their digests.

An image of the evaluation split that is trained on, too, says nothing about new images.
"""

import dataclasses

import numpy as np

from inception_jax.datasets.splits import Split

# How many pairs are named.
_MAX_NAMED = 10


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once.

    Attributes:
      total: how many there are.
      pairs: the file names of up to ten of them, each with that of an equal image.
    """

    total: int
    pairs: list[tuple[str, str]]

    def __str__(self) -> str:
        more = f" and {self.total - len(self.pairs):,} more" if self.total > len(self.pairs) else ""
        return ", ".join(f"{one} = {two}" for one, two in self.pairs) + more


def between(split: Split, other: Split) -> Duplicates | None:
    """Returns the images of a split that are also in another one.

    Args:
      split, other: of one data set.

    Returns:
      Of each pair, first the image of `split`; None if there are no digests to compare.
    """
    digests, others = split.digests, other.digests
    if digests is None or others is None:
        return None
    order = np.argsort(others, kind="stable")
    # The place of the first that is not smaller, or the last.
    places = np.minimum(np.searchsorted(others[order], digests), len(others) - 1)
    matches = np.flatnonzero(others[order][places] == digests)
    pairs = [(split.names[n], other.names[order[places[n]]]) for n in matches[:_MAX_NAMED]]
    return Duplicates(len(matches), pairs)


def with_conflicting_labels(split: Split) -> Duplicates | None:
    """Returns the images of a split that are in it with another label, too.

    Returns:
      Of each pair, two images that are equal and differ in their labels; None if there are no
      digests to compare.
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
