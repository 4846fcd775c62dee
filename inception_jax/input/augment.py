"""Augments training images inside the jitted training step.

All functions are pure functions of a key and a whole batch. They run on the devices because
transferring a uint8 batch needs a quarter of the bandwidth of a float32 one, and because the result
then depends only on the key, not on the number of processes or workers. A batch that is sharded
over devices gives the same result as on one device.

Each operation has its own key, folded in by number (`_Stream`), so that enabling or adding one does
not change the random draws of the others.
"""

import enum
import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from inception_jax import config, registry
from inception_jax.errors import ConfigError
from inception_jax.input import photometric

# Number of tries of torchvision's RandomResizedCrop to find a box that fits.
_MAX_TRIES = 10


@enum.unique
class _Stream(enum.IntEnum):
    """Numbers of the operations' keys. Do not change them: that would change every run."""

    CROP = 1
    FLIP = 2
    MIX = 3
    CUTOUT = 4
    POLICY = 5
    PHOTOMETRIC = 6
    EXTRA = 7


def augment(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    settings: config.Augment,
    mean: ArrayLike,
    std: ArrayLike,
    num_classes: int,
    size: int | None = None,
    resize_kernel: str = "linear",
    mix_probability: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Augments a batch according to `settings`.

    In this order: crop ('inception' crops are made on the host: `crops`), flip, policy, color
    jitter, `settings.extra`, resizing, normalization, mixing, Cutout. A policy takes and returns
    integer levels: images are uint8 before it (a resized crop, which is float32, is rounded) and
    float32 from color jitter on. With everything disabled and images of `size`, the result is
    `normalize(images)` and one-hot labels.

    Args:
      key: typed PRNG key of the step.
      images: uint8 [B, H, W, C].
      labels: int32 [B].
      settings: config.augment.
      mean, std: float32 [C], of the training split's pixel values / 255.
      num_classes: K.
      size: height and width of the result, pixels; None: those of `images`.
      resize_kernel: as in `resize`.
      mix_probability: fraction of batches to mix, may be traced; None: `settings.mix_probability`.

    Returns:
      (images, targets): float32 [B, size, size, C], normalized, and float32 [B, K] with rows that
      sum to 1.
    """
    keys = {stream: jax.random.fold_in(key, stream.value) for stream in _Stream}
    if settings.crop == "pad":
        images = pad_crop(keys[_Stream.CROP], images, settings.pad)
    elif settings.crop == "resized":
        images = resized_crop(
            keys[_Stream.CROP], images, settings.crop_scale_min, settings.crop_ratio_max
        )
    # Alternating flips depend on the example and the epoch, and are made on the host (`pipeline`).
    if settings.flip and not settings.alternating_flip:
        images = flip(keys[_Stream.FLIP], images)
    if settings.policy != "none":
        images = _policy(keys[_Stream.POLICY], images, settings)
    if settings.color_jitter or settings.hue_jitter:
        images = photometric.color_jitter(
            keys[_Stream.PHOTOMETRIC], images, settings.color_jitter, settings.hue_jitter
        )
    for name in settings.extra:
        # Folded in by name, so that draws do not depend on which others are enabled.
        extra_key = jax.random.fold_in(keys[_Stream.EXTRA], zlib.crc32(name.encode()))
        images = 255 * apply(name, extra_key, images.astype(jnp.float32) / 255, settings)
    if size is not None:
        images = resize(images, size, resize_kernel)
    images = normalize(images, mean, std)
    targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    if settings.mixup or settings.cutmix:
        images, targets = mix(
            keys[_Stream.MIX],
            images,
            targets,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            probability=settings.mix_probability if mix_probability is None else mix_probability,
        )
    if settings.cutout:
        images = cutout(keys[_Stream.CUTOUT], images, settings.cutout)
    return images, targets


def resize(images: jax.Array, size: int, kernel: str = "linear") -> jax.Array:
    """Resizes images with antialiasing.

    Args:
      images: uint8, or float32 between 0 and 255, [B, H, W, C].
      size: new height and width, pixels.
      kernel: "linear" (a triangle as wide as two new pixels) or "lanczos3", which is sharper and
        overshoots at edges.

    Returns:
      `images` if they already have that size, else float32 [B, size, size, C], with "linear"
      between 0 and 255.
    """
    batch, *shape, channels = images.shape
    if shape == [size, size]:
        return images
    new_shape = (batch, size, size, channels)
    return jax.image.resize(images.astype(jnp.float32), new_shape, kernel, antialias=True)


def _policy(key: jax.Array, images: jax.Array, settings: config.Augment) -> jax.Array:
    """Applies the policy to uint8 or float32 images in [0, 255]; returns uint8 [B, H, W, C]."""
    levels = jnp.round(images.astype(jnp.float32))
    varied = apply(settings.policy, key, levels / 255, settings)
    return jnp.clip(jnp.round(255 * varied), 0, 255).astype(jnp.uint8)


def apply(name: str, key: jax.Array, images: jax.Array, settings: config.Augment) -> jax.Array:
    """Applies a registered augmentation to images, float32 [B, H, W, 3] in [0, 1].

    Raises:
      ConfigError: if it returns another shape or dtype.
    """
    part = registry.AUGMENTATIONS.get(name)
    given = {setting: getattr(settings, setting) for setting in part.settings or ()}
    with registry.as_config_error(part, f"the augmentation {name!r}"):
        result = part.build(
            key, images, **given, **registry.options_with_defaults(part, settings.options)
        )
    if getattr(result, "shape", None) != images.shape or result.dtype != jnp.float32:
        raise ConfigError(
            f"{part.location}: the augmentation {name!r} returned "
            f"{registry.describe_value(result)}; must return images "
            f"of the same shape and dtype as its input, float32 {list(images.shape)}"
        )
    return result


def check(settings: config.Augment, image_size: int) -> None:
    """Checks the configured augmentations abstractly, without computing anything.

    Raises:
      ConfigError: if one returns a shape or dtype other than its input's.
    """
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    for name in (settings.policy, *settings.extra):
        if name != "none":
            jax.eval_shape(
                lambda images, name=name: apply(name, jax.random.key(0), images, settings), images
            )


def normalize(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Returns (images / 255 - mean) / std.

    Args:
      images: uint8, or float32 between 0 and 255, [B, H, W, C].
      mean, std: float32 [C], of pixel values / 255.

    Returns:
      float32 [B, H, W, C].
    """
    mean = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
    std = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255 - mean) / std


