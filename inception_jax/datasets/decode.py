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
import math
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
from PIL import (
    ExifTags,
    Image,
    ImageFile,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from inception_jax.config import BIT_DEPTHS
from inception_jax.datasets.sources import file_types
from inception_jax.datasets.sources.file_types import FileType
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
_PNG, _JPEG, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
# Tags of TIFF: by whom a raw file is, that this is a small copy of an image elsewhere in the file
# (as of raw files), how the channels lie, and the bits of each.
_DNG_VERSION, _SUBFILE, _PLANES, _BITS = 50706, 254, 284, 258
# PIL keeps the upper halves of several channels of 16 bits. Read in the other order of bytes, it
# keeps the lower ones: N is the order of this machine, in which libtiff gives values.
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_LOWER_HALVES = {
    f"{mode};16{order}": f"{mode};16{swapped}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, swapped in _SWAPPED.items()
}
# What a step of grey is, of 255, where it has 2 or 4 bits.
_GREY_STEPS = {"L;2": 85, "L;4": 17}
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


class _NotRead(ValueError):
    """An image that PIL would open, and that is not what it would give."""

    def __init__(self, kind: FileType) -> None:
        super().__init__(kind.name)
        self.kind = kind


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
        loaded = _repairing(lambda content: _load(content, name, draft=True), data)
    except BROKEN as error:
        return Inspection(_problem(data, name, error))
    return Inspection(None, 0 if loaded.wide is None else bit_depth_of(loaded.wide))


def dimensions(data: bytes) -> tuple[int, int]:
    """Returns width and height of an image, pixels, by what the file says of itself.

    Raises:
      one of `BROKEN`: if it does not say it.
    """

    def size(content: bytes) -> tuple[int, int]:
        with Image.open(io.BytesIO(content)) as image:
            return image.size

    return _repairing(size, data)


def bit_depth_of(values: np.ndarray) -> int:
    """Returns the least of `BIT_DEPTHS` that holds all of some values, uint16."""
    needed = int(values.max(initial=0)).bit_length()
    return next(depth for depth in BIT_DEPTHS if depth >= needed)


def _problem(data: bytes, name: str, error: Exception) -> Problem:
    """Returns what is wrong with data that PIL does not decode, from what it raised."""
    if isinstance(error, _NotRead):
        return Problem(*error.kind)
    if kind := file_types.identify(data, name):
        return Problem(*kind)
    if isinstance(error, Image.DecompressionBombError):
        return Problem("image that is too large", "make it smaller", str(error))
    if isinstance(error, UnidentifiedImageError) and not file_types.damaged_format(data):
        return Problem("file of no image format that is known", "remove it")
    # PIL names the buffer that it was given, by its address.
    unidentified = isinstance(error, UnidentifiedImageError)
    said = f"{file_types.damaged_format(data)} data without an image" if unidentified else ""
    return Problem(
        "damaged image",
        "the source is damaged: get this file, or the whole source, again",
        said or str(error) or type(error).__name__,
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
    return resized(pixels, size, crop)


def resized(pixels: np.ndarray, size: int, crop: float = 1.0) -> np.ndarray:
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


def decode_box(
    data: bytes, size: int, name: str, choose: ChooseBox, *, bit_depth: int = 0
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


def _decode_with_pil(data: bytes, name: str, bit_depth: int = 0) -> np.ndarray:
    """Returns an image's pixels, uint8 [H, W, 3], from any format and colour mode."""
    try:
        loaded = _repairing(lambda content: _load(content, name), data)
        return np.asarray(_to_rgb(loaded, bit_depth))
    except BROKEN as error:
        raise ImageError(name, len(data), _problem(data, name, error)) from error


def _repairing(read: Callable[[bytes], Result], data: bytes) -> Result:
    """Returns what `read` makes of data, or of what `_repaired` makes of them if it fails."""
    try:
        return read(data)
    except BROKEN as error:
        is_bomb = isinstance(error, Image.DecompressionBombError)
        repaired = None if is_bomb else _repaired(data)
        if repaired is None:
            raise
        return read(repaired)


def _repaired(data: bytes) -> bytes | None:
    """Returns an image file without the two faults that cost it no pixel, or None if it has none.

    A JPEG may lack its end marker alone, as some cameras and downloads leave it; and PIL refuses a
    PNG whose texts or color profile are long.
    """
    if data.startswith(_PNG):
        kept = b"".join(_chunks_without_texts(data))
        return kept if len(kept) < len(data) else None
    if not data.startswith(_JPEG) or data.endswith(_JPEG_END):
        return None
    whole = data.removesuffix(_JPEG_END[:1]) + _JPEG_END
    try:
        # Unlike PIL it says so if data are missing before the marker.
        simplejpeg.decode_jpeg(whole, min_height=1, min_width=1, min_factor=8)
    except ValueError:
        return None
    return whole


def _chunks_without_texts(data: bytes) -> Iterator[bytes]:
    """Yields what a PNG consists of, but for texts that are compressed or long, and the profile.

    Of the texts that stay, one may say how the camera was held.
    """
    yield _PNG
    place = len(_PNG)
    while place < len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        end = place + length + 12
        # After an international text's keyword stands whether it is compressed.
        packed = kind in (b"zTXt", b"iCCP") or (
            kind == b"iTXt" and b"\0\1" in data[place + 8 : place + 90]
        )
        is_long = kind in (b"tEXt", b"iTXt") and length > PngImagePlugin.MAX_TEXT_CHUNK
        if not (packed or is_long):
            yield data[place:end]
        place = end


class _Loaded(NamedTuple):
    """An image that PIL has decoded.

    Attributes:
      image: with 8 bits a channel where `wide` is None; else only its size counts.
      wide: uint16 [H, W, 1 or 3], the values of a file with 16 bits a channel, without `alpha`.
      alpha: uint8 [H, W], how opaque they are; None: entirely.
      orientation: the EXIF tag of that name.
    """

    image: Image.Image
    wide: np.ndarray | None
    alpha: np.ndarray | None
    orientation: int


def _load(data: bytes, name: str, *, draft: bool = False) -> _Loaded:
    """Decodes an image; `draft`: a JPEG at an eighth of its size."""
    with Image.open(io.BytesIO(data)) as image:
        _check_format(image, name)
        if draft:
            image.draft("RGB", (1, 1))
        raw_mode = _raw_mode(image)
        image.load()
        _check_mode(image)
        wide, alpha = _wide_values(data, image, raw_mode)
        if raw_mode in _GREY_STEPS and isinstance(key := image.info.get("transparency"), int):
            # PIL scales the values, and not the one that is transparent.
            image.info["transparency"] = key * _GREY_STEPS[raw_mode]
        # Asked for after the loading: PIL itself turns TIFFs, and then says so.
        return _Loaded(image, wide, alpha, _orientation(image))


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Returns how an image that is not yet loaded lies in its file, in PIL's words; '': unknown."""
    args: Any = image.tile[0].args if getattr(image, "tile", None) else ""
    mode = args[0] if isinstance(args, tuple) and args else args
    return mode if isinstance(mode, str) else ""


def _wide_values(
    data: bytes, image: Image.Image, raw_mode: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the values and opacities of a file with 16 bits a channel; None: it has fewer."""
    if image.mode.startswith("I"):
        values: np.ndarray = np.asarray(image).clip(0, 65535).astype(np.uint16)[..., None]
    elif raw_mode == "LA;16B":
        # Read as if it had four channels of 8 bits, of which two are the lower halves.
        parts = _reread(data, "RGBA").astype(np.uint16)
        values = parts[..., ::2] << 8 | parts[..., 1::2]
    elif raw_mode in _LOWER_HALVES:
        lower = _reread(data, _LOWER_HALVES[raw_mode])
        values = np.asarray(image).astype(np.uint16) << 8 | lower
    else:
        return None, None
    color = values[..., : 1 if values.shape[2] < 3 else 3]
    alpha = None
    if values.shape[2] in (2, 4):
        opacity = values[..., -1]
        alpha = _upper_bits(opacity, bit_depth_of(opacity))
    elif (key := image.info.get("transparency")) is not None:
        alpha = np.where((color == np.array(key)).all(axis=-1), 0, 255).astype(np.uint8)
    return color, alpha


def _reread(data: bytes, raw_mode: str) -> np.ndarray:
    """Returns the values of an image, read as if it lay in its file in another way."""
    with Image.open(io.BytesIO(data)) as image:
        image.tile = [tile._replace(args=_with_mode(tile.args, raw_mode)) for tile in image.tile]
        return np.asarray(image)


def _with_mode(args: Any, raw_mode: str) -> Any:
    """Returns the arguments of one of PIL's decoders, of which the first is the way to read."""
    return (raw_mode, *args[1:]) if isinstance(args, tuple) else raw_mode


def _upper_bits(values: np.ndarray, bit_depth: int) -> np.ndarray:
    """Returns the upper 8 of the bits that values use, uint8; larger values become 255."""
    return (values >> (bit_depth - 8)).clip(0, 255).astype(np.uint8)


def _to_rgb(loaded: _Loaded, bit_depth: int) -> Image.Image:
    """Returns an image upright, on white, with 8 bits a channel."""
    image = loaded.image
    if loaded.wide is not None:
        values = _upper_bits(loaded.wide, bit_depth or bit_depth_of(loaded.wide))
        height, width, _ = values.shape
        image = Image.fromarray(np.broadcast_to(values, (height, width, 3)).copy())
        if loaded.alpha is not None:
            image.putalpha(Image.fromarray(loaded.alpha))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    turn = _TURNS.get(loaded.orientation)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _check_format(image: ImageFile.ImageFile, name: str) -> None:
    if image.format in _PROGRAMS:
        raise _NotRead(file_types.PROGRAM)
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    if _DNG_VERSION in tags or tags.get(_SUBFILE, 0) & 1 or file_types.is_raw_name(name):
        raise _NotRead(file_types.CAMERA_RAW)
    is_wide = max(tags.get(_BITS, (8,))) > 8
    if is_wide and tags.get(_PLANES, 1) == 2 and image.tile[0].codec_name == "raw":
        raise _NotRead(file_types.PLANES)


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise _NotRead(file_types.FLOATS)
    # Of these two formats PIL opens 16 bits of grey as integers of 32, too.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise _NotRead(file_types.INTEGERS)


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
