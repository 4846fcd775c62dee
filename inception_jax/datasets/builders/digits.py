"""Handwritten digits that come with scikit-learn: a data set that needs no download.

1,797 grey images of 8 × 8 pixels, the test set of UCI's "Optical Recognition of Handwritten Digits"
(Alpaydin and Kaynak, 1998). Large enough to see a network learn in seconds.
"""

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from inception_jax.datasets.builders import base
from inception_jax.registry import DATASETS

# Every fifth image, counted within the classes one after another, is a test image: 360 of 1,797,
# each class's share the same to within one image.
_TEST_EVERY = 5


class Digits(base.ImageBuilder):
    """The digits 0 to 9: 1,437 training and 360 test images.

    Features: image (PNG, grey), label, file_name (the index in scikit-learn's order).
    """

    VERSION = tfds.core.Version(DATASETS.get("digits").version)
    DESCRIPTION = "Handwritten digits of 8 x 8 pixels, as shipped with scikit-learn."
    HOMEPAGE = "https://archive.ics.uci.edu/dataset/80"
    IMAGE: ClassVar[dict[str, Any]] = {"shape": (8, 8, 1), "encoding_format": "png"}

    _images: np.ndarray
    _labels: np.ndarray

    def open(self) -> None:
        """Loads the images from scikit-learn."""
        # Imported here: scikit-learn takes a second, and reading what is prepared needs none of it.
        from sklearn import datasets

        bunch = datasets.load_digits()
        self._images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
        self._labels = bunch.target
        by_class = np.argsort(self._labels, kind="stable")
        is_test = np.arange(len(by_class)) % _TEST_EVERY == 0
        self._splits = {
            "train": sorted(by_class[~is_test].tolist()),
            "test": sorted(by_class[is_test].tolist()),
        }

    def class_names_and_metadata(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the digits' names; there is no more to keep."""
        return [str(digit) for digit in range(10)], {}

    def source_bytes(self) -> int:
        """Returns a bound on the size of all images, bytes."""
        return 4 * self._images.nbytes

    def examples(self, items: Sequence[int]) -> Generator[base.KeyedExample, None, None]:
        """Yields the images as PNG files."""
        for item in items:
            name, image = f"digit_{item:04d}.png", base.to_png(self._images[item])
            yield name, {"image": image, "label": int(self._labels[item]), "file_name": name}
