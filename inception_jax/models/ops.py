"""Convolution, max-pooling and BatchNorm, plainly and in formulations that are fast on the CPU.

XLA's CPU backend loses most of a training step in a few places: the weight gradients of
convolutions, convolutions on small images, the gradient of a windowed maximum, and the many passes
over the images that the derivative of BatchNorm takes. Each has an equivalent, of the same values
and gradients to rounding, that is faster there (docs/notes/performance.md). Which of the two is
traced is said by the argument `rewrite`. A network has it as an attribute, which
`networks.create` sets once; so a program for a TPU can be traced on a machine that has none.
"""

import functools
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Pixels before and after, in each direction: ((top, bottom), (left, right)).
Paddings = tuple[tuple[int, int], tuple[int, int]]
NO_PADDING: Paddings = ((0, 0), (0, 0))

# With fewer channels than this, one product for each tap of a kernel would be too thin.
_LEAST_CHANNELS = 8


def prefers_rewrite() -> bool:
    """Whether the equivalents are the faster ones on the devices that JAX uses by default."""
    return jax.default_backend() == "cpu"


@functools.cache
def slow_bfloat16() -> str:
    """Returns why computing in bfloat16 is slower than in float32 on this hardware, or ''.

    TPUs multiply it, NVIDIA's GPUs from compute capability 8.0, and x86 processors with AMX or
    AVX-512's bfloat16, of which only jaxlib 0.12 makes use. XLA has others convert each number.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        old = re.fullmatch(r"[0-7]\.\d", getattr(device, "compute_capability", ""))
        return f"{device.device_kind} cannot multiply it" if old else ""
    if not {"amx_bf16", "avx512_bf16"} & set(_cpu_flags()):
        return "this CPU is not known to multiply it (no amx_bf16 or avx512_bf16)"
    if jax.__version_info__ < (0, 12):
        return f"jax {jax.__version__} does not use this CPU's instructions for it (0.12 does)"
    return ""


def auto_dtype() -> str:
    """Returns the type to compute in: "bfloat16" where the hardware multiplies it, or "float32"."""
    return "float32" if slow_bfloat16() else "bfloat16"


def _cpu_flags() -> list[str]:
    """Returns what the processor can do, in Linux's words; elsewhere nothing is known."""
    try:
        return pathlib.Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return []


def compiler_options(network: nn.Module) -> dict[str, bool]:
    """Returns the options for `jax.jit` with which a network is compiled.

    On the CPU, in bfloat16, they let XLA call oneDNN, which jaxlib 0.12 contains but does not use
    by default (0.10.2 ignores the option): only it takes products and convolutions to the matrix
    units in both directions, for twice the images a second on a processor with AMX. The price is
    that jaxlib cannot write such a program to the compilation cache. In float32 that is not worth
    the tenth it gains.
    """
    on_cpu = getattr(network, "rewrite", prefers_rewrite())
    use = on_cpu and jnp.dtype(getattr(network, "dtype", None) or "float32") == jnp.bfloat16
    return {"xla_cpu_experimental_onednn_custom_call": True} if use else {}


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    paddings: Paddings = NO_PADDING,
    rewrite: bool = False,
) -> jax.Array:
    """Convolves images with a square kernel.

    Args:
      x: float [B, H, W, I].
      kernel: float [k, k, I, O], of the same dtype.
      stride: distance between windows in pixels, in both directions.
      paddings: zeros added before and after, in each direction.
      rewrite: whether the equivalent for the CPU takes the place of XLA's convolution.

    Returns:
      float [B, H', W', O] with H' = floor((H + top + bottom - k) / stride) + 1.
    """
    inside = max(paddings[0] + paddings[1]) < kernel.shape[0]
    if rewrite and stride == 1 and inside:
        return matmul_conv(x, kernel, paddings)
    return plain_conv(x, kernel, paddings, stride=stride)


