"""Makes the network that a configuration names."""

from collections.abc import Callable, Mapping

import flax.linen as nn
import jax.numpy as jnp

from inception_jax import config
from inception_jax.models.googlenet import GoogLeNet
from inception_jax.models.mini_googlenet import MiniGoogLeNet


def googlenet(model: config.Model, num_classes: int) -> nn.Module:
    """Returns the paper's network, with its variations of stem, 5x5 branch, norm and width."""
    return GoogLeNet(
        num_classes=num_classes,
        stem=model.stem,
        width=model.width,
        five_by_five=model.five_by_five,
        norm=model.norm,
        norm_momentum=model.norm_momentum,
        norm_epsilon=model.norm_epsilon,
        aux_heads=model.aux_heads,
        dropout=model.dropout,
        aux_dropout=model.aux_dropout,
        dtype=jnp.dtype(model.dtype),
    )


def googlenet_torchvision(model: config.Model, num_classes: int) -> nn.Module:
    """Returns the network of torchvision.models.googlenet, whose weights fit it.

    It differs from the paper's in the 5x5 branch (3x3, pytorch/vision#906), in the fourth pool
    (2x2), in BatchNorm, and in the pooling of the auxiliary heads.
    """
    return GoogLeNet(
        num_classes=num_classes,
        last_window=2,
        five_by_five="3x3",
        adaptive_aux=True,
        width=model.width,
        norm_momentum=model.norm_momentum,
        norm_epsilon=model.norm_epsilon,
        aux_heads=model.aux_heads,
        dropout=model.dropout,
        aux_dropout=model.aux_dropout,
        dtype=jnp.dtype(model.dtype),
    )


def deeper_googlenet(model: config.Model, num_classes: int) -> nn.Module:
    """Returns DeeperGoogLeNet (Rosebrock, "Deep Learning for Computer Vision with Python").

    Made for the 64 px of Tiny ImageNet: a 5x5 first convolution at stride 1, and modules 3a to 4e.
    BatchNorm stands before the ReLU, as usual, where the book has it after.
    """
    return GoogLeNet(
        num_classes=num_classes,
        stem="deeper",
        last_module="4e",
        width=model.width,
        norm_momentum=model.norm_momentum,
        norm_epsilon=model.norm_epsilon,
        dropout=model.dropout,
        dtype=jnp.dtype(model.dtype),
    )


def mini_googlenet(model: config.Model, num_classes: int) -> nn.Module:
    """Returns MiniGoogLeNet for images of about 32 px."""
    return MiniGoogLeNet(
        num_classes=num_classes,
        width=model.width,
        norm_momentum=model.norm_momentum,
        norm_epsilon=model.norm_epsilon,
        dropout=model.dropout,
        dtype=jnp.dtype(model.dtype),
    )


REGISTRY: Mapping[str, Callable[[config.Model, int], nn.Module]] = {
    "googlenet": googlenet,
    "googlenet_torchvision": googlenet_torchvision,
    "deeper_googlenet": deeper_googlenet,
    "mini_googlenet": mini_googlenet,
}


def create(model: config.Model, num_classes: int) -> nn.Module:
    """Returns the network that `model.name` names.

    The network is called as `module.apply(variables, images, train=train, rngs={"dropout": key},
    mutable=["batch_stats"])` with images float32 [B, H, W, 3], and returns a `layers.ModelOutput`.

    Args:
      model: the validated settings of the network.
      num_classes: number of logits.
    """
    return REGISTRY[model.name](model, num_classes)
