"""The examples of a split, read at random: from decoded pixels or from compressed records.

Either way `read(indices)` is a pure function, safe in any thread, that gives the same pixels, and
memory holds the images that were asked for, not the data set.
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
    # It imports TFDS, which decoded images do without.
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
        """The original file name of each example, or its number where there is none."""
        return tuple(f"{index:06d}" for index in range(len(self)))

    @property
    def names_checksum(self) -> str:
        """By which two processes find that their names are equal."""
        return hashlib.sha256("\n".join(self.names).encode()).hexdigest()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        return self.image_size, self.image_size, 3

    @property
    def digests(self) -> np.ndarray | None:
        """By which equal images are found, uint64 [N]; None: not known, as of older versions."""
        return None

    @property
    @abc.abstractmethod
    def threads(self) -> int:
        """How many batches are worth reading at a time, each in a thread."""

    @abc.abstractmethod
    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`, int64 [B], at least one: uint8 [B, H, W, 3].

        Raises:
          DataError: naming the file that is damaged.
        """

    def cropped(self, crop: float) -> "Split":
        """Returns the split with the centred square of each image, `crop` of its shorter side.

        Args:
          crop: more than 0, at most 1, of the original images, however this split is cropped.

        Raises:
          ConfigError: if the original images are not at hand, as for all but records.
        """
        if crop != 1:
            raise ConfigError(
                f"crop = {crop:g}: cropping needs the original images; set "
                "config.data.storage=records"
            )
        return self

    def read_crops(self, indices: np.ndarray, boxes: Sequence[decode.CropFn]) -> np.ndarray:
        """Returns a box of each original image at `indices`, resized: uint8 [B, H, W, 3].

        Args:
          indices: int64 [B], at least one.
          boxes: B of them.

        Raises:
          ConfigError: if the original images are not at hand, as for all but records.
          DataError: naming the file that is damaged.
        """
        raise ConfigError(
            "config.data.storage = 'decoded': config.augment.crop=inception needs the original "
            "images; set config.data.storage=records, or config.augment.crop=resized"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class StoredSplit(Split):
    """A split of a cache (`cache`).

    Attributes:
      names_path: the text file behind `names`, a name a line.
    """

    names_path: pathlib.Path

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The original file name of each example; read at first use."""
        return tuple(self.names_path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))

    @property
    def names_checksum(self) -> str:
        """That of the file, which takes no memory."""
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
        """Those of the pixels."""
        return digests.of_images(self.pixels)

    @property
    def threads(self) -> int:
        """One: it copies what it reads."""
        return 1

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`."""
        return self.pixels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedSplit(StoredSplit):
    """A split whose images were decoded into one .npy file.

    Each image is one positional read. A mapped file is faster (1.6 to 2.3 against 2.7 to 4 µs), but
    the pages that it touches count as the process's memory, up to the whole file; and giving them
    back after each batch (MADV_DONTNEED) is as slow as to read, or slower.

    Attributes:
      images_path: uint8 [N, H, W, 3] as a .npy file.
      image_digests: uint64 [N], of `digests.of_images`; None: an older version wrote the file.
    """

    images_path: pathlib.Path
    image_digests: np.ndarray | None = None

    @property
    def digests(self) -> np.ndarray | None:
        """Those of the pixels."""
        return self.image_digests

    @property
    def threads(self) -> int:
        """One: it is faster than any step, and more would compete with the step for cores."""
        return 1

    @functools.cached_property
    def _offset(self) -> int:
        """Where the first image begins in the file, bytes."""
        with self.images_path.open("rb") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            return file.tell()

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`."""
        pixels = np.empty((len(indices), *self.image_shape), np.uint8)
        rows = pixels.reshape(len(indices), -1)
        places = (self._offset + indices * rows.shape[1]).tolist()
        # Opened for each batch (10 µs): nothing is left to close, and threads share nothing.
        with self.images_path.open("rb", buffering=0) as file:
            # The interpreter's loop would cost as much as the reads.
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
        """Raises DataError if images, read from `indices`, are not those that were written."""
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
    """A split whose images are decoded from TFDS records each time that they are read.

    Attributes:
      records: the split's records.
      decoders: how many batches to decode at a time, each in a thread.
      crop: side of the centred square that `read` cuts, over the image's shorter side.
      bit_depth: as of `images.decode`.
      digests_path: of a .npy file, uint64 [N]; None: an older version wrote none.
    """

    records: "Records"
    decoders: int
    crop: float = 1.0
    bit_depth: int = 0
    digests_path: pathlib.Path | None = None

    @property
    def digests(self) -> np.ndarray | None:
        """Those of the pixels at the size of the model's; of the files, if none were decoded."""
        return None if self.digests_path is None else np.load(self.digests_path)

    @property
    def threads(self) -> int:
        """As many as the settings say."""
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
        """Returns a box of each image at `indices`."""
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
    """Some examples of another split; made by `subset`.

    Attributes:
      whole: the other split.
      indices: int64 [N], which of its examples these are.
    """

    whole: Split
    indices: np.ndarray

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The original file name of each example."""
        return tuple(self.whole.names[index] for index in self.indices)

    @property
    def digests(self) -> np.ndarray | None:
        """Those of the other split."""
        return None if (whole := self.whole.digests) is None else whole[self.indices]

    @property
    def threads(self) -> int:
        """Those of the other split."""
        return self.whole.threads

    def cropped(self, crop: float) -> Split:
        """Returns the same examples of the other split, cropped."""
        whole = self.whole.cropped(crop)
        return self if whole is self.whole else dataclasses.replace(self, whole=whole)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Returns the images at `indices`."""
        return self.whole.read(self.indices[indices])

    def read_crops(self, indices: np.ndarray, boxes: Sequence[decode.CropFn]) -> np.ndarray:
        """Returns a box of each image at `indices`."""
        return self.whole.read_crops(self.indices[indices], boxes)


def subset(split: Split, indices: np.ndarray) -> SubsetSplit:
    """Returns the examples of `split` at `indices`, int64 [N], in that order."""
    return SubsetSplit(split.labels[indices], split.image_size, split, indices)


def take_range(split: Split, examples: range) -> Split:
    """Returns a split's examples in a range; the split itself if these are all."""
    return split if len(examples) == len(split) else subset(split, np.array(examples))


def parse_slice(text: str, sizes: Mapping[str, int], setting: str) -> tuple[str, range]:
    """Returns the split that a text such as 'train' or 'train[:90%]' names, and which examples.

    As in TFDS, a share is rounded to the nearest example, and numbers below 0 count from the end.

    Args:
      text: a split's name, and which part of it, from one number or percentage to another.
      sizes: the numbers of examples by split.
      setting: that has the text, for errors.

    Raises:
      ConfigError: if there is no such split, or nothing in that part of it.
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
    """Returns the sums of some images' pixels, uint8 [N, H, W, 3], and of their squares.

    They are uint64 [3], and exact: the square of a byte fits 16 bits.
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
    # Rounding may take the variance of what hardly changes below 0.
    return mean / 255, np.sqrt((squares / count - mean**2).clip(0)) / 255


def stratified_holdout(labels: np.ndarray, count: int) -> np.ndarray:
    """Returns which examples a hold-out of the same number of each class takes.

    Of each class those that come first, in the order of the records, which is a fixed shuffle: so
    the hold-out is the same for every seed, on every machine.

    Args:
      labels: int32 [N], all known.
      count: how many, a multiple of the number of classes.

    Returns:
      bool [N], of which `count` are True.

    Raises:
      ConfigError: if `count` does not fit the classes.
    """
    sizes = np.bincount(labels)
    if count % len(sizes):
        raise ConfigError(
            f"config.data.holdout = {count}: must be a multiple of the number of classes "
            f"({len(sizes)}), such as {max(count // len(sizes), 1) * len(sizes)}"
        )
    each = count // len(sizes)
    if each >= sizes.min():
        raise ConfigError(
            f"config.data.holdout = {count}: holds out {each} examples per class, but the "
            f"smallest class has {sizes.min()} and must keep at least one"
        )
    taken = np.zeros(len(labels), bool)
    for label in range(len(sizes)):
        taken[np.flatnonzero(labels == label)[:each]] = True
    return taken
