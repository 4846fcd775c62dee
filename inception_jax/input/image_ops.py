"""The image operations of RandAugment and TrivialAugment, one per image of a batch.

Input and output are uint8. The arithmetic matches Pillow, whose operations the policies were
published with; torchvision's are the same on PIL images and differ by one level on tensors.

The operation of an image is known only on the device, and a switch between operations under vmap
would compute all of them for all images. So they are implemented as three passes over every image,
with per-image parameters that leave it unchanged if its operation is another:

- a table of 256 levels: brightness, contrast, posterize, solarize, autocontrast, equalize;
- a blend with gray or smoothed pixels: color, sharpness;
- an affine map of coordinates: shears, translations, rotation.
"""

import enum

import jax
import jax.numpy as jnp


@enum.unique
class Op(enum.IntEnum):
    """The operations, in torchvision's order, each with the meaning of its value."""

    IDENTITY = 0
    SHEAR_X = 1  # pixels to the left per row downwards
    SHEAR_Y = 2  # pixels upwards per column to the right
    TRANSLATE_X = 3  # whole pixels to the right
    TRANSLATE_Y = 4  # whole pixels downwards
    ROTATE = 5  # degrees counterclockwise about the center
    BRIGHTNESS = 6  # added to the factor 1: -1 is black, 0 changes nothing
    COLOR = 7  # the same; -1 is gray
    CONTRAST = 8  # the same; -1 is the mean gray level
    SHARPNESS = 9  # the same; -1 is smoothed
    POSTERIZE = 10  # bits kept, 1 to 8
    SOLARIZE = 11  # levels from this one are inverted
    AUTOCONTRAST = 12
    EQUALIZE = 13