def pad_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Shifts each image by up to `pad` pixels in each direction, filling with black (0).

    Equivalent to padding by `pad` zeros on each side and cropping an H x W window at an offset
    sampled uniformly from the (2 * pad + 1)^2 possible ones (He et al. 2016, "Deep Residual
    Learning", section 4.2; torchvision's RandomCrop with padding).

    Args:
      key: typed PRNG key.
      images: uint8 [B, H, W, C].
      pad: maximum shift, pixels.

    Returns:
      uint8 [B, H, W, C].
    """
    batch, *window = images.shape
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    offsets = jax.random.randint(key, (batch, 2), 0, 2 * pad + 1)

    def cut(image: jax.Array, offset: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], jnp.int32(0)), window)

    return jax.vmap(cut)(padded, offsets)


def resized_crop(
    key: jax.Array, images: jax.Array, crop_scale_min: float, crop_ratio_max: float
) -> jax.Array:
    """Crops a random box from each image and resizes it to the image's size.

    Samples boxes like torchvision's RandomResizedCrop (Szegedy et al. 2015, section 6): area
    uniform in [crop_scale_min, 1] of the image's, width / height log-uniform in [1 /
    crop_ratio_max, crop_ratio_max], both sides rounded to pixels, position uniform. torchvision
    tries up to ten boxes until one fits; here all ten are sampled at once and the first that fits
    is used. If none fits, the box is the whole image, as in torchvision for a square image.

    Args:
      key: typed PRNG key.
      images: uint8 [B, H, W, C].
      crop_scale_min: fraction of the image's area.
      crop_ratio_max: at least 1.

    Returns:
      float32 [B, H, W, C], between 0 and 255.
    """
    batch, height, width, _ = images.shape
    boxes = _random_boxes(key, batch, (height, width), crop_scale_min, crop_ratio_max)
    return resize_boxes(images, boxes)


def _random_boxes(
    key: jax.Array, batch: int, size: tuple[int, int], crop_scale_min: float, crop_ratio_max: float
) -> jax.Array:
    """Returns float32 [B, 4]: top, left, height and width of each box, in integer pixels."""
    image_height, image_width = size
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    tries = (batch, _MAX_TRIES)
    area = jax.random.uniform(area_key, tries, minval=crop_scale_min) * (image_height * image_width)
    log_max = math.log(crop_ratio_max)
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=-log_max, maxval=log_max))
    heights = jnp.round(jnp.sqrt(area / aspect))
    widths = jnp.round(jnp.sqrt(area * aspect))
    fits = (heights >= 1) & (heights <= image_height) & (widths >= 1) & (widths <= image_width)
    # argmax of booleans is the index of the first True.
    first = jnp.argmax(fits, axis=1, keepdims=True)
    any_fits = jnp.any(fits, axis=1)
    height = jnp.where(any_fits, jnp.take_along_axis(heights, first, 1)[:, 0], image_height)
    width = jnp.where(any_fits, jnp.take_along_axis(widths, first, 1)[:, 0], image_width)
    place = jax.random.uniform(place_key, (batch, 2))
    top = jnp.floor(place[:, 0] * (image_height - height + 1))
    left = jnp.floor(place[:, 1] * (image_width - width + 1))
    return jnp.stack([top, left, height, width], axis=1)


def resize_boxes(images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Resizes one box of each image to the image's size with bilinear interpolation.

    Within half a pixel of the box's edges this uses the image's neighboring pixels, where a crop
    followed by a resize would repeat the last ones.

    Args:
      images: uint8 [B, H, W, C].
      boxes: float32 [B, 4], top, left, height and width in pixels.

    Returns:
      float32 [B, H, W, C], between 0 and 255.
    """
    size = jnp.asarray(images.shape[1:3], jnp.float32)

    def resize(image: jax.Array, box: jax.Array) -> jax.Array:
        scale = size / box[2:]
        # A box is never larger than the result, so antialiasing is unnecessary.
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -box[:2] * scale, "linear", antialias=False
        )

    return jax.vmap(resize)(images.astype(jnp.float32), boxes)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Flips each of B images, [B, H, W, C] of any dtype, horizontally with probability 0.5."""
    mirrored = jax.random.bernoulli(key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(mirrored, images[:, :, ::-1], images)


def mix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup: float,
    cutmix: float,
    probability: ArrayLike,
) -> tuple[jax.Array, jax.Array]:
    """Blends each image and its target with the previous ones in the batch (mixup or CutMix).

    mixup (Zhang et al. 2018) blends whole images: lambda * image + (1 - lambda) * partner. CutMix
    (Yun et al. 2019) pastes one box of the partner, with sides sqrt(1 - lambda) times the image's
    and a uniform center, clipped at the border; lambda is then corrected to the fraction of
    remaining pixels. As in the authors' code, lambda ~ Beta(alpha, alpha), the box and whether to
    mix at all are sampled once per batch. With both alphas above 0, each batch uses one of the two
    with probability 0.5. The authors permute the batch to choose partners; here the batch is
    already in random order, and a roll by one moves a single image between neighboring devices.

    Args:
      key: typed PRNG key.
      images: float32 [B, H, W, C].
      targets: float32 [B, K].
      mixup, cutmix: alphas; 0: off; at least one is greater than 0.
      probability: fraction of batches to mix.

    Returns:
      (images, targets) with the same shapes.
    """
    _, height, width, _ = images.shape
    whether_key, which_key, weight_key, box_key = jax.random.split(key, 4)
    cutmix_probability = 0.5 if mixup and cutmix else float(cutmix > 0)
    use_cutmix = jax.random.bernoulli(which_key, cutmix_probability)
    alpha = jnp.where(use_cutmix, cutmix, mixup)
    weight = jax.random.beta(weight_key, alpha, alpha)
    # A weight of 1 means no mixing, in both methods.
    weight = jnp.where(jax.random.bernoulli(whether_key, probability), weight, 1.0)

    pasted = _random_box_mask(box_key, (height, width), jnp.sqrt(1 - weight))
    label_weight = jnp.where(use_cutmix, 1 - jnp.mean(pasted), weight)
    pixel_weight = jnp.where(use_cutmix, jnp.where(pasted, 0.0, 1.0), weight)
    images = pixel_weight * images + (1 - pixel_weight) * jnp.roll(images, 1, axis=0)
    targets = label_weight * targets + (1 - label_weight) * jnp.roll(targets, 1, axis=0)
    return images, targets


def _random_box_mask(key: jax.Array, size: tuple[int, int], side: jax.Array) -> jax.Array:
    """Returns bool [1, H, W, 1], True in a box of `side` times the image's height and width."""
    extent = np.array([size])
    centers = jax.random.randint(key, (1, 2), 0, extent)
    sides = (jnp.asarray(extent, jnp.float32) * side).astype(jnp.int32)
    return _box_masks(centers, sides, size)


