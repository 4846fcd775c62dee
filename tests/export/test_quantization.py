"""Accuracy of an exported network, and what 8 bits cost."""

import numpy as np
import pytest

from inception_jax.datasets.splits import Split
from inception_jax.export import quantization


class Fixed(Split):
    """A split whose images are their numbers."""

    @property
    def threads(self) -> int:
        return 1

    def read(self, indices: np.ndarray) -> np.ndarray:
        return indices.astype(np.uint8).reshape(-1, 1, 1, 1)


def test_accuracy_counts_every_image_once() -> None:
    """7 classes; image i is rated i, i + 1, …: right at first, or at fifth place, or not at all."""
    labels = np.array([i % 7 if i % 2 else (i + 4) % 7 for i in range(150)] + [3], np.int32)
    labels[0] = 5
    split = Fixed(labels, 1)

    def classify(pixels: np.ndarray) -> np.ndarray:
        places = (np.arange(7) - pixels.reshape(-1, 1) % 7) % 7
        return -places.astype(np.float32)

    found = quantization.measure_accuracy("form", classify, split, size=2_500_000)
    assert (found.precision, found.megabytes, found.count) == ("form", 2.5, 151)
    # 75 odd ones; image 150 is rated 3 first; of the 75 even ones image 0 is not among the five.
    assert found.top1 == pytest.approx(100 * 76 / 151)
    assert found.top5 == pytest.approx(100 * 150 / 151)


def test_ties_go_to_the_lower_label() -> None:
    split = Fixed(np.array([0, 1, 4, 5], np.int32), 1)
    found = quantization.measure_accuracy(
        "", lambda pixels: np.zeros((len(pixels), 7)), split, size=0
    )
    assert (found.top1, found.top5) == (25, 75)


@pytest.mark.parametrize(("top1", "warned"), [(55.0, True), (59.0, False), (61.0, False)])
def test_warns_if_accuracy_drops_more_than_a_point(top1: float, warned: bool) -> None:
    before, after = (
        quantization.Accuracy(form, 1.0, top1=percent, top5=None, count=9, images_per_second=1.0)
        for form, percent in (("float32", 60.0), ("int8", top1))
    )
    found = quantization.accuracy_warning(before, after, ["--float_ends", "--calibration=2048"])
    assert bool(found) == warned
    if warned:
        assert "costs 5.00 points of top-1 accuracy (55.00%, float32 60.00%)" in found
        assert found.endswith("Try --float_ends or --calibration=2048")


def test_top5_is_omitted_for_five_classes() -> None:
    split = Fixed(np.array([0, 1, 4], np.int32), 1)
    found = quantization.measure_accuracy(
        "", lambda pixels: np.zeros((len(pixels), 5)), split, size=0
    )
    assert found.top5 is None
