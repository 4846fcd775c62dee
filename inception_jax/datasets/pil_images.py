"""Decodes images with PIL and handles what it lacks: 16 bits, transparency, minor damage."""

import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageFile, PngImagePlugin, TiffImagePlugin

from inception_jax.config import BIT_DEPTHS
from inception_jax.datasets.sources import file_types
from inception_jax.datasets.sources.file_types import FileType

Result = TypeVar("Result")

# Raised by PIL for data that are not an image, or not a complete one. Most decoders convert errors
# to one of the first four types; those of rare formats let other errors through.
DECODE_ERRORS = (
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
# Formats that PIL passes to another program, which executes them: PostScript.
_PROGRAMS = ("EPS",)
_PNG, _JPEG, _JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
# TIFF tags: DNG version (a raw file), reduced-size copy of another image in the file (as in raw
# files), planar configuration, bits per channel, and the meaning of 0.
_DNG_VERSION, _SUBFILE, _PLANES, _BITS, _PHOTOMETRIC = 50706, 254, 284, 258, 262
# Of several 16-bit channels PIL keeps the upper bytes. Read with the opposite byte order, it keeps
# the lower ones. N is this machine's byte order, which libtiff uses.
_SWAPPED = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_LOWER_HALVES = {
    f"{mode};16{order}": f"{mode};16{swapped}"
    for mode in ("RGB", "RGBA", "RGBX")
    for order, swapped in _SWAPPED.items()
}
# Gray level per step, of 255, for 2 and 4 bits.
_GRAY_STEPS = {"L;2": 85, "L;4": 17}
# Transposes that turn an image upright, by EXIF orientation; 1 is upright.
_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnsupportedImage(ValueError):
    """An image that PIL can open but would decode wrongly."""

    def __init__(self, kind: FileType) -> None:
        super().__init__(kind.name)
        self.kind = kind


def bit_depth_of(values: np.ndarray) -> int:
    """Returns the smallest of `BIT_DEPTHS` that fits all values: uint16, of any shape."""
    needed = int(values.max(initial=0)).bit_length()
    return next(depth for depth in BIT_DEPTHS if depth >= needed)


def load_repaired(read: Callable[[bytes], Result], data: bytes) -> Result:
    """Returns `read(data)`; if that fails, retries with the output of `_repaired`."""
    try:
        return read(data)
    except DECODE_ERRORS as error:
        is_bomb = isinstance(error, Image.DecompressionBombError)
        repaired = None if is_bomb else _repaired(data)
        if repaired is None:
            raise
        return read(repaired)


def _repaired(data: bytes) -> bytes | None:
    """Repairs two faults that do not affect any pixel; returns None if neither is present.

    A JPEG may lack only its end marker, as left by some cameras and downloads; and PIL refuses a
    PNG with a long text or color profile.
    """
    if data.startswith(_PNG):
        kept = b"".join(_chunks_without_texts(data))
        return kept if len(kept) < len(data) else None
    if not data.startswith(_JPEG) or data.endswith(_JPEG_END):
        return None
    completed = data.removesuffix(_JPEG_END[:1]) + _JPEG_END
    try:
        # Unlike PIL, this fails if data are missing before the marker.
        simplejpeg.decode_jpeg(completed, min_height=1, min_width=1, min_factor=8)
    except ValueError:
        return None
    return completed


def _chunks_without_texts(data: bytes) -> Iterator[bytes]:
    """Yields the chunks of a PNG except its color profile and compressed or long texts.

    One of the remaining texts may contain the camera's orientation.
    """
    yield _PNG
    position = len(_PNG)
    while position < len(data):
        length, kind = (
            int.from_bytes(data[position : position + 4]),
            data[position + 4 : position + 8],
        )
        end = position + length + 12
        # The compression flag follows the keyword of an international text.
        packed = kind in (b"zTXt", b"iCCP") or (
            kind == b"iTXt" and b"\0\1" in data[position + 8 : position + 90]
        )
        is_long = kind in (b"tEXt", b"iTXt") and length > PngImagePlugin.MAX_TEXT_CHUNK
        if not (packed or is_long):
            yield data[position:end]
        position = end


class Loaded(NamedTuple):
    """An image decoded by PIL.

    Attributes:
      image: with 8 bits per channel if `wide` is None; otherwise only its size is valid.
      wide: uint16 [H, W, 1 or 3], the values of a file with 16 bits per channel, without alpha.
      alpha: uint8 [H, W], the opacity; None: opaque.
      orientation: the EXIF orientation.
    """

    image: Image.Image
    wide: np.ndarray | None
    alpha: np.ndarray | None
    orientation: int


def load(data: bytes, name: str, *, draft: bool = False) -> Loaded:
    """Decodes an image; with `draft`, a JPEG at an eighth of its size."""
    with Image.open(io.BytesIO(data)) as image:
        _check_format(image, name)
        if draft:
            image.draft("RGB", (1, 1))
        raw_mode = _raw_mode(image)
        image.load()
        _check_mode(image)
        wide, alpha = _wide_values(data, image, raw_mode)
        if raw_mode in _GRAY_STEPS and isinstance(key := image.info.get("transparency"), int):
            # PIL scales the values, but not the transparent one.
            image.info["transparency"] = key * _GRAY_STEPS[raw_mode]
        # Read after loading: PIL itself rotates TIFFs and then updates the tag.
        return Loaded(image, wide, alpha, _orientation(image))


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Returns PIL's raw mode of an image that is not yet loaded; '': unknown."""
    args: Any = image.tile[0].args if getattr(image, "tile", None) else ""
    mode = args[0] if isinstance(args, tuple) and args else args
    return mode if isinstance(mode, str) else ""


def _wide_values(
    data: bytes, image: Image.Image, raw_mode: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns values and opacity of a file with 16 bits per channel; None: it has fewer."""
    if image.mode.startswith("I"):
        values: np.ndarray = np.asarray(image).clip(0, 65535).astype(np.uint16)[..., None]
    elif raw_mode == "LA;16B":
        # Read as four 8-bit channels, two of which are the lower bytes.
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
    """Returns the values of an image, decoded with another raw mode."""
    with Image.open(io.BytesIO(data)) as image:
        image.tile = [tile._replace(args=_with_mode(tile.args, raw_mode)) for tile in image.tile]
        return np.asarray(image)


def _with_mode(args: Any, raw_mode: str) -> Any:
    """Returns the arguments of a PIL decoder with the raw mode, the first one, replaced."""
    return (raw_mode, *args[1:]) if isinstance(args, tuple) else raw_mode


def _upper_bits(values: np.ndarray, bit_depth: int) -> np.ndarray:
    """Returns the upper 8 of `bit_depth` bits as uint8; larger values become 255."""
    return (values >> (bit_depth - 8)).clip(0, 255).astype(np.uint8)


def to_rgb(loaded: Loaded, bit_depth: int) -> Image.Image:
    """Returns an upright image, composited on white, with 8 bits per channel."""
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
    turn = _TRANSPOSES.get(loaded.orientation)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _check_format(image: ImageFile.ImageFile, name: str) -> None:
    if image.format in _PROGRAMS:
        raise UnsupportedImage(file_types.PROGRAM)
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    if _DNG_VERSION in tags or tags.get(_SUBFILE, 0) & 1 or file_types.is_raw_name(name):
        raise UnsupportedImage(file_types.CAMERA_RAW)
    is_wide = max(tags.get(_BITS, (8,))) > 8
    if is_wide and tags.get(_PLANES, 1) == 2 and image.tile[0].codec_name == "raw":
        raise UnsupportedImage(file_types.PLANES)
    # PIL inverts them only where they have 8 bits or fewer.
    if is_wide and tags.get(_PHOTOMETRIC) == 0:
        raise UnsupportedImage(file_types.WHITE_IS_ZERO)


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise UnsupportedImage(file_types.FLOATS)
    # For these two formats PIL also opens 16-bit grayscale as 32-bit integers.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnsupportedImage(file_types.INTEGERS)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation; 1 (upright) if it is missing or unreadable."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
