"""Encoded images to pixels, in threads (the decoders release the interpreter's lock).

JPEGs are decoded by simplejpeg, a thin layer over libjpeg-turbo: in a quarter of PIL's time, to the
same pixels. What it does not take (other formats, four channels, JPEGs with odd or missing data),
and JPEGs with EXIF data, are left to PIL, which alone decides what is an image.
"""

import collections
import io
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from inception_jax.errors import DataError

# Top, left, height and width, pixels.
Box = tuple[int, int, int, int]
# Maps an image's height and width to the box that is cut from it.
ChooseBox = Callable[[int, int], Box]

Item = TypeVar("Item")
Result = TypeVar("Result")

# What PIL raises for data that are no image, or not a whole one. Most decoders turn what goes
# wrong into one of the first four; those of rare formats let errors of unpacking through.
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
# What PIL would hand to another program that runs it: PostScript.
_PROGRAMS = ("EPS",)
# As simplejpeg names them.
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")
# What EXIF data begin with in a JPEG. They can say how the camera was held.
_EXIF = b"Exif\0\0"
# What brings an image upright, by the value of the EXIF tag "Orientation"; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Beyond this, threads only wait for each other's turn at the interpreter.
_MOST_THREADS = 8


def _broken(name: str, size: int, error: Exception | str) -> DataError:
    return DataError(
        f"{name}: not a whole image ({size:,} bytes; {error}). The source is damaged: get this "
        "file, or the whole source, again."
    )


def verify(data: bytes, name: str) -> None:
    """Checks that an encoded image can be decoded to its last byte.

    Args:
      data: the image file's content.
      name: what an error calls it.

    Raises:
      DataError: if the image is corrupt or cut short.
    """
    if error := problem(data):
        raise _broken(name, len(data), error)


def problem(data: bytes) -> str:
    """Returns why an encoded image cannot be decoded to its last byte, or '' if it can.

    A JPEG is decoded at an eighth of its size, which reads all of its data in half the time.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_format(image)
            image.draft("RGB", (1, 1))
            image.load()
            _check_mode(image)
    except BROKEN as error:
        # PIL names the buffer that it was given, by its address.
        found = "no image format that is known" if isinstance(error, UnidentifiedImageError) else ""
        return found or str(error) or type(error).__name__
    return ""


def decode(data: bytes, size: int, name: str, crop: float = 1.0) -> np.ndarray:
    """Decodes an image to RGB pixels of a given size.

    A picture that its EXIF data say was taken with the camera turned is set upright. Of an animated
    image the first frame counts; 16 bits a channel become 8, and transparency is dropped. The
    centred square that is `crop` times as large as its shorter side becomes `size` × `size` pixels,
    resized with PIL's antialiased bicubic filter where it is of another size.

    Args:
      data: the image file's content, in any format and colour mode that PIL knows.
      size: height and width of the result, pixels.
      name: what an error calls it.
      crop: more than 0, at most 1.

    Returns:
      uint8 [size, size, 3].

    Raises:
      DataError: if the image is corrupt or cut short.
    """
    pixels = _decode_jpeg(data, name) if _jpeg_shape(data) else _decode_with_pil(data, name)
    if crop == 1 and pixels.shape[:2] == (size, size):
        return pixels
    fitted = ImageOps.fit(
        Image.fromarray(pixels),
        (size, size),
        method=Image.Resampling.BICUBIC,
        bleed=(1 - crop) / 2,
    )
    return np.asarray(fitted)


def decode_box(data: bytes, size: int, name: str, choose: ChooseBox) -> np.ndarray:
    """Decodes an image and resizes a box of it to a square.

    The filter is PIL's antialiased bilinear one, as in torchvision's RandomResizedCrop; beside the
    box's edge it sees the image's own pixels, where a crop before it would repeat the last ones. A
    JPEG is decoded at half its size, or less, where the box stays at least `size` pixels each way.

    Args:
      data: the image file's content, in any format and colour mode that PIL knows.
      size: height and width of the result, pixels.
      name: what an error calls it.
      choose: gives the box inside the image.

    Returns:
      uint8 [size, size, 3].

    Raises:
      DataError: if the image is corrupt or cut short.
    """
    shape = _jpeg_shape(data)
    if shape is None:
        pixels = _decode_with_pil(data, name)
        shape = pixels.shape[0], pixels.shape[1]
        box = choose(*shape)
    else:
        box = choose(*shape)
        least = [math.ceil(side * size / part) for side, part in zip(shape, box[2:], strict=True)]
        pixels = _decode_jpeg(data, name, least)
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
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    # Enormous ones are PIL's to refuse. Of the ways from four channels to three, simplejpeg does
    # not take PIL's.
    enormous = height * width > 2 * (Image.MAX_IMAGE_PIXELS or math.inf)
    return (height, width) if colours in _JPEG_COLOURS and not enormous else None


def _decode_jpeg(data: bytes, name: str, least: Sequence[int] = (0, 0)) -> np.ndarray:
    """Returns a JPEG's pixels, uint8 [H, W, 3].

    Args:
      data: the file's content.
      name: what an error calls it.
      least: height and width that it may be reduced to while it is decoded; 0: not at all.
    """
    height, width = least
    try:
        # Reducing by less than 2 takes longer than to decode the whole.
        return simplejpeg.decode_jpeg(data, min_height=height, min_width=width, min_factor=2)
    except ValueError:
        return _decode_with_pil(data, name)


def _decode_with_pil(data: bytes, name: str) -> np.ndarray:
    """Returns an image's pixels, uint8 [H, W, 3], from any format and colour mode."""
    try:
        return _decode_any(data)
    except BROKEN as error:
        raise _broken(name, len(data), error) from error


def _decode_any(data: bytes) -> np.ndarray:
    """Returns the pixels of an image that PIL can read, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data)) as image:
        _check_format(image)
        image.load()
        _check_mode(image)
        # Asked for after the loading: PIL itself turns TIFFs, and then says so.
        orientation = _orientation(image)
        pixels = _to_rgb(image)
    turn = _TURNS.get(orientation)
    return np.asarray(pixels if turn is None else pixels.transpose(turn))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, which PIL would cut at 255.
        high = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # PIL warns of the direct way.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _check_format(image: Image.Image) -> None:
    if image.format in _PROGRAMS:
        raise ValueError(f"{image.format} is a program that draws a picture, and none is run")


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is unknown")
    # Of these two formats PIL opens 16 bits of grey as integers of 32, too.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("its pixels are integers of 32 bits, or with a sign: of unknown range")


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF tag of that name; 1, upright, if there is none or it cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except BROKEN:
        return 1


def pieces(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Yields `items` in pieces of `size`, of which the last may be smaller."""
    return (items[start : start + size] for start in range(0, len(items), size))


def threaded_map(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yields `function(item)` for each item in order, computed a little ahead in threads.

    Unlike `Executor.map` it takes no more items than it works on, so memory stays bounded. Give it
    pieces of work of a few milliseconds each.
    """
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    pending: collections.deque[futures.Future[Result]] = collections.deque()
    with futures.ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
