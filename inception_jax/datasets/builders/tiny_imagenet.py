"""Builds Tiny ImageNet: 200 classes, 64 × 64 pixels.

Source: Le and Yang, "Tiny ImageNet Visual Recognition Challenge", CS231n, Stanford, 2015. TFDS has
no builder for it (tensorflow/datasets#998).
"""

import collections
import pathlib
from collections.abc import Generator, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from inception_jax.datasets import decode
from inception_jax.datasets.builders import base, folders
from inception_jax.datasets.builders import tiny_imagenet_layout as layout
from inception_jax.datasets.sources import download
from inception_jax.errors import DataError
from inception_jax.registry import DATASETS

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
BYTES = 248_100_043

_CITATION = """@misc{le2015tiny,
  title = {Tiny {ImageNet} Visual Recognition Challenge},
  author = {Le, Ya and Yang, Xuan},
  howpublished = {CS 231N, Stanford University},
  year = {2015},
}"""
# Images read and checked per task of a thread: about 5 ms of work.
_CHUNK_SIZE = 64


class TinyImagenetSubset(base.ImageBuilder):
    """Builds any number of classes and images in Tiny ImageNet's layout.

    Features: image, label (−1 in the test split, whose classes are not published), wnid (class id;
    '' in the test split), file_name (path in the official layout), and box (x0, y0, x1, y1 in
    pixels, as in the annotation files; −1 four times if there is none).
    """

    VERSION = tfds.core.Version(DATASETS.get("tiny_imagenet_subset").version)
    DESCRIPTION = "A subset of Tiny ImageNet, or other images in its layout."
    HOMEPAGE = "https://www.kaggle.com/c/tiny-imagenet"
    CITATION = _CITATION
    IMAGE: ClassVar[dict[str, Any]] = {"shape": (None, None, 3), "encoding_format": "jpeg"}

    _index: layout.Index

    def more_features(self) -> dict[str, Any]:
        """Returns the features for class id and box."""
        box = tfds.features.Tensor(
            shape=(4,), dtype=np.int64, doc="x0, y0, x1, y1 in pixels; -1: no box"
        )
        return {"wnid": tfds.features.Text(), "box": box}

    def open(self) -> None:
        """Opens the source and checks that it is complete."""
        self._files = layout.open_source(self._locate(), scratch=pathlib.Path(self.data_dir_root))
        self._index = layout.index(self._files)
        self._splits = self._index.splits
        self._check_counts(self._index)
        for remark in self._index.remarks:
            self.log(f"{self._files.path}: {remark}")

    def _locate(self) -> str | pathlib.Path:
        if not self.source:
            raise DataError(
                f"config.data.source = '': {self.name} has no default source; set it to a zip "
                "archive or a folder in Tiny ImageNet's layout"
            )
        return self.source

    def _check_counts(self, index: layout.Index) -> None:
        """Raises DataError if the numbers of images are wrong; accepts any by default."""

    def class_names_and_metadata(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the class names in order of the sorted wnids, and metadata: wnids and source."""
        metadata = {
            "wnids": list(self._index.wnids),
            "source": str(self._files.path.absolute()),
            "source_digest": layout.fingerprint(self._files),
        }
        return self._index.class_names, metadata

    def source_bytes(self) -> int:
        """Returns the total size of all files, bytes."""
        return sum(self._files.sizes.values())

    def examples(
        self, items: Sequence[layout.IndexedImage]
    ) -> Generator[base.KeyedExample, None, None]:
        """Yields the examples, read and verified in threads."""
        label = {wnid: number for number, wnid in enumerate(self._index.wnids)} | {"": -1}
        contents = decode.threaded_map(self._read, items, _CHUNK_SIZE)
        for entry, data in zip(items, contents, strict=True):
            name = folders.escape_for_display(entry.file)
            yield (
                name,
                {
                    "image": data,
                    "label": label[entry.wnid],
                    "wnid": entry.wnid,
                    "file_name": name,
                    "box": np.array(entry.box, np.int64),
                },
            )

    def _read(self, entry: layout.IndexedImage) -> bytes:
        data = self._files.read(entry.path)
        decode.verify(data, f"{self._files.path}: {entry.path}")
        return data


class TinyImagenet(TinyImagenetSubset):
    """Builds the complete Tiny ImageNet; rejects a source with other image counts."""

    VERSION = tfds.core.Version(DATASETS.get("tiny_imagenet").version)
    DESCRIPTION = (
        "200 classes of ImageNet at 64 x 64 pixels: 100,000 training, 10,000 validation and "
        "10,000 unlabeled test images."
    )

    def _locate(self) -> str | pathlib.Path:
        if self.source:
            return self.source
        target = pathlib.Path(self.data_dir_root, "downloads", "tiny-imagenet-200.zip")
        return download.fetch(URL, target, size=BYTES, md5=MD5, log=self.log)

    def _check_counts(self, index: layout.Index) -> None:
        counts = {"classes": len(index.wnids)}
        counts |= {f"{split} images": len(entries) for split, entries in index.splits.items()}
        official = DATASETS.get("tiny_imagenet")
        expected = {"classes": official.classes}
        expected |= {f"{split} images": count for split, count in official.examples.items()}
        # Test images are optional: their classes are not published, so they are not used.
        if "test images" in counts:
            expected["test images"] = 10_000
        wrong = [
            f"{counts[what]:,} {what} (expected {count:,})"
            for what, count in expected.items()
            if counts[what] != count
        ]
        per_class = collections.Counter(entry.wnid for entry in index.splits["train"])
        wrong += [
            f"{count:,} training images of class {wnid} (expected 500)"
            for wnid in index.wnids
            if (count := per_class[wnid]) != 500
        ][:3]
        if wrong:
            raise DataError(
                f"{self._files.path}: incomplete Tiny ImageNet: {', '.join(wrong)}. Download the "
                "archive again, or set config.data.name=tiny_imagenet_subset to use these files"
            )
