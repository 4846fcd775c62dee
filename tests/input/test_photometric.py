"""Compares color jitter with Pillow, colorsys and its defining distributions."""

import colorsys

import jax
import numpy as np
import PIL.Image
import pytest
from PIL import ImageEnhance

from inception_jax.input import photometric

ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
adjust = jax.jit(photometric.adjust)
color_jitter = jax.jit(photometric.color_jitter, static_argnums=(2, 3))


def images_of(shape: tuple[int, ...], low: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, shape, np.uint8)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.4])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_adjust_equals_pillow_in_any_order(order: tuple[int, ...], factor: float) -> None:
    images = images_of((2, 12, 10, 3))
    orders, factors = np.array([order, order[::-1]]), np.full((2, 3), factor, np.float32)
    result = np.asarray(adjust(images.astype(np.float32), orders, factors))
    for image, actual, places in zip(images, result, orders, strict=True):
        expected = PIL.Image.fromarray(image)
        for place in places:
            expected = ENHANCE[place](expected).enhance(factor)
        # Pillow truncates after each of the three, and the next multiplies the error.
        assert np.abs(actual - np.asarray(expected)).max() < 4
    assert factor == 1 or np.abs(result - images).mean() > 10


def test_hue_shift_matches_colorsys() -> None:
    images = images_of((4, 6, 6, 3))
    images[0, 0] = 77
    shifts = np.array([-0.5, -0.1, 0.2, 0.45], np.float32)
    result = photometric.shift_hue(images.astype(np.float32), shifts)
    for image, actual, shift in zip(images, np.asarray(result), shifts, strict=True):
        for pixel, changed in zip(image.reshape(-1, 3), actual.reshape(-1, 3), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255.0))
            expected = colorsys.hsv_to_rgb((hue + shift) % 1.0, saturation, value)
            np.testing.assert_allclose(changed, np.array(expected) * 255, atol=2e-3)


def test_factors_and_orders_are_uniform() -> None:
    # A saturated red and its complement, too dark to be clipped at strength 0.2, so that each
    # property's factor can be computed from the result.
    pixels = np.array([[120, 100, 110], [90, 110, 100]], np.float32)
    images = np.broadcast_to(pixels.reshape(1, 1, 2, 3), (6000, 1, 2, 3))
    result = np.asarray(color_jitter(jax.random.key(0), images, 0.2, 0.0), np.float64)
    luma = np.array([0.299, 0.587, 0.114])
    gray = result @ luma
    before = pixels.astype(np.float64) @ luma
    brightness = gray.mean(axis=(1, 2)) / before.mean()
    contrast = (gray[:, 0, 0] - gray[:, 0, 1]) / (before[0] - before[1]) / brightness
    chroma = (result - gray[..., None])[:, 0, 0, 0] / (pixels[0, 0] - before[0])
    saturation = chroma / brightness / contrast
    for factors in (brightness, contrast, saturation):
        # Kolmogorov-Smirnov: exceeded by one sample in a thousand.
        actual = np.sort((factors - 0.8) / 0.4)
        assert np.abs(actual - (np.arange(6000) + 0.5) / 6000).max() < 1.95 / np.sqrt(6000)
    for one, other in ((brightness, contrast), (contrast, saturation), (brightness, saturation)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.045


def test_order_is_sampled_per_image(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = []

    def record(images: jax.Array, order: jax.Array, factors: jax.Array) -> jax.Array:
        orders.append(np.asarray(order))
        return images

    monkeypatch.setattr(photometric, "adjust", record)
    photometric.color_jitter(jax.random.key(0), images_of((6000, 1, 1, 3)), 0.5, 0.0)
    _, counts = np.unique(orders[0], axis=0, return_counts=True)
    assert len(counts) == 6
    # The 99.9th percentile of chi-squared with 5 degrees of freedom.
    assert ((counts - 1000) ** 2 / 1000).sum() < 20.5


def test_hue_shift_is_uniform() -> None:
    red = np.broadcast_to(np.array([255, 0, 0], np.uint8), (3000, 1, 1, 3))
    result = np.asarray(color_jitter(jax.random.key(3), red, 0.0, 0.1))[:, 0, 0] / 255
    hue = (np.array([colorsys.rgb_to_hsv(*pixel)[0] for pixel in result]) + 0.5) % 1 - 0.5
    actual = np.sort((hue + 0.1) / 0.2)
    assert np.abs(actual - (np.arange(3000) + 0.5) / 3000).max() < 1.95 / np.sqrt(3000)
