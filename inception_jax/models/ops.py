"""Convolution, max pooling and BatchNorm, as plain XLA operations and as equivalents.

XLA's CPU backend spends most of a training step in a few places: weight gradients of convolutions,
convolutions on small images, the gradient of max pooling, and BatchNorm's derivative with its many
passes over the images. Each has an equivalent here that is faster on the CPU, with the same values
and gradients up to rounding. That of max pooling also moves fewer bytes on a GPU, and TPUs have two
of their own (docs/notes/performance.md). The argument `rewrite` selects those of a device. Networks
have it as an attribute, which `networks.create` sets once, so a program for a TPU can be traced on
a machine without one.
"""

import functools
import importlib.metadata
import pathlib
import re
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inception_jax.errors import ConfigError

# Pixels before and after, in each direction: ((top, bottom), (left, right)).
Paddings = tuple[tuple[int, int], tuple[int, int]]
NO_PADDING: Paddings = ((0, 0), (0, 0))

# Whose equivalents are used:
#   "": none, only plain operations.
#   "cpu": those of convolution, max pooling (`indexed_max_pool`) and BatchNorm.
#   "gpu": that of max pooling.
#   "tpu": branches are concatenated before they are normalized (`layers.concatenate`).
#   "tpu_padded": as "tpu", and pools are padded for a compiler that needs it (`padded_max_pool`).
Rewrite = Literal["", "cpu", "gpu", "tpu", "tpu_padded"]

# With fewer channels, the matrix product for each tap of a kernel would be too thin.
_MIN_CHANNELS = 8

# Compilers that need "tpu_padded" fail on pools at stride 1 over fewer pixels: among other
# operations, on 3 x 3 to 21 x 21 of the sizes tried, but not on 22 x 22 or more.
_PADDED_BELOW_PIXELS = 22 * 22


def preferred_rewrite(device: jax.Device | None = None) -> Rewrite:
    """Returns the equivalents that suit a device.

    libtpu 0.0.50.1 fails on the gradient of some pools for TPU v6e and TPU7x ("LLO_CHECK failure"
    with ``scheduled_bundleno_.valid()`` and ``opcode=vector-store``), as does 0.0.51; 0.0.52 does
    not.

    Args:
      device: the device; None: JAX's first one.
    """
    device = device or jax.devices()[0]
    if device.platform == "cpu":
        return "cpu"
    if device.platform in ("cuda", "gpu", "rocm"):
        return "gpu"
    if device.platform != "tpu":
        return ""
    fails = device.device_kind in ("TPU v6 lite", "TPU7x") and _libtpu_version() < (0, 0, 52)
    return "tpu_padded" if fails else "tpu"


def joins_first(rewrite: Rewrite) -> bool:
    """Returns whether branches are concatenated before they are normalized.

    On a TPU that saves two passes over the images: one reads the branches and writes both what is
    saved for the gradient and the result, and the gradient's sums become part of the convolutions
    that compute it. See `layers.concatenate`.
    """
    return rewrite in ("tpu", "tpu_padded")


@functools.cache
def bfloat16_slowdown(device: jax.Device | None = None) -> str:
    """Returns why bfloat16 is slower than float32 on a device, or '' if it is not.

    TPUs multiply bfloat16 natively, as do NVIDIA GPUs from compute capability 8.0 and x86 CPUs with
    AMX or AVX-512 BF16 (used only by jaxlib 0.12). Elsewhere XLA converts each number.

    Args:
      device: the device; None: JAX's first one.
    """
    device = device or jax.devices()[0]
    if device.platform != "cpu":
        old = re.fullmatch(r"[0-7]\.\d", getattr(device, "compute_capability", ""))
        return f"{device.device_kind} cannot multiply it" if old else ""
    if not {"amx_bf16", "avx512_bf16"} & set(_cpu_flags()):
        return "this CPU is not known to multiply it (no amx_bf16 or avx512_bf16)"
    if jax.__version_info__ < (0, 12):
        return f"jax {jax.__version__} does not use this CPU's instructions for it (0.12 does)"
    return ""


def auto_dtype(device: jax.Device | None = None) -> str:
    """Returns the compute dtype: "bfloat16" if the device multiplies it, else "float32"."""
    return "float32" if bfloat16_slowdown(device) else "bfloat16"


def _libtpu_version() -> tuple[int, ...]:
    """Returns the installed version, or () if it is unknown, as of a file outside a package."""
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return tuple(map(int, re.findall(r"\d+", version)))


