"""GoogLeNet (Inception v1) and its relatives.

Szegedy et al. 2014, "Going Deeper with Convolutions", arXiv:1409.4842. One module covers them all,
since they differ only in the first layers, the number of inception modules and a few details;
`networks` names the combinations.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from inception_jax.models import ops
from inception_jax.models.layers import (
    AuxiliaryHead,
    Classifier,
    ConvUnit,
    Inception,
    InceptionWidths,
    ModelOutput,
    Unit,
    check_image_size,
    local_response_norm,
    scale_channels,
)


class Stem(NamedTuple):
    """The layers before the first inception module: convolution, pool, two convolutions, pool.

    Attributes:
      kernel_size, stride: of the first convolution, which has 64 channels.
      reduce: channels of the second convolution, 1x1.
      features, second_kernel_size: of the third convolution.
      second_pool: whether a pool precedes the first inception module.
    """

    kernel_size: int
    stride: int
    reduce: int = 64
    features: int = 192
    second_kernel_size: int = 3
    second_pool: bool = True


class Pool(NamedTuple):
    """Max pooling over square windows at stride 2.

    Attributes:
      window: side in pixels.
    """

    window: int = 3


STEM_SPECS: Mapping[str, Stem] = {
    "paper": Stem(kernel_size=7, stride=2),
    "s16": Stem(kernel_size=3, stride=1),
    "s32": Stem(kernel_size=3, stride=1, second_pool=False),
    "deeper": Stem(kernel_size=5, stride=1),
    "eight_module": Stem(3, 1, reduce=32, features=128, second_kernel_size=5),
}

# Table 1 of the paper, starting at the first inception module.
PAPER_BODY: Mapping[str, InceptionWidths | Pool] = {
    "3a": InceptionWidths(64, 96, 128, 16, 32, 32),
    "3b": InceptionWidths(128, 128, 192, 32, 96, 64),
    "pool3": Pool(),
    "4a": InceptionWidths(192, 96, 208, 16, 48, 64),
    "4b": InceptionWidths(160, 112, 224, 24, 64, 64),
    "4c": InceptionWidths(128, 128, 256, 24, 64, 64),
    "4d": InceptionWidths(112, 144, 288, 32, 64, 64),
    "4e": InceptionWidths(256, 160, 320, 32, 128, 128),
    "pool4": Pool(),
    "5a": InceptionWidths(256, 160, 320, 32, 128, 128),
    "5b": InceptionWidths(384, 192, 384, 48, 128, 128),
}
# The layers between the stem and the global average pool.
BODIES: Mapping[str, Mapping[str, InceptionWidths | Pool]] = {
    "paper": PAPER_BODY,
    "torchvision": {**PAPER_BODY, "pool4": Pool(window=2)},
    "deeper": {name: layer for name, layer in PAPER_BODY.items() if name not in ("5a", "5b")},
    "eight_module": {
        "3a": InceptionWidths(32, 64, 128, 16, 32, 16),
        "3b": InceptionWidths(64, 128, 256, 32, 64, 32),
        "3c": InceptionWidths(32, 64, 128, 16, 32, 16),
        "pool3": Pool(),
        "4a": InceptionWidths(64, 128, 256, 32, 64, 32),
        "4b": InceptionWidths(128, 256, 512, 64, 128, 64),
        "4c": InceptionWidths(256, 512, 768, 128, 256, 128),
        "4d": InceptionWidths(128, 256, 512, 64, 128, 64),
        "4e": InceptionWidths(64, 128, 256, 32, 64, 32),
        "pool4": Pool(),
    },
}
AUX_MODULES = ("4a", "4d")


class GoogLeNet(nn.Module):
    """GoogLeNet, configurable as any of its relatives.

    Kernels are initialized from He's truncated normal (see `layers.he_normal`), biases to 0 and
    BatchNorm scales to 1.

    Attributes:
      num_classes: number of logits.
      stem: key of `STEM_SPECS`.
      body: key of `BODIES`.
      conv5x5: convolutions of the 5x5 branch: "5x5", "3x3" or "two_3x3".
      norm: "batch", "lrn" (the stem's two local response normalizations, and biases) or "none"
        (biases).
      norm_momentum: fraction of BatchNorm's running statistics kept at each step.
      norm_epsilon: added to BatchNorm's variance.
      norm_group_size: images that BatchNorm normalizes together; 0: the whole batch.
      width: multiplier on every layer's number of channels.
      aux_heads: whether training uses the two auxiliary heads.
      adaptive_aux: whether the heads pool like torchvision's.
      dropout, aux_dropout: fraction of features dropped before the last layer, and in the heads.
      dtype: compute dtype.
      rewrite: whose equivalents in `ops` are used.
    """

    first_conv = "conv1/conv"
    first_norm = "conv1/norm"

    num_classes: int
    stem: str = "paper"
    body: str = "paper"
    conv5x5: str = "5x5"
    norm: str = "batch"
    norm_momentum: float = 0.9
    norm_epsilon: float = 1e-3
    norm_group_size: int = 0
    width: float = 1.0
    aux_heads: bool = False
    adaptive_aux: bool = False
    dropout: float = 0.4
    aux_dropout: float = 0.7
    dtype: Any = jnp.float32
    rewrite: ops.Rewrite = ""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        """Computes the logits.

        Args:
          images: float32 [B, H, W, 3], normalized.
          train: whether to apply dropout, use batch statistics and run the auxiliary heads.

        Returns:
          The logits, float32 [B, num_classes], and in training also those of the auxiliary heads.

        Raises:
          ConfigError: if the images are smaller than `min_image_size`.
        """
        check_image_size(
            images, min_size=self.min_image_size, model=f"GoogLeNet with the stem {self.stem!r}"
        )
        unit = functools.partial(
            ConvUnit,
            dtype=self.dtype,
            batch_norm=self.norm == "batch",
            momentum=self.norm_momentum,
            epsilon=self.norm_epsilon,
            train=train,
            rewrite=self.rewrite,
            group_size=self.norm_group_size,
        )
        x = self._stem(images, unit)
        aux = []
        for name, layer in BODIES[self.body].items():
            if isinstance(layer, Pool):
                x = self._pool(x, layer.window)
                continue
            x = self._inception(name, layer, unit)(x)
            # The heads need their parameters even when evaluation code initializes the model.
            if self.aux_heads and name in AUX_MODULES and (train or self.is_initializing()):
                aux.append(self._head(name, unit, train)(x))
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        logits = Classifier(self.num_classes, self.dropout, train, name="classifier")(x)
        return ModelOutput(logits, tuple(aux))

    @property
    def min_image_size(self) -> int:
        """The smallest image side, in pixels, that leaves one pixel in the last feature map."""
        stem = STEM_SPECS[self.stem]
        pools = [Pool()] * (2 if stem.second_pool else 1)
        pools += [layer for layer in BODIES[self.body].values() if isinstance(layer, Pool)]
        # A window of 3 at stride 2 maps 2 m pixels to m; a window of 2, or a stride of the first
        # convolution, maps 2 m - 1.
        size = 1
        for pool in reversed(pools):
            size = 2 * size - (3 - pool.window)
        return size * stem.stride - (stem.stride - 1)

    @property
    def heads(self) -> tuple[str, ...]:
        """Paths of the auxiliary heads (see `protocol`)."""
        return tuple(f"aux_{name}" for name in AUX_MODULES if name in BODIES[self.body])

    @property
    def classifiers(self) -> tuple[str, ...]:
        """Paths of the layers that compute logits."""
        return ("classifier/dense", *(f"{head}/classifier/dense" for head in self.heads))

    def _stem(self, images: jax.Array, unit: Unit) -> jax.Array:
        """Maps images [B, H, W, 3] to the first inception module's input."""
        stem = STEM_SPECS[self.stem]
        x = unit(scale_channels(64, self.width), stem.kernel_size, stem.stride, name="conv1")(
            images
        )
        x = self._pool(x)
        if self.norm == "lrn":
            x = local_response_norm(x)
        x = unit(scale_channels(stem.reduce, self.width), name="conv2_reduce")(x)
        x = unit(scale_channels(stem.features, self.width), stem.second_kernel_size, name="conv2")(
            x
        )
        if self.norm == "lrn":
            x = local_response_norm(x)
        return self._pool(x) if stem.second_pool else x

    def _pool(self, x: jax.Array, window: int = 3) -> jax.Array:
        return ops.max_pool(x, window=window, stride=2, rewrite=self.rewrite)

    def _inception(self, name: str, widths: InceptionWidths, unit: Unit) -> Inception:
        widths = InceptionWidths(*(scale_channels(channels, self.width) for channels in widths))
        return Inception(widths, self.conv5x5, unit, self.rewrite, name=f"inception_{name}")

    def _head(self, name: str, unit: Unit, train: bool) -> AuxiliaryHead:
        return AuxiliaryHead(
            num_classes=self.num_classes,
            conv_features=scale_channels(128, self.width),
            dense_features=scale_channels(1024, self.width),
            dropout=self.aux_dropout,
            adaptive=self.adaptive_aux,
            unit=unit,
            dtype=self.dtype,
            train=train,
            name=f"aux_{name}",
        )
