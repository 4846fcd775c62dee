"""The layers of the networks.

Parameters and BatchNorm statistics are always float32; each layer computes in its `dtype`. Every
weight that multiplies activations is named "kernel", by which `protocol` recognizes it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inception_jax.errors import ConfigError
from inception_jax.models import ops

# He et al. 2015 (arXiv:1502.01852), eq. 10: keeps the variance of activations through ReLU layers.
# Networks without BatchNorm need that most. Caffe's GoogLeNet uses a Xavier variance, half of this,
# and biases of 0.2, but its pixels range from 0 to 255. On normalized images its logits hardly
# depend on the image, and it learns more slowly at the paper's learning rate of 0.01.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class ModelOutput(NamedTuple):
    """The output of a network.

    Attributes:
      logits: float32 [B, K].
      aux: float32 [B, K] of each auxiliary head, the one closest to the input first; empty unless
        the network has heads and is training.
    """

    logits: jax.Array
    aux: tuple[jax.Array, ...] = ()


class Conv(nn.Module):
    """Convolution with a square kernel (see `ops.conv`).

    Attributes:
      features: number of output channels.
      kernel_size: side of the kernel in pixels.
      stride: distance between windows in pixels.
      paddings: zeros around the image; None: half the kernel on all sides, which preserves the size
        at stride 1.
      use_bias: whether to add a bias.
      dtype: compute dtype.
      rewrite: see `ops.conv`.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    paddings: ops.Paddings | None = None
    use_bias: bool = False
    dtype: Any = jnp.float32
    rewrite: ops.Rewrite = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, I] to `dtype` [B, H', W', features]."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, shape, jnp.float32)
        half = self.kernel_size // 2
        paddings = self.paddings or ((half, half), (half, half))
        x = ops.conv(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            stride=self.stride,
            paddings=paddings,
            rewrite=self.rewrite,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            x = x + jnp.broadcast_to(bias.astype(self.dtype), x.shape)
        return x


class Unnormalized(NamedTuple):
    """The output of a convolution before its BatchNorm and ReLU, which are `ops.affine_relu`.

    Attributes:
      x: float [B, H, W, C].
      factor, offset: float32 [C], or [G, C] of groups.
    """

    x: jax.Array
    factor: jax.Array
    offset: jax.Array


def concatenate(branches: Sequence[Any]) -> jax.Array:
    """Concatenates the channels of branches, and normalizes them if they are `Unnormalized`.

    Args:
      branches: float [B, H, W, C] of each, or `Unnormalized`.
    """
    if not isinstance(branches[0], Unnormalized):
        return jnp.concatenate(branches, axis=-1)
    # The name by which compiled programs show what an operation does.
    with jax.named_scope("norm"):
        parts = zip(*branches, strict=True)
        return ops.affine_relu(*(jnp.concatenate(part, axis=-1) for part in parts))


class BatchNormReLU(nn.Module):
    """BatchNorm (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1) and ReLU.

    Parameters and running statistics have the same names and shapes as `flax.linen.BatchNorm`'s.

    Attributes:
      momentum: fraction of the running statistics kept at each training step.
      epsilon: added to the variance.
      train: whether to use batch statistics and update the running ones.
      rewrite, group_size: see `ops.batch_norm_relu`.
      defer: whether training leaves the normalization to `concatenate`.
    """

    momentum: float
    epsilon: float
    train: bool
    rewrite: ops.Rewrite = ""
    group_size: int = 0
    defer: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        """Maps float [B, H, W, C] to the same shape and dtype, or to `Unnormalized`."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if not self.train:
            factor = scale * lax.rsqrt(variance.value + self.epsilon)
            return ops.affine_relu(x, factor, bias - mean.value * factor)
        # The batch that gives the variables their shapes may be of any size.
        group_size = 0 if self.is_initializing() else self.group_size
        result: Any
        if self.defer:
            factor, offset, batch_mean, batch_variance = ops.batch_norm_affine(
                x, scale, bias, epsilon=self.epsilon, group_size=group_size
            )
            result = Unnormalized(x, factor, offset)
        else:
            result, batch_mean, batch_variance = ops.batch_norm_relu(
                x,
                scale,
                bias,
                epsilon=self.epsilon,
                rewrite=self.rewrite,
                group_size=group_size,
            )
        if not self.is_initializing():
            for running, batch in ((mean, batch_mean), (variance, batch_variance)):
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
        return result


class ConvUnit(nn.Module):
    """Convolution, BatchNorm and ReLU; or convolution with a bias and ReLU.

    Attributes:
      features, kernel_size, stride, paddings, dtype, rewrite: see `Conv`.
      batch_norm: whether to use BatchNorm instead of a bias.
      momentum, epsilon, train, group_size, defer: see `BatchNormReLU`.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    paddings: ops.Paddings | None = None
    dtype: Any = jnp.float32
    batch_norm: bool = True
    momentum: float = 0.9
    epsilon: float = 1e-3
    train: bool = False
    rewrite: ops.Rewrite = ""
    group_size: int = 0
    defer: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        """Maps float [B, H, W, I] to `dtype` [B, H', W', features], or to `Unnormalized`."""
        x = Conv(
            self.features,
            self.kernel_size,
            self.stride,
            self.paddings,
            use_bias=not self.batch_norm,
            dtype=self.dtype,
            rewrite=self.rewrite,
            name="conv",
        )(x)
        if not self.batch_norm:
            return nn.relu(x)
        return BatchNormReLU(
            self.momentum,
            self.epsilon,
            self.train,
            self.rewrite,
            self.group_size,
            self.defer,
            name="norm",
        )(x)


Unit = Callable[..., ConvUnit]


class InceptionWidths(NamedTuple):
    """Output channels of an inception module's layers, in the order of the paper's Table 1."""

    conv_1x1: int
    reduce_3x3: int
    conv_3x3: int
    reduce_5x5: int
    conv_5x5: int
    pool_proj: int


class Inception(nn.Module):
    """The inception module with dimension reductions (Szegedy et al. 2014, fig. 2b).

    Attributes:
      widths: output channels of each layer.
      conv5x5: convolutions of the 5x5 branch: "5x5", "3x3" or "two_3x3" (Szegedy et al. 2015,
        arXiv:1512.00567, section 3.1).
      unit: makes a convolution unit, given features, kernel size and name.
      rewrite: see `ops.max_pool` and `ops.joins_first`.
    """

    widths: InceptionWidths
    conv5x5: str
    unit: Unit
    rewrite: ops.Rewrite = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, I] to [B, H, W, sum of the four branches]."""
        widths, unit = self.widths, self.unit
        last = functools.partial(unit, defer=ops.joins_first(self.rewrite))
        branch_1x1 = last(widths.conv_1x1, name="conv_1x1")(x)
        branch_3x3 = unit(widths.reduce_3x3, name="reduce_3x3")(x)
        branch_3x3 = last(widths.conv_3x3, 3, name="conv_3x3")(branch_3x3)
        branch_5x5 = unit(widths.reduce_5x5, name="reduce_5x5")(x)
        if self.conv5x5 == "two_3x3":
            branch_5x5 = unit(widths.conv_5x5, 3, name="conv_5x5_first")(branch_5x5)
        kernel_size = 5 if self.conv5x5 == "5x5" else 3
        branch_5x5 = last(widths.conv_5x5, kernel_size, name="conv_5x5")(branch_5x5)
        branch_pool = ops.max_pool(x, window=3, stride=1, rewrite=self.rewrite)
        branch_pool = last(widths.pool_proj, name="pool_proj")(branch_pool)
        return concatenate([branch_1x1, branch_3x3, branch_5x5, branch_pool])


class Classifier(nn.Module):
    """Dropout and the last dense layer, in float32 so that the logits are exact.

    Attributes:
      num_classes: number of logits.
      dropout: fraction of features dropped in training.
      train: whether to apply dropout.
    """

    num_classes: int
    dropout: float
    train: bool

    @nn.compact
    def __call__(self, features: jax.Array) -> jax.Array:
        """Maps float [B, C] to float32 [B, num_classes]."""
        features = features.astype(jnp.float32)
        features = nn.Dropout(self.dropout, deterministic=not self.train)(features)
        return nn.Dense(self.num_classes, name="dense")(features)


class AuxiliaryHead(nn.Module):
    """A classifier on a middle layer (Szegedy et al. 2014, section 5).

    The paper's head averages 5x5 windows at stride 3, so the shapes of its parameters depend on the
    image size. If the feature map is smaller than 5 pixels (64 px images), the window covers all of
    it. torchvision's head averages a feature map of any size to 4x4.

    Attributes:
      num_classes: number of logits.
      conv_features: channels of the 1x1 convolution.
      dense_features: size of the hidden dense layer.
      dropout: fraction of hidden features dropped in training.
      adaptive: whether to pool like torchvision instead of the paper.
      unit: makes a convolution unit, given features, kernel size and name.
      dtype: compute dtype.
      train: whether to apply dropout.
    """

    num_classes: int
    conv_features: int
    dense_features: int
    dropout: float
    adaptive: bool
    unit: Unit
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, C] to float32 [B, num_classes]."""
        if self.adaptive:
            x = adaptive_average_pool(x, 4)
        else:
            window = min(5, *x.shape[1:3])
            x = average_pool(x, window=window, stride=3)
        x = self.unit(self.conv_features, name="conv")(x)
        x = x.reshape(x.shape[0], -1)
        x = nn.Dense(self.dense_features, dtype=self.dtype, kernel_init=he_normal, name="hidden")(x)
        x = nn.relu(x)
        return Classifier(self.num_classes, self.dropout, self.train, name="classifier")(x)


