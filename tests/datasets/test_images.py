import io
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from inception_jax.datasets import images
from inception_jax.errors import DataError
from tests import archives


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


def problem(data: bytes) -> str:
    return str(images.inspect(data).problem)


def test_decode_returns_the_pixels_of_a_lossless_image() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    decoded = images.decode(png(array), 16, "x")
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, array)


def test_decode_gives_grey_images_three_equal_channels() -> None:
    array = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    decoded = images.decode(png(array), 16, "x")
    np.testing.assert_array_equal(decoded, np.repeat(array[..., None], 3, axis=2))


@pytest.mark.parametrize("shape", [(24, 72), (72, 24)])
def test_decode_takes_the_central_square(shape: tuple[int, int]) -> None:
    array = np.zeros((*shape, 3), np.uint8)
    array[..., 0] = 255
    middle = slice(24, 48)
    array[(slice(None), middle) if shape == (24, 72) else middle] = (0, 255, 0)
    decoded = images.decode(png(array), 12, "x")
    assert decoded.shape == (12, 12, 3)
    # The filter mixes what lies beside the square into its outermost pixels.
    inner = decoded[1:-1, 1:-1]
    np.testing.assert_array_equal(inner, np.broadcast_to([0, 255, 0], inner.shape))


def test_decode_averages_when_it_shrinks() -> None:
    checkers = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    decoded = images.decode(png(checkers), 16, "x")
    # Without antialiasing, some pixels would be black or white. Borders see less of the pattern.
    assert np.abs(decoded[2:-2, 2:-2].astype(int) - 127.5).max() < 3


def encoded(image: Image.Image, kind: str, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **settings)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_sets_turned_pictures_upright(kind: str, orientation: int) -> None:
    # Where the four corners go tells the eight ways apart.
    array = np.full((16, 16, 3), 128, np.uint8)
    array[:8, :8], array[:8, 8:], array[8:, :8] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.fromarray(array), kind, exif=exif, quality=100)
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(images.decode(data, 16, "x"), expected)
    is_red = expected[4, 4, 0] > 200 and expected[4, 4, 1] < 100
    assert is_red == (orientation in (1, 5)), "the reference does turn"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_decode_ignores_damaged_exif_data() -> None:
    array = np.full((16, 16, 3), 90, np.uint8)
    data = encoded(Image.fromarray(array), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\xff\xff")
    np.testing.assert_array_equal(images.decode(data, 16, "x"), array)


def test_decode_keeps_the_upper_8_of_16_bits() -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 7
    expected = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
    for kind in ("PNG", "TIFF", "PPM"):
        data = encoded(Image.fromarray(grey), kind)
        np.testing.assert_array_equal(images.decode(data, 16, "x"), expected)


def test_decode_takes_other_colour_modes_and_the_first_frame() -> None:
    red = Image.new("RGB", (16, 16), (250, 10, 10))
    blue = Image.new("RGB", (16, 16), (10, 10, 250))
    palette = encoded(red.quantize(4), "PNG", transparency=b"\x80")
    animated = encoded(red, "GIF", save_all=True, append_images=[blue])
    transparent = encoded(red.convert("RGBA"), "PNG")
    cmyk = encoded(red.convert("CMYK"), "JPEG", quality=100)
    for data in (palette, animated, transparent, cmyk):
        assert images.inspect(data).problem is None
        np.testing.assert_allclose(images.decode(data, 16, "x"), np.asarray(red), atol=4)


def test_floating_point_and_enormous_images_are_refused() -> None:
    data = encoded(Image.fromarray(np.zeros((8, 8), np.float32)), "TIFF")
    assert "floating-point" in problem(data)
    with pytest.raises(DataError, match=r"x: not a whole image .*floating-point"):
        images.decode(data, 8, "x")
    integers = Image.fromarray(np.full((8, 8), 200, np.int32))
    assert "integers of 32 bits" in problem(encoded(integers, "TIFF"))
    assert "200000000 pixels" in problem(encoded(Image.new("1", (20000, 10000)), "PNG"))


def test_what_is_no_image_is_said_in_one_line() -> None:
    assert problem(b"\x01a note") == "file of no image format that is known"


def smooth(height: int, width: int) -> np.ndarray:
    """Returns an image without detail: a wave across and one down."""
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 40), np.cos(y / 30), np.sin((x + y) / 50)]
    return (127 + 100 * np.stack(waves, axis=-1)).astype(np.uint8)