def _cpu_flags() -> list[str]:
    """Returns the words of Linux's /proc/cpuinfo, or an empty list on other systems."""
    try:
        return pathlib.Path("/proc/cpuinfo").read_text(errors="replace").split()
    except OSError:
        return []


def compiler_options(network: nn.Module, device: jax.Device | None = None) -> dict[str, bool]:
    """Returns the compiler options of `jax.jit` for a network on a device; None: the default one.

    On the CPU in bfloat16, they let XLA call oneDNN, which jaxlib 0.12 contains but does not use by
    default (0.10.2 ignores the option). Only oneDNN runs products and convolutions on the matrix
    units in both directions, for twice the images per second on a CPU with AMX. The price is that
    jaxlib cannot write such programs to the compilation cache, which the 10% gained in float32 is
    not worth.
    """
    on_cpu = getattr(network, "rewrite", preferred_rewrite(device)) == "cpu"
    use = on_cpu and jnp.dtype(getattr(network, "dtype", None) or "float32") == jnp.bfloat16
    return {"xla_cpu_experimental_onednn_custom_call": True} if use else {}


def conv(
    x: jax.Array,
    kernel: jax.Array,
    *,
    stride: int = 1,
    paddings: Paddings = NO_PADDING,
    rewrite: Rewrite = "",
) -> jax.Array:
    """Convolves images with a square kernel.

    Args:
      x: float [B, H, W, I].
      kernel: float [k, k, I, O], of the same dtype.
      stride: distance between windows in pixels, in both directions.
      paddings: zeros added before and after, in each direction.
      rewrite: "cpu" uses the CPU equivalent instead of XLA's convolution.

    Returns:
      float [B, H', W', O] with H' = floor((H + top + bottom - k) / stride) + 1.
    """
    inside = max(paddings[0] + paddings[1]) < kernel.shape[0]
    if rewrite == "cpu" and stride == 1 and inside:
        return matmul_conv(x, kernel, paddings)
    return plain_conv(x, kernel, paddings, stride=stride)


