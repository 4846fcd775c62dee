"""The image operations of RandAugment and TrivialAugment: one for each image of a batch.

Images are uint8 before and after. The arithmetic is Pillow's, whose operations the policies were
published with; torchvision's are the same on PIL images, and differ by a grey level on tensors.

Which operation an image gets is known on the device only, and a switch between whole operations
would, under vmap, compute all of them for all images. So they are three passes that every image
takes, with numbers of its own that leave it as it is where its operation is another:

- a table of 256 levels: brightness, contrast, posterize, solarize, autocontrast, equalize;
- a blend with grey or smoothed pixels: colour, sharpness;
- an affine map of coordinates: shears, translations, rotation.
"""

import enum

import jax
import jax.numpy as jnp


@enum.unique
class Op(enum.IntEnum):
    """The operations, in torchvision's order, each with what its value means."""

    IDENTITY = 0
    SHEAR_X = 1  # pixels to the left per row downwards
    SHEAR_Y = 2  # pixels upwards per column to the right
    TRANSLATE_X = 3  # whole pixels to the right
    TRANSLATE_Y = 4  # whole pixels downwards
    ROTATE = 5  # degrees anticlockwise about the centre
    BRIGHTNESS = 6  # added to the factor 1: -1 is black, 0 changes nothing
    COLOR = 7  # the same; -1 is grey
    CONTRAST = 8  # the same; -1 is the mean grey
    SHARPNESS = 9  # the same; -1 is smoothed
    POSTERIZE = 10  # bits kept, 1 to 8
    SOLARIZE = 11  # levels from here on are inverted
    AUTOCONTRAST = 12
    EQUALIZE = 13


def apply(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Applies one operation to each image.

    Args:
      images: uint8 [B, H, W, 3].
      operations: int32 [B], of `Op`.
      values: float32 [B], what `Op` says.

    Returns:
      uint8 [B, H, W, 3].
    """
    # Without barriers XLA computes a pass again for each pixel that the next one reads.
    barrier = jax.lax.optimization_barrier
    tables = barrier(_tables(images, operations, values))
    images = barrier(_look_up(images, tables))
    images = barrier(_blend(images, operations, values))
    return _warp(images, barrier(_matrices(images, operations, values)))


def _to_gray(images: jax.Array) -> jax.Array:
    """Returns int32 [B, H, W, 1], the luma as Pillow's mode L has it, in 16-bit fixed point."""
    weights = jnp.array([19595, 38470, 7471], jnp.int32).reshape(1, 1, 1, 3)
    weighted = jnp.sum(images.astype(jnp.int32) * weights, axis=3, keepdims=True)
    return (weighted + 0x8000) >> 16


def _enhance(pixels: jax.Array, degenerate: jax.Array, value: jax.Array) -> jax.Array:
    """Returns degenerate + (1 + value) * (pixels - degenerate), as ImageEnhance has it.

    Pixels are int32, the result is uint8: clipped, with its fraction cut off. In
    this form, equal pixels stay exactly as they are.
    """
    start = degenerate.astype(jnp.float32)
    result = start + (1 + value) * (pixels - degenerate).astype(jnp.float32)
    return jnp.clip(result, 0, 255).astype(jnp.uint8)


def _tables(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Returns uint8 [B, 3, 256]: what becomes of each level; the level itself for other images."""
    value = values.reshape(-1, 1, 1)
    operation = operations.reshape(-1, 1, 1)
    pixels = images.shape[1] * images.shape[2]
    # Half is added before the division to round.
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
    """Returns int32 [B, 3, 256] that spread each channel's levels over 0 to 255."""
    low = jnp.min(images, axis=(1, 2)).astype(jnp.int32)[:, :, None]
    high = jnp.max(images, axis=(1, 2)).astype(jnp.int32)[:, :, None]
    spread = jnp.clip((level - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, spread, level)


def _equalize(images: jax.Array) -> jax.Array:
    """Returns int32 [B, 3, 256] that make each channel's levels about equally frequent."""
    channels = jnp.moveaxis(images, 3, 1).reshape(len(images), 3, -1)

    def count(channel: jax.Array) -> jax.Array:
        return jnp.zeros(256, jnp.int32).at[channel].add(1, mode="promise_in_bounds")

    counts = jax.vmap(jax.vmap(count))(channels)
    pixels = channels.shape[2]
    # Pillow's step leaves the pixels of the highest level out.
    highest = jnp.max(channels, axis=2, keepdims=True).astype(jnp.int32)
    step = (pixels - jnp.take_along_axis(counts, highest, axis=2)) // 255
    below = jnp.cumsum(counts, axis=2) - counts
    table = jnp.minimum((below + step // 2) // jnp.maximum(step, 1), 255)
    return jnp.where(step > 0, table, jnp.arange(256).reshape(1, 1, 256))


def _look_up(images: jax.Array, tables: jax.Array) -> jax.Array:
    """Replaces each level by that of its image's and channel's table."""

    def look_up(image: jax.Array, table: jax.Array) -> jax.Array:
        channel = jnp.arange(3).reshape(1, 1, 3)
        return table.at[channel, image.astype(jnp.int32)].get(mode="promise_in_bounds")

    return jax.vmap(look_up)(images, tables)


def _blend(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Applies colour and sharpness to the images that get them."""
    operation = operations.reshape(-1, 1, 1, 1)
    value = values.reshape(-1, 1, 1, 1)
    degenerate = jnp.where(operation == Op.COLOR, _to_gray(images), _smooth(images))
    blended = _enhance(images.astype(jnp.int32), degenerate, value)
    return jnp.where((operation == Op.COLOR) | (operation == Op.SHARPNESS), blended, images)


def _smooth(images: jax.Array) -> jax.Array:
    """Returns int32 [B, H, W, 3], Pillow's ImageFilter.SMOOTH: the border stays as it is."""
    pixels = images.astype(jnp.int32)
    if min(pixels.shape[1:3]) < 3:
        return pixels
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = (sums + 4 * pixels[:, 1:-1, 1:-1] + 6) // 13
    return pixels.at[:, 1:-1, 1:-1].set(inner)


def _matrices(images: jax.Array, operations: jax.Array, values: jax.Array) -> jax.Array:
    """Returns float32 [B, 2, 3]: from (x, y, 1) in the result to (x, y) in the image.

    Coordinates are pixels from the top left corner; the centre of the first pixel is (0.5, 0.5).
    """
    _, height, width, _ = images.shape

    def only(*ops: Op) -> jax.Array:
        """Returns the values of the images that get one of `ops`, and 0 for the others."""
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
    """Takes each pixel from where its image's matrix points, black (0) from outside the image."""
    _, height, width, _ = images.shape
    x = jnp.arange(width, dtype=jnp.float32).reshape(1, -1) + 0.5
    y = jnp.arange(height, dtype=jnp.float32).reshape(-1, 1) + 0.5

    def warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
        columns, rows = (jnp.floor(row[0] * x + row[1] * y + row[2]) for row in matrix)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        # Places outside are clipped for the gather, and blanked after it.
        taken = image.at[rows.astype(jnp.int32), columns.astype(jnp.int32)].get(mode="clip")
        return jnp.where(inside[:, :, None], taken, 0)

    return jax.vmap(warp)(images, matrices)
