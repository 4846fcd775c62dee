import io
import random
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image, ImageOps, PngImagePlugin

from inception_jax.datasets import decode
from inception_jax.errors import DataError
from tests import archives


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def problem(data: bytes) -> str:
    return str(decode.inspect(data).problem)


def test_decode_returns_pixels_of_lossless_image() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    decoded = decode.decode(png(array), 16, "x")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, array)


def test_decode_converts_grayscale_to_three_channels() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    decoded = decode.decode(png(array), 16, "x")
    np.testing.assert_array_equal(decoded, np.repeat(array[..., None], 3, axis=2))


@pytest.mark.parametrize("shape", [(24, 72), (72, 24)])
def test_decode_crops_center_square(shape: tuple[int, int]) -> None:
    array = np.zeros((*shape, 3), np.uint8)
    array[..., 0] = 255
    middle = slice(24, 48)
    array[(slice(None), middle) if shape == (24, 72) else middle] = (0, 255, 0)
    decoded = decode.decode(png(array), 12, "x")
    assert decoded.shape == (12, 12, 3)
    # The filter mixes pixels next to the square into its outermost pixels.
    inner = decoded[1:-1, 1:-1]
    np.testing.assert_array_equal(inner, np.broadcast_to([0, 255, 0], inner.shape))