def plain_conv(x: jax.Array, kernel: jax.Array, paddings: Paddings, stride: int = 1) -> jax.Array:
    """Computes `conv` with XLA's convolution."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), paddings, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul_conv(x: jax.Array, kernel: jax.Array, paddings: Paddings) -> jax.Array:
    """Computes `conv` at stride 1, with matrix products wherever they are faster.

    XLA's own weight gradient takes two to five times as long. Supports only reverse-mode
    differentiation, like every custom_vjp.
    """
    # Otherwise, in evaluation, XLA puts the convolution into the fusion of the product before it,
    # where it is slower (YNNPACK, jaxlib 0.12).
    return _conv_or_patches(_materialize(x, kernel.shape[0] > 1), kernel, paddings)


def _conv_or_patches(x: jax.Array, kernel: jax.Array, paddings: Paddings) -> jax.Array:
    """Convolves at stride 1 with XLA's convolution, or a matrix product on small feature maps.

    XLA swaps image and kernel if the image is the smaller one, and has no library call for the
    result: 8 GF/s instead of 250. With a 1x1 kernel, the patches are x itself.
    """
    size = kernel.shape[0]
    if 1 < size**2 <= x.shape[1] * x.shape[2]:
        return plain_conv(x, kernel, paddings)
    patches = _patches(x, size, paddings)
    rows = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[-1])
    return rows.reshape(*patches.shape[:-1], -1)


def _matmul_conv_forward(
    x: jax.Array, kernel: jax.Array, paddings: Paddings
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    x = _materialize(x)
    return _conv_or_patches(x, kernel, paddings), (x, kernel)


def _matmul_conv_backward(
    paddings: Paddings, saved: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = saved
    size = kernel.shape[0]
    gradient = _materialize(gradient)
    # With respect to x: the convolution with the kernel rotated by 180 degrees.
    rotated = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    (top, bottom), (left, right) = paddings
    full = size - 1
    mirrored = ((full - top, full - bottom), (full - left, full - right))
    gradient_x = _conv_or_patches(gradient, rotated, mirrored)
    # With respect to the kernel: one product over patches or, on larger feature maps, where writing
    # patches costs more than it saves, one per tap. Not XLA's convolution of x with the gradient:
    # with oneDNN it is wrong for batches of fewer than 16 (jaxlib 0.12).
    if size == 1 or x.shape[1] * x.shape[2] <= max(size**2, 16) or x.shape[-1] < _MIN_CHANNELS:
        gradient_kernel = _weight_gradient(_patches(x, size, paddings), gradient)
    else:
        gradient_kernel = _weight_gradient_by_taps(x, gradient, size, paddings)
    return gradient_x, gradient_kernel.reshape(kernel.shape)


matmul_conv.defvjp(_matmul_conv_forward, _matmul_conv_backward)


def _weight_gradient_by_taps(
    x: jax.Array, gradient: jax.Array, size: int, paddings: Paddings
) -> jax.Array:
    """Returns the gradient of each kernel tap, [size * size, I, O], for x [B, H, W, I].

    In a loop, because XLA would compile a program for each of up to 25 slices: those were a third
    of the programs in the gradient of an inception module, and of the time to compile it.
    """
    x = _materialize(jnp.pad(x, ((0, 0), *paddings, (0, 0))))

    def of_tap(offset: jax.Array) -> jax.Array:
        start = (0, offset[0], offset[1], 0)
        tap = lax.dynamic_slice(x, start, (*gradient.shape[:-1], x.shape[-1]))
        return _weight_gradient(tap, gradient)

    return lax.map(of_tap, np.array(list(np.ndindex(size, size)), np.int32))


def _weight_gradient(x: jax.Array, gradient: jax.Array) -> jax.Array:
    """Returns the sum of x.T @ gradient over pixels, [I, O], of [..., I] and [..., O].

    In float32 it is a sum of products over chunks of rows: with many rows and a small result, XLA's
    product uses the cores poorly. In bfloat16 the partial sums would be rounded.
    """
    x, gradient = (each.reshape(-1, each.shape[-1]) for each in (x, gradient))
    num_chunks = min(8, x.shape[0] // 1024)
    if num_chunks <= 1 or x.shape[0] % num_chunks or x.dtype != jnp.float32:
        return x.T @ gradient
    x = x.reshape(num_chunks, -1, x.shape[1])
    gradient = gradient.reshape(num_chunks, -1, gradient.shape[1])
    return jnp.einsum("pri,pro->pio", x, gradient).sum(0)


def _patches(x: jax.Array, size: int, paddings: Paddings) -> jax.Array:
    """Returns the pixels of each `size` x `size` window: [B, H', W', size * size * I]."""
    if size == 1 and paddings == NO_PADDING:
        return x
    x = _materialize(jnp.pad(x, ((0, 0), *paddings, (0, 0))))
    height, width = x.shape[1] - size + 1, x.shape[2] - size + 1
    taps = [x[:, i : i + height, j : j + width] for i in range(size) for j in range(size)]
    return jnp.concatenate(taps, axis=-1)


def max_pool(x: jax.Array, *, window: int, stride: int, rewrite: Rewrite = "") -> jax.Array:
    """Max-pools over square windows, padded as in the paper's Caffe implementation.

    At stride 1 the window is centered and the size is preserved. At a larger stride the first
    window starts at the first pixel and the last may extend past the end (torch: `ceil_mode=True`).

    Args:
      x: float [B, H, W, C].
      window: side of the window in pixels, at most 15; odd at stride 1.
      stride: distance between windows in pixels.
      rewrite: "cpu" and "gpu" use `indexed_max_pool` instead of XLA's windowed maximum,
        "tpu_padded" uses `padded_max_pool` for the sizes that need it.

    Returns:
      float [B, H', W', C] with H' = H at stride 1, else ceil((H - window) / stride) + 1.
    """
    paddings = pool_paddings(x.shape, window=window, stride=stride)
    if rewrite in ("cpu", "gpu"):
        # For tables of compiled programs, in which it is no operation of its own.
        with jax.named_scope("max_pool"):
            return indexed_max_pool(x, window, stride, paddings, rewrite == "cpu")
    small = stride == 1 and x.shape[1] * x.shape[2] < _PADDED_BELOW_PIXELS
    pool = padded_max_pool if small and rewrite == "tpu_padded" else plain_max_pool
    return pool(x, window, stride, paddings)


def pool_paddings(shape: tuple[int, ...], *, window: int, stride: int) -> Paddings:
    """Returns the paddings that `max_pool` adds to images of a shape [B, H, W, C].

    >>> pool_paddings((8, 28, 28, 64), window=3, stride=2)
    ((0, 1), (0, 1))
    """

    def of(size: int) -> tuple[int, int]:
        if stride == 1:
            return (window - 1) // 2, window // 2
        outputs = -(-(size - window) // stride) + 1
        return 0, (outputs - 1) * stride + window - size

    return of(shape[1]), of(shape[2])


def plain_max_pool(x: jax.Array, window: int, stride: int, paddings: Paddings) -> jax.Array:
    """Pools with XLA's windowed reduction; among equal values the first gets the full gradient."""
    # nn.max_pool has the name that converters to other formats look for.
    return nn.max_pool(x, window_shape=(window, window), strides=(stride, stride), padding=paddings)


