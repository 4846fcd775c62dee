"""Compares each operation with Pillow's."""

from collections.abc import Callable

import jax
import numpy as np
import PIL.Image
import pytest
from PIL import ImageEnhance, ImageOps

from inception_jax.input import image_ops
from inception_jax.input.image_ops import Op

apply = jax.jit(image_ops.apply)
HEIGHT, WIDTH = 20, 24


def images() -> np.ndarray:
    """Returns uint8 images: noise, few levels, smooth with low contrast, single color."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    coarse = PIL.Image.fromarray(rng.integers(40, 190, (3, 4, 3), np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC))
    return np.stack([noise, noise // 64 * 64, smooth, np.full_like(noise, (7, 130, 255))])


def affine(matrix: tuple[float, ...]) -> Callable[[PIL.Image.Image], PIL.Image.Image]:
    return lambda image: image.transform(
        image.size, PIL.Image.Transform.AFFINE, matrix, PIL.Image.Resampling.NEAREST
    )


def applied(operation: Op, value: float) -> np.ndarray:
    """Returns each image after an operation, in a batch with other operations."""
    operations = np.full(4, operation, np.int32)
    return np.asarray(apply(images(), operations, np.full(4, value, np.float32)))


def by_pillow(function: Callable[[PIL.Image.Image], PIL.Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(function(PIL.Image.fromarray(image))) for image in images()])


def test_identity() -> None:
    np.testing.assert_array_equal(applied(Op.IDENTITY, 0.5), images())


@pytest.mark.parametrize(
    ("operation", "enhance"),
    [
        (Op.BRIGHTNESS, ImageEnhance.Brightness),
        (Op.COLOR, ImageEnhance.Color),
        (Op.CONTRAST, ImageEnhance.Contrast),
        (Op.SHARPNESS, ImageEnhance.Sharpness),
    ],
)
@pytest.mark.parametrize("value", [-0.99, -0.27, 0.0, 0.297, 0.9])
def test_enhancements_equal_pillow(operation: Op, enhance: Callable, value: float) -> None:
    actual = applied(operation, value).astype(int)
    expected = by_pillow(lambda image: enhance(image).enhance(1 + value)).astype(int)
    # If rounding puts a product just below an integer, it is truncated to the level below.
    assert np.abs(actual - expected).max() <= 1
    assert (actual != expected).mean() < 0.05


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_equals_pillow(bits: int) -> None:
    expected = by_pillow(lambda image: ImageOps.posterize(image, bits))
    np.testing.assert_array_equal(applied(Op.POSTERIZE, bits), expected)


@pytest.mark.parametrize("threshold", [0.0, 76.5, 128.0, 255.0])
def test_solarize_equals_pillow(threshold: float) -> None:
    expected = by_pillow(lambda image: ImageOps.solarize(image, threshold))
    np.testing.assert_array_equal(applied(Op.SOLARIZE, threshold), expected)


def test_autocontrast_equals_pillow() -> None:
    actual = applied(Op.AUTOCONTRAST, 0).astype(int)
    expected = by_pillow(ImageOps.autocontrast).astype(int)
    assert np.abs(actual - expected).max() <= 1
    assert (actual != expected).mean() < 0.05
    assert actual[2].min() == 0 and actual[2].max() == 255


def test_equalize_equals_pillow() -> None:
    actual = applied(Op.EQUALIZE, 0)
    np.testing.assert_array_equal(actual, by_pillow(ImageOps.equalize))
    assert (actual[2] != images()[2]).any()


@pytest.mark.parametrize(
    ("operation", "value", "matrix"),
    [
        (Op.SHEAR_X, 0.3, (1, 0.3, 0, 0, 1, 0)),
        (Op.SHEAR_X, -0.99, (1, -0.99, 0, 0, 1, 0)),
        (Op.SHEAR_Y, 0.17, (1, 0, 0, 0.17, 1, 0)),
        (Op.SHEAR_Y, -0.4, (1, 0, 0, -0.4, 1, 0)),
        (Op.TRANSLATE_X, 5, (1, 0, -5, 0, 1, 0)),
        (Op.TRANSLATE_X, -WIDTH, (1, 0, WIDTH, 0, 1, 0)),
        (Op.TRANSLATE_Y, -7, (1, 0, 0, 0, 1, 7)),
    ],
)
def test_shears_and_translations_equal_pillow(
    operation: Op, value: float, matrix: tuple[float, ...]
) -> None:
    actual, expected = applied(operation, value), by_pillow(affine(matrix))
    # A coordinate between two pixels may be rounded either way.
    assert (actual != expected).mean() < 0.02


@pytest.mark.parametrize("degrees", [0.0, 9.3, -30.0, 90.0, 101.0, -135.0])
def test_rotation_equals_pillow(degrees: float) -> None:
    actual, expected = applied(Op.ROTATE, degrees), by_pillow(lambda image: image.rotate(degrees))
    # At multiples of 45 degrees many coordinates are between two pixels and may round either way.
    assert (actual != expected).mean() < (0.04 if degrees % 45 == 0 else 0.02)


def test_each_image_gets_its_own_operation() -> None:
    values = {Op.POSTERIZE: 3, Op.SOLARIZE: 99, Op.SHEAR_X: 0.2, Op.ROTATE: 20, Op.COLOR: -0.5}
    values |= {Op.TRANSLATE_X: 3, Op.TRANSLATE_Y: -3, Op.SHEAR_Y: 0.1, Op.BRIGHTNESS: 0.4}
    values |= {Op.CONTRAST: 0.4, Op.SHARPNESS: 0.4}
    image = images()[2]
    batch = np.broadcast_to(image, (len(Op), *image.shape))
    value = np.array([values.get(op, 0) for op in Op], np.float32)
    together = np.asarray(apply(batch, np.arange(len(Op), dtype=np.int32), value))
    for op in Op:
        np.testing.assert_array_equal(together[op], applied(op, values.get(op, 0))[2])
    # All results differ, so none is missing or swapped.
    assert len(np.unique(together.reshape(len(Op), -1), axis=0)) == len(Op)
