"""Random variation of training images, inside the jitted training step.

Everything here is a pure function of a key and a whole batch. It runs on the devices because a
uint8 batch is a quarter of the size of a float32 one on its way there, and because what a batch
becomes then depends on the key alone, not on how many processes or workers feed it. With a batch
that is sharded over devices the result is the same as on one.

Each operation draws from its own key, folded in by number (`_Stream`), so that switching one on or
adding another leaves what the rest draw unchanged.
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

# torchvision's RandomResizedCrop gives up after this many boxes that do not fit.
_RESIZED_TRIES = 10


@enum.unique
class _Stream(enum.IntEnum):
    """Numbers of the operations' keys. They stay as they are: a changed one changes every run."""

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
    mix_probability: ArrayLike | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Varies a batch as `settings` say.

    In this order: crop ('inception' crops were cut on the host already: `crops`), flip, policy,
    colour jitter, those of `settings.extra`, resizing, normalisation, mixing, Cutout. A policy has
    whole grey levels before and after: images are uint8 up to it, rounded after a resized crop,
    which is float32, and float32 from the colour jitter on. With everything switched off, and
    images of `size` already, the result is `normalise(images)` and the labels' one-hot rows.

    Args:
      key: typed PRNG key of the step.
      images: uint8 [B, H, W, C].
      labels: int32 [B].
      settings: what to do and how much.
      mean, std: float32 [C], of the training split's pixels in units of pixel / 255.
      num_classes: K.
      size: height and width of the result, pixels; None: those of `images`.
      mix_probability: share of batches that are mixed at all, perhaps traced; None: that of the
        settings.

    Returns:
      (images, targets): float32 [B, size, size, C], normalised, and float32 [B, K], rows summing
      to 1.
    """
    keys = {stream: jax.random.fold_in(key, stream.value) for stream in _Stream}
    if settings.crop == "pad":
        images = pad_crop(keys[_Stream.CROP], images, settings.pad)
    elif settings.crop == "resized":
        images = resized_crop(
            keys[_Stream.CROP], images, settings.crop_scale_min, settings.crop_ratio_max
        )
    if settings.flip:
        images = flip(keys[_Stream.FLIP], images)
    if settings.policy != "none":
        images = _policy(keys[_Stream.POLICY], images, settings)
    if settings.color_jitter or settings.hue_jitter:
        images = photometric.color_jitter(
            keys[_Stream.PHOTOMETRIC], images, settings.color_jitter, settings.hue_jitter
        )
    for name in settings.extra:
        # By name, so that the others' draws are the same whichever stand beside them.
        extra_key = jax.random.fold_in(keys[_Stream.EXTRA], zlib.crc32(name.encode()))
        images = 255 * apply(name, extra_key, images.astype(jnp.float32) / 255, settings)
    if size is not None:
        images = resize(images, size)
    images = normalise(images, mean, std)
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


def resize(images: jax.Array, size: int) -> jax.Array:
    """Resizes images by antialiased bilinear interpolation (a triangle as wide as a new pixel).

    Args:
      images: uint8, or float32 between 0 and 255, [B, H, W, C].
      size: new height and width, pixels.

    Returns:
      The images themselves if they have that size, else float32 [B, size, size, C] in 0 to 255.
    """
    batch, *shape, channels = images.shape
    if shape == [size, size]:
        return images
    new_shape = (batch, size, size, channels)
    return jax.image.resize(images.astype(jnp.float32), new_shape, "linear", antialias=True)


def _policy(key: jax.Array, images: jax.Array, settings: config.Augment) -> jax.Array:
    """Returns uint8 [B, H, W, C]: images, uint8 or float32 between 0 and 255, under a policy."""
    levels = jnp.round(images.astype(jnp.float32))
    varied = apply(settings.policy, key, levels / 255, settings)
    return jnp.clip(jnp.round(255 * varied), 0, 255).astype(jnp.uint8)


def apply(name: str, key: jax.Array, images: jax.Array, settings: config.Augment) -> jax.Array:
    """Returns what a registered augmentation makes of images, float32 [B, H, W, 3] in 0 to 1.

    Raises:
      ConfigError: if it returns something of another shape or type.
    """
    part = registry.AUGMENTATIONS.get(name)
    given = {setting: getattr(settings, setting) for setting in part.settings or ()}
    with registry.explained(part, f"the augmentation {name!r}"):
        result = part.build(key, images, **given, **registry.with_defaults(part, settings.options))
    if getattr(result, "shape", None) != images.shape or result.dtype != jnp.float32:
        raise ConfigError(
            f"{part.place}: the augmentation {name!r} returned {registry.described(result)}; it "
            f"has to return images as it was given them, float32 {list(images.shape)}"
        )
    return result


def check(settings: config.Augment, image_size: int) -> None:
    """Checks the augmentations that settings name; nothing is computed.

    Raises:
      ConfigError: if one returns something of another shape or type than it is given.
    """
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    for name in (settings.policy, *settings.extra):
        if name != "none":
            jax.eval_shape(
                lambda images, name=name: apply(name, jax.random.key(0), images, settings), images
            )


def normalise(images: jax.Array, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Returns (images / 255 - mean) / std.

    Args:
      images: uint8, or float32 between 0 and 255, [B, H, W, C].
      mean, std: float32 [C], in units of pixel / 255.

    Returns:
      float32 [B, H, W, C].
    """
    mean = jnp.asarray(mean, jnp.float32).reshape(1, 1, 1, -1)
    std = jnp.asarray(std, jnp.float32).reshape(1, 1, 1, -1)
    return (images.astype(jnp.float32) / 255 - mean) / std


