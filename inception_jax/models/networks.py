"""The networks that a configuration can name, and their factories.

Each factory imports its module only when it is called, so listing the names is fast.
"""

import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from inception_jax import config as configs
from inception_jax import registry
from inception_jax.errors import ConfigError
from inception_jax.registry import register_model

if TYPE_CHECKING:
    import flax.linen as nn

    from inception_jax.models import ops

_NORM_SETTINGS = ("norm_momentum", "norm_epsilon", "norm_group_size")
_COMMON_SETTINGS = ("width", *_NORM_SETTINGS, "dropout", "dtype")
_HEAD_SETTINGS = ("aux_heads", "aux_dropout")
_GOOGLENET_SETTINGS = (*_COMMON_SETTINGS, *_HEAD_SETTINGS, "stem", "conv5x5", "norm")


def _attributes(settings: configs.Model, names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the settings that are network attributes of the same names."""
    import jax.numpy as jnp

    return {name: getattr(settings, name) for name in names} | {"dtype": jnp.dtype(settings.dtype)}


def _googlenet(num_classes: int, **attributes: Any) -> "nn.Module":
    from inception_jax.models.googlenet import GoogLeNet

    return GoogLeNet(num_classes, **attributes)


def _check_heads(config: configs.Config) -> Iterator[str]:
    """Yields a problem if the shapes of the auxiliary heads would change with the image size."""
    if not config.model.aux_heads:
        return
    if sizes := config.train.image_sizes:
        yield (
            f"config.train.image_sizes = {sizes}: the auxiliary heads' shapes depend on the image "
            "size; set config.model.aux_heads to False, or leave image_sizes empty"
        )
    evaluation = config.evaluation
    # BatchNorm is re-estimated in training mode, with the heads, at the size of the evaluation.
    if evaluation.norm_examples and evaluation.image_size not in (0, config.data.image_size):
        yield (
            f"config.evaluation.image_size = {evaluation.image_size}: the auxiliary heads' shapes "
            "depend on the image size, and config.evaluation.norm_examples uses them; set either "
            "to 0, or config.model.aux_heads to False"
        )


@register_model("googlenet", settings=_GOOGLENET_SETTINGS, check=_check_heads)
def googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns the paper's network, with variations of stem, 5x5 branch, norm and width."""
    return _googlenet(num_classes, **_attributes(settings, _GOOGLENET_SETTINGS))


@register_model("googlenet_torchvision", settings=(*_COMMON_SETTINGS, *_HEAD_SETTINGS))
def googlenet_torchvision(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns the network of torchvision.models.googlenet, compatible with its weights.

    It differs from the paper's network in the 5x5 branch (3x3, pytorch/vision#906), the fourth pool
    (2x2), BatchNorm, and the pooling of the auxiliary heads.
    """
    attributes = _attributes(settings, (*_COMMON_SETTINGS, *_HEAD_SETTINGS))
    return _googlenet(
        num_classes, body="torchvision", conv5x5="3x3", adaptive_aux=True, **attributes
    )


@register_model("deeper_googlenet", settings=_COMMON_SETTINGS)
def deeper_googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns DeeperGoogLeNet (Rosebrock, "Deep Learning for Computer Vision with Python").

    Designed for Tiny ImageNet's 64 px: a 5x5 first convolution at stride 1, and modules 3a to 4e.
    BatchNorm precedes the ReLU, as usual; in the book it follows it.
    """
    return _googlenet(
        num_classes, stem="deeper", body="deeper", **_attributes(settings, _COMMON_SETTINGS)
    )


@register_model("eight_module_googlenet", settings=_COMMON_SETTINGS)
def eight_module_googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns the network of ankit16-py/GoogLeNet-on-Tiny-ImageNet-from-scratch (as of 2020-11-16).

    Designed for Tiny ImageNet's 64 px: a 3x3 first convolution at stride 1, a 5x5 third one, and
    eight custom modules at 16 and 8 px, of which the sixth is the widest (1,408 channels).
    BatchNorm precedes the ReLU, as usual (in the source it follows it), and convolutions have no
    biases. So at 200 classes it has 10,716,744 parameters; the source's biases add 6,880, and Keras
    also counts 13,760 running statistics.
    """
    attributes = _attributes(settings, _COMMON_SETTINGS)
    return _googlenet(num_classes, stem="eight_module", body="eight_module", **attributes)


@register_model("mini_googlenet", settings=_COMMON_SETTINGS)
def mini_googlenet(settings: configs.Model, num_classes: int) -> "nn.Module":
    """Returns MiniGoogLeNet for images of about 32 px."""
    from inception_jax.models.mini_googlenet import MiniGoogLeNet

    return MiniGoogLeNet(num_classes, **_attributes(settings, _COMMON_SETTINGS))


def create(
    settings: configs.Model,
    num_classes: int,
    *,
    rewrite: "ops.Rewrite | None" = None,
) -> "nn.Module":
    """Returns the network named by `settings.name`.

    Call it as `module.apply(variables, images, train=train, rngs={"dropout": key},
    mutable=["batch_stats"])` with images float32 [B, H, W, 3]; it returns a `layers.ModelOutput`.

    Args:
      settings: validated settings of the network.
      num_classes: number of logits.
      rewrite: whose equivalents in `ops` are used; None: those for JAX's default device. Use ""
        for export and for inspection.

    Raises:
      ConfigError: if `num_classes` is less than 1, or the registered factory returns no network.
    """
    import flax.linen as nn

    from inception_jax.models import ops, protocol

    if num_classes < 1:
        raise ConfigError(
            f"config.model.name = {settings.name!r}: the number of classes must be at least 1, got "
            f"{num_classes}. Weights without a classifier can only initialize training: "
            "config.init.pretrained"
        )
    part = registry.MODELS.get(settings.name)
    dtype = ops.auto_dtype() if settings.dtype == "auto" else settings.dtype
    filled = dataclasses.replace(registry.settings_with_defaults(part, settings), dtype=dtype)
    with registry.as_config_error(part, f"the model {part.name!r}"):
        network = part.build(filled, num_classes)
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"{part.location}: the model {part.name!r} returned {network!r}, a "
            f"{type(network).__name__}; it must return a flax.linen.Module"
        )
    if hasattr(network, "rewrite"):
        network = network.clone(rewrite=ops.preferred_rewrite() if rewrite is None else rewrite)
    if part.is_builtin:
        return network
    return protocol.adapt(
        network, name=part.name, place=part.location, min_image_size=part.min_image_size
    )


def check(network: "nn.Module", config: configs.Config, num_classes: int) -> None:
    """Checks a network at all image sizes of a run, without computing anything.

    Args:
      network: as `create` returns it.
      config: of the run.
      num_classes: number of logits.

    Raises:
      ConfigError: if an image size is too small for it, or it does not return logits.
    """
    from inception_jax.models import protocol

    min_size = protocol.min_image_size(network)
    name = network.display_name if isinstance(network, protocol.Adapter) else config.model.name
    sizes = [("data.image_size", config.data.image_size)]
    sizes += [("train.image_sizes", size) for size in config.train.image_sizes]
    sizes += [("evaluation.image_size", config.evaluation.image_size)]
    sizes += [(f"evaluations.{each}.size", view.size) for each, view in config.evaluations.items()]
    for path, size in sizes:
        if 0 < size < min_size:  # 0: data.image_size.
            raise ConfigError(
                f"config.{path} = {size}: must be at least {min_size} px for {name}; increase it, "
                "or use a model or stem that downsamples less"
            )
    if isinstance(network, protocol.Adapter):
        variables = _check_output(network, config.data.image_size, num_classes)
        _check_paths(network, variables["params"], num_classes)
        for path, size in sizes[1:]:
            if size not in (0, config.data.image_size):
                _check_size(network, variables, path, size)


def _check_output(network: Any, image_size: int, num_classes: int) -> Any:
    """Checks that a custom network returns logits and only has variables that training keeps.

    Returns:
      The shapes and dtypes of its variables.
    """
    import jax
    import jax.numpy as jnp

    def call(plain: Any, images: jax.Array) -> tuple[Any, Any]:
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        variables = plain.init(rngs, images, train=True)
        output = plain.apply(variables, images, train=True, rngs=rngs, mutable=["batch_stats"])
        # As evaluation calls it: without keys or mutable collections, at another batch size.
        plain.apply(variables, jnp.concatenate([images, images]), train=False)
        return variables, output[0]

    subject = _subject(network)
    required = f"it must return logits, float [2, {num_classes}], or a ModelOutput of such arrays"
    variables, output = _trace(network, call, subject, image_size, required)
    for logits in (output.logits, *output.aux):
        shape = getattr(logits, "shape", None)
        if shape != (2, num_classes) or not jnp.issubdtype(logits.dtype, jnp.floating):
            got = type(logits).__name__ if shape is None else registry.describe_value(logits)
            raise ConfigError(
                f"{subject} returned {got} for 2 images of {image_size} px; {required}"
            )
    if "params" not in variables:
        raise ConfigError(f"{subject} has no parameters, so it cannot be trained")
    if others := sorted({*variables} - {"params", "batch_stats"}):
        raise ConfigError(
            f"{subject} has the variable collections {', '.join(others)}, which training does not "
            "keep; store parameters in params and statistics in batch_stats"
        )
    return variables


def _check_paths(network: Any, params: Any, num_classes: int) -> None:
    """Checks that the layers that a custom network declares exist."""
    from inception_jax.models import protocol

    def find(path: str) -> Any:
        node = params
        for name in path.split("/"):
            node = node.get(name) if isinstance(node, Mapping) else None
        return node

    subject = _subject(network)
    paths: dict[str, tuple[str, ...]] = {}
    for attribute in ("first_conv", "first_norm", "classifiers", "heads"):
        declared = protocol.get_attribute(network, attribute) or ()
        is_one = attribute.startswith("first")
        paths[attribute] = (declared,) if is_one and declared else declared
        is_valid = isinstance(paths[attribute], tuple | list)
        if not is_valid or not all(isinstance(path, str) for path in paths[attribute]):
            raise ConfigError(
                f"{subject} has {attribute} = {declared!r}; must be "
                f"{'a path' if is_one else 'a tuple of paths'} (see "
                "inception_jax/models/protocol.py); rename an attribute with another meaning"
            )
    # Heads are declared whether or not this instance has them, as is a BatchNorm.
    absent = [head for head in paths["heads"] if not find(head)]
    for attribute in ("first_conv", "classifiers"):
        for path in paths[attribute]:
            if any(path.startswith(f"{head}/") for head in absent):
                continue
            kernel = find(f"{path}/kernel")
            if kernel is None:
                raise ConfigError(
                    f"{subject} declares {attribute} = {path!r}, but has no parameter "
                    f"{path}/kernel; the first parts of its paths are {', '.join(params)}"
                )
            if attribute == "classifiers" and kernel.shape[-1] != num_classes:
                raise ConfigError(
                    f"{subject} declares {path!r} as a classifier, but it computes "
                    f"{kernel.shape[-1]} values, not {num_classes} logits"
                )


def _check_size(network: Any, variables: Any, setting: str, size: int) -> None:
    """Checks that a custom network can be called with images of another size."""
    import jax

    train = setting == "train.image_sizes"

    def call(plain: Any, images: jax.Array, variables: Any) -> Any:
        rngs = {"dropout": jax.random.key(0)} if train else None
        mutable = ["batch_stats"] if train else False
        return plain.apply(variables, images, train=train, rngs=rngs, mutable=mutable)

    subject = f"config.{setting}: {_subject(network)}"
    _trace(network, call, subject, size, "it must return logits", variables)


def _trace(
    network: Any,
    call: Callable[..., Any],
    subject: str,
    image_size: int,
    required: str,
    *arguments: Any,
) -> Any:
    """Returns the shapes and dtypes that `call` returns, given the network, 2 images and arguments.

    The network is a copy without groups for BatchNorm, which would have to divide the images. A
    failure is a ConfigError about `subject`; `required` says what the network must return.
    """
    import jax
    import jax.numpy as jnp
    from flax.errors import FlaxError

    from inception_jax.models import protocol

    images = jax.ShapeDtypeStruct((2, image_size, image_size, 3), jnp.float32)
    try:
        plain_call = functools.partial(call, protocol.with_plain_ops(network))
        return jax.eval_shape(plain_call, images, *arguments)
    except (AttributeError, TypeError, ValueError, FlaxError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        # The adapter reads the dtype of something that is not an array.
        if isinstance(error, AttributeError) and last == protocol.__file__:
            raise ConfigError(f"{subject} returned no logits ({error}); {required}") from error
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{subject} failed for 2 images of {image_size} px: {type(error).__name__}: {reason}"
        ) from error


def _subject(network: Any) -> str:
    return f"{network.place}: the model {network.display_name!r}"