def average_pool(x: jax.Array, *, window: int, stride: int) -> jax.Array:
    """Averages the square windows that fit inside the image.

    Args:
      x: float [B, H, W, C].
      window: side of the window in pixels.
      stride: distance between windows in pixels.

    Returns:
      float [B, floor((H - window) / stride) + 1, ..., C].
    """
    total = lax.reduce_window(
        x, np.zeros((), x.dtype), lax.add, (1, window, window, 1), (1, stride, stride, 1), "VALID"
    )
    return total / window**2


def adaptive_average_pool(x: jax.Array, size: int) -> jax.Array:
    """Averages a feature map of any size to `size` x `size`, like torch's AdaptiveAvgPool2d.

    Args:
      x: float [B, H, W, C].
      size: output side in pixels.

    Returns:
      float [B, size, size, C]; window i covers floor(i H / size) to ceil((i + 1) H / size).
    """

    def weights(length: int) -> jax.Array:
        matrix = np.zeros((size, length), np.float32)
        for row in range(size):
            first, end = row * length // size, -(-(row + 1) * length // size)
            matrix[row, first:end] = 1 / (end - first)
        return jnp.asarray(matrix, x.dtype)

    return jnp.einsum("bhwc,ih,jw->bijc", x, weights(x.shape[1]), weights(x.shape[2]))


