"""Makes the network that a configuration names."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from inception_jax import config
from inception_jax.errors import ConfigError
from inception_jax.models import ops
from inception_jax.models.googlenet import GoogLeNet
from inception_jax.models.mini_googlenet import MiniGoogLeNet

Network = GoogLeNet | MiniGoogLeNet


def _shared(model: config.Model, num_classes: int) -> dict[str, Any]:
    """Returns the attributes that every network has."""
    return {
        "num_classes": num_classes,
        "width": model.width,
        "norm_momentum": model.norm_momentum,
        "norm_epsilon": model.norm_epsilon,
        "dropout": model.dropout,
        "dtype": jnp.dtype(ops.auto_dtype() if model.dtype == "auto" else model.dtype),
    }


def _heads(model: config.Model) -> dict[str, Any]:
    """Returns the attributes of the networks that can have auxiliary heads."""
    return {"aux_heads": model.aux_heads, "aux_dropout": model.aux_dropout}


def googlenet(model: config.Model, num_classes: int) -> Network:
    """Returns the paper's network, with its variations of stem, 5x5 branch, norm and width."""
    return GoogLeNet(
        stem=model.stem,
        five_by_five=model.five_by_five,
        norm=model.norm,
        **_heads(model),
        **_shared(model, num_classes),
    )


def googlenet_torchvision(model: config.Model, num_classes: int) -> Network:
    """Returns the network of torchvision.models.googlenet, whose weights fit it.

    It differs from the paper's in the 5x5 branch (3x3, pytorch/vision#906), in the fourth pool
    (2x2), in BatchNorm, and in the pooling of the auxiliary heads.
    """
    return GoogLeNet(
        body="torchvision",
        five_by_five="3x3",
        adaptive_aux=True,
        **_heads(model),
        **_shared(model, num_classes),
    )


def deeper_googlenet(model: config.Model, num_classes: int) -> Network:
    """Returns DeeperGoogLeNet (Rosebrock, "Deep Learning for Computer Vision with Python").

    Made for the 64 px of Tiny ImageNet: a 5x5 first convolution at stride 1, and modules 3a to 4e.
    BatchNorm stands before the ReLU, as usual, where the book has it after.
    """
    return GoogLeNet(stem="deeper", body="deeper", **_shared(model, num_classes))


def eight_module_googlenet(model: config.Model, num_classes: int) -> Network:
    """Returns the network of ankit16-py/GoogLeNet-on-Tiny-ImageNet-from-scratch (as of 2020-11-16).

    Made for the 64 px of Tiny ImageNet: a 3x3 first convolution at stride 1, a 5x5 third one, and
    eight modules of its own, on grids of 16 and 8, of which the sixth is the widest (1,408
    channels). BatchNorm stands before the ReLU, as usual, where the source has it after, and its
    convolutions have no biases. So at 200 classes it has 10,716,744 parameters; the source's biases
    make 6,880 more, and Keras counts 13,760 running statistics besides.
    """
    return GoogLeNet(stem="eight_module", body="eight_module", **_shared(model, num_classes))


def mini_googlenet(model: config.Model, num_classes: int) -> Network:
    """Returns MiniGoogLeNet for images of about 32 px."""
    return MiniGoogLeNet(**_shared(model, num_classes))


REGISTRY: Mapping[str, Callable[[config.Model, int], Network]] = {
    "googlenet": googlenet,
    "googlenet_torchvision": googlenet_torchvision,
    "deeper_googlenet": deeper_googlenet,
    "eight_module_googlenet": eight_module_googlenet,
    "mini_googlenet": mini_googlenet,
}


def create(model: config.Model, num_classes: int) -> Network:
    """Returns the network that `model.name` names.

    The network is called as `module.apply(variables, images, train=train, rngs={"dropout": key},
    mutable=["batch_stats"])` with images float32 [B, H, W, 3], and returns a `layers.ModelOutput`.

    Args:
      model: the validated settings of the network.
      num_classes: number of logits.

    Raises:
      ConfigError: if there is no network of that name, or there are no classes.
    """
    if model.name not in REGISTRY:
        raise ConfigError(
            f"config.model.name = {model.name!r}: no network is registered under this name. "
            f"Registered: {', '.join(REGISTRY)}. One of your own is known once the file that "
            "registers it is imported"
        )
    if num_classes < 1:
        raise ConfigError(
            f"model.name = {model.name!r}: a network needs at least one class, got {num_classes}. "
            "Weights without a classifier can only start a training: config.init.weights"
        )
    return REGISTRY[model.name](model, num_classes)
