"""Tests accuracy of exported networks and the warning about int8."""

import numpy as np
import pytest

from inception_jax.datasets.splits import Split
from inception_jax.export import quantization


class Fixed(Split):
    """A split in which each image is its index."""

    @property
    def threads(self) -> int:
        return 1

    def read(self, indices: np.ndarray) -> np.ndarray:
        return indices.astype(np.uint8).reshape(-1, 1, 1, 1)


def test_accuracy_counts_every_image_once() -> None:
    """Image i of 7 classes is ranked i, i + 1, …: its label is first, fifth or lower."""
    labels = np.array([i % 7 if i % 2 else (i + 4) % 7 for i in range(150)] + [3], np.int32)
    labels[0] = 5
    split = Fixed(labels, 1)

    def classify(pixels: np.ndarray) -> np.ndarray:
        places = (np.arange(7) - pixels.reshape(-1, 1) % 7) % 7
        return -places.astype(np.float32)

    accuracy = quantization.measure_accuracy("int8", classify, split, size=2_500_000)
    assert (accuracy.precision, accuracy.megabytes, accuracy.count) == ("int8", 2.5, 151)
    # First: the 75 odd images and image 150. Among the first five: all but image 0.
    assert accuracy.top1 == pytest.approx(100 * 76 / 151)
    assert accuracy.top5 == pytest.approx(100 * 150 / 151)


def test_ties_go_to_the_lower_label() -> None:
    split = Fixed(np.array([0, 1, 4, 5], np.int32), 1)
    accuracy = quantization.measure_accuracy(
        "", lambda pixels: np.zeros((len(pixels), 7)), split, size=0
    )
    assert (accuracy.top1, accuracy.top5) == (25, 75)


def test_images_without_finite_logits_are_wrong() -> None:
    split = Fixed(np.array([0, 1, 4, 5], np.int32), 1)
    accuracy = quantization.measure_accuracy(
        "", lambda pixels: np.full((len(pixels), 7), np.nan), split, size=0
    )
    assert (accuracy.top1, accuracy.top5) == (0, 0)


@pytest.mark.parametrize(("top1", "warned"), [(55.0, True), (59.0, False), (61.0, False)])
def test_warns_if_accuracy_drops_more_than_a_point(top1: float, warned: bool) -> None:
    before, after = (
        quantization.Accuracy(form, 1.0, top1=percent, top5=None, count=9, images_per_second=1.0)
        for form, percent in (("float32", 60.0), ("int8", top1))
    )
    warning = quantization.accuracy_warning(before, after, ["--float_ends", "--calibration=2048"])
    assert bool(warning) == warned
    if warned:
        assert "costs 5.00 points of top-1 accuracy (55.00%, float32 60.00%)" in warning
        assert warning.endswith("Try --float_ends or --calibration=2048")


def test_top5_is_omitted_for_five_classes() -> None:
    split = Fixed(np.array([0, 1, 4], np.int32), 1)
    accuracy = quantization.measure_accuracy(
        "", lambda pixels: np.zeros((len(pixels), 5)), split, size=0
    )
    assert accuracy.top5 is None
