"""Compares augmentation with NumPy, Pillow and the definitions in the papers."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from inception_jax import config
from inception_jax.input import augment, photometric

MEAN = np.array([0.48, 0.45, 0.40], np.float32)
STD = np.array([0.28, 0.27, 0.28], np.float32)
resize_boxes = jax.jit(augment.resize_boxes)
resized_crop = jax.jit(augment.resized_crop, static_argnums=(2, 3))
ALL = {"mixup": 0.3, "cutmix": 1.0, "cutout": 4}


def images_of(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def settings_of(**changes: object) -> config.Augment:
    """Returns settings with everything off except the given ones."""
    return config.Augment(**({"crop": "none", "flip": False} | changes))


@functools.cache
def compiled(**changes: object) -> Callable[..., tuple[jax.Array, jax.Array]]:
    return jax.jit(
        functools.partial(
            augment.augment, settings=settings_of(**changes), mean=MEAN, std=STD, num_classes=10
        )
    )


def run(images: np.ndarray, *, seed: int = 0, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    """Returns the augmented images, and targets of labels that count up from 0 to 9."""
    labels = np.arange(len(images), dtype=np.int32) % 10
    named = {"crop": "none"} | changes
    result, targets = compiled(**named)(jax.random.key(seed), images, labels)
    return np.asarray(result), np.asarray(targets)


def normalized(images: np.ndarray) -> np.ndarray:
    return (images.astype(np.float64) / 255 - MEAN) / STD


def one_hot(count: int) -> np.ndarray:
    return np.eye(10)[np.arange(count) % 10]


def test_without_augmentation_images_are_only_normalized() -> None:
    images = images_of((4, 8, 8, 3))
    result, targets = run(images)
    assert result.dtype == targets.dtype == np.float32
    np.testing.assert_allclose(result, normalized(images), atol=1e-6)
    np.testing.assert_array_equal(targets, one_hot(4))
    np.testing.assert_array_equal(result, jax.jit(augment.normalize)(images, MEAN, STD))


def test_pad_crop_windows_are_uniform() -> None:
    pad, size, batch = 2, 6, 2000
    images = images_of((batch, size, size, 3))
    result = np.asarray(augment.pad_crop(jax.random.key(1), images, pad))
    assert result.dtype == np.uint8
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    matches = np.zeros((2 * pad + 1, 2 * pad + 1, batch), bool)
    for y, x in np.ndindex(matches.shape[:2]):
        window = padded[:, y : y + size, x : x + size]
        matches[y, x] = (window == result).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(matches.sum(axis=(0, 1)), 1)
    counts = matches.sum(axis=2)
    expected = batch / counts.size
    # The 99.9th percentile of chi-squared with 24 degrees of freedom.
    assert ((counts - expected) ** 2 / expected).sum() < 51.2


def test_pad_crop_by_zero_is_identity() -> None:
    images = images_of((3, 5, 5, 3))
    np.testing.assert_array_equal(augment.pad_crop(jax.random.key(0), images, 0), images)


def test_flip_mirrors_half_of_the_images() -> None:
    images = images_of((1000, 4, 6, 3))
    result = np.asarray(augment.flip(jax.random.key(2), images))
    same = (result == images).all(axis=(1, 2, 3))
    mirrored = (result == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 430 < mirrored.sum() < 570


def test_alternating_flips_are_not_repeated_on_the_device() -> None:
    images = images_of((8, 4, 6, 3))
    result, _ = run(images, flip=True, alternating_flip=True)
    np.testing.assert_array_equal(result, run(images, flip=False)[0])
    assert (result != run(images, flip=True)[0]).any()


@pytest.mark.parametrize("box", [(0, 0, 16, 16), (3, 5, 7, 9), (0, 2, 16, 5), (9, 0, 7, 16)])
def test_resize_boxes_equals_pillow(box: tuple[int, int, int, int]) -> None:
    top, left, height, width = box
    image = images_of((16, 16, 3))
    result = np.asarray(resize_boxes(image[None], jnp.asarray([box], jnp.float32)))[0]
    # Pillow ignores pixels outside the box, so outputs within half a pixel of a box edge that is
    # not an image edge are excluded.
    rows = (np.arange(16) + 0.5) * height / 16
    columns = (np.arange(16) + 0.5) * width / 16
    inner_rows = ((rows >= 0.5) | (top == 0)) & ((rows <= height - 0.5) | (top + height == 16))
    inner_columns = ((columns >= 0.5) | (left == 0)) & (
        (columns <= width - 0.5) | (left + width == 16)
    )
    assert inner_rows.sum() >= 12 and inner_columns.sum() >= 12
    inner = np.ix_(inner_rows, inner_columns)
    for channel in range(3):
        plane = PIL.Image.fromarray(image[..., channel].astype(np.float32))
        resized = plane.resize(
            (16, 16), PIL.Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
        np.testing.assert_allclose(
            result[..., channel][inner], np.asarray(resized)[inner], atol=1e-3
        )


def boxes_of_torchvision(
    count: int, size: int, crop_scale_min: float, crop_ratio_max: float
) -> np.ndarray:
    """Returns boxes [count, 4], from the loop of RandomResizedCrop.get_params."""
    rng = np.random.default_rng(3)
    boxes = []
    for _ in range(count):
        box = (0, 0, size, size)
        for _ in range(10):
            area = size * size * rng.uniform(crop_scale_min, 1)
            aspect = np.exp(rng.uniform(-np.log(crop_ratio_max), np.log(crop_ratio_max)))
            width, height = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if 0 < width <= size and 0 < height <= size:
                top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
                box = (top, left, height, width)
                break
        boxes.append(box)
    return np.array(boxes)


@pytest.mark.parametrize(("crop_scale_min", "crop_ratio_max"), [(0.08, 4 / 3), (0.5, 2.0)])
def test_resized_crop_boxes_match_torchvision(crop_scale_min: float, crop_ratio_max: float) -> None:
    size, count = 32, 4000
    # Pixel values of four times their row and column identify the box.
    rows, columns = np.meshgrid(4 * np.arange(size), 4 * np.arange(size), indexing="ij")
    ramp = np.broadcast_to(np.stack([rows, columns], -1).astype(np.uint8), (count, size, size, 2))
    result = np.asarray(resized_crop(jax.random.key(4), ramp, crop_scale_min, crop_ratio_max))
    result = np.stack([result[:, :, 16, 0], result[:, 16, :, 1]], axis=1) / 4
    # Near the center, the ramp is not affected by the image border.
    slope = result[:, :, 17] - result[:, :, 16]
    sides = slope * size
    corners = result[:, :, 16] - 16.5 * slope + 0.5
    boxes = np.concatenate([corners, sides], axis=1)
    np.testing.assert_allclose(boxes, np.round(boxes), atol=5e-3)
    boxes = np.round(boxes)

    assert boxes[:, :2].min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= size
    expected = boxes_of_torchvision(count, size, crop_scale_min, crop_ratio_max)
    for derive in (
        lambda b: b[:, 2] * b[:, 3] / size**2,
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: b[:, 0],
        lambda b: b[:, 1],
    ):
        ours, theirs = np.sort(derive(boxes)), np.sort(derive(expected))
        # Kolmogorov-Smirnov: 1.95 sqrt(2 / n) is exceeded by one pair of samples in a thousand.
        grid = np.union1d(ours, theirs)
        distance = np.abs(
            np.searchsorted(ours, grid, "right") - np.searchsorted(theirs, grid, "right")
        )
        assert distance.max() / count < 1.95 * np.sqrt(2 / count)


def test_resized_crop_uses_whole_image_if_no_box_fits() -> None:
    # Non-square boxes with the full area of the image never fit.
    images = images_of((50, 64, 64, 3))
    result = resized_crop(jax.random.key(0), images, 1.0, 1.0001)
    np.testing.assert_allclose(result, images, atol=1e-3)


def test_mixup_weights_images_and_targets_equally() -> None:
    images = images_of((6, 8, 8, 3))
    result, targets = run(images, mixup=0.5)
    weight = targets[0, 0]
    assert 0 < weight < 1
    np.testing.assert_allclose(
        targets, weight * one_hot(6) + (1 - weight) * np.roll(one_hot(6), 1, axis=0), atol=1e-6
    )
    before = normalized(images)
    np.testing.assert_allclose(
        result, weight * before + (1 - weight) * np.roll(before, 1, axis=0), atol=1e-5
    )


def test_cutmix_targets_match_area_of_pasted_box() -> None:
    height, width = 12, 10
    images = images_of((5, height, width, 3))
    # Neighbors have no common pixel values, so that each pixel identifies its image.
    images = (images // 5) * 5 + np.arange(5, dtype=np.uint8)[:, None, None, None]
    before = normalized(images)
    partner = np.roll(before, 1, axis=0)
    areas = set()
    for seed in range(20):
        result, targets = run(images, seed=seed, cutmix=1.0)
        own = np.isclose(result, before, atol=1e-5).all(axis=3)
        pasted = np.isclose(result, partner, atol=1e-5).all(axis=3)
        assert (own ^ pasted).all()
        assert (pasted == pasted[0]).all()
        rows, columns = pasted[0].any(axis=1), pasted[0].any(axis=0)
        np.testing.assert_array_equal(pasted[0], rows[:, None] & columns[None, :])
        for line in (rows, columns):
            assert np.count_nonzero(np.diff(line.astype(int), prepend=0, append=0)) in (0, 2)
        weight = own[0].mean()
        areas.add(weight)
        np.testing.assert_allclose(
            targets, weight * one_hot(5) + (1 - weight) * np.roll(one_hot(5), 1, axis=0), atol=1e-6
        )
    assert len(areas) > 10


def weights(count: int, **changes: float) -> np.ndarray:
    """Returns the image's weight in `count` batches of two images of 32 x 32."""
    mixing = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0} | changes
    images, targets = jnp.zeros((2, 32, 32, 1)), jnp.eye(2)
    keys = jax.random.split(jax.random.key(5), count)

    def weight(key: jax.Array) -> jax.Array:
        return augment.mix(key, images, targets, **mixing)[1][0, 0]

    return np.asarray(jax.jit(jax.vmap(weight))(keys))


