"""Encoded images to pixels, in threads (the decoders release the interpreter's lock).

JPEGs are decoded by simplejpeg, a thin layer over libjpeg-turbo: in a quarter of PIL's time, to the
same pixels. What it does not take (other formats, four channels, JPEGs with odd or missing data),
and JPEGs with EXIF data, are left to PIL, which alone decides what is an image.

Pixels have 8 bits a channel. Files of 16 bits often hold less: a microscope's camera fills 12, and
the upper 8 of 16 would be black. How many bits count is a fact of a data set, not of a picture, for
its pictures must stay as bright beside each other as they are. Transparent pictures lie on white.
"""

import collections
import io
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from inception_jax.datasets import pil_images
from inception_jax.datasets.sources import file_types
from inception_jax.errors import DataError

# Top, left, height and width, pixels.
CropBox = tuple[int, int, int, int]
# Maps an image's height and width to the box that is cut from it.
CropFn = Callable[[int, int], CropBox]

Item = TypeVar("Item")
Result = TypeVar("Result")

# What PIL raises for data that are no image, or not a whole one.
DECODE_ERRORS = pil_images.DECODE_ERRORS
# As simplejpeg names them.
_JPEG_COLOR_SPACES = ("YCbCr", "Gray", "RGB")
# What EXIF data begin with in a JPEG. They can say how the camera was held.
_EXIF = b"Exif\0\0"
# Beyond this, threads only wait for each other's turn at the interpreter.
_MAX_THREADS = 8


class Problem(NamedTuple):
    """Why a file cannot be decoded as an image.

    Attributes:
      kind: of the file, in the singular: "HEIC photo", "damaged image".
      remedy: what to do about such files, without a period.
      detail: what the decoder says; empty where the kind says all.
    """

    kind: str
    remedy: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    @property
    def advice(self) -> str:
        """The remedy as a sentence, without its period."""
        return self.remedy[:1].upper() + self.remedy[1:]


class ImageError(DataError):
    """A file cannot be decoded as an image."""

    def __init__(self, name: str, size: int, problem: Problem) -> None:
        super().__init__(
            f"{name}: not a readable image ({size:,} bytes; {problem}). {problem.advice}"
        )
        self.problem = problem


class Inspection(NamedTuple):
    """What decoding an image file once finds out.

    Attributes:
      problem: why it cannot be decoded; None: it can.
      bit_depth: the least of `BIT_DEPTHS` that holds the values of a file of 16 bits a channel; 0:
        it has no such values.
    """

    problem: Problem | None
    bit_depth: int = 0


def verify(data: bytes, name: str) -> None:
    """Checks that an encoded image can be decoded to its last byte.

    Args:
      data: the image file's content.
      name: what an error calls it.

    Raises:
      ImageError: if the image is corrupt or cut short.
    """
    if problem := inspect(data, name).problem:
        raise ImageError(name, len(data), problem)


def inspect(data: bytes, name: str = "") -> Inspection:
    """Decodes an encoded image to its last byte.

    A JPEG is decoded at an eighth of its size, which reads all of its data in half the time.

    Args:
      data: the image file's content.
      name: of the file; its ending decides what it is where the content says nothing.
    """
    try:
        loaded = pil_images.load_repaired(
            lambda content: pil_images.load(content, name, draft=True), data
        )
    except DECODE_ERRORS as error:
        return Inspection(_problem(data, name, error))
    return Inspection(None, 0 if loaded.wide is None else pil_images.bit_depth_of(loaded.wide))


def dimensions(data: bytes) -> tuple[int, int]:
    """Returns width and height of an image, pixels, by what the file says of itself.

    Raises:
      one of `DECODE_ERRORS`: if it does not say it.
    """

    def size(content: bytes) -> tuple[int, int]:
        with Image.open(io.BytesIO(content)) as image:
            return image.size

    return pil_images.load_repaired(size, data)


def _problem(data: bytes, name: str, error: Exception) -> Problem:
    """Returns what is wrong with data that PIL does not decode, from what it raised."""
    if isinstance(error, pil_images.UnsupportedImage):
        return Problem(*error.kind)
    if kind := file_types.identify(data, name):
        return Problem(*kind)
    if isinstance(error, Image.DecompressionBombError):
        return Problem("oversized image", "make it smaller", str(error))
    if isinstance(error, UnidentifiedImageError) and not file_types.damaged_format(data):
        return Problem("file in an unknown format", "remove it")
    # PIL names the buffer that it was given, by its address.
    is_unidentified = isinstance(error, UnidentifiedImageError)
    detail = f"{file_types.damaged_format(data)} header without an image" if is_unidentified else ""
    return Problem(
        "damaged image",
        "download or copy this file again",
        detail or str(error) or type(error).__name__,
    )


