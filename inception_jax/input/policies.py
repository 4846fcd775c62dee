"""RandAugment and TrivialAugment: random operations per image.

Both sample from the 14 operations of `image_ops.Op`, with the ranges and the 31 magnitudes (0 to
30) of torchvision's RandAugment and TrivialAugmentWide, which differ from each other. Shears,
translations, rotations and enhancements are negated with probability 0.5.

Experimental: tested against Pillow and torchvision, but not used in any recorded run.
"""

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax.input.image_ops import Op, apply
from inception_jax.registry import register_augmentation

_MAGNITUDES = 31
_ENHANCEMENTS = (Op.BRIGHTNESS, Op.COLOR, Op.CONTRAST, Op.SHARPNESS)
_SIGNED = np.isin(np.arange(len(Op)), [op for op in Op if Op.SHEAR_X <= op <= Op.SHARPNESS])


@register_augmentation("randaugment", settings=("policy_ops", "policy_magnitude"))
def _randaugment(
    key: jax.Array, images: jax.Array, *, policy_ops: int, policy_magnitude: int
) -> jax.Array:
    return _to_unit_range(randaugment(key, _to_uint8(images), policy_ops, policy_magnitude))


@register_augmentation("trivialaugment")
def _trivialaugment(key: jax.Array, images: jax.Array) -> jax.Array:
    return _to_unit_range(trivialaugment(key, _to_uint8(images)))


def _to_uint8(images: jax.Array) -> jax.Array:
    """Converts images from float32 in [0, 1] to uint8."""
    return jnp.clip(jnp.round(255 * images), 0, 255).astype(jnp.uint8)


def _to_unit_range(images: jax.Array) -> jax.Array:
    """Converts images from uint8 to float32 in [0, 1]."""
    return images.astype(jnp.float32) / 255


def randaugment(key: jax.Array, images: jax.Array, ops: int, magnitude: int) -> jax.Array:
    """Applies `ops` operations of one magnitude to each image (Cubuk et al. 2020, section 3).

    Operations are sampled with replacement. The paper's magnitudes also range to 30, but some of
    its ranges are wider; this uses torchvision's.

    Args:
      key: typed PRNG key.
      images: uint8 [B, H, W, 3].
      ops: number of consecutive operations (N in the paper).
      magnitude: between 0 and 30 (M in the paper).

    Returns:
      uint8 [B, H, W, 3].
    """
    values = jnp.asarray(randaugment_values(*images.shape[1:3])[:, magnitude])
    op_key, sign_key = jax.random.split(key)
    shape = (ops, len(images))
    operations = jax.random.randint(op_key, shape, 0, len(Op))
    drawn = _signed(sign_key, operations, values[operations])
    # A scan compiles the operations only once, whatever `ops` is.
    return jax.lax.scan(lambda last, op: (apply(last, *op), None), images, (operations, drawn))[0]


def trivialaugment(key: jax.Array, images: jax.Array) -> jax.Array:
    """Applies one operation with a uniform magnitude to each image (Müller & Hutter 2021).

    Uses the ranges of the paper's "Wide" space. Translations are up to 32 pixels, regardless of the
    image size.

    Args:
      key: typed PRNG key.
      images: uint8 [B, H, W, 3].

    Returns:
      uint8 [B, H, W, 3].
    """
    op_key, magnitude_key, sign_key = jax.random.split(key, 3)
    shape = (len(images),)
    operations = jax.random.randint(op_key, shape, 0, len(Op))
    magnitudes = jax.random.randint(magnitude_key, shape, 0, _MAGNITUDES)
    values = jnp.asarray(trivialaugment_values())[operations, magnitudes]
    return apply(images, operations, _signed(sign_key, operations, values))


def _signed(key: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Negates the values of signed operations with probability 0.5."""
    negative = jax.random.bernoulli(key, 0.5, operations.shape)
    return jnp.where(negative & jnp.asarray(_SIGNED)[operations], -values, values)


def randaugment_values(height: int, width: int) -> np.ndarray:
    """Returns float32 [14, 31]: each operation's value at each magnitude, in the units of `Op`."""
    # 150 of the 331 pixels of AutoAugment's images.
    fraction = 150 / 331
    return _values(
        shear=0.3, x=fraction * width, y=fraction * height, degrees=30, enhancement=0.9, bits=4
    )


def trivialaugment_values() -> np.ndarray:
    """Returns float32 [14, 31]: each operation's value at each magnitude, in the units of `Op`."""
    return _values(shear=0.99, x=32, y=32, degrees=135, enhancement=0.99, bits=6)


def _values(
    *, shear: float, x: float, y: float, degrees: float, enhancement: float, bits: int
) -> np.ndarray:
    """Returns float32 [14, 31] that grow to the given extremes; `bits`: bits to drop."""
    values = np.zeros((len(Op), _MAGNITUDES))
    steps = np.linspace(0, 1, _MAGNITUDES)
    values[[Op.SHEAR_X, Op.SHEAR_Y]] = shear * steps
    values[Op.TRANSLATE_X] = np.trunc(x * steps)
    values[Op.TRANSLATE_Y] = np.trunc(y * steps)
    values[Op.ROTATE] = degrees * steps
    values[list(_ENHANCEMENTS)] = enhancement * steps
    values[Op.POSTERIZE] = 8 - np.round(bits * steps)
    values[Op.SOLARIZE] = 255 * (1 - steps)
    return values.astype(np.float32)