def local_response_norm(x: jax.Array) -> jax.Array:
    """Normalizes each channel by its neighbors' energy (Krizhevsky et al. 2012, section 3.3).

    Uses the constants of the GoogLeNet released with Caffe: size 5, alpha 1e-4 (divided by the
    size), beta 0.75, k 1.

    Args:
      x: float [B, H, W, C].

    Returns:
      x / (1 + 1e-4 / 5 * sum of squares over 5 channels) ** 0.75, in the dtype of x.
    """
    # In bfloat16, adding the small sum to 1 would round it away.
    wide = x.astype(jnp.float32)
    energy = lax.reduce_window(
        wide * wide, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), ((0, 0), (0, 0), (0, 0), (2, 2))
    )
    return (wide * (1.0 + 1e-4 / 5 * energy) ** -0.75).astype(x.dtype)


def scale_channels(channels: int, width: float) -> int:
    """Returns a layer's number of channels under a width multiplier: rounded, and at least 1.

    >>> scale_channels(64, 0.25), scale_channels(3, 0.1)
    (16, 1)
    """
    return max(1, round(channels * width))


def check_image_size(images: jax.Array, *, min_size: int, model: str) -> None:
    """Checks that images [B, H, W, 3] are large enough for a network.

    Raises:
      ConfigError: if a side is less than `min_size` pixels.
    """
    height, width = images.shape[1:3]
    if min(height, width) < min_size:
        raise ConfigError(
            f"images of {height} x {width} px: must be at least {min_size} x {min_size} px for "
            f"{model}; increase config.data.image_size, or use a model or stem that downsamples "
            "less"
        )