def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Sets a square of each image to 0, which is the mean of normalized images.

    The center is uniform over the pixels, and the square is clipped at the border (DeVries & Taylor
    2017, section 3.1).

    Args:
      key: typed PRNG key.
      images: float32 [B, H, W, C], normalized.
      side: of the square, pixels.

    Returns:
      float32 [B, H, W, C].
    """
    batch, height, width, _ = images.shape
    centers = jax.random.randint(key, (batch, 2), 0, np.array([[height, width]]))
    blank = _box_masks(centers, jnp.full((batch, 2), side, jnp.int32), (height, width))
    return jnp.where(blank, 0.0, images)


def _box_masks(centers: jax.Array, sides: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns masks of boxes.

    Args:
      centers: int32 [N, 2], row and column; a box starts side // 2 before its center.
      sides: int32 [N, 2], height and width in pixels.
      size: H and W of the image, which clips the boxes.

    Returns:
      bool [N, H, W, 1], True inside.
    """
    starts = centers - sides // 2
    stops = starts + sides
    inside = []
    for axis, length in enumerate(size):
        at = jnp.arange(length).reshape(1, -1)
        inside.append((at >= starts[:, axis, None]) & (at < stops[:, axis, None]))
    rows, columns = inside
    return rows[:, :, None, None] & columns[:, None, :, None]