def padded_max_pool(x: jax.Array, window: int, stride: int, paddings: Paddings) -> jax.Array:
    """Computes `plain_max_pool` on a padded copy, for compilers that fail to pad in the gradient.

    Values and gradients are the same; the copies cost another 1.6 times the memory traffic of the
    gradient of a 16 x 16 pool (libtpu 0.0.50.1's count for v6e: 245 MB instead of 94).
    """
    x = jnp.pad(x, ((0, 0), *paddings, (0, 0)), constant_values=-jnp.inf)
    return plain_max_pool(x, window, stride, NO_PADDING)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def indexed_max_pool(
    x: jax.Array, window: int, stride: int, paddings: Paddings, materialize: bool
) -> jax.Array:
    """Computes `plain_max_pool`, saving the index of each maximum for the gradient.

    XLA scatters the gradient one value at a time; with the indices known, it is a sum over the
    windows that contain a pixel. On a GPU, XLA's gradient first writes four 32-bit coordinates of
    each maximum.

    Args:
      x, window, stride: see `max_pool`.
      paddings: added to x.
      materialize: whether to write padded images to memory, which is faster on the CPU; otherwise
        pooling is one pass over memory, and so is its gradient.
    """
    return _max_and_index(x, window, stride, paddings, materialize)[0]