def pad_crop(key: jax.Array, images: jax.Array, pad: int) -> jax.Array:
    """Moves each image by up to `pad` pixels each way; black (0) comes in at the borders.

    The same as padding by `pad` zeros on each side and cutting an H x W window at an offset drawn
    uniformly from the (2 * pad + 1)^2 possible ones (He et al. 2016, "Deep Residual Learning",
    section 4.2; torchvision's RandomCrop with padding).

    Args:
      key: typed PRNG key.
      images: uint8 [B, H, W, C].
      pad: in pixels.

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
    """Cuts a random box out of each image and resizes it to the image's own size.

    The box is that of torchvision's RandomResizedCrop (Szegedy et al. 2015, section 6): its area is
    uniform in [crop_scale_min, 1] of the image's, width / height log-uniform in
    [1 / crop_ratio_max, crop_ratio_max], both sides rounded to pixels, its position uniform.
    torchvision draws until a box fits the image, at most ten times; here all ten are drawn at once
    and the first that fits is used. If none fits, the box is the whole image, as torchvision has it
    for a square image.

    Args:
      key: typed PRNG key.
      images: uint8 [B, H, W, C].
      crop_scale_min: share of the image's area.
      crop_ratio_max: a ratio of at least 1.

    Returns:
      float32 [B, H, W, C], between 0 and 255.
    """
    batch, height, width, _ = images.shape
    boxes = _random_boxes(key, batch, (height, width), crop_scale_min, crop_ratio_max)
    return resize_boxes(images, boxes)


def _random_boxes(
    key: jax.Array, batch: int, size: tuple[int, int], crop_scale_min: float, crop_ratio_max: float
) -> jax.Array:
    """Returns float32 [B, 4]: top, left, height and width of each image's box, whole pixels."""
    image_height, image_width = size
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    tries = (batch, _RESIZED_TRIES)
    area = jax.random.uniform(area_key, tries, minval=crop_scale_min) * (image_height * image_width)
    log_max = math.log(crop_ratio_max)
    aspect = jnp.exp(jax.random.uniform(aspect_key, tries, minval=-log_max, maxval=log_max))
    heights = jnp.round(jnp.sqrt(area / aspect))
    widths = jnp.round(jnp.sqrt(area * aspect))
    fits = (heights >= 1) & (heights <= image_height) & (widths >= 1) & (widths <= image_width)
    # argmax of booleans is the first that is true.
    first = jnp.argmax(fits, axis=1, keepdims=True)
    any_fits = jnp.any(fits, axis=1)
    height = jnp.where(any_fits, jnp.take_along_axis(heights, first, 1)[:, 0], image_height)
    width = jnp.where(any_fits, jnp.take_along_axis(widths, first, 1)[:, 0], image_width)
    place = jax.random.uniform(place_key, (batch, 2))
    top = jnp.floor(place[:, 0] * (image_height - height + 1))
    left = jnp.floor(place[:, 1] * (image_width - width + 1))
    return jnp.stack([top, left, height, width], axis=1)


