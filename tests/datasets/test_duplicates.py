import dataclasses
import pathlib

import numpy as np
import pytest

from inception_jax.datasets import duplicates
from inception_jax.datasets.duplicates import Duplicates
from inception_jax.datasets.splits import DecodedSplit, subset


def split(folder: pathlib.Path, digests: list[int], labels: list[int]) -> DecodedSplit:
    names = folder / f"{len(list(folder.iterdir()))}.txt"
    names.write_text("".join(f"{names.stem}-{n}\n" for n in range(len(digests))))
    return DecodedSplit(np.array(labels, np.int32), 8, names, names, np.array(digests, np.uint64))


LARGE = 2**64 - 1


def test_images_in_two_splits_are_detected(tmp_path: pathlib.Path) -> None:
    train = split(tmp_path, [7, 0, LARGE, 7], [0, 0, 1, 1])
    val = split(tmp_path, [LARGE, 5, 7, 3, 7], [0] * 5)
    shared = duplicates.between(val, train)
    assert shared == Duplicates(3, [("1-0", "0-2"), ("1-2", "0-0"), ("1-4", "0-0")])
    assert str(shared) == "1-0 = 0-2, 1-2 = 0-0, 1-4 = 0-0"
    # Of a subset, only its own images.
    part = subset(train, np.array([1, 2]))
    assert duplicates.between(val, part) == Duplicates(1, [("1-0", "0-2")])
    assert duplicates.between(split(tmp_path, [1, 8], [0, 0]), train) == Duplicates(0, [])


def test_at_most_ten_duplicates_are_named(tmp_path: pathlib.Path) -> None:
    both = split(tmp_path, list(range(12)), [0] * 12)
    shared = duplicates.between(both, both)
    assert shared is not None and shared.total == 12 and len(shared.pairs) == 10
    assert str(shared).endswith("0-9 = 0-9 and 2 more")


@pytest.mark.parametrize(
    ("digests", "labels", "expected"),
    [
        ([4, 9, 4, 9, 4], [0, 1, 0, 1, 0], Duplicates(0, [])),
        ([4, 9, 4, 9, 4], [0, 1, 0, 2, 1], Duplicates(5, [("0-0", "0-4"), ("0-1", "0-3")])),
        ([0, LARGE, 0], [1, 1, 0], Duplicates(2, [("0-0", "0-2")])),
    ],
)
def test_equal_images_with_different_labels_are_detected(
    tmp_path: pathlib.Path,
    digests: list[int],
    labels: list[int],
    expected: Duplicates,
) -> None:
    assert duplicates.with_conflicting_labels(split(tmp_path, digests, labels)) == expected


def test_missing_digests_give_none(tmp_path: pathlib.Path) -> None:
    known = split(tmp_path, [1, 2], [0, 1])
    older = dataclasses.replace(known, image_digests=None)
    assert duplicates.between(older, known) is None is duplicates.between(known, older)
    assert duplicates.with_conflicting_labels(subset(older, np.array([0]))) is None