def apply(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Applies one operation to each image.

    Args:
      images: uint8 [B, H, W, 3].
      operations: int32 [B], of `Op`.
      values: float32 [B], in the units of `Op`.

    Returns:
      uint8 [B, H, W, 3].
    """
    # Without barriers XLA recomputes a pass for each pixel that the next one reads.
    barrier = jax.lax.optimization_barrier
    tables = barrier(_tables(images, operations, values))
    images = barrier(_look_up(images, tables))
    images = barrier(_blend(images, operations, values))
    return _warp(images, barrier(_matrices(images, operations, values)))


def _to_gray(images: jax.Array) -> jax.Array:
    """Returns the luma, int32 [B, H, W, 1], in 16-bit fixed point as in Pillow's mode L."""
    weights = jnp.array([19595, 38470, 7471], jnp.int32).reshape(1, 1, 1, 3)
    weighted = jnp.sum(images.astype(jnp.int32) * weights, axis=3, keepdims=True)
    return (weighted + 0x8000) >> 16


def _enhance(pixels: jax.Array, degenerate: jax.Array, value: jax.Array) -> jax.Array:
    """Returns degenerate + (1 + value) * (pixels - degenerate), as in Pillow's ImageEnhance.

    Takes int32 pixels and returns uint8, clipped and truncated. In this form, equal pixels stay
    exactly unchanged.
    """
    start = degenerate.astype(jnp.float32)
    result = start + (1 + value) * (pixels - degenerate).astype(jnp.float32)
    return jnp.clip(result, 0, 255).astype(jnp.uint8)


def _tables(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Returns uint8 [B, 3, 256] lookup tables; identity for images with other operations."""
    value = values.reshape(-1, 1, 1)
    operation = operations.reshape(-1, 1, 1)
    pixels = images.shape[1] * images.shape[2]
    # Adds one half before the division, to round.
    mean = (jnp.sum(_to_gray(images), axis=(1, 2)) * 2 + pixels) // (2 * pixels)
    level = jnp.arange(256).reshape(1, 1, 256)
    dropped_bits = (8 - value).astype(jnp.int32)
    tables = {
        Op.BRIGHTNESS: _enhance(level, jnp.zeros_like(level), value),
        Op.CONTRAST: _enhance(level, mean.reshape(-1, 1, 1), value),
        Op.POSTERIZE: level >> dropped_bits << dropped_bits,
        Op.SOLARIZE: jnp.where(level.astype(jnp.float32) < value, level, 255 - level),
        Op.AUTOCONTRAST: _autocontrast(images, level),
        Op.EQUALIZE: _equalize(images),
    }
    result = jnp.broadcast_to(level, (len(images), 3, 256)).astype(jnp.uint8)
    for number, table in tables.items():
        result = jnp.where(operation == number, table.astype(jnp.uint8), result)
    return result


def _autocontrast(images: jax.Array, level: jax.Array) -> jax.Array:
    """Returns int32 [B, 3, 256] tables that stretch each channel's levels to 0 to 255."""
    low = jnp.min(images, axis=(1, 2)).astype(jnp.int32)[:, :, None]
    high = jnp.max(images, axis=(1, 2)).astype(jnp.int32)[:, :, None]
    spread = jnp.clip((level - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, spread, level)


def _equalize(images: jax.Array) -> jax.Array:
    """Returns int32 [B, 3, 256] tables that equalize each channel's histogram."""
    channels = jnp.moveaxis(images, 3, 1).reshape(len(images), 3, -1)

    def count(channel: jax.Array) -> jax.Array:
        return jnp.zeros(256, jnp.int32).at[channel].add(1, mode="promise_in_bounds")

    counts = jax.vmap(jax.vmap(count))(channels)
    pixels = channels.shape[2]
    # Pillow's step excludes the pixels of the highest level.
    highest = jnp.max(channels, axis=2, keepdims=True).astype(jnp.int32)
    step = (pixels - jnp.take_along_axis(counts, highest, axis=2)) // 255
    below = jnp.cumsum(counts, axis=2) - counts
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.arange(256).reshape(1, 1, 256))


def _look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Maps each level through the table of its image and channel."""

    def look_up(image: jax.Array, table: jax.Array) -> jax.Array:
        channel = jnp.arange(3).reshape(1, 1, 3)
        return table.at[channel, image.astype(jnp.int32)].get(mode="promise_in_bounds")

    return jax.vmap(look_up)(images, tables)


def _blend(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Applies color and sharpness to the images with these operations."""
    operation = operations.reshape(-1, 1, 1, 1)
    value = values.reshape(-1, 1, 1, 1)
    degenerate = jnp.where(operation == Op.COLOR, _to_gray(images), _smooth(images))
    blended = _enhance(images.astype(jnp.int32), degenerate, value)
    return jnp.where((operation == Op.COLOR) | (operation == Op.SHARPNESS), blended, images)


def _smooth(images: jax.Array) -> jax.Array:
    """Applies Pillow's ImageFilter.SMOOTH, int32 [B, H, W, 3], leaving the border unchanged."""
    pixels = images.astype(jnp.int32)
    if min(pixels.shape[1:3]) < 3:
        return pixels
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (sums + 4 * pixels[:, 1:-1, 1:-1] + 6) // 13
    return pixels.at[:, 1:-1, 1:-1].set(inner)


def _matrices(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Returns float32 [B, 2, 3] maps from (x, y, 1) in the result to (x, y) in the image.

    Coordinates are pixels from the top left corner; the center of the first pixel is (0.5, 0.5).
    """
    _, height, width, _ = images.shape

    def only(*ops: Op) -> jax.Array:
        """Returns the values of images with one of `ops`, and 0 for the others."""
        chosen = jnp.isin(operations, jnp.array(ops, operations.dtype))
        return jnp.where(chosen, values, 0.0)

    angle = only(Op.ROTATE) * (jnp.pi / 180)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    rows = [
        [cos, only(Op.SHEAR_X) - sin, x - cos * x + sin * y - only(Op.TRANSLATE_X)],
        [only(Op.SHEAR_Y) + sin, cos, y - sin * x - cos * y - only(Op.TRANSLATE_Y)],
    ]
    return jnp.stack([jnp.stack(row, axis=1) for row in rows], axis=1)


def _warp(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Samples each pixel at the position given by the matrix; black (0) outside the image."""
    _, height, width, _ = images.shape
    x = jnp.arange(width, dtype=jnp.float32).reshape(1, -1) + 0.5
    y = jnp.arange(height, dtype=jnp.float32).reshape(-1, 1) + 0.5

    def warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
        columns, rows = (jnp.floor(row[0] * x + row[1] * y + row[2]) for row in matrix)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        # Positions outside are clipped for the gather and blanked afterwards.
        taken = image.at[rows.astype(jnp.int32), columns.astype(jnp.int32)].get(mode="clip")
        return jnp.where(inside[:, :, None], taken, 0)

    return jax.vmap(warp)(images, matrices)