@pytest.mark.parametrize("alpha", [0.2, 4.0])
def test_mixup_weight_is_beta_distributed(alpha: float) -> None:
    drawn = weights(4000, mixup=alpha)
    assert abs(drawn.mean() - 0.5) < 0.03
    np.testing.assert_allclose(drawn.var(), 1 / (4 * (2 * alpha + 1)), rtol=0.1)


def test_cutmix_boxes_match_authors_code() -> None:
    rng = np.random.default_rng(6)
    expected = []
    for weight in rng.beta(1.0, 1.0, 4000):
        side = int(32 * np.sqrt(1 - weight))
        pasted = np.zeros((32, 32), bool)
        top, left = rng.integers(32, size=2) - side // 2
        pasted[max(top, 0) : top + side, max(left, 0) : left + side] = True
        expected.append(1 - pasted.mean())
    drawn = weights(4000, cutmix=1.0)
    np.testing.assert_allclose(drawn.mean(), np.mean(expected), atol=0.02)
    np.testing.assert_allclose(drawn.std(), np.std(expected), atol=0.02)


def test_mix_probability_leaves_other_batches_unmixed() -> None:
    drawn = weights(2000, mixup=1.0, probability=0.3)
    assert 0.25 < (drawn != 1).mean() < 0.35
    images = images_of((4, 8, 8, 3))
    result, targets = run(images, mixup=1.0, cutmix=1.0, mix_probability=0.0)
    np.testing.assert_allclose(result, normalized(images), atol=1e-6)
    np.testing.assert_array_equal(targets, one_hot(4))


