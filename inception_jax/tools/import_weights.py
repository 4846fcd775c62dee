"""Converts torchvision's GoogLeNet to a file of weights."""

import argparse
import dataclasses
import pathlib
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from inception_jax import cli, console
from inception_jax.errors import DataError, UserError

USAGE = """
Convert the state dict of torchvision's GoogLeNet, fine-tuned or not, to a file of weights of the
model googlenet_torchvision.

  python -m inception_jax.tools.import_weights --input googlenet.pth --output FILE.safetensors

The input is PyTorch's .pth, which needs PyTorch, or a .safetensors of the same entries, which does
not. It may be a whole checkpoint with the state dict inside, and the names may have any prefix
(module., model., _orig_mod.); of several networks in it, --prefix says which. The number of classes
is that of the classifier. Auxiliary heads that do not fit it are skipped, as training alone uses
them. A file without a classifier can only start a training (--config.init.pretrained).
What was skipped is logged.

torchvision's pretrained GoogLeNet (transform_input) takes pixels from -1 to 1, and the file says
so: mean and std 0.5. With --notransform_input they are those of ImageNet.
"""

_INPUT = cli.define_path("input", "state dict: .pth or .safetensors", required=True)
_OUTPUT = cli.define_path("output", "file to write; one that is there is replaced", required=True)
_CLASS_NAMES = cli.define_path(
    "class_names", "text file of the classes' names in the order of the logits, a line each"
)
_PREFIX = flags.DEFINE_string(
    "prefix", None, "of the network's entries, such as model_ema; found if there is one network"
)
_CLASSIFIER = flags.DEFINE_string(
    "classifier", None, "linear layer that gives the logits, such as head.1; default: fc"
)
_TRANSFORM_INPUT = flags.DEFINE_bool(
    "transform_input", True, "as torchvision's argument; its pretrained weights have it"
)

# torchvision's usual normalisation, and the one that GoogLeNet's transform_input makes of it:
# (x * 0.229 + 0.485 - 0.5) / 0.5 and so on give back (pixel / 255 - 0.5) / 0.5.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TRANSFORMED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax.models import torchvision_weights, weights
    from inception_jax.runtime import devices, environment
    from inception_jax.training import workdir

    devices.initialize(platform="cpu", log=console.say)
    source, target = cli.given(_INPUT), cli.given(_OUTPUT)
    state = read_state_dict(source)
    try:
        model, variables, notes = torchvision_weights.from_torchvision(
            state, prefix=_PREFIX.value, classifier=_CLASSIFIER.value
        )
    except DataError as error:
        raise DataError(f"--input={source}: {error}") from error
    for note in notes:
        console.say(f"{source}: {note}")
    mean, std = _TRANSFORMED if _TRANSFORM_INPUT.value else _IMAGENET
    imported = weights.Weights(
        variables=variables,
        model=model,
        image_size=224,
        class_names=(),
        mean=np.array(mean, np.float32),
        std=np.array(std, np.float32),
        experiment="torchvision",
        revision=environment.revision(),
    )
    if _CLASS_NAMES.value is not None:
        names = read_names(_CLASS_NAMES.value, imported.num_classes)
        imported = dataclasses.replace(imported, class_names=names)
    workdir.check_writable(target.parent, flag="output", own=False)
    weights.save(target, imported)
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB; {imported}; mean {mean}, std {std}")


def read_names(path: pathlib.Path, count: int) -> tuple[str, ...]:
    """Returns the lines of a text file.

    Raises:
      DataError: if there are not `count`.
    """
    try:
        names = tuple(path.read_text(encoding="utf-8").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"--class_names={path}: is no text in UTF-8: {error}") from error
    if not count:
        raise DataError(f"--class_names={path}: the weights have no classifier, so no classes")
    if len(names) != count:
        raise DataError(
            f"--class_names={path}: has {len(names)} lines; the weights have {count} classes, and "
            "each needs one"
        )
    return names


def read_state_dict(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a state dict by name.

    Args:
      path: of a safetensors file, or of a file by torch.save: of the state dict, or of dictionaries
        that hold it, whose keys then precede the names ("model.conv1.conv.weight").

    Raises:
      DataError: if it cannot be read as that.
    """
    from inception_jax.models import weights

    try:
        is_pickle = weights.looks_like_pickle(path)
    except OSError as error:
        raise DataError(f"--input={path}: cannot be read: {error.strerror}") from error
    if not is_pickle:
        return weights.read_arrays(path)[0]
    return {name: _array(tensor) for name, tensor in _tensors(_load_with_torch(path))}


def _tensors(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the tensors of nested dictionaries by their keys, joined with dots."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
        elif hasattr(value, "detach"):
            yield f"{prefix}{key}", value


def _array(tensor: Any) -> np.ndarray:
    # NumPy knows no bfloat16 of PyTorch's.
    found = tensor.detach()
    return (found.float() if found.is_floating_point() else found).numpy()


def _load_with_torch(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--input={path}: reading PyTorch's format needs PyTorch: pip install torch. Or "
            "convert the file to .safetensors where PyTorch is, with safetensors.torch.save_file"
        ) from error
    try:
        # weights_only: nothing in the file is run. Training scripts put their arguments beside the
        # weights, as a Namespace, which holds nothing but values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        object_name = re.search(r"GLOBAL (\S+)", str(error))
        if object_name:
            raise DataError(
                f"{path}: holds a {object_name[1]} beside the weights; objects are not loaded, as "
                "loading one may run any program. Save the weights alone where the file is from, "
                "with torch.save(model.state_dict(), FILE), or, if you trust it, with "
                'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW)'
            ) from error
        raise DataError(
            f"{path}: cannot be read as a state dict, or is only a part of a file: "
            f"{str(error).splitlines()[0]}. Copy it again, or save it again with "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds {type(state).__name__}, where a state dict was expected")
    return state


if __name__ == "__main__":
    cli.run(main, USAGE)
