import io
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from inception_jax.datasets import images
from inception_jax.errors import DataError
from tests import archives


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()


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


@pytest.mark.parametrize("kept", [0, 10, 300, -20])
@pytest.mark.parametrize("read", [images.verify, lambda data, name: images.decode(data, 32, name)])
def test_a_cut_image_is_refused_by_name(read: Callable[[bytes, str], object], kept: int) -> None:
    whole = archives.jpeg(archives.pixels(3, 32, np.random.default_rng(0)))
    read(whole, "whole.JPEG")
    with pytest.raises(DataError, match=r"^somewhere/n1_2\.JPEG: not a whole image .*again"):
        read(whole[:kept], "somewhere/n1_2.JPEG")


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