def _max_and_index(
    x: jax.Array, window: int, stride: int, paddings: Paddings, materialize: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the maxima and the index of each in its window: uint8, row by row from 0."""
    x = jnp.pad(x, ((0, 0), *paddings, (0, 0)), constant_values=-jnp.inf)
    x = _materialize(x, materialize)
    reach = [side - window + 1 for side in x.shape[1:3]]
    largest, position = x[:, : reach[0] : stride, : reach[1] : stride], jnp.uint8(0)
    for index in range(1, window**2):
        i, j = divmod(index, window)
        other = x[:, i : i + reach[0] : stride, j : j + reach[1] : stride]
        # Not jnp.maximum: among equal values the first counts, as in XLA's gradient.
        larger = other > largest
        largest = jnp.where(larger, other, largest)
        position = jnp.where(larger, jnp.uint8(index), position)
    return largest, position


def _indexed_max_pool_forward(
    x: jax.Array, window: int, stride: int, paddings: Paddings, materialize: bool
) -> tuple[jax.Array, jax.Array]:
    return _max_and_index(x, window, stride, paddings, materialize)


def _indexed_max_pool_backward(
    window: int,
    stride: int,
    paddings: Paddings,
    materialize: bool,
    position: jax.Array,
    gradient: jax.Array,
) -> tuple[jax.Array]:
    """Sums, for each pixel, the gradients of the windows whose maximum it is.

    Row a * stride + r of the padded image is row r + i * stride of window a - i; columns likewise.
    """
    batch, height, width, channels = gradient.shape
    reach = -(-window // stride)  # Windows that cover a pixel, in one direction.
    border = ((0, 0), (reach - 1, reach - 1), (reach - 1, reach - 1), (0, 0))
    gradient = _materialize(jnp.pad(gradient, border), materialize)
    position = jnp.pad(position, border, constant_values=window**2)
    position = _materialize(position, materialize)
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
            # Pixels that no window reaches get an index that neither windows nor borders have.
            here = np.where(inside, rows[:, None] * window + columns, window**2 + 1)
            here = here.astype(np.uint8).reshape(1, 1, stride, 1, stride, 1)
            is_maximum = over_pixels(position, i, j) == jnp.broadcast_to(here, shape)
            total += jnp.where(is_maximum, over_pixels(gradient, i, j), jnp.zeros_like(total))
    image = total.reshape(batch, blocks[0] * stride, blocks[1] * stride, channels)
    (top, bottom), (left, right) = paddings
    rows_padded = (height - 1) * stride + window
    columns_padded = (width - 1) * stride + window
    return (image[:, top : rows_padded - bottom, left : columns_padded - right],)


indexed_max_pool.defvjp(_indexed_max_pool_forward, _indexed_max_pool_backward)


def _materialize(x: jax.Array, wanted: bool = True) -> jax.Array:
    """Makes XLA compute x once, instead of fusing it into each of its consumers, if wanted."""
    return lax.optimization_barrier(x) if wanted else x


def affine_relu(x: jax.Array, factor: jax.Array, offset: jax.Array) -> jax.Array:
    """Returns max(0, x * factor + offset), computed in float32, in the dtype and shape of x.

    Args:
      x: float [..., C].
      factor, offset: float32 [C]; or [G, C], of G groups of consecutive images.
    """
    if factor.ndim == 2:
        groups = x.reshape(factor.shape[0], -1, *x.shape[1:])
        return jax.vmap(affine_relu)(groups, factor, offset).reshape(x.shape)
    factor, offset = (jnp.broadcast_to(channelwise, x.shape) for channelwise in (factor, offset))
    return jnp.maximum(x.astype(jnp.float32) * factor + offset, 0.0).astype(x.dtype)


def batch_norm_relu(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    epsilon: float,
    rewrite: Rewrite = "",
    group_size: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes each channel by the moments of the batch, then applies ReLU.

    With a group size of N, each N consecutive images are normalized by their own moments ("ghost
    batch normalization", Hoffer et al. 2017, arXiv:1705.08741, algorithm 1). Devices that hold
    whole groups exchange no moments.

    Args:
      x: float [B, H, W, C].
      scale, bias: float32 [C].
      epsilon: added to the variance.
      rewrite: "cpu" uses the CPU equivalent instead of XLA's derivative.
      group_size: N, which must divide B; 0: the whole batch is one group.

    Returns:
      max(0, (x - mean) / sqrt(variance + epsilon) * scale + bias) in the dtype of x, and the
      float32 mean and (biased) variance [C], averaged over the groups, which have no gradient.

    Raises:
      ConfigError: if the group size does not divide the batch.
    """
    normalize = fused_batch_norm_relu if rewrite == "cpu" else plain_batch_norm_relu
    if group_size:
        groups = _groups(x, group_size)
        y, mean, variance = jax.vmap(lambda group: normalize(group, scale, bias, epsilon))(groups)
        y, mean, variance = y.reshape(x.shape), mean.mean(0), variance.mean(0)
    else:
        y, mean, variance = normalize(x, scale, bias, epsilon)
    return y, lax.stop_gradient(mean), lax.stop_gradient(variance)


def _groups(x: jax.Array, group_size: int) -> jax.Array:
    """Returns images [B, ...] as groups [B / group_size, group_size, ...]."""
    if x.shape[0] % group_size:
        raise ConfigError(
            f"config.model.norm_group_size = {group_size}: must divide the {x.shape[0]} images of "
            "a batch; set it to 0 to normalize the whole batch"
        )
    return x.reshape(-1, group_size, *x.shape[1:])


def batch_norm_affine(
    x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, group_size: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the factor and offset with which `affine_relu` computes `batch_norm_relu`.

    Args:
      x, scale, bias, epsilon, group_size: see `batch_norm_relu`.

    Returns:
      float32 factor and offset, [C], or [B / N, C] with groups; mean and variance as
      `batch_norm_relu` returns them.

    Raises:
      ConfigError: if the group size does not divide the batch.
    """
    if group_size:
        groups = _groups(x, group_size)
        factor, offset, mean, variance = jax.vmap(
            lambda group: _batch_norm_affine(group, scale, bias, epsilon)
        )(groups)
        mean, variance = mean.mean(0), variance.mean(0)
    else:
        factor, offset, mean, variance = _batch_norm_affine(x, scale, bias, epsilon)
    return factor, offset, lax.stop_gradient(mean), lax.stop_gradient(variance)


def _batch_norm_affine(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - 1))
    wide = x.astype(jnp.float32)
    mean = wide.mean(axes)
    variance = jnp.maximum((wide * wide).mean(axes) - mean * mean, 0.0)
    factor = scale * lax.rsqrt(variance + epsilon)
    return factor, bias - mean * factor, mean, variance


def plain_batch_norm_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `batch_norm_relu`, leaving the gradient to XLA."""
    factor, offset, mean, variance = _batch_norm_affine(x, scale, bias, epsilon)
    return affine_relu(x, factor, offset), mean, variance


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def fused_batch_norm_relu(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes `batch_norm_relu`, with a gradient that passes over the images twice."""
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
    """Follows Ioffe and Szegedy 2015, section 3, with sums over x instead of x - mean."""
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
