"""Kernels that do not start at random: identity convolutions, and a whitening first convolution.

Both are from Jordan 2024, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", arXiv:2404.00498, and
legacy/airbench94.py in KellerJordan/cifar10-airbench.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from inception_jax.datasets.dataset import Dataset
from inception_jax.errors import ConfigError
from inception_jax.models import protocol, weights
from inception_jax.runtime import hosts
from inception_jax.training.run import Run

# Training images from which the filters of the first convolution are computed, and patches of each:
# 1.3 million patches at most, of which 147 numbers take a few seconds.
_IMAGES, _PATCHES_PER_SIDE = 5000, 16
# Added to the variances, as in the source: of normalized pixels, less than noise of compression.
_EPSILON = 5e-4


def with_identity(network: nn.Module, params: Any) -> Any:
    """Returns parameters whose convolutions begin by passing their input on.

    Output channel i of each convolution larger than 1x1, except the first, becomes a copy of input
    channel i, for as many channels as both have; further output channels keep their random kernels.
    Convolutions of 1x1 stay random: all branches of an inception module would otherwise begin with
    the same few channels, and the others would reach none of them.

    `Conv.reset_parameters` of the source, whose network has no 1x1 convolutions.

    Args:
      network: the network; declares `first_conv`.
      params: its initial parameters.

    Raises:
      ConfigError: if the network does not declare its first convolution.
    """
    first = protocol.require_attribute(network, "first_conv", "config.init.identity_convs = True")

    def start(path: str, leaf: jax.Array) -> jax.Array:
        is_spatial = protocol.is_kernel(path, leaf) and leaf.ndim == 4 and leaf.shape[:2] != (1, 1)
        return _identity(leaf) if is_spatial and not protocol.is_inside(path, first) else leaf

    return protocol.label_params(params, start)


def _identity(kernel: jax.Array) -> jax.Array:
    """Returns a kernel [H, W, I, O] whose first min(I, O) outputs are copies of the inputs."""
    height, width, inputs, outputs = kernel.shape
    copied = np.arange(min(inputs, outputs))
    identity = np.zeros((height, width, inputs, len(copied)), np.float32)
    identity[height // 2, width // 2, copied, copied] = 1
    return jnp.concatenate([identity, kernel[..., len(copied) :]], axis=-1)


def whitening_filters(dataset: Dataset, size: int, count: int) -> np.ndarray:
    """Returns filters whose responses to patches of training images are uncorrelated.

    They are the eigenvectors of the patches' second moment, divided by the roots of its eigenvalues
    + 5e-4, the largest first: each has a mean square response of almost 1. Patches come from a
    regular grid in 5,000 images, spread evenly over the training split and normalized as in
    training, at data.image_size (`init_whitening_conv` of the source).

    Args:
      dataset: the data set.
      size: side of the filters, pixels.
      count: number of filters, at most 3 * size**2.

    Returns:
      float32 [size, size, 3, count]; the largest weight of each filter is positive.
    """
    moment, patches = np.zeros((3 * size**2, 3 * size**2)), 0
    chosen = np.unique(np.linspace(0, len(dataset.train) - 1, _IMAGES, dtype=np.int64))
    for indices in np.array_split(chosen, -(-len(chosen) // 500)):
        images = (dataset.train.read(indices) / 255 - dataset.mean) / dataset.std
        windows = np.lib.stride_tricks.sliding_window_view(images, (size, size), axis=(1, 2))
        step = -(-windows.shape[1] // _PATCHES_PER_SIDE)
        # [N, H, W, 3, size, size] → [patches, size * size * 3]
        flat = windows[:, ::step, ::step].transpose(0, 1, 2, 4, 5, 3).reshape(-1, len(moment))
        moment, patches = moment + flat.T @ flat, patches + len(flat)
    values, vectors = np.linalg.eigh(moment / patches)
    vectors = vectors[:, ::-1] / np.sqrt(values[::-1] + _EPSILON)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    filters = (vectors * np.sign(largest))[:, :count]
    return filters.reshape(size, size, 3, count).astype(np.float32)


def whitened_channels(kernel_shape: tuple[int, ...]) -> int:
    """Returns how many channels of the first convolution are filters or their negatives.

    >>> whitened_channels((3, 3, 3, 64)), whitened_channels((7, 7, 3, 64))
    (54, 64)
    """
    *window, outputs = kernel_shape
    return 2 * min(int(np.prod(window)), outputs // 2)


def whitened(run: Run, params: Any) -> dict[str, np.ndarray]:
    """Returns the first convolution's kernel with whitening filters, by path.

    The first half of `whitened_channels` are the filters, the second half their negatives, which a
    ReLU would otherwise discard; further channels keep their random kernels, and are trained. A 3x3
    kernel of 64 channels holds all 27 filters in both signs, the paper's 7x7 kernel the first 32 of
    147. All processes use the filters that the first one computes.

    Args:
      run: the run; its network declares `first_conv`.
      params: its initial parameters.

    Raises:
      ConfigError: if the network does not declare its first convolution, or that is not a square
        one of the image's three channels.
    """
    path = f"params/{_first_conv(run)}/kernel"
    kernel = np.asarray(weights.flatten({"params": params})[path])
    if kernel.ndim != 4 or kernel.shape[:3] != (kernel.shape[0], kernel.shape[0], 3):
        raise ConfigError(
            f"config.init.whiten = True: needs a first convolution with a kernel [H, H, 3, O], but "
            f"that of {run.model_name} is {list(kernel.shape)}; set it to False"
        )
    channels = whitened_channels(kernel.shape)
    filters = whitening_filters(run.dataset, kernel.shape[0], channels // 2)
    shared = hosts.gather("whitening filters", filters.tolist())[0]
    filters = np.asarray(shared, np.float32).reshape(filters.shape)
    return {path: np.concatenate([filters, -filters, kernel[..., channels:]], axis=-1)}


def make_freeze(run: Run) -> Callable[[Any, jax.Array], Any]:
    """Returns a function that stops the training of what config.init.whiten does not train.

    It maps gradients or updates, and the number of finished steps, to the same with zeros for the
    whitening filters and, after config.init.whiten_bias, for their biases and BatchNorm scales.

    Args:
      run: the run; its network declares `first_conv`.

    Raises:
      ConfigError: if the network does not declare its first convolution.
    """
    conv, norm = _first_conv(run), protocol.get_attribute(run.model, "first_norm", "")
    following = {f"{conv}/bias", f"{norm}/scale", f"{norm}/bias"}
    bias_steps = run.timeline.steps(run.config.init.whiten_bias)

    def freeze(tree: Any, step: jax.Array) -> Any:
        channels = whitened_channels(weights.flatten(tree)[f"{conv}/kernel"].shape)

        def of_leaf(path: str, leaf: jax.Array) -> jax.Array:
            whitening = np.broadcast_to(np.arange(leaf.shape[-1]) < channels, leaf.shape)
            if path == f"{conv}/kernel":
                return jnp.where(whitening, 0.0, leaf)
            if path in following and bias_steps:
                return jnp.where(whitening & (step >= bias_steps), 0.0, leaf)
            return leaf

        return protocol.label_params(tree, of_leaf)

    return freeze


def _first_conv(run: Run) -> str:
    path: str = protocol.require_attribute(run.model, "first_conv", "config.init.whiten = True")
    return path
