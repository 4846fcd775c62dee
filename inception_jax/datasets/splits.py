"""Random access to the examples of a split: decoded pixels or compressed records.

Either way `read(indices)` is a pure, thread-safe function that returns the same pixels, and only
the requested images are in memory, not the data set.
"""

import abc
import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import numpy as np

from inception_jax.datasets import decode, digests
from inception_jax.errors import ConfigError, DataError

if TYPE_CHECKING:
    # Imports TFDS, which is not needed for decoded images.
    from inception_jax.datasets.records import Records


@dataclasses.dataclass(frozen=True, eq=False)
class Split(abc.ABC):
    """The examples of one split.

    Attributes:
      labels: int32 [N]; −1: unknown.
      image_size: height and width of the images, pixels.
    """

    labels: np.ndarray
    image_size: int

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The original file name of each example, or its index if there is none."""
        return tuple(f"{index:06d}" for index in range(len(self)))

    @property
    def names_checksum(self) -> str:
        """A checksum with which processes verify that their names are equal."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, 3

    @property
    def digests(self) -> np.ndarray | None:
        """Checksums for finding equal images, uint64 [N]; None: written by an older version."""
        return None

    @property
    def threads(self) -> int:
        """The number of batches to read at a time, each in a thread."""
        return 1  # Copying is faster than any step, and more would compete with it for cores.

    @abc.abstractmethod
    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`, int64 [B] with B ≥ 1, as uint8 [B, H, W, 3].

        Raises:
          DataError: if a file is damaged; the message names it.
        """

    def cropped(self, crop: float) -> "Split":
        """Returns the split with center crops of its images.

        Args:
          crop: side as a fraction of the original image's shorter side, greater than 0, at most 1;
            replaces this split's crop.

        Raises:
          ConfigError: if the original images are unavailable: only record splits have them.
        """
        if crop != 1:
            raise ConfigError(
                f"crop = {crop:g}: cropping needs the original images, which only a prepared data "
                "set with config.data.storage=records has"
            )
        return self

    def read_crops(self, indices: np.ndarray, boxes: Sequence[decode.CropFn]) -> np.ndarray:
        """Returns resized crops of the original images at `indices`, uint8 [B, H, W, 3].

        Args:
          indices: int64 [B], at least one.
          boxes: B crop functions.

        Raises:
          ConfigError: if the original images are unavailable: only record splits have them.
          DataError: if a file is damaged; the message names it.
        """
        raise ConfigError(
            "config.augment.crop = 'inception': needs the original images, which only a prepared "
            "data set with config.data.storage=records has; or set config.augment.crop=resized"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSplit(Split):
    """A split stored in a cache (`cache`).

    Attributes:
      names_path: the text file of `names`, one per line.
    """

    names_path: pathlib.Path

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The original file name of each example; read on first use."""
        return tuple(self.names_path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))

    @property
    def names_checksum(self) -> str:
        """The checksum of the file, computed without loading the names."""
        with self.names_path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclasses.dataclass(frozen=True, eq=False)
class MemorySplit(Split):
    """A split in memory.

    Attributes:
      pixels: uint8 [N, H, W, 3].
    """

    pixels: np.ndarray

    @functools.cached_property
    def digests(self) -> np.ndarray:
        """Checksums of the pixels."""
        return digests.of_images(self.pixels)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`."""
        return self.pixels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedSplit(StoredSplit):
    """A split with its decoded images in one .npy file.

    Each image is one positional read. A memory-mapped file is faster (1.6 to 2.3 µs instead of 2.7
    to 4 µs), but its pages count as the process's memory, up to the size of the file; and releasing
    them after each batch (MADV_DONTNEED) is as slow as reading, or slower.

    Attributes:
      images_path: a .npy file, uint8 [N, H, W, 3].
      image_digests: uint64 [N], from `digests.of_images`; None: written by an older version.
    """

    images_path: pathlib.Path
    image_digests: np.ndarray | None = None

    @property
    def digests(self) -> np.ndarray | None:
        """Checksums of the pixels."""
        return self.image_digests

    @functools.cached_property
    def _offset(self) -> int:
        """Offset of the first image in the file, bytes."""
        with self.images_path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return file.tell()

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`."""
        pixels = np.empty((len(indices), *self.image_shape), np.uint8)
        rows = pixels.reshape(len(indices), -1)
        places = (self._offset + indices * rows.shape[1]).tolist()
        # Opened for each batch (10 µs), so nothing must be closed later and threads share nothing.
        with self.images_path.open("rb", buffering=0) as file:
            # A Python loop would cost as much as the reads.
            read: Callable[..., int] = os.preadv
            count = sum(map(read, repeat(file.fileno()), zip(rows), places))
        if count != pixels.nbytes:
            raise DataError(
                f"{self.images_path}: was truncated while in use. Rerun the command to rebuild it"
            )
        if self.image_digests is not None:
            self._check(pixels, indices)
        return pixels

    def _check(self, pixels: np.ndarray, indices: np.ndarray) -> None:
        """Raises DataError if images read from `indices` do not match their checksums."""
        assert self.image_digests is not None
        changed = indices[digests.of_images(pixels) != self.image_digests[indices]]
        if len(changed):
            raise DataError(
                f"{self.images_path}: image {changed[0]} ({self.names[changed[0]]}) is damaged "
                f"(checksum mismatch). Remove {self.images_path.parent} and rerun to rebuild it "
                "from the records"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class RecordSplit(StoredSplit):
    """A split that decodes its images from TFDS records each time they are read.

    Attributes:
      records: the split's records.
      decoders: number of batches to decode at a time, each in a thread.
      crop: side of the center crop of `read`, as a fraction of the image's shorter side.
      bit_depth: as for `decode.decode`.
      digests_path: a .npy file, uint64 [N]; None: prepared by an older version.
    """

    records: "Records"
    decoders: int
    crop: float = 1.0
    bit_depth: int = 0
    digests_path: pathlib.Path | None = None

    @property
    def digests(self) -> np.ndarray | None:
        """Checksums of the pixels at the model's image size, or of the files if not decoded."""
        return None if self.digests_path is None else np.load(self.digests_path)

    @property
    def threads(self) -> int:
        """The number of decoding threads in the settings."""
        return self.decoders

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`."""
        pixels = np.empty((len(indices), *self.image_shape), np.uint8)
        size, depth = self.image_size, self.bit_depth
        for row, example in zip(pixels, self.records.read(indices.tolist()), strict=True):
            row[:] = decode.decode(
                example.image, size, example.file_name, self.crop, bit_depth=depth
            )
        return pixels

    def cropped(self, crop: float) -> Split:
        """Returns the split with another crop."""
        return self if crop == self.crop else dataclasses.replace(self, crop=crop)

    def read_crops(self, indices: np.ndarray, boxes: Sequence[decode.CropFn]) -> np.ndarray:
        """Returns crops of the images at `indices`."""
        pixels = np.empty((len(indices), *self.image_shape), np.uint8)
        examples = self.records.read(indices.tolist())
        size, depth = self.image_size, self.bit_depth
        for row, example, choose in zip(pixels, examples, boxes, strict=True):
            row[:] = decode.decode_crop(
                example.image, size, example.file_name, choose, bit_depth=depth
            )
        return pixels


@dataclasses.dataclass(frozen=True, eq=False)
class SubsetSplit(Split):
    """Selected examples of another split; created by `subset`.

    Attributes:
      base: the other split.
      indices: int64 [N], indices into the other split.
    """

    base: Split
    indices: np.ndarray

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The original file name of each example."""
        return tuple(self.base.names[index] for index in self.indices)

    @property
    def digests(self) -> np.ndarray | None:
        """Checksums of the selected examples."""
        return None if (base := self.base.digests) is None else base[self.indices]

    @property
    def threads(self) -> int:
        """The number for the other split."""
        return self.base.threads

    def cropped(self, crop: float) -> Split:
        """Returns the same examples with another crop."""
        base = self.base.cropped(crop)
        return self if base is self.base else dataclasses.replace(self, base=base)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`."""
        return self.base.read(self.indices[indices])

    def read_crops(self, indices: np.ndarray, boxes: Sequence[decode.CropFn]) -> np.ndarray:
        """Returns crops of the images at `indices`."""
        return self.base.read_crops(self.indices[indices], boxes)


def subset(split: Split, indices: np.ndarray) -> SubsetSplit:
    """Returns the examples of `split` at `indices`, int64 [N], in that order."""
    return SubsetSplit(split.labels[indices], split.image_size, split, indices)


def take_range(split: Split, examples: range) -> Split:
    """Returns a split's examples in a range, or the split itself if the range covers it."""
    return split if len(examples) == len(split) else subset(split, np.array(examples))


def parse_slice(text: str, sizes: Mapping[str, int], setting: str) -> tuple[str, range]:
    """Parses a split specification such as 'train' or 'train[:90%]'.

    As in TFDS, percentages are rounded to the nearest example, and negative numbers count from the
    end.

    >>> parse_slice("train[:90%]", {"train": 50}, "train_split")
    ('train', range(0, 45))

    Args:
      text: a split name, optionally followed by a slice of numbers or percentages.
      sizes: number of examples by split.
      setting: name of the setting, for errors.

    Raises:
      ConfigError: if the split does not exist, or the slice is empty or malformed.
    """
    what = f"config.data.{setting} = {text!r}"
    bound = r"(-?\d+%?)?"
    if not (match := re.fullmatch(rf"([\w.-]+?)(?:\[{bound}:{bound}\])?", text)):
        raise ConfigError(
            f"{what}: must be a split name or a part of a split, such as train[:90%] or "
            "train[1000:2000]; sums and other forms are not supported"
        )
    name = match[1]
    if name not in sizes:
        raise ConfigError(f"{what}: no such split; must be one of {', '.join(sizes)}")
    count = sizes[name]
    ends = [
        None if end is None else round(int(end[:-1]) * count / 100) if end[-1] == "%" else int(end)
        for end in (match[2], match[3])
    ]
    selected = range(count)[slice(*ends)]
    if not selected:
        raise ConfigError(f"{what}: selects none of the {count:,} examples of {name}")
    return name, selected


def pixel_sums(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the per-channel sums of pixels, uint8 [N, H, W, 3], and of their squares.

    Both are uint64 [3] and exact: the square of a byte fits into 16 bits.
    """
    channels = [pixels[..., channel] for channel in range(3)]
    total = np.array([c.sum(dtype=np.uint64) for c in channels])
    squares = [np.square(c, dtype=np.uint16).sum(dtype=np.uint64) for c in channels]
    return total, np.array(squares)


def mean_and_std(
    total: np.ndarray, squares: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of pixel values / 255, float64 [3], from `pixel_sums`."""
    mean = total / count
    # Rounding can make a tiny variance negative.
    return mean / 255, np.sqrt((squares / count - mean**2).clip(0)) / 255


def stratified_holdout(labels: np.ndarray, count: int, classes: int) -> np.ndarray:
    """Returns a mask of held-out examples, the same number of each class.

    Takes the first examples of each class in the order of the records, which is a fixed shuffle:
    the hold-out is the same for every seed, on every machine.

    Args:
      labels: int32 [N], without unknown labels.
      count: number of held-out examples, a multiple of the number of classes.
      classes: that number.

    Returns:
      bool [N] with `count` True values.

    Raises:
      ConfigError: if `count` is not such a multiple, or too large.
    """
    if count % classes:
        raise ConfigError(
            f"config.data.holdout = {count}: must be a multiple of the number of classes "
            f"({classes}), such as {max(count // classes, 1) * classes}"
        )
    each, smallest = count // classes, np.bincount(labels, minlength=classes).min()
    if each >= smallest:
        raise ConfigError(
            f"config.data.holdout = {count}: holds out {each} examples per class, but the "
            f"smallest class has {smallest} and must keep at least one"
        )
    mask = np.zeros(len(labels), bool)
    for label in range(classes):
        mask[np.flatnonzero(labels == label)[:each]] = True
    return mask