def test_decode_cuts_a_share_of_the_shorter_side() -> None:
    array = smooth(48, 60)
    # The usual way: the shorter side becomes 16 pixels, of which the centred 14 stay.
    whole = Image.fromarray(array).resize((20, 16), Image.Resampling.BICUBIC)
    expected = np.asarray(whole)[1:15, 3:17].astype(int)
    decoded = images.decode(png(array), 14, "x", crop=0.875)
    assert np.abs(decoded - expected).max() <= 1
    assert (images.decode(png(array[:16, :16]), 16, "x", crop=0.5) != array[:16, :16]).any()


@pytest.mark.parametrize("encode", [png, archives.jpeg])
def test_decode_box_is_a_crop_and_an_antialiased_resize(
    encode: Callable[[np.ndarray], bytes],
) -> None:
    asked = []

    def choose(height: int, width: int) -> images.Box:
        asked.append((height, width))
        return 7, 20, 33, 25

    array = smooth(48, 70)
    found = images.decode_box(encode(array), 14, "x", choose)
    assert asked == [(48, 70)]
    whole = np.asarray(Image.open(io.BytesIO(encode(array))))
    crop = Image.fromarray(whole[7:40, 20:45]).resize((14, 14), Image.Resampling.BILINEAR)
    # At the border the one sees the image's own pixels, the other none.
    difference = np.abs(found.astype(int) - np.asarray(crop))
    assert difference[1:-1, 1:-1].max() <= 1
    assert difference.max() <= 8


@pytest.mark.parametrize("box", [(10, 30, 500, 640), (0, 0, 600, 800), (100, 200, 400, 384)])
def test_decode_box_reduces_a_large_jpeg_while_it_decodes(
    box: images.Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, shapes = archives.jpeg(smooth(600, 800)), []
    original = simplejpeg.decode_jpeg

    def decode_jpeg(*arguments: Any, **settings: Any) -> np.ndarray:
        shapes.append((pixels := original(*arguments, **settings)).shape)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode_jpeg)
    small = images.decode_box(data, 192, "x", lambda height, width: box)
    assert shapes[0][0] <= 600 // 2 and shapes[0][0] * box[2] // 600 >= 192
    monkeypatch.undo()
    whole = Image.open(io.BytesIO(data))
    edges = (box[1], box[0], box[1] + box[3], box[0] + box[2])
    expected = np.asarray(whole.resize((192, 192), Image.Resampling.BILINEAR, box=edges))
    assert np.abs(small.astype(int) - expected).max() <= 4


@pytest.mark.parametrize("kept", [0, 10, 300, -20])
@pytest.mark.parametrize(
    "read",
    [
        images.verify,
        lambda data, name: images.decode(data, 32, name),
        lambda data, name: images.decode_box(data, 32, name, lambda *_: (0, 0, 32, 32)),
    ],
)
def test_a_cut_image_is_refused_by_name(read: Callable[[bytes, str], object], kept: int) -> None:
    whole = archives.jpeg(archives.pixels(3, 32, np.random.default_rng(0)))
    read(whole, "whole.JPEG")
    with pytest.raises(DataError, match=r"^somewhere/n1_2\.JPEG: not a whole image .*again"):
        read(whole[:kept], "somewhere/n1_2.JPEG")


def test_pieces_are_the_items_in_order() -> None:
    assert list(images.pieces("abcde", 2)) == ["ab", "cd", "e"]
    assert list(images.pieces(range(4), 2)) == [range(2), range(2, 4)]
    assert not list(images.pieces([], 3))


def test_threaded_map_keeps_the_order_and_takes_no_more_than_it_needs() -> None:
    taken = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = images.threaded_map(lambda item: item * item, items())
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    assert len(taken) < 50
    assert list(results) == [item * item for item in range(5, 1000)]


def test_threaded_map_passes_on_an_error_and_ends_its_threads() -> None:
    def fails(item: int) -> int:
        if item == 7:
            raise DataError("seven")
        return item

    with pytest.raises(DataError, match="seven"):
        list(images.threaded_map(fails, range(100)))
    assert not [t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")]