def test_decode_antialiases_when_downscaling() -> None:
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    decoded = decode.decode(png(checkers), 16, "x")
    # Without antialiasing, some pixels would be black or white. Borders cover less of the pattern.
    assert np.abs(decoded[2:-2, 2:-2].astype(int) - 127.5).max() < 3


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_applies_exif_orientation(kind: str, orientation: int) -> None:
    # The positions of the four corners distinguish the eight orientations.
    array = np.full((16, 16, 3), 128, np.uint8)
    array[:8, :8], array[:8, 8:], array[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.fromarray(array), kind, exif=exif, quality=100)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(decode.decode(data, 16, "x"), expected)
    is_red = expected[4, 4, 0] > 200 and expected[4, 4, 1] < 100
    assert is_red == (orientation in (1, 5)), "the reference does turn"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_decode_ignores_damaged_exif_data() -> None:
    array = np.full((16, 16, 3), 90, np.uint8)
    data = encoded(Image.fromarray(array), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\xff\xff")
    np.testing.assert_array_equal(decode.decode(data, 16, "x"), array)


def test_decode_keeps_the_upper_8_of_16_bits() -> None:
    gray = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 7
    expected = np.repeat((gray >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF", "PPM"):
        data = encoded(Image.fromarray(gray), kind)
        np.testing.assert_array_equal(decode.decode(data, 16, "x"), expected)


def test_decode_supports_other_color_modes_and_first_frame() -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    blue = Image.new("RGB", (16, 16), (10, 10, 250))
    palette = encoded(red.quantize(4), "PNG", transparency=b"\xff")
    animated = encoded(red, "GIF", save_all=True, append_images=[blue])
    transparent = encoded(red.convert("RGBA"), "PNG")
    cmyk = encoded(red.convert("CMYK"), "JPEG", quality=100)
    for data in (palette, animated, transparent, cmyk):
        assert decode.inspect(data).problem is None
        np.testing.assert_allclose(decode.decode(data, 16, "x"), np.asarray(red), atol=4)


def png_of(values: np.ndarray, color_type: int, *chunks: bytes, bits: int = 16) -> bytes:
    """Returns rows of big-endian values, uint16 [H, W, C] or packed bytes [H, B], as a PNG."""
    height, width = values.shape[0], values.shape[1] * (8 // bits if bits < 8 else 1)
    content = values.astype(">u2") if bits == 16 else values
    rows = b"".join(b"\0" + row.tobytes() for row in content)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0)
    parts = [(b"IHDR", header), *((c[:4], c[4:]) for c in chunks), (b"IDAT", zlib.compress(rows))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts) + chunk(b"IEND", b"")


def tiff_of(
    values: np.ndarray, order: str, *, packed: bool = False, tags: dict[int, int] | None = None
) -> bytes:
    """Returns values, uint16 [H, W, 3 or 4], as a TIFF with byte order '<' or '>'."""
    height, width, channels = values.shape
    pixels = values.astype(f"{order}u2").tobytes()
    pixels = zlib.compress(pixels) if packed else pixels
    bits = struct.pack(f"{order}{channels}H", *[16] * channels)
    entries = {256: width, 257: height, 259: 8 if packed else 1, 262: 2, 277: channels}
    entries |= {278: height, 279: len(pixels)} | (tags or {}) | ({338: 2} if channels == 4 else {})
    count = len(entries) + 2
    place = 8 + 2 + 12 * count + 4
    directory = {tag: (4, 1, value) for tag, value in entries.items()}
    directory |= {258: (3, channels, place), 273: (4, 1, place + len(bits))}
    body = b"".join(
        struct.pack(f"{order}HHII", tag, *entry) for tag, entry in sorted(directory.items())
    )
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, count)
    return start + body + bytes(4) + bits + pixels


def tall(channels: int, most: int) -> np.ndarray:
    """Returns values from 0 to `most`, uint16 [16, 16, channels]."""
    values = np.random.default_rng(0).integers(0, most + 1, (16, 16, channels)).astype(np.uint16)
    values[0, 0] = most
    return values


WIDE = {
    "gray.png": lambda v: encoded(Image.fromarray(v[..., 0]), "PNG"),
    "gray.tif": lambda v: encoded(Image.fromarray(v[..., 0]), "TIFF"),
    "rgb.png": lambda v: png_of(v, 2),
    "le.tif": lambda v: tiff_of(v, "<"),
    "be.tif": lambda v: tiff_of(v, ">"),
    "le-packed.tif": lambda v: tiff_of(v, "<", packed=True),
    "be-packed.tif": lambda v: tiff_of(v, ">", packed=True),
}


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_upper_8_of_used_bits_are_kept(name: str, bits: int) -> None:
    values = tall(3, 2**bits - 1)
    data = WIDE[name](values)
    values = values[..., :1] if name.startswith("gray") else values
    expected = np.broadcast_to((values >> (bits - 8)).astype(np.uint8), (16, 16, 3))
    np.testing.assert_array_equal(decode.decode(data, 16, name), expected)
    np.testing.assert_array_equal(decode.decode(data, 16, name, bit_depth=bits), expected)
    box = decode.decode_crop(data, 16, name, lambda *_: (0, 0, 16, 16), bit_depth=bits)
    np.testing.assert_array_equal(box, expected)
    assert decode.inspect(data, name) == (None, bits)


def test_explicit_bit_depth_is_used() -> None:
    data = WIDE["rgb.png"](tall(3, 4095))
    expected = (tall(3, 4095) >> 8).astype(np.uint8)
    np.testing.assert_array_equal(decode.decode(data, 16, "x", bit_depth=16), expected)
    # Larger values become white instead of wrapping around.
    clipped = (tall(3, 4095) >> 2).clip(0, 255).astype(np.uint8)
    np.testing.assert_array_equal(decode.decode(data, 16, "x", bit_depth=10), clipped)
    assert decode.inspect(png(np.zeros((8, 8, 3), np.uint8))).bit_depth == 0


@pytest.mark.parametrize("opaque", [4095, 65535])
@pytest.mark.parametrize("kind", ["LA", "RGBA", "TIFF"])
def test_16_bit_opacity_is_scaled_separately(kind: str, opaque: int) -> None:
    channels = 2 if kind == "LA" else 4
    values = tall(channels, 4095)
    values[..., -1] = opaque
    values[8:, :, -1] = 0
    data = tiff_of(values, "<") if kind == "TIFF" else png_of(values, 4 if kind == "LA" else 6)
    expected = np.broadcast_to(values[..., : channels - 1] >> 4, (16, 16, 3)).copy()
    expected[8:] = 255
    np.testing.assert_array_equal(decode.decode(data, 16, "x", bit_depth=12), expected)


def half_transparent(mode: str) -> Image.Image:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 16, 8))
    return image.convert(mode)


TRANSPARENT = {
    "RGBA.png": lambda: encoded(half_transparent("RGBA"), "PNG"),
    "LA.png": lambda: encoded(half_transparent("LA"), "PNG"),
    "webp": lambda: encoded(half_transparent("RGBA"), "WEBP", lossless=True),
    "gif": lambda: encoded(half_transparent("RGBA"), "GIF"),
    "palette": lambda: encoded(half_transparent("RGBA").quantize(4), "PNG"),
    "RGBA.tif": lambda: encoded(half_transparent("RGBA"), "TIFF"),
    "gray key": lambda: encoded(half_transparent("L"), "PNG", transparency=0),
    "RGB key": lambda: encoded(half_transparent("RGB"), "PNG", transparency=(0, 0, 0)),
    "key of 16 bits": lambda: png_of(
        np.asarray(half_transparent("RGB")).astype(np.uint16) * 257, 2, b"tRNS" + bytes(6)
    ),
    "gray key of 16 bits": lambda: png_of(
        np.asarray(half_transparent("L"))[..., None].astype(np.uint16) * 257, 0, b"tRNS" + bytes(2)
    ),
}


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_images_are_composited_on_white(name: str) -> None:
    decoded = decode.decode(TRANSPARENT[name](), 16, name)
    np.testing.assert_allclose(decoded[:8], 200, atol=2)
    np.testing.assert_array_equal(decoded[8:], 255)