def plain_conv(x: jax.Array, kernel: jax.Array, paddings: Paddings, stride: int = 1) -> jax.Array:
    """Convolves as `conv` does, with XLA's convolution."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), paddings, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_conv(x: jax.Array, kernel: jax.Array, paddings: Paddings) -> jax.Array:
    """Convolves as `conv` does at stride 1, by matrix products wherever these are faster.

    XLA's own weight gradient takes two to five times as long. Reverse differentiation only, as with
    every custom_vjp.
    """
    return _conv_or_patches(x, kernel, paddings)


def _conv_or_patches(x: jax.Array, kernel: jax.Array, paddings: Paddings) -> jax.Array:
    """Convolves at stride 1 with XLA's convolution, or on small grids with one matrix product."""
    if not _is_small_grid(x, kernel):
        return plain_conv(x, kernel, paddings)
    patches = _patches(x, kernel.shape[0], paddings)
    rows = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return rows.reshape(*patches.shape[:-1], -1)


def _is_small_grid(x: jax.Array, kernel: jax.Array) -> bool:
    """Whether a product over patches, k * k times the memory of x, is faster than a convolution.

    XLA exchanges image and kernel where the image is the smaller one, and has no library call for
    what comes of it: 8 GF/s instead of 250. With a 1x1 kernel the patches are x itself.
    """
    size = kernel.shape[0]
    return size == 1 or x.shape[1] * x.shape[2] <= max(size**2, 16)


