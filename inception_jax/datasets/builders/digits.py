"""Builds the handwritten digits of scikit-learn, which need no download.

1,797 grayscale images of 8 × 8 pixels: the test set of UCI's "Optical Recognition of Handwritten
Digits" (Alpaydin and Kaynak, 1998). Large enough to see a network learn within seconds.
"""

from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from inception_jax.datasets.builders import base
from inception_jax.registry import DATASETS

# With the images sorted by class, every fifth is a test image: 360 of 1,797, the same fraction of
# each class to within one image.
_TEST_EVERY = 5


class Digits(base.ImageBuilder):
    """Builds the digits 0 to 9 with 1,437 training and 360 test images.

    Features: image (grayscale PNG), label, file_name (with the index in scikit-learn's order).
    """

    VERSION = tfds.core.Version(DATASETS.get("digits").version)
    DESCRIPTION = "Handwritten digits of 8 x 8 pixels, as shipped with scikit-learn."
    HOMEPAGE = "https://archive.ics.uci.edu/dataset/80"
    IMAGE: ClassVar[dict[str, Any]] = {"shape": (8, 8, 1), "encoding_format": "png"}

    _images: np.ndarray
    _labels: np.ndarray

    def open(self) -> None:
        """Loads the images from scikit-learn."""
        # Imported here because it takes a second, and reading prepared data does not need it.
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
        """Returns the digits as class names, and no metadata."""
        return [str(digit) for digit in range(10)], {}

    def source_bytes(self) -> int:
        """Returns an upper bound of the size of all images, bytes."""
        return 4 * self._images.nbytes

    def examples(self, items: Sequence[int]) -> Generator[base.KeyedExample, None, None]:
        """Yields the images as PNG."""
        for item in items:
            name, image = f"digit_{item:04d}.png", base.to_png(self._images[item])
            yield name, {"image": image, "label": int(self._labels[item]), "file_name": name}
