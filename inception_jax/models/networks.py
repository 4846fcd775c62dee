"""The networks that a configuration can name, and what makes them.

The entries import their modules when they are called, so that their names are known at once.
"""

import dataclasses
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from inception_jax import config as configs
from inception_jax import registry
from inception_jax.errors import ConfigError
from inception_jax.registry import register_model

if TYPE_CHECKING:
    import flax.linen as nn

_SHARED = ("width", "norm_momentum", "norm_epsilon", "dropout", "dtype")
_HEADS = ("aux_heads", "aux_dropout")
_PAPER = (*_SHARED, *_HEADS, "stem", "conv5x5", "norm")


def _attributes(settings: configs.Model, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the settings that a network has as attributes of the same names."""
    import jax.numpy as jnp

    return {name: getattr(settings, name) for name in names} | {"dtype": jnp.dtype(settings.dtype)}


def _googlenet(num_classes: int, **attributes: Any) -> "nn.Module":
    from inception_jax.models.googlenet import GoogLeNet

    return GoogLeNet(num_classes, **attributes)


def _check_heads(config: configs.Config) -> Iterator[str]:
    """Yields a problem if the heads' shapes would change with the size of the images."""
    if (sizes := config.train.image_sizes) and config.model.aux_heads:
        yield (
            f"config.train.image_sizes = {sizes}: the auxiliary heads' shapes depend on the image "
            "size; set model.aux_heads to False, or leave image_sizes empty"
        )


@register_model("googlenet", settings=_PAPER, check=_check_heads)
def googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns the paper's network, with its variations of stem, 5x5 branch, norm and width."""
    return _googlenet(num_classes, **_attributes(settings, _PAPER))


@register_model("googlenet_torchvision", settings=(*_SHARED, *_HEADS))
def googlenet_torchvision(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns the network of torchvision.models.googlenet, whose weights fit it.

    It differs from the paper's in the 5x5 branch (3x3, pytorch/vision#906), in the fourth pool
    (2x2), in BatchNorm, and in the pooling of the auxiliary heads.
    """
    attributes = _attributes(settings, (*_SHARED, *_HEADS))
    return _googlenet(
        num_classes, body="torchvision", conv5x5="3x3", adaptive_aux=True, **attributes
    )


@register_model("deeper_googlenet", settings=_SHARED)
def deeper_googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns DeeperGoogLeNet (Rosebrock, "Deep Learning for Computer Vision with Python").

    Made for the 64 px of Tiny ImageNet: a 5x5 first convolution at stride 1, and modules 3a to 4e.
    BatchNorm stands before the ReLU, as usual, where the book has it after.
    """
    return _googlenet(num_classes, stem="deeper", body="deeper", **_attributes(settings, _SHARED))


@register_model("eight_module_googlenet", settings=_SHARED)
def eight_module_googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns the network of ankit16-py/GoogLeNet-on-Tiny-ImageNet-from-scratch (as of 2020-11-16).

    Made for the 64 px of Tiny ImageNet: a 3x3 first convolution at stride 1, a 5x5 third one, and
    eight modules of its own, on grids of 16 and 8, of which the sixth is the widest (1,408
    channels). BatchNorm stands before the ReLU, as usual, where the source has it after, and its
    convolutions have no biases. So at 200 classes it has 10,716,744 parameters; the source's biases
    make 6,880 more, and Keras counts 13,760 running statistics besides.
    """
    attributes = _attributes(settings, _SHARED)
    return _googlenet(num_classes, stem="eight_module", body="eight_module", **attributes)


@register_model("mini_googlenet", settings=_SHARED)
def mini_googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns MiniGoogLeNet for images of about 32 px."""
    from inception_jax.models.mini_googlenet import MiniGoogLeNet

    return MiniGoogLeNet(num_classes, **_attributes(settings, _SHARED))


def create(
    settings: configs.Model, num_classes: int, *, rewrite: bool | None = None
) -> "nn.Module":
    """Returns the network that `settings.name` names.

    The network is called as `module.apply(variables, images, train=train, rngs={"dropout": key},
    mutable=["batch_stats"])` with images float32 [B, H, W, 3], and returns a `layers.ModelOutput`.

    Args:
      settings: the validated settings of the network.
      num_classes: number of logits.
      rewrite: whether it computes by the equivalents of `ops` for the CPU; None: where JAX computes
        on one. Programs for other devices, for other libraries and for readers have it False.

    Raises:
      ConfigError: if there are no classes, or what was registered makes no network.
    """
    import flax.linen as nn

    from inception_jax.models import ops, protocol

    if num_classes < 1:
        raise ConfigError(
            f"model.name = {settings.name!r}: a network needs at least one class, got "
            f"{num_classes}. Weights without a classifier can only start a training: "
            "config.init.pretrained"
        )
    part = registry.MODELS.get(settings.name)
    dtype = ops.auto_dtype() if settings.dtype == "auto" else settings.dtype
    filled = dataclasses.replace(registry.fill(part, settings), dtype=dtype)
    with registry.explained(part, f"the model {part.name!r}"):
        network = part.build(filled, num_classes)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"{part.place}: the model {part.name!r} returned {network!r}, a "
            f"{type(network).__name__}; it has to return a flax.linen.Module"
        )
    if hasattr(network, "rewrite"):
        network = network.clone(rewrite=ops.prefers_rewrite() if rewrite is None else rewrite)
    if part.is_own:
        return network
    return protocol.adapted(
        network, name=part.name, place=part.place, min_image_size=part.min_image_size
    )


def check(network: "nn.Module", config: configs.Config, num_classes: int) -> None:
    """Checks a network at all sizes of images that a run has; nothing is computed.

    Args:
      network: as `create` returns it.
      config: of the run.
      num_classes: number of logits.

    Raises:
      ConfigError: if a size is too small for it, or it does not return logits.
    """
    from inception_jax.models import protocol

    least = protocol.min_image_size(network)
    name = network.called if isinstance(network, protocol.Adapter) else config.model.name
    sizes = [("data.image_size", config.data.image_size)]
    sizes += [("train.image_sizes", size) for size in config.train.image_sizes]
    # 0: the data set's own.
    own = config.data.image_size
    sizes += [("evaluation.image_size", config.evaluation.image_size or own)]
    sizes += [
        (f"evaluations.{name}.size", view.size or own) for name, view in config.evaluations.items()
    ]
    for path, size in sizes:
        if size < least:
            raise ConfigError(
                f"config.{path} = {size}: {name} needs at least {least} px; raise it, "
                "or take a model or stem that shrinks the image less"
            )
    if isinstance(network, protocol.Adapter):
        _check_output(network, config.data.image_size, num_classes)


def _check_output(network: Any, image_size: int, num_classes: int) -> None:
    """Checks that a user's network gives logits and has the variables that training keeps."""
    import jax
    import jax.numpy as jnp
    from flax.errors import FlaxError

    from inception_jax.models import protocol

    def call(images: jax.Array) -> tuple[Any, Any]:
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        variables = network.init(rngs, images, train=True)
        output = network.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        # As evaluation calls it: with no keys, nothing that changes, and batches of another size.
        network.apply(variables, jnp.concatenate([images, images]), train=False)
        return variables, output[0]

    what = f"{network.place}: the model {network.called!r}"
    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    wanted = f"it must return logits, float [2, {num_classes}], or a ModelOutput of such arrays"
    try:
        variables, output = jax.eval_shape(call, images)
    except (AttributeError, TypeError, ValueError, FlaxError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if isinstance(error, AttributeError) and last == protocol.__file__:  # Of what is no array.
            raise ConfigError(f"{what} returned no logits ({error}); {wanted}") from error
        raise ConfigError(
            f"{what} failed for 2 images of {image_size} px: {type(error).__name__}: {reason}"
        ) from error
    for logits in (output.logits, *output.aux):
        shape = getattr(logits, "shape", None)
        if shape != (2, num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
            found = type(logits).__name__ if shape is None else registry.described(logits)
            raise ConfigError(f"{what} returned {found} for 2 images of {image_size} px; {wanted}")
    if "params" not in variables:
        raise ConfigError(f"{what} has no parameters, so there is nothing to train")
    if others := sorted({*variables} - {"params", "batch_stats"}):
        raise ConfigError(
            f"{what} has variables {', '.join(others)}, which "
            "training would not keep; keep parameters in params and statistics in batch_stats"
        )