def _matmul_conv_forward(
    x: jax.Array, kernel: jax.Array, paddings: Paddings
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = _separate(x)
    return _conv_or_patches(x, kernel, paddings), (x, kernel)


def _matmul_conv_backward(
    paddings: Paddings, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size = kernel.shape[0]
    gradient = _separate(gradient)
    # With regard to x: the convolution with the kernel turned by 180 degrees.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    (top, bottom), (left, right) = paddings
    full = size - 1
    mirrored = ((full - top, full - bottom), (full - left, full - right))
    gradient_x = _conv_or_patches(gradient, turned, mirrored)
    # With regard to the kernel: one product over patches, or on larger grids, where patches cost
    # more to write than they save, one for each tap. Not XLA's convolution of x with the gradient:
    # with oneDNN it is wrong for batches of less than 16 (jaxlib 0.12).
    rows = gradient.reshape(-1, gradient.shape[-1])
    patches = _is_small_grid(x, kernel) or x.shape[-1] < _LEAST_CHANNELS
    seen = [_patches(x, size, paddings)] if patches else _taps(x, size, paddings)
    products = [_weight_gradient(part.reshape(-1, part.shape[-1]), rows) for part in seen]
    return gradient_x, jnp.stack(products).reshape(kernel.shape)


matmul_conv.defvjp(_matmul_conv_forward, _matmul_conv_backward)


def _weight_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns x.T @ gradient of rows [R, I] and [R, O].

    In float32 it is a sum of products of fewer rows: with many rows and a small result, XLA's
    product uses the cores badly. In bfloat16 the partial sums would be rounded.
    """
    pieces = min(8, x.shape[0] // 1024)
    if pieces <= 1 or x.shape[0] % pieces or x.dtype != jnp.float32:
        return x.T @ gradient
    x = x.reshape(pieces, -1, x.shape[1])
    gradient = gradient.reshape(pieces, -1, gradient.shape[1])
    return jnp.einsum("pri,pro->pio", x, gradient).sum(0)


def _taps(x: jax.Array, size: int, paddings: Paddings) -> list[jax.Array]:
    """Returns what each tap of a kernel meets: size * size images [B, H', W', I], row by row."""
    if size == 1 and paddings == NO_PADDING:
        return [x]
    x = _separate(jnp.pad(x, ((0, 0), *paddings, (0, 0))))
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    return [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]


def _patches(x: jax.Array, size: int, paddings: Paddings) -> jax.Array:
    """Returns what each window of `size` x `size` pixels sees: [B, H', W', size * size * I]."""
    return jnp.concatenate(_taps(x, size, paddings), axis=-1)


def max_pool(x: jax.Array, *, window: int, stride: int, rewrite: bool = False) -> jax.Array:
    """Takes the maximum over square windows, with the borders of the paper's Caffe implementation.

    At stride 1 the window is centred and the size is kept. At a larger stride the first window
    starts at the first pixel and the last one may reach over the end (torch: `ceil_mode=True`).

    Args:
      x: float [B, H, W, C].
      window: side of the window in pixels, at most 15; odd at stride 1.
      stride: distance between windows in pixels.
      rewrite: whether the equivalent for the CPU takes the place of XLA's windowed maximum.

    Returns:
      float [B, H', W', C] with H' = H at stride 1, else ceil((H - window) / stride) + 1.
    """
    pool = indexed_max_pool if rewrite else plain_max_pool
    return pool(x, window, stride, pool_paddings(x.shape, window=window, stride=stride))


def pool_paddings(shape: tuple[int, ...], *, window: int, stride: int) -> Paddings:
    """Returns the paddings that `max_pool` gives images of a shape [B, H, W, C]."""

    def of(size: int) -> tuple[int, int]:
        if stride == 1:
            return (window - 1) // 2, window // 2
        outputs = -(-(size - window) // stride) + 1
        return 0, (outputs - 1) * stride + window - size

    return of(shape[1]), of(shape[2])


def plain_max_pool(x: jax.Array, window: int, stride: int, paddings: Paddings) -> jax.Array:
    """Pools with XLA's windowed reduction; where values tie, the first takes the whole gradient."""
    # By the name that converters to other formats look for.
    return nn.max_pool(x, window_shape=(window, window), strides=(stride, stride), padding=paddings)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def indexed_max_pool(x: jax.Array, window: int, stride: int, paddings: Paddings) -> jax.Array:
    """Pools as `plain_max_pool` does, remembering for the gradient where each maximum stood.

    XLA scatters the gradient one value after the other; with the places known it is a sum over the
    windows that hold a pixel.
    """
    return _max_and_place(x, window, stride, paddings)[0]


def _max_and_place(
    x: jax.Array, window: int, stride: int, paddings: Paddings
) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima, and where in its window each stands: uint8, row by row from 0."""
    x = _separate(jnp.pad(x, ((0, 0), *paddings, (0, 0)), constant_values=-jnp.inf))
    reach = [side - window + 1 for side in x.shape[1:3]]
    largest, place = x[:, : reach[0] : stride, : reach[1] : stride], jnp.uint8(0)
    for index in range(1, window**2):
        i, j = divmod(index, window)
        other = x[:, i : i + reach[0] : stride, j : j + reach[1] : stride]
        # Not jnp.maximum: the first of several equal values counts, as in XLA's gradient.
        larger = other > largest
        largest = jnp.where(larger, other, largest)
        place = jnp.where(larger, jnp.uint8(index), place)
    return largest, place


def _indexed_max_pool_forward(
    x: jax.Array, window: int, stride: int, paddings: Paddings
) -> tuple[jax.Array, jax.Array]:
    return _max_and_place(x, window, stride, paddings)


def _indexed_max_pool_backward(
    window: int, stride: int, paddings: Paddings, place: jax.Array, gradient: jax.Array
) -> tuple[jax.Array]:
    """Adds up, for each pixel, what the windows that found their maximum there received.

    Row a * stride + r of the padded image is row r + i * stride of the window a - i. Columns alike.
    """
    batch, height, width, channels = gradient.shape
    reach = -(-window // stride)  # How many windows lie over a pixel, in one direction.
    border = ((0, 0), (reach - 1, reach - 1), (reach - 1, reach - 1), (0, 0))
    gradient = _separate(jnp.pad(gradient, border))
    place = _separate(jnp.pad(place, border, constant_values=window**2))
    blocks = (height + reach - 1, width + reach - 1)
    shape = (batch, blocks[0], stride, blocks[1], stride, channels)

    def over_pixels(x: jax.Array, i: int, j: int) -> jax.Array:
        top, left = reach - 1 - i, reach - 1 - j
        x = x[:, top : top + blocks[0], left : left + blocks[1]]
        return jnp.broadcast_to(x[:, :, None, :, None], shape)

    total = jnp.zeros(shape, gradient.dtype)
    for i in range(reach):
        for j in range(reach):
            rows, columns = np.arange(stride) + i * stride, np.arange(stride) + j * stride
            inside = (rows[:, None] < window) & (columns < window)
            # One more than any place, and no border's either: no window reaches there.
            here = np.where(inside, rows[:, None] * window + columns, window**2 + 1)
            here = here.astype(np.uint8).reshape(1, 1, stride, 1, stride, 1)
            stood_here = over_pixels(place, i, j) == jnp.broadcast_to(here, shape)
            total += jnp.where(stood_here, over_pixels(gradient, i, j), jnp.zeros_like(total))
    image = total.reshape(batch, blocks[0] * stride, blocks[1] * stride, channels)
    (top, bottom), (left, right) = paddings
    rows_padded = (height - 1) * stride + window
    columns_padded = (width - 1) * stride + window
    return (image[:, top : rows_padded - bottom, left : columns_padded - right],)


indexed_max_pool.defvjp(_indexed_max_pool_forward, _indexed_max_pool_backward)


def _separate(x: jax.Array) -> jax.Array:
    """Keeps x an array of its own, instead of a computation that each of its readers repeats."""
    return lax.optimization_barrier(x)


def affine_relu(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """Returns max(0, x * factor + offset), computed in float32, in the type and shape of x.

    Args:
      x: float [..., C].
      factor, offset: float32 [C].
    """
    factor, offset = (jnp.broadcast_to(channelwise, x.shape) for channelwise in (factor, offset))
    return jnp.maximum(x.astype(jnp.float32) * factor + offset, 0.0).astype(x.dtype)


def batch_norm_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, rewrite: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises each channel by the moments of the batch, and cuts off what is negative.

    Args:
      x: float [B, H, W, C].
      scale, bias: float32 [C].
      epsilon: added to the variance.
      rewrite: whether the equivalent for the CPU takes the place of XLA's derivative.

    Returns:
      max(0, (x - mean) / sqrt(variance + epsilon) * scale + bias) in the type of x, and the
      float32 mean and (biased) variance [C], which have no gradient.
    """
    normalise = fused_batch_norm_relu if rewrite else plain_batch_norm_relu
    y, mean, variance = normalise(x, scale, bias, epsilon)
    return y, lax.stop_gradient(mean), lax.stop_gradient(variance)


def plain_batch_norm_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `batch_norm_relu` so that XLA derives the gradient."""
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes)
    variance = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0.0)
    factor = scale * lax.rsqrt(variance + epsilon)
    return affine_relu(x, factor, bias - mean * factor), mean, variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_batch_norm_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `batch_norm_relu`, with a gradient of two passes over the images."""
    return plain_batch_norm_relu(x, scale, bias, epsilon)


_BatchNormSaved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _fused_batch_norm_relu_forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], _BatchNormSaved]:
    y, mean, variance = plain_batch_norm_relu(x, scale, bias, epsilon)
    return (y, mean, variance), (x, y, scale, mean, lax.rsqrt(variance + epsilon))


def _fused_batch_norm_relu_backward(
    epsilon: float,
    saved: _BatchNormSaved,
    gradients: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Ioffe and Szegedy 2015, section 3, with the sums over x in place of those over x - mean."""
    del epsilon
    x, y, scale, mean, inverse_deviation = saved
    axes = tuple(range(x.ndim - 1))
    count = x.size // x.shape[-1]
    wide = x.astype(jnp.float32)
    gradient = jnp.where(y > 0, gradients[0], jnp.zeros_like(y)).astype(jnp.float32)
    gradient_bias = gradient.sum(axes)
    gradient_scale = ((gradient * wide).sum(axes) - mean * gradient_bias) * inverse_deviation
    factor = scale * inverse_deviation
    slope = factor * inverse_deviation * gradient_scale / count
    constant = factor * gradient_bias / count - mean * slope
    factor, slope, constant = (
        jnp.broadcast_to(channelwise, x.shape) for channelwise in (factor, slope, constant)
    )
    gradient_x = factor * gradient - slope * wide - constant
    return gradient_x.astype(x.dtype), gradient_scale, gradient_bias


fused_batch_norm_relu.defvjp(_fused_batch_norm_relu_forward, _fused_batch_norm_relu_backward)
