"""Convolution and max-pooling, in the formulation that is fast on the backend in use.

XLA's CPU backend loses most of a training step in a few places: 1x1 convolutions, convolutions
whose image is smaller than the kernel, the weight gradient of 3x3 ones, and the gradient of a
windowed maximum. Each has an equivalent, of the same values and gradients to rounding, that is
faster there (BUILD_NOTES.md, "Speed"). `_rewrite` decides, in this one place, when they are used;
on every other backend the plain XLA operations run.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

# Pixels before and after, in each direction: ((top, bottom), (left, right)).
Paddings = tuple[tuple[int, int], tuple[int, int]]
NO_PADDING: Paddings = ((0, 0), (0, 0))


def _rewrite() -> bool:
    """Whether the equivalents replace the plain operations."""
    return jax.default_backend() == "cpu"


def conv(
    x: jax.Array, kernel: jax.Array, *, stride: int = 1, paddings: Paddings = NO_PADDING
) -> jax.Array:
    """Convolves images with a square kernel.

    Args:
      x: float [B, H, W, I].
      kernel: float [k, k, I, O], of the same dtype.
      stride: distance between windows in pixels, in both directions.
      paddings: zeros added before and after, in each direction.

    Returns:
      float [B, H', W', O] with H' = floor((H + top + bottom - k) / stride) + 1.
    """
    if _rewrite() and stride == 1:
        # XLA exchanges image and kernel where the image is the smaller one, and has no library call
        # for what comes of it: 3 GF/s instead of 150.
        size = kernel.shape[0]
        if size == 1 or x.shape[1] * x.shape[2] < size**2:
            return patch_conv(x, kernel, paddings)
        if size == 3:
            return tap_conv(x, kernel, paddings)
    return plain_conv(x, kernel, stride=stride, paddings=paddings)


def plain_conv(x: jax.Array, kernel: jax.Array, *, stride: int, paddings: Paddings) -> jax.Array:
    """Convolves as `conv` does, with XLA's convolution."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), paddings, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def patch_conv(x: jax.Array, kernel: jax.Array, paddings: Paddings) -> jax.Array:
    """Convolves as `conv` does at stride 1, with one matrix product over the pixels' patches.

    The patches take k * k times the memory of x; with a 1x1 kernel they are x itself.
    """
    patches = jnp.concatenate(_shifts(x, kernel, paddings), axis=-1)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    flat = patches.reshape(-1, matrix.shape[0]) @ matrix
    return flat.reshape(*patches.shape[:-1], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def tap_conv(x: jax.Array, kernel: jax.Array, paddings: Paddings) -> jax.Array:
    """Convolves as `conv` does at stride 1, with a weight gradient of one matrix product a tap.

    XLA's own weight gradient takes up to twice the time for 3x3 kernels. Reverse differentiation
    only, as with every custom_vjp.
    """
    return plain_conv(x, kernel, stride=1, paddings=paddings)


def _tap_conv_forward(
    x: jax.Array, kernel: jax.Array, paddings: Paddings
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return tap_conv(x, kernel, paddings), (x, kernel)


def _tap_conv_backward(
    paddings: Paddings, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    convolve = functools.partial(plain_conv, kernel=kernel, stride=1, paddings=paddings)
    (gradient_x,) = jax.linear_transpose(convolve, x)(gradient)
    flat_gradient = gradient.reshape(-1, gradient.shape[-1])
    taps = [tap.reshape(-1, x.shape[-1]).T @ flat_gradient for tap in _shifts(x, kernel, paddings)]
    return gradient_x, jnp.stack(taps).reshape(kernel.shape)


tap_conv.defvjp(_tap_conv_forward, _tap_conv_backward)


def _shifts(x: jax.Array, kernel: jax.Array, paddings: Paddings) -> list[jax.Array]:
    """Returns what each tap of the kernel meets: k * k images [B, H', W', I], row by row."""
    size = kernel.shape[0]
    x = jnp.pad(x, ((0, 0), *paddings, (0, 0)))
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    return [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]


def max_pool(x: jax.Array, *, window: int, stride: int) -> jax.Array:
    """Takes the maximum over square windows, with the borders of the paper's Caffe implementation.

    At stride 1 the window is centred and the size is kept. At a larger stride the first window
    starts at the first pixel and the last one may reach over the end (torch: `ceil_mode=True`).

    Args:
      x: float [B, H, W, C].
      window: side of the window in pixels; odd at stride 1.
      stride: distance between windows in pixels.

    Returns:
      float [B, H', W', C] with H' = H at stride 1, else ceil((H - window) / stride) + 1.
    """
    height, width = x.shape[1:3]
    paddings = (
        pool_padding(height, window=window, stride=stride),
        pool_padding(width, window=window, stride=stride),
    )
    pool = separable_max_pool if _rewrite() else plain_max_pool
    return pool(x, window=window, stride=stride, paddings=paddings)


def pool_padding(size: int, *, window: int, stride: int) -> tuple[int, int]:
    """Returns the padding before and after one direction of `size` pixels, as `max_pool` has it."""
    if stride == 1:
        return (window - 1) // 2, window // 2
    outputs = -(-(size - window) // stride) + 1
    return 0, (outputs - 1) * stride + window - size


def plain_max_pool(x: jax.Array, *, window: int, stride: int, paddings: Paddings) -> jax.Array:
    """Pools with XLA's windowed reduction; where values tie, the first takes the whole gradient."""
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        (1, window, window, 1),
        (1, stride, stride, 1),
        ((0, 0), *paddings, (0, 0)),
    )


def separable_max_pool(x: jax.Array, *, window: int, stride: int, paddings: Paddings) -> jax.Array:
    """Pools along rows, then along columns, by comparing shifted slices.

    Where values tie, the first of the window takes the whole gradient, as in `plain_max_pool`: that
    is why rows come first, and why a comparison stands in place of jnp.maximum, whose gradient is
    shared and slower.
    """
    for axis, padding in ((2, paddings[1]), (1, paddings[0])):
        widths = [padding if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, widths, constant_values=-jnp.inf)
        reach = padded.shape[axis] - window + 1
        x = lax.slice_in_dim(padded, 0, reach, stride, axis)
        for start in range(1, window):
            other = lax.slice_in_dim(padded, start, start + reach, stride, axis)
            x = jnp.where(other > x, other, x)
    return x