@pytest.mark.parametrize(("bits", "ink", "clear"), [(1, 1, 0), (2, 3, 1), (4, 15, 7)])
def test_transparent_gray_level_of_few_bits_is_white(bits: int, ink: int, clear: int) -> None:
    shades = np.full((8, 8), ink)
    shades[4:] = clear
    each = 8 // bits
    parts = [shades[:, n::each] << (8 - bits * (n + 1)) for n in range(each)]
    packed = np.sum(parts, axis=0).astype(np.uint8)
    data = png_of(packed, 0, b"tRNS" + struct.pack(">H", clear), bits=bits)
    np.testing.assert_array_equal(decode.decode(data, 8, "x"), 255)


def test_opaque_images_with_alpha_are_unchanged() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = Image.fromarray(array)
    image.putalpha(255)
    np.testing.assert_array_equal(decode.decode(encoded(image, "PNG"), 16, "x"), array)


def test_png_with_long_text_or_large_profile_is_accepted() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", "x" * 2_000_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "y" * 1_500_000, zip=True)
    profile = np.random.default_rng(0).integers(0, 4, 1_600_000, np.uint8).tobytes()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    cases: list[dict[str, Any]] = [
        {"pnginfo": info},
        {"icc_profile": profile},
        {"pnginfo": info, "exif": exif},
    ]
    for settings in cases:
        data = encoded(Image.fromarray(array), "PNG", **settings)
        expected = array[::-1, ::-1] if "exif" in settings else array
        assert decode.inspect(data).problem is None
        assert decode.dimensions(data) == (16, 16)
        np.testing.assert_array_equal(decode.decode(data, 16, "x"), expected)
        with pytest.raises(DataError, match="damaged image"):
            decode.verify(data[:-60], "x")


def test_jpeg_may_lack_only_its_end_marker() -> None:
    complete = archives.jpeg(archives.pixels(3, 32, np.random.default_rng(0)))
    expected = decode.decode(complete, 32, "x")
    for cut in (1, 2):
        decode.verify(complete[:-cut], "x")
        np.testing.assert_array_equal(decode.decode(complete[:-cut], 32, "x"), expected)
    for cut in (3, 4, 8):
        with pytest.raises(DataError, match="damaged image"):
            decode.verify(complete[:-cut], "x")


@pytest.mark.parametrize(
    ("tags", "name"), [({254: 1}, "x.tif"), ({50706: 0x0401}, "x.jpg"), ({}, "x.NEF")]
)
def test_thumbnail_of_raw_file_is_refused(tags: dict[int, int], name: str) -> None:
    data = tiff_of(tall(3, 65535), "<", tags=tags)
    with pytest.raises(DataError, match=r"camera raw file\)\. Convert it to JPEG or TIFF"):
        decode.decode(data, 16, name)
    assert decode.inspect(tiff_of(tall(3, 65535), "<"), "x.tif").problem is None


def test_planar_16_bit_channels_are_refused() -> None:
    assert "planar 16-bit channels" in problem(tiff_of(tall(3, 65535), "<", tags={284: 2}))


def test_wide_values_whose_zero_is_white_are_refused() -> None:
    image = Image.fromarray(tall(1, 65535)[..., 0])
    white, black = io.BytesIO(), io.BytesIO()
    image.save(white, "TIFF", tiffinfo={262: 0})
    image.save(black, "TIFF")
    assert "whose 0 is white" in problem(white.getvalue())
    assert decode.inspect(black.getvalue(), "x.tif").problem is None


def test_floating_point_and_enormous_images_are_refused() -> None:
    data = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    assert "floating-point" in problem(data)
    with pytest.raises(DataError, match=r"x: not a readable image .*floating-point"):
        decode.decode(data, 8, "x")
    integers = Image.fromarray(np.full((8, 8), 200, np.int32))
    assert "32-bit or signed integers" in problem(encoded(integers, "TIFF"))
    assert "200000000 pixels" in problem(encoded(Image.new("1", (20000, 10000)), "PNG"))


def test_non_image_is_described_in_one_line() -> None:
    assert problem(b"\x01a note") == "file in an unknown format"


