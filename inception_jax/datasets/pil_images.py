"""Images as PIL decodes them, helped where it falls short: 16 bits, transparency, small damage."""

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

# What PIL raises for data that are no image, or not a whole one. Most decoders turn what goes
# wrong into one of the first four; those of rare formats let errors of unpacking through.
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
# What PIL would hand to another program that runs it: PostScript.
_PROGRAMS = ("EPS",)
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
_GRAY_STEPS = {"L;2": 85, "L;4": 17}
# What brings an image upright, by the value of the EXIF tag "Orientation"; 1 is upright.
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
    """An image that PIL would open, and that is not what it would give."""

    def __init__(self, kind: FileType) -> None:
        super().__init__(kind.name)
        self.kind = kind


def bit_depth_of(values: np.ndarray) -> int:
    """Returns the least of `BIT_DEPTHS` that holds all of some values, uint16."""
    needed = int(values.max(initial=0)).bit_length()
    return next(depth for depth in BIT_DEPTHS if depth >= needed)


def load_repaired(read: Callable[[bytes], Result], data: bytes) -> Result:
    """Returns what `read` makes of data, or of what `_repaired` makes of them if it fails."""
    try:
        return read(data)
    except DECODE_ERRORS as error:
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
    position = len(_PNG)
    while position < len(data):
        length, kind = (
            int.from_bytes(data[position : position + 4]),
            data[position + 4 : position + 8],
        )
        end = position + length + 12
        # After an international text's keyword stands whether it is compressed.
        packed = kind in (b"zTXt", b"iCCP") or (
            kind == b"iTXt" and b"\0\1" in data[position + 8 : position + 90]
        )
        is_long = kind in (b"tEXt", b"iTXt") and length > PngImagePlugin.MAX_TEXT_CHUNK
        if not (packed or is_long):
            yield data[position:end]
        position = end


class Loaded(NamedTuple):
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


def load(data: bytes, name: str, *, draft: bool = False) -> Loaded:
    """Decodes an image; `draft`: a JPEG at an eighth of its size."""
    with Image.open(io.BytesIO(data)) as image:
        _check_format(image, name)
        if draft:
            image.draft("RGB", (1, 1))
        raw_mode = _raw_mode(image)
        image.load()
        _check_mode(image)
        wide, alpha = _wide_values(data, image, raw_mode)
        if raw_mode in _GRAY_STEPS and isinstance(key := image.info.get("transparency"), int):
            # PIL scales the values, and not the one that is transparent.
            image.info["transparency"] = key * _GRAY_STEPS[raw_mode]
        # Asked for after the loading: PIL itself turns TIFFs, and then says so.
        return Loaded(image, wide, alpha, _orientation(image))


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


def to_rgb(loaded: Loaded, bit_depth: int) -> Image.Image:
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


def _check_mode(image: Image.Image) -> None:
    if image.mode == "F":
        raise UnsupportedImage(file_types.FLOATS)
    # Of these two formats PIL opens 16 bits of grey as integers of 32, too.
    if image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise UnsupportedImage(file_types.INTEGERS)


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF tag of that name; 1, upright, if there is none or it cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1
