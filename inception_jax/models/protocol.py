"""The Protocol: what the package needs to know about a network beyond its logits.

Any `flax.linen.Module` registered with `registry.register_model` can be trained, evaluated, used
and exported to StableHLO. A network describes itself further with attributes, all optional: module
fields, properties or class attributes. A path is the slash-separated path of a module or variable
in the collection "params"::

    min_image_size: int           The smallest image side, pixels. Default: as registered.
    decays(path, leaf) -> bool    Whether weight decay applies to a parameter. Default: to all
                                  named "kernel" with two axes or more.
    first_conv: str               Path of the first convolution, which has "kernel" and, without
                                  BatchNorm, "bias". Required by Muon, to initialize from weights
                                  of a data set with another mean, and by config.init.whiten and
                                  config.init.identity_convs.
    first_norm: str               Path of the BatchNorm after it, if any.
    classifiers: tuple[str, ...]  Paths of the dense layers that compute logits, the network's main
                                  one first. Required by Muon, and to initialize from weights with
                                  other classes.
    heads: tuple[str, ...]        Paths of the modules used only in training, whether or not this
                                  instance has them. Default: none.
    norm_momentum: float          Fraction of BatchNorm's running statistics kept at each step.
                                  Without it, they are neither corrected for the start of training
                                  (`training.ema.correct_start`) nor re-estimated
                                  (config.evaluation.norm_examples).
    dtype                         Compute dtype; determines compiler options.
    rewrite: str                  A field: whose equivalents in `models.ops` are used
                                  (`models.ops.Rewrite`). `networks.create` sets it.
    norm_group_size: int          A field: images that BatchNorm normalizes together
                                  (`models.ops.batch_norm_relu`). Inspection sets it to 0.

To be summarized layer by layer (tools.summarize) or exported to ONNX, a network must consist of
operations that `inspection.structure` and `export.onnx_graph` support; their errors name the
missing ones.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from inception_jax.errors import ConfigError
from inception_jax.models.layers import ModelOutput

# Names that others use for the argument `train`, or its opposite.
_OTHER_NAMES = ("training", "is_training", "deterministic", "use_running_average")


class Adapter(nn.Module):
    """Wraps a custom network to be called like the built-in ones; variable paths stay the same.

    Attributes:
      adapted_network: returns logits or a `ModelOutput`. No submodule of a custom network may have
        this name, as they share this module's scope.
      takes_train: whether it accepts the argument `train`.
      display_name: its name, for messages.
      place: where it was registered, or the argument that provided it, for messages.
      default_min_image_size: the smallest image side, pixels, if it does not define its own.
    """

    adapted_network: nn.Module
    takes_train: bool
    display_name: str
    place: str
    default_min_image_size: int = 1

    def setup(self) -> None:
        """Keeps the network's variables at the paths they have without this module."""
        nn.share_scope(self, self.adapted_network)

    @property
    def dtype(self) -> Any:
        """The compute dtype of the network, or None if it does not define one."""
        return getattr(self.adapted_network, "dtype", None)

    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        """Returns the logits of images, float32 [B, H, W, 3], normalized."""
        arguments = {"train": train} if self.takes_train else {}
        output: Any = self.adapted_network(images, **arguments)
        output = output if isinstance(output, ModelOutput) else ModelOutput(output)
        return jax.tree.map(
            lambda logits: (
                logits.astype(jnp.float32) if jnp.issubdtype(logits.dtype, jnp.floating) else logits
            ),
            output,
        )


def adapt(network: nn.Module, *, name: str, place: str, min_image_size: int = 1) -> Adapter:
    """Returns a network that can be called like the built-in ones.

    Args:
      network: returns logits or a `ModelOutput`.
      name, place, min_image_size: `Adapter.display_name`, `place`, `default_min_image_size`.

    Raises:
      ConfigError: if the argument that tells training from evaluation is not called `train`.
    """
    if isinstance(network, Adapter):
        return network
    # **kwargs do not count: nn.Sequential would pass `train` on to layers that do not accept it.
    parameters = inspect.signature(type(network).__call__).parameters
    takes_train = "train" in parameters
    if not takes_train and (others := [each for each in _OTHER_NAMES if each in parameters]):
        raise ConfigError(
            f"{place}: the model {name!r} has the argument {others[0]!r}, which would keep its "
            "default; give it an argument train instead, which training sets to True"
        )
    return Adapter(network, takes_train, name, place, min_image_size)


