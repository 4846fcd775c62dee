"""Decodes images to pixels, in threads (the decoders release the GIL).

JPEGs are decoded by simplejpeg, a thin wrapper of libjpeg-turbo: in a quarter of PIL's time, to the
same pixels. PIL decodes everything that simplejpeg does not support (other formats, four channels,
JPEGs with unusual or missing data) and JPEGs with EXIF data; what simplejpeg refuses, PIL alone
decides whether it is an image.

Pixels have 8 bits per channel. 16-bit files often use fewer: a microscope camera uses 12, of which
the upper 8 of 16 would be black. The bit depth belongs to the data set, not to a single image, so
that the relative brightness of its images is kept. Transparent images are composited on white.
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
# Maps an image's height and width to the box to crop.
CropFn = Callable[[int, int], CropBox]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Raised by PIL for data that are not an image, or not a complete one.
DECODE_ERRORS = pil_images.DECODE_ERRORS
# Names used by simplejpeg.
_JPEG_COLOR_SPACES = ("YCbCr", "Gray", "RGB")
# Marker of EXIF data in a JPEG, which may contain the camera's orientation.
_EXIF = b"Exif\0\0"
# Additional threads would only wait for the GIL.
_MAX_THREADS = 8


class Problem(NamedTuple):
    """Why a file cannot be decoded as an image.

    Attributes:
      kind: of file, singular: "HEIC photo", "damaged image".
      remedy: imperative clause without a period.
      detail: the decoder's error; empty if the kind is sufficient.
    """

    kind: str
    remedy: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind

    @property
    def advice(self) -> str:
        """The remedy with a capital letter."""
        return self.remedy[:1].upper() + self.remedy[1:]


class ImageError(DataError):
    """A file cannot be decoded as an image."""

    def __init__(self, name: str, size: int, problem: Problem) -> None:
        super().__init__(
            f"{name}: not a readable image ({size:,} bytes; {problem}). {problem.advice}"
        )
        self.problem = problem


class Inspection(NamedTuple):
    """The result of test-decoding an image file.

    Attributes:
      problem: why the file cannot be decoded; None: it can.
      bit_depth: the smallest of `BIT_DEPTHS` that fits the values of a file with 16 bits per
        channel; 0: not such a file.
    """

    problem: Problem | None
    bit_depth: int = 0


def verify(data: bytes, name: str) -> int:
    """Checks that an encoded image can be decoded completely.

    Args:
      data: content of the image file.
      name: of the file, for errors.

    Returns:
      Its bit depth, as in `Inspection`.

    Raises:
      ImageError: if the image is corrupt or truncated.
    """
    problem, bit_depth = inspect(data, name)
    if problem:
        raise ImageError(name, len(data), problem)
    return bit_depth


def inspect(data: bytes, name: str = "") -> Inspection:
    """Test-decodes an encoded image completely.

    JPEGs are decoded at an eighth of their size, which reads all data in half the time.

    Args:
      data: content of the image file.
      name: of the file; its extension identifies the type if the content does not.
    """
    if _is_flawless_jpeg(data):
        return Inspection(None)
    try:
        loaded = pil_images.load_repaired(
            lambda content: pil_images.load(content, name, draft=True), data
        )
    except DECODE_ERRORS as error:
        return Inspection(_problem(data, name, error))
    return Inspection(None, 0 if loaded.wide is None else pil_images.bit_depth_of(loaded.wide))


def dimensions(data: bytes) -> tuple[int, int]:
    """Returns width and height of an image, pixels, from the file header.

    Raises:
      one of `DECODE_ERRORS`: if the header is invalid.
    """

    def size(content: bytes) -> tuple[int, int]:
        with Image.open(io.BytesIO(content)) as image:
            return image.size

    return pil_images.load_repaired(size, data)


def _problem(data: bytes, name: str, error: Exception) -> Problem:
    """Returns the problem of data that PIL cannot decode, based on its error."""
    if isinstance(error, pil_images.UnsupportedImage):
        return Problem(*error.kind)
    if kind := file_types.identify(data, name):
        return Problem(*kind)
    if isinstance(error, Image.DecompressionBombError):
        return Problem("oversized image", "make it smaller", str(error))
    if isinstance(error, UnidentifiedImageError) and not file_types.damaged_format(data):
        return Problem("file in an unknown format", "remove it")
    # PIL's message contains only the address of the buffer.
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
    """Decodes an image and resizes its center square.

    Applies the EXIF orientation. Uses the first frame of an animation, and composites transparency
    on white. The center square, with a side of `crop` times the shorter side, is resized to `size`
    × `size` pixels with PIL's antialiased bicubic filter unless it has that size.

    Args:
      data: content of the image file, in any format and color mode that PIL supports.
      size: height and width of the result, pixels.
      name: of the file, for errors.
      crop: greater than 0, at most 1.
      bit_depth: number of bits used by files with 16 bits per channel, of which the upper 8 become
        the pixels; larger values become white. 0: as needed by this image.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ImageError: if the image is corrupt or truncated.
    """
    if _jpeg_shape(data):
        pixels = _decode_jpeg(data, name)
    else:
        pixels = _decode_with_pil(data, name, bit_depth)
    return crop_and_resize(pixels, size, crop)


def crop_and_resize(pixels: np.ndarray, size: int, crop: float = 1.0) -> np.ndarray:
    """Crops and resizes the center square of an image, uint8 [H, W, 3], as `decode` does."""
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
    """Decodes an image, crops a box and resizes it to a square.

    Uses PIL's antialiased bilinear filter, as torchvision's RandomResizedCrop does; at the box's
    edges it uses the image's neighboring pixels, where cropping first would repeat the last ones. A
    JPEG is decoded at half size or less if the box still has at least `size` pixels each way.

    Args:
      data: content of the image file, in any format and color mode that PIL supports.
      size: height and width of the result, pixels.
      name: of the file, for errors.
      choose_crop: returns the box inside the image.
      bit_depth: as for `decode`.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ImageError: if the image is corrupt or truncated.
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
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=edges))