def decode(
    data: bytes, size: int, name: str, crop: float = 1.0, *, bit_depth: int = 0
) -> np.ndarray:
    """Decodes an image to RGB pixels of a given size.

    A picture that its EXIF data say was taken with the camera turned is set upright. Of an animated
    image the first frame counts; what is transparent lies on white. The centred square that is
    `crop` times as large as its shorter side becomes `size` × `size` pixels, resized with PIL's
    antialiased bicubic filter where it is of another size.

    Args:
      data: the image file's content, in any format and colour mode that PIL knows.
      size: height and width of the result, pixels.
      name: what an error calls it.
      crop: more than 0, at most 1.
      bit_depth: how many bits the values of files with 16 bits a channel use, of which the upper 8
        become the pixels; larger values are white. 0: what the picture's own values need.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ImageError: if the image is corrupt or cut short.
    """
    if _jpeg_shape(data):
        pixels = _decode_jpeg(data, name)
    else:
        pixels = _decode_with_pil(data, name, bit_depth)
    return crop_and_resize(pixels, size, crop)


def crop_and_resize(pixels: np.ndarray, size: int, crop: float = 1.0) -> np.ndarray:
    """Returns the centred square of an image, uint8 [H, W, 3], as `decode` cuts and resizes it."""
    if crop == 1 and pixels.shape[:2] == (size, size):
        return pixels
    fitted = ImageOps.fit(
        Image.fromarray(pixels),
        (size, size),
        method=Image.Resampling.BICUBIC,
        bleed=(1 - crop) / 2,
    )
    return np.asarray(fitted)


def decode_crop(
    data: bytes, size: int, name: str, choose_crop: CropFn, *, bit_depth: int = 0
) -> np.ndarray:
    """Decodes an image and resizes a box of it to a square.

    The filter is PIL's antialiased bilinear one, as in torchvision's RandomResizedCrop; beside the
    box's edge it sees the image's own pixels, where a crop before it would repeat the last ones. A
    JPEG is decoded at half its size, or less, where the box stays at least `size` pixels each way.

    Args:
      data: the image file's content, in any format and colour mode that PIL knows.
      size: height and width of the result, pixels.
      name: what an error calls it.
      choose: gives the box inside the image.
      bit_depth: as of `decode`.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ImageError: if the image is corrupt or cut short.
    """
    shape = _jpeg_shape(data)
    if shape is None:
        pixels = _decode_with_pil(data, name, bit_depth)
        shape = pixels.shape[0], pixels.shape[1]
        box = choose_crop(*shape)
    else:
        box = choose_crop(*shape)
        min_size = [
            math.ceil(side * size / part) for side, part in zip(shape, box[2:], strict=True)
        ]
        pixels = _decode_jpeg(data, name, min_size)
    top, left, height, width = box
    y, x = pixels.shape[0] / shape[0], pixels.shape[1] / shape[1]
    edges = (left * x, top * y, (left + width) * x, (top + height) * y)
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=edges))


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Returns the height and width of a JPEG that simplejpeg decodes as PIL does, else None."""
    if _EXIF in data:
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # Enormous ones are PIL's to refuse. Of the ways from four channels to three, simplejpeg does
    # not take PIL's.
    oversized = height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    return (height, width) if color_space in _JPEG_COLOR_SPACES and not oversized else None


def _decode_jpeg(data: bytes, name: str, min_size: Sequence[int] = (0, 0)) -> np.ndarray:
    """Returns a JPEG's pixels, uint8 [H, W, 3].

    Args:
      data: the file's content.
      name: what an error calls it.
      least: height and width that it may be reduced to while it is decoded; 0: not at all.
    """
    height, width = min_size
    try:
        # Reducing by less than 2 takes longer than to decode the whole.
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
    except ValueError:
        return _decode_with_pil(data, name)


def _decode_with_pil(data: bytes, name: str, bit_depth: int = 0) -> np.ndarray:
    """Returns an image's pixels, uint8 [H, W, 3], from any format and colour mode."""
    try:
        loaded = pil_images.load_repaired(lambda content: pil_images.load(content, name), data)
        return np.asarray(pil_images.to_rgb(loaded, bit_depth))
    except DECODE_ERRORS as error:
        raise ImageError(name, len(data), _problem(data, name, error)) from error


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields `items` in pieces of `size`, of which the last may be smaller."""
    rest = iter(items)
    while piece := list(itertools.islice(rest, size)):
        yield piece


def threaded_map(
    function: Callable[[Item], Result], items: Iterable[Item], piece: int = 1
) -> Iterator[Result]:
    """Yields `function(item)` for each item in order, computed a little ahead in threads.

    Unlike `Executor.map` it takes no more items than it works on, so memory stays bounded.

    Args:
      function: of one item.
      items: perhaps an endless stream.
      piece: how many a thread does at a time: a few milliseconds of work.
    """

    def work(part: list[Item]) -> list[Result]:
        return [function(item) for item in part]

    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    pending: collections.deque[futures.Future[list[Result]]] = collections.deque()
    with futures.ThreadPoolExecutor(threads) as pool:
        try:
            for part in chunks(items, piece):
                pending.append(pool.submit(work, part))
                if len(pending) > 2 * threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