def test_with_both_alphas_each_batch_uses_one_method() -> None:
    images = np.stack([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)])
    low, high = normalized(np.array([[[[0, 0, 0]]], [[[255] * 3]]]))
    blended = 0
    for seed in range(40):
        result, targets = run(images, seed=seed, mixup=1.0, cutmix=1.0)
        weights = (result - low) / (high - low)
        blended += not np.isin(weights.round(5), [0, 1]).all()
        np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)
        np.testing.assert_allclose(weights[1].mean(), targets[1, 1], atol=1e-5)
    assert 10 <= blended <= 30


def test_cutout_blanks_one_clipped_square_per_image() -> None:
    size, side, batch = 9, 4, 1500
    result = np.asarray(augment.cutout(jax.random.key(7), jnp.ones((batch, size, size, 3)), side))
    blank = result[..., 0] == 0
    np.testing.assert_array_equal(result, np.where(blank[..., None], 0.0, 1.0) * np.ones(3))
    counts: dict[tuple[int, ...], int] = {}
    for image in blank:
        rows, columns = image.any(axis=1).nonzero()[0], image.any(axis=0).nonzero()[0]
        square = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
        assert image[square[0] : square[1], square[2] : square[3]].all()
        counts[square] = counts.get(square, 0) + 1
    centers = {
        (max(y - 2, 0), min(y + 2, size), max(x - 2, 0), min(x + 2, size))
        for y in range(size)
        for x in range(size)
    }
    assert set(counts) == centers
    expected = batch / len(centers)
    # The 99.9th percentile of chi-squared with 80 degrees of freedom.
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 124.8