def _jpeg_shape(data: bytes) -> tuple[int, int] | None:
    """Returns height and width of a JPEG that simplejpeg decodes as PIL does, else None."""
    if _EXIF in data:
        return None
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # PIL refuses oversized images. simplejpeg converts four channels to three differently from PIL.
    oversized = height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    return (height, width) if color_space in _JPEG_COLOR_SPACES and not oversized else None


def _is_flawless_jpeg(data: bytes) -> bool:
    """Returns whether simplejpeg decodes a JPEG, which it does without a single libjpeg warning.

    PIL, which ignores warnings, decodes it too, but takes seven times as long, mostly in Python.
    """
    if _jpeg_shape(data) is None:
        return False
    try:
        simplejpeg.decode_jpeg(data, min_height=1, min_width=1, min_factor=8)
    except ValueError:
        return False
    return True


def _decode_jpeg(data: bytes, name: str, min_size: Sequence[int] = (0, 0)) -> np.ndarray:
    """Returns a JPEG's pixels, uint8 [H, W, 3].

    Args:
      data: content of the file.
      name: of the file, for errors.
      min_size: minimum height and width after scaled decoding; 0: full size.
    """
    height, width = min_size
    try:
        # Scaling by less than 2 takes longer than decoding at full size.
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
    except ValueError:
        return _decode_with_pil(data, name)


def _decode_with_pil(data: bytes, name: str, bit_depth: int = 0) -> np.ndarray:
    """Returns an image's pixels, uint8 [H, W, 3], from any format and color mode."""
    try:
        loaded = pil_images.load_repaired(lambda content: pil_images.load(content, name), data)
        return np.asarray(pil_images.to_rgb(loaded, bit_depth))
    except DECODE_ERRORS as error:
        raise ImageError(name, len(data), _problem(data, name, error)) from error


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields `items` in lists of `size`; the last may be shorter.

    >>> list(chunks(range(5), 2))
    [[0, 1], [2, 3], [4]]
    """
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def threaded_map(
    function: Callable[[Item], Result], items: Iterable[Item], chunk_size: int = 1
) -> Iterator[Result]:
    """Yields `function(item)` for each item in order, computed slightly ahead in threads.

    Unlike `Executor.map`, it consumes items only as needed, so memory stays bounded.

    Args:
      function: applied to each item.
      items: may be an infinite stream.
      chunk_size: items per task of a thread: a few milliseconds of work.
    """

    def work(chunk: list[Item]) -> list[Result]:
        return [function(item) for item in chunk]

    threads = min(os.cpu_count() or 1, _MAX_THREADS)
    pending: collections.deque[futures.Future[list[Result]]] = collections.deque()
    with futures.ThreadPoolExecutor(threads) as pool:
        try:
            for chunk in chunks(items, chunk_size):
                pending.append(pool.submit(work, chunk))
                if len(pending) > 2 * threads:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
