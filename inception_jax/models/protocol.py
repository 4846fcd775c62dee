"""What the package has to know of a network besides its logits: the Protocol.

Any `flax.linen.Module` that `registry.register_model` takes is trained, evaluated, used and
exported to StableHLO. A network says more of itself by attributes, all of them optional; they are
fields of the module, properties, or set in the class's body. A path is that of a module or variable
inside the collection "params", with slashes::

    min_image_size: int           The least side of an image, pixels. Otherwise that of its
                                  registration.
    decays(path, leaf) -> bool    Whether weight decay takes a parameter. Otherwise it takes all of
                                  two axes or more that are called "kernel".
    first_conv: str               Path of the first convolution, which holds "kernel" and, without
                                  BatchNorm, "bias". Needed to start from weights of a data set
                                  of another mean, and by Muon.
    first_norm: str               Path of the BatchNorm after it, if there is one.
    classifiers: tuple[str, ...]  Paths of the dense layers that give logits, that of the network
                                  itself first. Needed to start from weights of other classes, and
                                  by Muon.
    heads: tuple[str, ...]        Paths of the modules that only training computes, whether this
                                  instance has them or not. Otherwise there are none.
    norm_momentum: float          Share of BatchNorm's running statistics that a step keeps. Where
                                  it is not said, they are not corrected for the start of training
                                  (`training.ema.correct_start`), nor re-estimated
                                  (config.evaluation.norm_examples).
    dtype                         Type that it computes in; decides on options of the compiler.
    rewrite: bool                 A field; whether to compute by the equivalents of `models.ops` for
                                  the CPU. `networks.create` sets it.

To be drawn and counted layer by layer (tools.summarize), and to be exported to ONNX, it must be
made of operations that `inspection.structure` and `export.onnx_graph` know. Those say what they
miss.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from inception_jax.errors import ConfigError
from inception_jax.models.layers import ModelOutput


class Adapter(nn.Module):
    """A user's network, called as the package's own are; its variables stay where they are.

    Attributes:
      adapted_network: returns logits or a `ModelOutput`. A name that no submodule of a user's
        network has, as its submodules are in this module's scope.
      takes_train: whether it is told if it trains.
      called: its name, for messages.
      place: what registered it, or the argument that gave it, for messages.
      least: the least side of its images, pixels, where it does not say itself.
    """

    adapted_network: nn.Module
    takes_train: bool
    called: str
    place: str
    least: int = 1

    def setup(self) -> None:
        """Gives the network's variables the paths that they have without this module."""
        nn.share_scope(self, self.adapted_network)

    @property
    def dtype(self) -> Any:
        """The type that the network computes in; None: it does not say."""
        return getattr(self.adapted_network, "dtype", None)

    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        """Returns the logits of images, float32 [B, H, W, 3], normalised."""
        arguments = {"train": train} if self.takes_train else {}
        output: Any = self.adapted_network(images, **arguments)
        output = output if isinstance(output, ModelOutput) else ModelOutput(output)
        return jax.tree.map(
            lambda logits: (
                logits.astype(jnp.float32) if jnp.issubdtype(logits.dtype, jnp.floating) else logits
            ),
            output,
        )


def adapted(network: nn.Module, *, name: str, place: str, min_image_size: int = 1) -> Adapter:
    """Returns a network that is called as the package's own are.

    Args:
      network: returns logits or a `ModelOutput`.
      name, place, min_image_size: `called`, `place` and `least` of an `Adapter`.
    """
    if isinstance(network, Adapter):
        return network
    # One that takes any keyword, as nn.Sequential, hands them on to layers that do not know it.
    takes_train = "train" in inspect.signature(type(network).__call__).parameters
    return Adapter(network, takes_train, name, place, min_image_size)


def own(network: nn.Module) -> nn.Module:
    """Returns the network as it was registered."""
    return network.adapted_network if isinstance(network, Adapter) else network


def plain(network: nn.Module) -> nn.Module:
    """Returns a network that computes by plain operations, for readers and other libraries."""
    if isinstance(network, Adapter):
        return network.clone(adapted_network=plain(network.adapted_network))
    return network.clone(rewrite=False) if hasattr(network, "rewrite") else network


def said(network: nn.Module, attribute: str, default: Any = None) -> Any:
    """Returns what a network says of itself, or a default."""
    return getattr(own(network), attribute, default)


def needed(network: nn.Module, attribute: str, purpose: str) -> Any:
    """Returns what a network says of itself.

    Args:
      network: as `networks.create` returns it.
      attribute: of the Protocol.
      purpose: what needs it, for the message.

    Raises:
      ConfigError: if it does not say.
    """
    found = said(network, attribute)
    if found is None:
        raise ConfigError(
            f"{purpose} needs to know the network's {attribute}, and {type(own(network)).__name__} "
            f"does not say; give the class an attribute {attribute!r}, as inception_jax/models/"
            "protocol.py describes it"
        )
    return found


def min_image_size(network: nn.Module) -> int:
    """Returns the least side of an image that a network takes, pixels."""
    registered = network.least if isinstance(network, Adapter) else 1
    return int(said(network, "min_image_size", registered))


def is_inside(path: str, *modules: str) -> bool:
    """Whether a variable belongs to one of some modules."""
    return any(path.startswith(f"{module}/") for module in modules)


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether a parameter multiplies activations, by its name and shape."""
    return path.rpartition("/")[2] == "kernel" and leaf.ndim >= 2


def labelled(params: Any, label: Callable[[str, Any], Any]) -> Any:
    """Returns a tree of the labels that a function of path and leaf gives parameters."""

    def of_leaf(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        return label(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def decay_mask(network: nn.Module | None) -> Callable[[Any], Any]:
    """Returns a function of parameters: a tree of bools, true for those that weight decay takes."""
    decays = said(network, "decays", is_kernel) if network is not None else is_kernel
    return lambda params: labelled(params, decays)


def num_classes(network: nn.Module, params: Mapping[str, Any]) -> int:
    """Returns how many logits parameters give; 0: they are without a classifier.

    Raises:
      ConfigError: if the network does not say which is its classifier.
    """
    node: Any = params
    for name in needed(network, "classifiers", "counting the classes")[0].split("/"):
        node = node.get(name, {})
    return int(node["kernel"].shape[-1]) if node else 0