def resize_boxes(images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Resizes one box of each image to the whole image's size by bilinear interpolation.

    Within half a pixel of the box's edge the image's own neighbouring pixels are used, where a crop
    followed by a resize repeats the last ones.

    Args:
      images: uint8 [B, H, W, C].
      boxes: float32 [B, 4], top, left, height and width in pixels.

    Returns:
      float32 [B, H, W, C], between 0 and 255.
    """
    size = jnp.asarray(images.shape[1:3], jnp.float32)

    def resize(image: jax.Array, box: jax.Array) -> jax.Array:
        scale = size / box[2:]
        # A box is never larger than what it becomes, so there is nothing to antialias.
        return jax.image.scale_and_translate(
            image, image.shape, (0, 1), scale, -box[:2] * scale, "linear", antialias=False
        )

    return jax.vmap(resize)(images.astype(jnp.float32), boxes)


def flip(key: jax.Array, images: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability one half."""
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
    """Blends each image and its target with those of the image before it in the batch.

    mixup (Zhang et al. 2018) weighs whole images, lambda * own + (1 - lambda) * partner. CutMix
    (Yun et al. 2019) pastes one box of the partner, with sides sqrt(1 - lambda) of the image's, its
    centre uniform, clipped at the border; lambda is then corrected to the share of pixels that are
    left. As in the authors' code, lambda ~ Beta(alpha, alpha), the box and whether to mix at all
    are drawn once a batch. With both alphas above 0 a batch gets one of the two, each with
    probability one half. The authors permute the batch to find partners; a batch is in random order
    already, and a roll by one moves a single image between neighbouring devices.

    Args:
      key: typed PRNG key.
      images: float32 [B, H, W, C].
      targets: float32 [B, K].
      mixup, cutmix: alphas, 0 for off; one at least is more than 0.
      probability: share of batches that are mixed at all.

    Returns:
      (images, targets), of the same shapes.
    """
    _, height, width, _ = images.shape
    whether_key, which_key, weight_key, box_key = jax.random.split(key, 4)
    cutmix_share = 0.5 if mixup and cutmix else float(cutmix > 0)
    use_cutmix = jax.random.bernoulli(which_key, cutmix_share)
    alpha = jnp.where(use_cutmix, cutmix, mixup)
    weight = jax.random.beta(weight_key, alpha, alpha)
    # No mixing is a weight of 1, under either method.
    weight = jnp.where(jax.random.bernoulli(whether_key, probability), weight, 1.0)

    pasted = _random_box(box_key, (height, width), jnp.sqrt(1 - weight))
    share = jnp.where(use_cutmix, 1 - jnp.mean(pasted), weight)
    own = jnp.where(use_cutmix, jnp.where(pasted, 0.0, 1.0), weight)
    images = own * images + (1 - own) * jnp.roll(images, 1, axis=0)
    targets = share * targets + (1 - share) * jnp.roll(targets, 1, axis=0)
    return images, targets


def _random_box(key: jax.Array, size: tuple[int, int], side: jax.Array) -> jax.Array:
    """Returns bool [1, H, W, 1], true in a box of `side` times the image's height and width."""
    extent = np.array([size])
    centres = jax.random.randint(key, (1, 2), 0, extent)
    sides = (jnp.asarray(extent, jnp.float32) * side).astype(jnp.int32)
    return _boxes(centres, sides, size)


def cutout(key: jax.Array, images: jax.Array, side: int) -> jax.Array:
    """Sets a square of each image to 0, the mean once images are normalised.

    The centre is uniform over the pixels and the square is clipped at the border (DeVries & Taylor
    2017, section 3.1).

    Args:
      key: typed PRNG key.
      images: float32 [B, H, W, C], normalised.
      side: of the square, in pixels.

    Returns:
      float32 [B, H, W, C].
    """
    batch, height, width, _ = images.shape
    centres = jax.random.randint(key, (batch, 2), 0, np.array([[height, width]]))
    blank = _boxes(centres, jnp.full((batch, 2), side, jnp.int32), (height, width))
    return jnp.where(blank, 0.0, images)


def _boxes(centres: jax.Array, sides: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns where boxes lie.

    Args:
      centres: int32 [N, 2], row and column; the box starts side // 2 before it.
      sides: int32 [N, 2], height and width in pixels.
      size: H and W of the image that clips them.

    Returns:
      bool [N, H, W, 1], true inside.
    """
    starts = centres - sides // 2
    stops = starts + sides
    inside = []
    for axis, length in enumerate(size):
        at = jnp.arange(length).reshape(1, -1)
        inside.append((at >= starts[:, axis, None]) & (at < stops[:, axis, None]))
    rows, columns = inside
    return rows[:, :, None, None] & columns[:, None, :, None]
