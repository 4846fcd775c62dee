"""MiniGoogLeNet, the small Inception network for CIFAR-size images.

Zhang et al. 2017, "Understanding deep learning requires rethinking generalization",
arXiv:1611.03530, figure 3.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from inception_jax.models import ops
from inception_jax.models.layers import (
    Classifier,
    ConvUnit,
    ModelOutput,
    Unit,
    check_image_size,
    concatenate,
    scale_channels,
)


class MiniGoogLeNet(nn.Module):
    """MiniGoogLeNet: 1.65 M parameters at 10 classes.

    Kernels are initialized from He's truncated normal and BatchNorm scales to 1.

    Attributes:
      num_classes: number of logits.
      norm_momentum: fraction of BatchNorm's running statistics kept at each step.
      norm_epsilon: added to BatchNorm's variance.
      norm_group_size: images that BatchNorm normalizes together; 0: the whole batch.
      width: multiplier on every layer's number of channels.
      dropout: fraction of features dropped before the last layer; the paper has none.
      dtype: compute dtype.
      rewrite: whose equivalents in `ops` are used.
    """

    min_image_size = 4  # Halved twice, it leaves one pixel.
    first_conv = "conv1/conv"
    first_norm = "conv1/norm"
    classifiers = ("classifier/dense",)

    num_classes: int
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-3
    norm_group_size: int = 0
    width: float = 1.0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    rewrite: ops.Rewrite = ""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        """Computes the logits.

        Args:
          images: float32 [B, H, W, 3], normalized; 28 px in the paper, 32 px for CIFAR.
          train: whether to apply dropout and use batch statistics.

        Returns:
          The logits, float32 [B, num_classes].

        Raises:
          ConfigError: if the images are smaller than `min_image_size`.
        """
        check_image_size(images, min_size=self.min_image_size, model="MiniGoogLeNet")
        unit = functools.partial(
            ConvUnit,
            dtype=self.dtype,
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            train=train,
            rewrite=self.rewrite,
            group_size=self.norm_group_size,
        )
        x = unit(scale_channels(96, self.width), 3, name="conv1")(images)
        x = self._inception("2a", 32, 32, unit)(x)
        x = self._inception("2b", 32, 48, unit)(x)
        x = self._downsample("2c", 80, unit)(x)
        x = self._inception("3a", 112, 48, unit)(x)
        x = self._inception("3b", 96, 64, unit)(x)
        x = self._inception("3c", 80, 80, unit)(x)
        x = self._inception("3d", 48, 96, unit)(x)
        x = self._downsample("3e", 96, unit)(x)
        x = self._inception("4a", 176, 160, unit)(x)
        x = self._inception("4b", 176, 160, unit)(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = Classifier(self.num_classes, self.dropout, train, name="classifier")(x)
        return ModelOutput(logits)

    def _inception(self, name: str, conv_1x1: int, conv_3x3: int, unit: Unit) -> "MiniInception":
        features = scale_channels(conv_1x1, self.width), scale_channels(conv_3x3, self.width)
        unit = functools.partial(unit, defer=ops.joins_first(self.rewrite))
        return MiniInception(*features, unit, name=f"inception_{name}")

    def _downsample(self, name: str, conv_3x3: int, unit: Unit) -> "Downsample":
        return Downsample(
            scale_channels(conv_3x3, self.width), unit, self.rewrite, name=f"downsample_{name}"
        )


class MiniInception(nn.Module):
    """A 1x1 and a 3x3 convolution in parallel.

    Attributes:
      conv_1x1, conv_3x3: output channels of the two.
      unit: makes a convolution unit, given features, kernel size and name.
    """

    conv_1x1: int
    conv_3x3: int
    unit: Unit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, I] to [B, H, W, conv_1x1 + conv_3x3]."""
        branch_1x1 = self.unit(self.conv_1x1, name="conv_1x1")(x)
        branch_3x3 = self.unit(self.conv_3x3, 3, name="conv_3x3")(x)
        return concatenate([branch_1x1, branch_3x3])


class Downsample(nn.Module):
    """A 3x3 convolution and a 3x3 max pool in parallel, both at stride 2.

    Both pad like `ops.max_pool`, so the size is halved: 28, 14, 7, as in the figure.

    Attributes:
      features: output channels of the convolution.
      unit: makes a convolution unit, given features, kernel size and name.
      rewrite: see `ops.max_pool`.
    """

    features: int
    unit: Unit
    rewrite: ops.Rewrite = ""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float [B, H, W, I] to [B, ceil((H - 1) / 2), ceil((W - 1) / 2), features + I]."""
        paddings = ops.pool_paddings(x.shape, window=3, stride=2)
        convolved = self.unit(self.features, 3, 2, paddings, name="conv_3x3")(x)
        pooled = ops.max_pool(x, window=3, stride=2, rewrite=self.rewrite)
        return jnp.concatenate([convolved, pooled], axis=-1)