def test_images_of_a_batch_are_augmented_independently() -> None:
    images = np.broadcast_to(images_of((1, 16, 16, 3)), (64, 16, 16, 3))
    for changes in (
        {"crop": "pad"},
        {"crop": "resized"},
        {"flip": True},
        {"cutout": 4},
        {"policy": "trivialaugment"},
        {"color_jitter": 0.4},
        {"hue_jitter": 0.2},
    ):
        result, _ = run(images, **changes)
        assert len(np.unique(result.reshape(64, -1), axis=0)) > (1 if "flip" in changes else 30)


def test_result_depends_on_key() -> None:
    images = images_of((8, 16, 16, 3))
    changes = {"crop": "resized", "flip": True, "mixup": 1.0}
    first, again, other = (run(images, seed=seed, **changes) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], other[0])


def test_enabling_an_operation_does_not_change_other_draws() -> None:
    images = images_of((32, 16, 16, 3))
    cropped, _ = run(images, crop="pad")
    both, _ = run(images, crop="pad", flip=True)
    blanked, _ = run(images, crop="pad", flip=True, cutout=6)
    same = np.isclose(both, cropped).all(axis=(1, 2, 3))
    mirrored = np.isclose(both, cropped[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same | mirrored).all()
    assert mirrored.any()
    np.testing.assert_allclose(blanked, np.where(blanked == 0, 0.0, both), atol=1e-6)
    _, mixed = run(images, mixup=1.0)
    _, mixed_and_more = run(images, mixup=1.0, crop="pad", flip=True, cutout=6)
    np.testing.assert_array_equal(mixed, mixed_and_more)


@pytest.mark.parametrize("policy", ["randaugment", "trivialaugment"])
def test_policy_takes_and_returns_integer_levels(policy: str) -> None:
    images = images_of((32, 16, 16, 3))
    for crop in ("none", "pad", "resized"):
        cropped, _ = run(images, crop=crop)
        result, _ = run(images, crop=crop, policy=policy, policy_ops=1)
        levels = (result * STD + MEAN) * 255
        np.testing.assert_allclose(levels, levels.round(), atol=1e-3)
        assert levels.min() > -0.01 and levels.max() < 255.01
        # One image in 14 gets the identity, and others an operation without effect.
        kept = (np.abs(result - cropped) < 0.51 / 255 / STD).all(axis=(1, 2, 3))
        assert 0 < kept.sum() < 16


def test_the_policy_and_its_settings_change_the_batch() -> None:
    images = images_of((32, 16, 16, 3))
    results = [
        run(images, **changes)[0]
        for changes in (
            {},
            {"policy": "trivialaugment"},
            {"policy": "randaugment"},
            {"policy": "randaugment", "policy_ops": 1},
            {"policy": "randaugment", "policy_magnitude": 20},
        )
    ]
    assert len(np.unique(np.stack(results).reshape(len(results), -1), axis=0)) == len(results)


def test_color_jitter_is_between_policy_and_normalization() -> None:
    images = images_of((32, 16, 16, 3))
    policy, _ = run(images, policy="trivialaugment")
    both, _ = run(images, policy="trivialaugment", color_jitter=0.3, hue_jitter=0.1)
    before = (policy * STD + MEAN) * 255
    key = jax.random.fold_in(jax.random.key(0), 6)
    color_jitter = jax.jit(photometric.color_jitter, static_argnums=(2, 3))
    jittered = color_jitter(key, before, 0.3, 0.1)
    np.testing.assert_allclose(both, normalized(np.asarray(jittered)), atol=1e-4)


def test_traced_probability_equals_configured_one() -> None:
    images, labels = images_of((4, 8, 8, 3)), np.arange(4, dtype=np.int32)
    traced = []

    @jax.jit
    def function(*arguments: Any, mix_probability: jax.Array) -> tuple[jax.Array, jax.Array]:
        traced.append(mix_probability)
        return augment.augment(
            *arguments,
            settings=settings_of(mixup=1.0),
            mean=MEAN,
            std=STD,
            num_classes=10,
            mix_probability=mix_probability,
        )

    for seed in range(3):
        key = jax.random.key(seed)
        for probability in (0.0, 0.5, 1.0):
            expected, targets = run(images, seed=seed, mixup=1.0, mix_probability=probability)
            actual = function(key, images, labels, mix_probability=probability)
            np.testing.assert_allclose(actual[0], expected, atol=1e-5)
            np.testing.assert_array_equal(actual[1], targets)
    assert len(traced) == 1


EACH_IMAGE = {"crop": "pad", "policy": "randaugment", "color_jitter": 0.4, "hue_jitter": 0.1}


@pytest.mark.parametrize(
    "changes", [{"crop": "pad"} | ALL, {"crop": "resized"}, EACH_IMAGE], ids=str
)
def test_result_is_independent_of_device_count(changes: dict[str, object]) -> None:
    images, labels = images_of((16, 8, 8, 3)), np.arange(16, dtype=np.int32)
    settings = settings_of(flip=True, **changes)
    function = functools.partial(
        augment.augment, settings=settings, mean=MEAN, std=STD, num_classes=16
    )
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    sharded = jax.jit(function, in_shardings=(None, split, split), out_shardings=(split, split))
    for seed in range(3):
        key = jax.random.key(seed)
        for one, many in zip(
            jax.jit(function)(key, images, labels), sharded(key, images, labels), strict=True
        ):
            assert len(many.sharding.device_set) == 8
            np.testing.assert_allclose(one, many, atol=1e-5)
    if changes is EACH_IMAGE:
        # Per-image operations need no communication between devices.
        text = str(sharded.lower(key, images, labels).compile().as_text())
        assert not [name for name in ("all-gather", "all-to-all", "permute(") if name in text]


def test_resize_is_antialiased_triangle_filter() -> None:
    images = images_of((2, 12, 12, 3))
    actual = np.asarray(augment.resize(jnp.asarray(images), 8))
    # A triangle of half-width 12 / 8 around each new pixel's center, normalized within the image.
    centers = (np.arange(8) + 0.5) * 12 / 8 - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(12) - centers[:, None]) / 1.5)
    weights /= weights.sum(1, keepdims=True)
    expected = np.einsum("ih,jw,bhwc->bijc", weights, weights, images.astype(np.float64))
    np.testing.assert_allclose(actual, expected, atol=1e-3)
    assert augment.resize(images, 12) is images


