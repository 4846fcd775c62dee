"""Validates arrays from users and builds in-memory splits for `Dataset.from_arrays`."""

import hashlib
import os
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

from inception_jax.datasets import decode, splits
from inception_jax.datasets.splits import MemorySplit
from inception_jax.errors import DataError

_CHANNELS = (1, 3)


def check_image(image: Any, what: str, *, stacked: bool = False) -> None:
    """Checks the type, dtype and shape of one image or of a stack of images.

    Args:
      image: uint8 [H, W, 3], [H, W, 1] or [H, W]; with a leading N dimension if `stacked`.
      what: describes the image in errors.
      stacked: whether `image` contains several images.

    Raises:
      DataError: if type, dtype or shape differ.
    """
    if not isinstance(image, np.ndarray):
        remedy = "convert a PIL image or a tensor with np.asarray(image)"
        if isinstance(image, str | os.PathLike):
            remedy = "read a file with np.asarray(PIL.Image.open(path).convert('RGB'))"
        raise DataError(
            f"{what}: has type {type(image).__name__}; must be a uint8 NumPy array; {remedy}"
        )
    if image.dtype != np.uint8:
        remedy = "convert with images.astype(np.uint8)"
        if image.dtype.kind in "iu" and image.size and not 0 <= image.min() <= image.max() <= 255:
            remedy = (
                f"its values are from {image.min()} to {image.max()}, which must be scaled to 0 to "
                "255 before images.astype(np.uint8)"
            )
        elif np.issubdtype(image.dtype, np.floating):
            remedy = (
                "convert values between 0 and 1 with np.round(images * 255).astype(np.uint8); "
                "images normalized by mean and standard deviation cannot be used"
            )
        raise DataError(f"{what}: has dtype {image.dtype}; must be uint8 (0 to 255); {remedy}")
    if image.ndim - stacked not in (2, 3) or not image.size:
        one, gray = ("[N, H, W, 3]", "[N, H, W]") if stacked else ("[H, W, 3]", "[H, W]")
        raise DataError(
            f"{what}: has shape {list(image.shape)}; must be {one}, or {gray} for grayscale"
        )
    if image.ndim == 3 + stacked and image.shape[-1] not in _CHANNELS:
        remedy = "keep the first three channels with images[..., :3]"
        if image.shape[-1] == 2:
            remedy = "keep the first channel with images[..., :1]"
        elif image.shape[-3] in _CHANNELS:
            remedy = "move the channels last with np.moveaxis(images, -3, -1)"
        raise DataError(
            f"{what}: has shape {list(image.shape)}; the last dimension must be 3 or 1 channels; "
            f"{remedy}"
        )


def as_pixel_array(images: Any, what: str) -> np.ndarray:
    """Returns a split's images as uint8 [N, H, W, 3], or [N, H, W] if grayscale.

    Raises:
      DataError: if `images` is not such an array.
    """
    check_image(images, what, stacked=True)
    pixels: np.ndarray = images
    if pixels.ndim == 4 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return pixels


def as_label_array(labels: Any, what: str) -> np.ndarray:
    """Returns labels as an array.

    Raises:
      DataError: if they are not a sequence, or nested and of different lengths.
    """
    if not isinstance(labels, Sized) or isinstance(labels, str | bytes):
        raise DataError(f"{what}: have type {type(labels).__name__}; must be an array or a list")
    try:
        array = np.asarray(labels)
        if array.dtype == object and all(isinstance(label, str) for label in array.flat):
            return array.astype(str)  # As pandas stores text.
        return array
    except ValueError as error:
        raise DataError(f"{what}: {error}; must be integers of shape [N]") from error


