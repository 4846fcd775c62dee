"""Encoded images to pixels, in threads (the decoders release the interpreter's lock).

JPEGs are decoded by simplejpeg, a thin layer over libjpeg-turbo: in a quarter of PIL's time, to the
same pixels. What it does not take (other formats, four channels, JPEGs with odd or missing data) is
left to PIL, which alone decides what is an image.
"""

import collections
import io
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from inception_jax.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

# What PIL raises for data that are no image, or not a whole one; struct.error comes through as
# SyntaxError or ValueError from some of its decoders.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# As simplejpeg names them.
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")
# Beyond this, threads only wait for each other's turn at the interpreter.
_MOST_THREADS = 8


def _broken(name: str, size: int, error: Exception) -> DataError:
    return DataError(
        f"{name}: not a whole image ({size:,} bytes; {error}). The source is damaged: get this "
        "file, or the whole source, again."
    )


def verify(data: bytes, name: str) -> None:
    """Checks that an encoded image can be decoded to its last byte.

    A JPEG is decoded at an eighth of its size, which reads all of its data in half the time.

    Args:
      data: the image file's content.
      name: what an error calls it.

    Raises:
      DataError: if the image is corrupt or cut short.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (1, 1))
            image.load()
    except _BROKEN as error:
        raise _broken(name, len(data), error) from error


def decode(data: bytes, size: int, name: str) -> np.ndarray:
    """Decodes an image to RGB pixels of a given size.

    An image of another size is resized with PIL's antialiased bicubic filter: the centred square
    that is as large as its shorter side becomes `size` × `size` pixels.

    Args:
      data: the image file's content, in any format and colour mode that PIL knows.
      size: height and width of the result, pixels.
      name: what an error calls it.

    Returns:
      uint8 [size, size, 3].

    Raises:
      DataError: if the image is corrupt or cut short.
    """
    pixels = _decode_jpeg(data)
    if pixels is None:
        try:
            with Image.open(io.BytesIO(data)) as image:
                pixels = np.asarray(image.convert("RGB"))
        except _BROKEN as error:
            raise _broken(name, len(data), error) from error
    if pixels.shape[:2] == (size, size):
        return pixels
    fitted = ImageOps.fit(Image.fromarray(pixels), (size, size), method=Image.Resampling.BICUBIC)
    return np.asarray(fitted)


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Returns a JPEG's pixels, uint8 [H, W, 3], or None for what is left to PIL."""
    try:
        *_, colours, _ = simplejpeg.decode_jpeg_header(data)
        # Of the ways from four channels to three, it does not take PIL's.
        return simplejpeg.decode_jpeg(data) if colours in _JPEG_COLOURS else None
    except ValueError:
        return None


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
