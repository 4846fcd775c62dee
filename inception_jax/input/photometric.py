"""Randomly changes brightness, contrast, saturation and hue of each image.

Images are float32 between 0 and 255 throughout, without rounding between changes. Experimental:
tested, but not used in any recorded run.
"""

import jax
import jax.numpy as jnp

# ITU-R BT.601, the luma of Pillow's mode L and of torchvision's rgb_to_grayscale.
_LUMA = (0.299, 0.587, 0.114)


def color_jitter(key: jax.Array, images: jax.Array, strength: float, hue: float) -> jax.Array:
    """Changes brightness, contrast and saturation in random order, then the hue.

    Each of the three blends the image with a degenerate one that lacks the property: black, its
    mean gray level, its gray values. Factors are uniform in [1 - strength, 1 + strength], sampled
    per image and property, and the order per image (Howard 2013, "Some Improvements on Deep
    Convolutional Neural Network Based Image Classification", section 2, with a strength of 0.5;
    these are GoogLeNet's photometric distortions, Szegedy et al. 2015, section 6). The hue is
    rotated by an angle uniform in [-hue, hue], as in TF-slim and torchvision's ColorJitter but not
    in Howard. It always comes last, so that the expensive color space conversion is done once.

    Args:
      key: typed PRNG key.
      images: uint8, or float32 between 0 and 255, [B, H, W, 3].
      strength: between 0 (none of the three) and 1.
      hue: fraction of the color circle, between 0 (none) and 0.5.

    Returns:
      float32 [B, H, W, 3], between 0 and 255.
    """
    factor_key, order_key, hue_key = jax.random.split(key, 3)
    images = images.astype(jnp.float32)
    if strength:
        shape = (len(images), 3)
        factors = jax.random.uniform(factor_key, shape, minval=1 - strength, maxval=1 + strength)
        order = jnp.argsort(jax.random.uniform(order_key, shape), axis=1)
        images = adjust(images, order, factors)
    if hue:
        shifts = jax.random.uniform(hue_key, (len(images),), minval=-hue, maxval=hue)
        images = shift_hue(images, shifts)
    return images


def adjust(images: jax.Array, order: jax.Array, factors: jax.Array) -> jax.Array:
    """Multiplies brightness (0), contrast (1) and saturation (2) by factors, in the given order.

    Values are clipped to [0, 255] after each, as in torchvision.

    Args:
      images: float32 [B, H, W, 3], between 0 and 255.
      order: int32 [B, N], numbers of properties; the first column is applied first.
      factors: float32 [B, 3], by property number; 1 leaves an image unchanged.

    Returns:
      float32 [B, H, W, 3], between 0 and 255.
    """
    for position in range(order.shape[1]):
        which = order[:, position].reshape(-1, 1, 1, 1)
        factor = jnp.take_along_axis(factors, order[:, position, None], axis=1).reshape(-1, 1, 1, 1)
        gray = jnp.sum(images * jnp.array(_LUMA).reshape(1, 1, 1, 3), axis=3, keepdims=True)
        mean = jnp.mean(gray, axis=(1, 2), keepdims=True)
        degenerate = jnp.where(which == 0, 0.0, jnp.where(which == 1, mean, gray))
        images = jnp.clip(factor * images + (1 - factor) * degenerate, 0, 255)
    return images


def shift_hue(images: jax.Array, shifts: jax.Array) -> jax.Array:
    """Rotates the hue, in the hexagonal HSV color space (as in Python's colorsys).

    Args:
      images: float32 [B, H, W, 3], between 0 and 255.
      shifts: float32 [B], fractions of the full circle.

    Returns:
      float32 [B, H, W, 3] with the same value and saturation.
    """
    red, green, blue = images[..., 0], images[..., 1], images[..., 2]
    value = jnp.max(images, axis=3)
    chroma = value - jnp.min(images, axis=3)
    scale = 1 / jnp.where(chroma == 0, 1.0, chroma)
    # In sixths of the circle; the hue of a gray pixel is arbitrary.
    hue = jnp.where(
        value == red,
        (green - blue) * scale,
        jnp.where(value == green, 2 + (blue - red) * scale, 4 + (red - green) * scale),
    )
    hue = hue + 6 * shifts.reshape(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        # Modulo 6; XLA's float modulo is slow on CPUs.
        sixths = hue + offset - 6 * jnp.floor((hue + offset) / 6)
        channels.append(value - chroma * jnp.clip(jnp.minimum(sixths, 4 - sixths), 0, 1))
    return jnp.stack(channels, axis=3)