def test_lanczos_resize_matches_pillow() -> None:
    images = images_of((2, 12, 12, 3))
    actual = np.asarray(augment.resize(jnp.asarray(images), 8, "lanczos3"))
    for n, channel in itertools.product(range(2), range(3)):
        plane = PIL.Image.fromarray(images[n, :, :, channel].astype(np.float32))
        expected = np.asarray(plane.resize((8, 8), PIL.Image.Resampling.LANCZOS))
        np.testing.assert_allclose(actual[n, :, :, channel], expected, atol=1e-3)


@pytest.mark.parametrize("kernel", ["linear", "lanczos3"])
def test_training_images_are_resized_with_the_kernel(kernel: str) -> None:
    images = images_of((2, 12, 12, 3))
    actual, _ = augment.augment(
        jax.random.key(0),
        images,
        np.arange(2, dtype=np.int32),
        settings=settings_of(),
        mean=MEAN,
        std=STD,
        num_classes=10,
        size=8,
        resize_kernel=kernel,
    )
    resized = augment.resize(jnp.asarray(images), 8, kernel)
    np.testing.assert_allclose(actual, augment.normalize(resized, MEAN, STD), atol=1e-6)


def test_batch_is_resized_before_mixing() -> None:
    function = functools.partial(
        augment.augment,
        settings=settings_of(cutmix=1.0),
        mean=MEAN,
        std=STD,
        num_classes=10,
        size=6,
    )
    images, targets = jax.jit(function)(
        jax.random.key(0), images_of((4, 8, 8, 3)), np.arange(4, dtype=np.int32)
    )
    assert (images.shape, images.dtype) == ((4, 6, 6, 3), jnp.float32)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