def unwrap(network: nn.Module) -> nn.Module:
    """Returns the network as it was registered."""
    return network.adapted_network if isinstance(network, Adapter) else network


def with_plain_ops(network: nn.Module) -> nn.Module:
    """Returns a network that uses only plain operations, for inspection and export."""
    if isinstance(network, Adapter):
        return network.clone(adapted_network=with_plain_ops(network.adapted_network))
    if hasattr(network, "rewrite"):
        network = network.clone(rewrite="")
    if hasattr(network, "norm_group_size"):
        network = network.clone(norm_group_size=0)  # Inspection traces a single image.
    return network


def get_attribute(network: nn.Module, attribute: str, default: Any = None) -> Any:
    """Returns an attribute of the Protocol, or a default."""
    return getattr(unwrap(network), attribute, default)


def require_attribute(network: nn.Module, attribute: str, purpose: str) -> Any:
    """Returns an attribute of the Protocol.

    Args:
      network: as `networks.create` returns it.
      attribute: its name.
      purpose: what needs it, for the message.

    Raises:
      ConfigError: if the network does not have it.
    """
    value = get_attribute(network, attribute)
    if value is None:
        raise ConfigError(
            f"{purpose} needs the network's attribute {attribute!r}, which "
            f"{type(unwrap(network)).__name__} does not have; add it as described in "
            "inception_jax/models/protocol.py"
        )
    return value


def min_image_size(network: nn.Module) -> int:
    """Returns the smallest image side that a network accepts, pixels."""
    registered = network.default_min_image_size if isinstance(network, Adapter) else 1
    return int(get_attribute(network, "min_image_size", registered))


def is_inside(path: str, *modules: str) -> bool:
    """Returns whether a variable's path is inside one of the modules.

    >>> is_inside("classifier/dense/kernel", "classifier"), is_inside("conv10/kernel", "conv1")
    (True, False)
    """
    return any(path.startswith(f"{module}/") for module in modules)


def is_kernel(path: str, leaf: Any) -> bool:
    """Returns whether a parameter multiplies activations, judging by its name and shape."""
    return path.rpartition("/")[2] == "kernel" and leaf.ndim >= 2


def norm_bias_mask(params: Any) -> Any:
    """Returns a tree of bools: whether a parameter is the bias of a normalization with a scale."""
    normalized: set[str] = set()

    def note(path: str, leaf: Any) -> None:
        del leaf
        module, _, name = path.rpartition("/")
        if name == "scale":
            normalized.add(f"{module}/bias")

    label_params(params, note)
    return label_params(params, lambda path, _: path in normalized)


def label_params(params: Any, label: Callable[[str, Any], Any]) -> Any:
    """Returns a tree of labels, computed for each parameter from its path and leaf."""

    def of_leaf(path: jax.tree_util.KeyPath, leaf: Any) -> Any:
        return label(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def decay_mask(network: nn.Module | None) -> Callable[[Any], Any]:
    """Returns a function that maps parameters to a tree of bools: whether weight decay applies."""
    decays = get_attribute(network, "decays", is_kernel) if network is not None else is_kernel
    return lambda params: label_params(params, decays)


def num_classes(network: nn.Module, params: Mapping[str, Any]) -> int:
    """Returns the number of logits, or 0 if the parameters include no classifier.

    Raises:
      ConfigError: if the network does not define `classifiers`.
    """
    node: Any = params
    for name in require_attribute(network, "classifiers", "counting the classes")[0].split("/"):
        node = node.get(name, {})
    return int(node["kernel"].shape[-1]) if node else 0
