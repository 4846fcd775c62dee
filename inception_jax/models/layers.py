"""The layers that the networks are made of.

Parameters and BatchNorm statistics are float32 throughout; each layer computes in its `dtype`.
Every weight that multiplies activations is called "kernel", by which `protocol` knows it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from inception_jax.errors import ConfigError
from inception_jax.models import ops

# He et al. 2015 (arXiv:1502.01852), eq. 10: keeps the variance of activations through ReLU layers.
# Networks without BatchNorm need that most. Caffe's GoogLeNet starts from a Xavier variance, half
# of this, and biases of 0.2, but is given pixels of 0 to 255. On normalised images its logits
# hardly depend on the image, and it learns more slowly at the paper's learning rate of 0.01.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "truncated_normal")


class ModelOutput(NamedTuple):
    """What a network returns.

    Attributes:
      logits: float32 [B, K].
      aux: float32 [B, K] of each auxiliary head, the one nearest to the input first; empty unless
        the network has heads and is training.
    """

    logits: jax.Array
    aux: tuple[jax.Array, ...] = ()


class Conv(nn.Module):
    """Convolution with a square kernel, as `ops.conv`.

    Attributes:
      features: number of output channels.
      kernel_size: side of the kernel in pixels.
      stride: distance between windows in pixels.
      paddings: zeros around the image; None: half the kernel on all sides, which keeps the size at
        stride 1.
      use_bias: whether a bias is added.
      dtype: type to compute in.
      rewrite: as of `ops.conv`.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    paddings: ops.Paddings | None = None
    use_bias: bool = False
    dtype: Any = jnp.float32
    rewrite: bool = False

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


class BatchNormReLU(nn.Module):
    """BatchNorm (Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1) and ReLU.

    Parameters and running statistics are those of `flax.linen.BatchNorm`, of the same names.

    Attributes:
      momentum: share of the running statistics that a training step keeps.
      epsilon: added to the variance.
      train: whether batch statistics are used, and the running ones updated.
      rewrite: as of `ops.batch_norm_relu`.
    """

    momentum: float
    epsilon: float
    train: bool
    rewrite: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, C] to an array of the same shape and type."""
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        variance = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if not self.train:
            factor = scale * lax.rsqrt(variance.value + self.epsilon)
            return ops.affine_relu(x, factor, bias - mean.value * factor)
        x, batch_mean, batch_variance = ops.batch_norm_relu(
            x, scale, bias, epsilon=self.epsilon, rewrite=self.rewrite
        )
        if not self.is_initializing():
            for running, batch in ((mean, batch_mean), (variance, batch_variance)):
                running.value = self.momentum * running.value + (1 - self.momentum) * batch
        return x


class ConvUnit(nn.Module):
    """Convolution, BatchNorm and ReLU; or convolution with a bias and ReLU.

    Attributes:
      features, kernel_size, stride, paddings, dtype, rewrite: as in `Conv`.
      batch_norm: whether BatchNorm takes the place of the bias.
      momentum: share of the running statistics that a training step keeps.
      epsilon: added to the variance.
      train: whether batch statistics are used, and the running ones updated.
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
    rewrite: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, I] to `dtype` [B, H', W', features]."""
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
        return BatchNormReLU(self.momentum, self.epsilon, self.train, self.rewrite, name="norm")(x)


Unit = Callable[..., ConvUnit]


class InceptionWidths(NamedTuple):
    """Output channels of an inception module's layers, in the order of the paper's table 1."""

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
      conv5x5: what stands in the 5x5 branch: "5x5", "3x3" or "two_3x3" (Szegedy et al. 2015,
        arXiv:1512.00567, section 3.1).
      unit: makes a convolution unit, given features, kernel size and name.
      rewrite: as of `ops.max_pool`.
    """

    widths: InceptionWidths
    conv5x5: str
    unit: Unit
    rewrite: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, I] to [B, H, W, sum of the four branches]."""
        widths, unit = self.widths, self.unit
        branch_1x1 = unit(widths.conv_1x1, name="conv_1x1")(x)
        branch_3x3 = unit(widths.reduce_3x3, name="reduce_3x3")(x)
        branch_3x3 = unit(widths.conv_3x3, 3, name="conv_3x3")(branch_3x3)
        branch_5x5 = unit(widths.reduce_5x5, name="reduce_5x5")(x)
        if self.conv5x5 == "two_3x3":
            branch_5x5 = unit(widths.conv_5x5, 3, name="conv_5x5_first")(branch_5x5)
        kernel_size = 5 if self.conv5x5 == "5x5" else 3
        branch_5x5 = unit(widths.conv_5x5, kernel_size, name="conv_5x5")(branch_5x5)
        branch_pool = ops.max_pool(x, window=3, stride=1, rewrite=self.rewrite)
        branch_pool = unit(widths.pool_proj, name="pool_proj")(branch_pool)
        return jnp.concatenate([branch_1x1, branch_3x3, branch_5x5, branch_pool], axis=-1)


class Classifier(nn.Module):
    """Dropout and the last dense layer, in float32 so that the logits are exact.

    Attributes:
      num_classes: number of logits.
      dropout: share of features that training drops.
      train: whether to drop.
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

    The paper's head averages 5x5 windows at stride 3, so its parameters' shapes depend on the size
    of the images. On a grid of less than 5 pixels (images of 64 px) the window is the whole grid.
    torchvision's averages the grid to 4x4 whatever its size.

    Attributes:
      num_classes: number of logits.
      conv_features: channels of the 1x1 convolution.
      dense_features: size of the hidden dense layer.
      dropout: share of hidden features that training drops.
      adaptive: torchvision's pooling in place of the paper's.
      unit: makes a convolution unit, given features, kernel size and name.
      dtype: type to compute in.
      train: whether to drop.
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
    """Averages the square windows that lie inside the image.

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
    """Averages a grid of any size to `size` x `size`, as torch's AdaptiveAvgPool2d does.

    Args:
      x: float [B, H, W, C].
      size: side of the result.

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
    """Divides each channel by the energy of its neighbours (Krizhevsky et al. 2012, section 3.3).

    With the numbers of the GoogLeNet released with Caffe: size 5, alpha 1e-4 (divided by the size),
    beta 0.75, k 1.

    Args:
      x: float [B, H, W, C].

    Returns:
      x / (1 + 1e-4 / 5 * sum of squares over 5 channels) ** 0.75, of the type of x.
    """
    # In bfloat16 the sum next to 1 would be rounded away.
    wide = x.astype(jnp.float32)
    energy = lax.reduce_window(
        wide * wide, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), ((0, 0), (0, 0), (0, 0), (2, 2))
    )
    return (wide * (1.0 + 1e-4 / 5 * energy) ** -0.75).astype(x.dtype)


def scaled(channels: int, width: float) -> int:
    """Returns a layer's number of channels under a width multiplier: rounded, and at least 1."""
    return max(1, round(channels * width))


def check_image_size(images: jax.Array, *, least: int, model: str) -> None:
    """Refuses images on which the last grid would be empty.

    Raises:
      ConfigError: if a side of images [B, H, W, 3] is less than `least` pixels.
    """
    height, width = images.shape[1:3]
    if min(height, width) < least:
        raise ConfigError(
            f"images of {height} x {width} px are too small for {model}, which needs at least "
            f"{least} x {least} px: raise config.data.image_size, or take a model or stem that "
            "shrinks the image less"
        )
