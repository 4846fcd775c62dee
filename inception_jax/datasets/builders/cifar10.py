"""Builds CIFAR-10: 10 classes, 32 × 32 pixels (cifar10_files.py reads its file formats).

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", University of Toronto,
2009.
"""

import pathlib
from collections.abc import Generator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from inception_jax.datasets import decode
from inception_jax.datasets.builders import base, folders
from inception_jax.datasets.builders import cifar10_files as files
from inception_jax.datasets.sources import download, opening
from inception_jax.errors import DataError
from inception_jax.registry import DATASETS

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
BYTES = 170_498_071
# Images encoded per task of a thread: about 5 ms of work.
_CHUNK_SIZE = 64
_CITATION = """@techreport{krizhevsky2009learning,
  title = {Learning Multiple Layers of Features from Tiny Images},
  author = {Krizhevsky, Alex},
  institution = {University of Toronto},
  year = {2009},
}"""


class CifarImage(NamedTuple):
    """One image: its split, its index in file order, its pixels (uint8 [3072]) and its label."""

    split: str
    number: int
    pixels: np.ndarray
    label: int


class Cifar10(base.ImageBuilder):
    """Builds CIFAR-10 with 50,000 training and 10,000 test images.

    Features: image (PNG), label, file_name ('train_00000.png': the index in file order, which other
    programs use too).

    Any source with the right image counts is accepted as CIFAR-10, and data prepared from one
    source are reused for another. A non-official archive is reported in the log; a folder is not.
    """

    VERSION = tfds.core.Version(DATASETS.get("cifar10").version)
    DESCRIPTION = "10 classes at 32 x 32 pixels: 50,000 training and 10,000 test images."
    HOMEPAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"
    CITATION = _CITATION
    IMAGE: ClassVar[dict[str, Any]] = {"shape": (32, 32, 3), "encoding_format": "png"}

    _path: pathlib.Path
    _names: list[str]

    def open(self) -> None:
        """Reads all files (184 MB of pixels) and checks that they match CIFAR-10."""
        self._path = self._locate()
        with opening.open_path(
            self._path, is_hidden=folders.is_hidden, scratch=pathlib.Path(self.data_dir_root)
        ) as source:
            self._names, arrays = files.read(source)
        for split, (_, labels) in arrays.items():
            self._check_counts(
                split,
                labels,
                len(files.BATCH_FILES[split]) * files.IMAGES_PER_FILE // files.NUM_CLASSES,
            )
        path = self._path
        if path.is_file() and (path.stat().st_size, download.md5_of(path)) != (BYTES, MD5):
            self.log(
                f"{self._path}: not the official archive (MD5 {MD5}), but its files and image "
                "counts match CIFAR-10; using it as is"
            )

        self._splits = {
            split: [
                CifarImage(split, index, row, label)
                for index, (row, label) in enumerate(zip(pixels, labels, strict=True))
            ]
            for split, (pixels, labels) in arrays.items()
        }

    def _locate(self) -> pathlib.Path:
        if not self.source:
            target = pathlib.Path(self.data_dir_root, "downloads", "cifar-10-python.tar.gz")
            return download.fetch(URL, target, size=BYTES, md5=MD5, log=self.log)
        path = pathlib.Path(self.source)
        if not path.exists():
            raise DataError(
                f"config.data.source = {self.source!r}: no such file or folder; set it to "
                f"cifar-10-python.tar.gz or the extracted folder {files.FOLDER}, or leave it "
                "empty to download the official archive"
            )
        return path

    def _check_counts(self, split: str, labels: Sequence[int], expected: int) -> None:
        counts = np.bincount(labels, minlength=files.NUM_CLASSES)
        if (counts != expected).any():
            raise DataError(
                f"{self._path}: incomplete CIFAR-10: its {split} split has "
                f"{', '.join(f'{count:,}' for count in counts)} images of the classes 0 to 9 "
                f"(expected {expected:,} each). Download the archive again"
            )

    def class_names_and_metadata(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the class names from batches.meta, and the source path."""
        return self._names, {"source": str(self._path.absolute())}

    def source_bytes(self) -> int:
        """Returns the size of all pixels, which PNG exceeds by at most a few bytes per image."""
        return sum(len(each) * (3 * 32 * 32 + 200) for each in self._splits.values())

    def examples(self, items: Sequence[CifarImage]) -> Generator[base.KeyedExample, None, None]:
        """Yields the images as PNG, encoded in threads."""
        encoded = decode.threaded_map(_encode, items, _CHUNK_SIZE)
        for item, data in zip(items, encoded, strict=True):
            name = f"{item.split}_{item.number:05d}.png"
            yield name, {"image": data, "label": item.label, "file_name": name}


def _encode(item: CifarImage) -> bytes:
    return base.to_png(item.pixels.reshape(3, 32, 32).transpose(1, 2, 0))
