"""The widths of GoogLeNet with BatchNorm, for the peers and for counting operations.

The peers' interpreters may lack JAX, so this repeats the widths of
`inception_jax.models.googlenet`. The benchmarks compare the parameter counts of all contenders with
`parameters`, and a test compares it with our network.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Stem(NamedTuple):
    """Kernel size and stride of the first convolution, and whether a second pool follows."""

    kernel_size: int
    stride: int
    second_pool: bool


STEMS = {"paper": Stem(7, 2, True), "s16": Stem(3, 1, True), "s32": Stem(3, 1, False)}

# 1x1, reduction before 3x3, 3x3, reduction before 5x5, 5x5, projection after the pool; a pool of
# stride 2 follows 3b and 4e.
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
POOL_AFTER = ("3b", "4e")
NORM_EPSILON = 1e-3
NORM_MOMENTUM = 0.9
DROPOUT = 0.4
# Low, so that hundreds of steps on one batch of noise stay finite.
LEARNING_RATE = 0.01
MOMENTUM = 0.9


class Conv(NamedTuple):
    """A convolution: kernel size, input and output channels, side of the output grid."""

    kernel_size: int
    inputs: int
    outputs: int
    grid: int

    @property
    def weights(self) -> int:
        """The number of weights of the kernel."""
        return self.kernel_size**2 * self.inputs * self.outputs


def convolutions(stem: str, image_size: int, width: float = 1.0) -> Iterator[Conv]:
    """Yields the convolutions in order.

    Args:
      stem: a key of `STEMS`.
      image_size: side of the images, pixels.
      width: multiplier of the channels of all layers.
    """

    def scaled(channels: int) -> int:
        return max(1, round(channels * width))

    first = STEMS[stem]
    grid = (image_size - 1) // first.stride + 1
    yield Conv(first.kernel_size, 3, scaled(64), grid)
    grid //= 2
    yield Conv(1, scaled(64), scaled(64), grid)
    yield Conv(3, scaled(64), scaled(192), grid)
    if first.second_pool:
        grid //= 2
    inputs = scaled(192)
    for name, widths in MODULES.items():
        one, reduce3, three, reduce5, five, pool = map(scaled, widths)
        yield Conv(1, inputs, one, grid)
        yield Conv(1, inputs, reduce3, grid)
        yield Conv(3, reduce3, three, grid)
        yield Conv(1, inputs, reduce5, grid)
        yield Conv(5, reduce5, five, grid)
        yield Conv(1, inputs, pool, grid)
        inputs = one + three + five + pool
        if name in POOL_AFTER:
            grid //= 2


def features(width: float = 1.0) -> int:
    """Returns the number of input channels of the last layer."""
    one, _, three, _, five, pool = (max(1, round(each * width)) for each in MODULES["5b"])
    return one + three + five + pool


def parameters(stem: str, classes: int, width: float = 1.0) -> int:
    """Returns the number of parameters: kernels, BatchNorm's scales and biases, the last layer."""
    # The image size does not affect the parameters.
    layers = list(convolutions(stem, 64, width))
    norms = sum(2 * layer.outputs for layer in layers)
    return sum(layer.weights for layer in layers) + norms + (features(width) + 1) * classes


def multiply_adds(stem: str, image_size: int, classes: int, width: float = 1.0) -> int:
    """Returns the multiply-adds per image of the forward pass: convolutions and last layer."""
    layers = convolutions(stem, image_size, width)
    return sum(layer.weights * layer.grid**2 for layer in layers) + features(width) * classes


def flops(mode: str, stem: str, image_size: int, classes: int, width: float = 1.0) -> int:
    """Returns the operations per image: two per multiply-add, three passes in training.

    In addition to the forward pass, a training step computes the gradients of the activations and
    of the weights, each as much work as the forward pass.
    """
    passes = {"eval": 1, "train": 3}[mode]
    return 2 * passes * multiply_adds(stem, image_size, classes, width)