def smooth(height: int, width: int) -> np.ndarray:
    """Returns an image without detail: a horizontal and a vertical wave."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def test_decode_crops_fraction_of_shorter_side() -> None:
    array = smooth(48, 60)
    # The usual method: resize the shorter side to 16 pixels, then crop the center 14.
    complete = Image.fromarray(array).resize((20, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(complete)[1:15, 3:17].astype(int)
    decoded = decode.decode(png(array), 14, "x", crop=0.875)
    assert np.abs(decoded - expected).max() <= 1
    assert (decode.decode(png(array[:16, :16]), 16, "x", crop=0.5) != array[:16, :16]).any()


@pytest.mark.parametrize("encode", [png, archives.jpeg])
def test_decode_crop_is_crop_and_antialiased_resize(
    encode: Callable[[np.ndarray], bytes],
) -> None:
    asked = []

    def choose(height: int, width: int) -> decode.CropBox:
        asked.append((height, width))
        return 7, 20, 33, 25

    array = smooth(48, 70)
    actual = decode.decode_crop(encode(array), 14, "x", choose)
    assert asked == [(48, 70)]
    complete = np.asarray(Image.open(io.BytesIO(encode(array))))
    crop = Image.fromarray(complete[7:40, 20:45]).resize((14, 14), Image.Resampling.BILINEAR)
    # At the border only one of them uses the image's neighboring pixels.
    difference = np.abs(actual.astype(int) - np.asarray(crop))
    assert difference[1:-1, 1:-1].max() <= 1
    assert difference.max() <= 8


@pytest.mark.parametrize("box", [(10, 30, 500, 640), (0, 0, 600, 800), (100, 200, 400, 384)])
def test_decode_crop_scales_large_jpeg_while_decoding(
    box: decode.CropBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, shapes = archives.jpeg(smooth(600, 800)), []
    original = simplejpeg.decode_jpeg

    def decode_jpeg(*arguments: Any, **settings: Any) -> np.ndarray:
        shapes.append((pixels := original(*arguments, **settings)).shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    small = decode.decode_crop(data, 192, "x", lambda height, width: box)
    assert shapes[0][0] <= 600 // 2 and shapes[0][0] * box[2] // 600 >= 192
    monkeypatch.undo()
    complete = Image.open(io.BytesIO(data))
    edges = (box[1], box[0], box[1] + box[3], box[0] + box[2])
    expected = np.asarray(complete.resize((192, 192), Image.Resampling.BILINEAR, box=edges))
    assert np.abs(small.astype(int) - expected).max() <= 4


@pytest.mark.parametrize("kept", [0, 10, 300, -20])
@pytest.mark.parametrize(
    "read",
    [
        decode.verify,
        lambda data, name: decode.decode(data, 32, name),
        lambda data, name: decode.decode_crop(data, 32, name, lambda *_: (0, 0, 32, 32)),
    ],
)
def test_truncated_image_is_named(read: Callable[[bytes, str], object], kept: int) -> None:
    complete = archives.jpeg(archives.pixels(3, 32, np.random.default_rng(0)))
    read(complete, "whole.JPEG")
    with pytest.raises(DataError, match=r"^somewhere/n1_2\.JPEG: not a readable image .*again"):
        read(complete[:kept], "somewhere/n1_2.JPEG")


def damaged(data: bytes, seed: int) -> bytes:
    """Returns a JPEG with a byte changed, cut off, removed or inserted, mostly in its header."""
    rng = random.Random(seed)
    place = rng.randrange(min(len(data), 700))
    rest = {
        "changed": bytes([rng.randrange(256)]) + data[place + 1 :],
        "cut off": b"",
        "removed": data[place + 1 :],
        "inserted": bytes([rng.randrange(256)]) + data[place:],
    }
    return data[:place] + rest[rng.choice(list(rest))]


def test_quick_verdict_on_jpegs_is_that_of_pil(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8)
    data = archives.jpeg(smooth(64, 48) + noise[:1, :1] // 16)
    files = [data, data + b"\0 more", *(damaged(data, seed) for seed in range(300))]
    quick = [decode.inspect(file) for file in files]
    monkeypatch.setattr(decode, "_is_flawless_jpeg", lambda file: False)
    assert quick == [decode.inspect(file) for file in files]
    accepted = sum(each.problem is None for each in quick)
    assert 100 < accepted < 250


def test_chunks_keep_items_in_order() -> None:
    assert list(decode.chunks("abcde", 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(decode.chunks(range(4), 2)) == [[0, 1], [2, 3]]
    assert not list(decode.chunks([], 3))


def test_threaded_map_keeps_order_and_is_lazy() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = decode.threaded_map(lambda item: item * item, items())
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(taken) < 50
    assert list(results) == [item * item for item in range(5, 1000)]


def test_threaded_map_propagates_errors_and_stops_threads() -> None:
    def fails(item: int) -> int:
        if item == 7:
            raise DataError("seven")
        return item

    with pytest.raises(DataError, match="seven"):
        list(decode.threaded_map(fails, range(100)))
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