def check_labels(
    labels: Any, count: int, what: str, *, classes: int = 0, unknown: bool = False
) -> np.ndarray:
    """Returns the labels of a split as int32 [N].

    Args:
      labels: integers [N], an array or a sequence.
      count: number of images.
      what: describes the labels in errors.
      classes: number of classes; 0: unknown.
      unknown: whether −1 (unknown label) is allowed.

    Raises:
      DataError: if type, number or range is wrong.
    """
    array = as_label_array(labels, what)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        remedy = "; convert one-hot rows with labels.argmax(axis=1)" if array.ndim == 2 else ""
        if array.dtype.kind == "U":
            remedy = ", or names of the classes, which must then be given as well"
        raise DataError(
            f"{what}: have dtype {array.dtype} and shape {list(array.shape)}; must be integers of "
            f"shape [N]{remedy}"
        )
    if len(array) != count:
        raise DataError(
            f"{what}: {len(array):,} labels for {count:,} images; must be one per image"
        )
    most = classes - 1 if classes else np.iinfo(np.int32).max
    wrong = array[(array < (-1 if unknown else 0)) | (array > most)]
    if len(wrong):
        allowed = f"0 to {most} (there are {classes} classes)" if classes else "0 or more"
        raise DataError(f"{what}: contain {wrong[0]}; must be {allowed}")
    return array.astype(np.int32)


def check_contiguous_labels(labels: np.ndarray, what: str, remedy: str) -> None:
    """Checks that labels without class names use all of 0 to K - 1, K ≥ 2.

    Args:
      labels: int [N], at least 0.
      what: describes the labels in errors.
      remedy: what to do if a number is missing.

    Raises:
      DataError: if a number is missing, or there is only one class.
    """
    occurring = np.unique(labels)
    if len(occurring) < 2:
        raise DataError(f"{what}: contain only one class; at least two are required")
    if occurring[-1] >= len(occurring):
        raise DataError(
            f"{what}: {len(occurring)} distinct values, up to {occurring[-1]}; must be 0 to "
            f"{len(occurring) - 1}; {remedy}"
        )


def check_class_names(names: Any, what: str) -> tuple[str, ...]:
    """Returns class names as strings, in label order; `names` may be numbers.

    Raises:
      DataError: if `names` is not a sequence of at least two distinct names.
    """
    if isinstance(names, str) or not isinstance(names, Sequence | np.ndarray):
        raise DataError(f"{what}: have type {type(names).__name__}; must be a list of names")
    result = tuple(map(str, names))
    if len(result) < 2 or len(set(result)) < len(result):
        raise DataError(
            f"{what}: are {', '.join(map(repr, result[:10])) or 'empty'}; must be at least two "
            "distinct names"
        )
    return result


def numbered_names(classes: int) -> tuple[str, ...]:
    """Returns default class names: '0', '1', …."""
    return tuple(map(str, range(classes)))


def holdout_mask(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Returns a mask of held-out examples, bool [N].

    Holds out `fraction` of each class, rounded, but at least one example and never all, as
    image_folder does. The choice depends only on the seed.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64)))
    order = generator.permutation(len(labels))
    held = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        held[members[: min(max(round(fraction * len(members)), 1), len(members) - 1)]] = True
    return held


def make_split(
    pixels: np.ndarray, labels: np.ndarray, indices: np.ndarray, image_size: int
) -> MemorySplit:
    """Returns selected examples as a split, with images resized to `image_size` if needed.

    Args:
      pixels: uint8 [N, H, W, 3] or [N, H, W], as returned by `as_pixel_array`.
      labels: int32 [N].
      indices: int64 [M], which of them.
      image_size: height and width, pixels.
    """
    selected = pixels[indices]
    if selected.ndim == 3:
        selected = np.repeat(selected[..., None], 3, axis=-1)
    if selected.shape[1:3] != (image_size, image_size):
        selected = np.stack([decode.crop_and_resize(image, image_size) for image in selected])
    return MemorySplit(labels[indices], image_size, np.ascontiguousarray(selected))


def statistics(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and standard deviation of uint8 [N, H, W, 3] pixels / 255, float64 [3] each."""
    return splits.mean_and_std(*splits.pixel_sums(pixels), pixels.size // 3)


def version(*parts: MemorySplit) -> str:
    """Returns a checksum of all examples, which lets a resumed run detect changed data."""
    digest = hashlib.sha256()
    for split in parts:
        digest.update(split.digests.tobytes())
        digest.update(split.labels.tobytes())
    return digest.hexdigest()[:12]
