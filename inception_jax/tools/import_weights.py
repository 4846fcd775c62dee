"""Converts torchvision's GoogLeNet to a weights file."""

import argparse
import dataclasses
import pathlib
import pickle
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from inception_jax import advice, cli, console
from inception_jax.errors import DataError, UserError
from inception_jax.storage import access, paths

USAGE = """
Convert a state dict of torchvision's GoogLeNet, fine-tuned or not, to a weights file.

  python -m inception_jax.tools.import_weights --input googlenet.pth --output FILE.safetensors

The model is googlenet_torchvision. The input is a PyTorch .pth file, which requires PyTorch, or a
.safetensors file with the same entries, which does not. It may be a full checkpoint with the state
dict inside, and names may have any prefix (module., model., _orig_mod.); if it contains several
networks, choose one with --prefix.
The classifier determines the number of classes. Auxiliary heads that do not match it are skipped,
since only training uses them. Without a classifier, the output can only initialize training
(--config.init.pretrained). Skipped entries are logged.

torchvision's pretrained GoogLeNet (transform_input) expects pixels from -1 to 1, so mean and std
are recorded as 0.5; --notransform_input records those of ImageNet. Images of 224 pixels, the center
crop of images resized to 256, are recorded as well: those of torchvision's evaluation.
"""

_INPUT = cli.define_path("input", "state dict: .pth or .safetensors", required=True)
_OUTPUT = cli.define_path("output", "file to write; replaced if it exists", required=True)
_CLASS_NAMES = cli.define_path(
    "class_names", "text file with one class name per line, in the order of the logits"
)
_PREFIX = flags.DEFINE_string(
    "prefix", None, "prefix of the network's entries, such as model_ema; detected if unambiguous"
)
_CLASSIFIER = flags.DEFINE_string(
    "classifier", None, "linear layer that computes the logits, such as head.1; default: fc"
)
_TRANSFORM_INPUT = flags.DEFINE_bool(
    "transform_input", True, "normalize as torchvision's transform_input, as pretrained weights do"
)

# torchvision's usual normalization, and the result of GoogLeNet's transform_input on it:
# (x * 0.229 + 0.485 - 0.5) / 0.5 and so on give back (pixel / 255 - 0.5) / 0.5.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_TRANSFORMED = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# torchvision's preset for evaluation resizes the shorter side to 256 pixels and crops 224.
_IMAGE_SIZE, _EVAL_CROP = 224, 224 / 256


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax.models import torchvision_weights, weights
    from inception_jax.runtime import devices, environment

    source, target = cli.given(_INPUT), cli.given(_OUTPUT)
    devices.initialize(platform="cpu", log=console.log)
    state = read_state_dict(source)
    access.check_output_file(target, "output")
    try:
        model, variables, notes = torchvision_weights.from_torchvision(
            state, prefix=_PREFIX.value, classifier=_CLASSIFIER.value
        )
    except DataError as error:
        raise DataError(f"--input={source}: {error}") from error
    for note in notes:
        console.log(f"{source}: {note}")
    mean, std = _TRANSFORMED if _TRANSFORM_INPUT.value else _IMAGENET
    imported = weights.Weights(
        variables=variables,
        model=model,
        image_size=_IMAGE_SIZE,
        eval_crop=_EVAL_CROP,
        class_names=(),
        mean=np.array(mean, np.float32),
        std=np.array(std, np.float32),
        experiment="torchvision",
        revision=environment.revision(),
    )
    if _CLASS_NAMES.value is not None:
        names = read_names(_CLASS_NAMES.value, imported.num_classes)
        imported = dataclasses.replace(imported, class_names=names)
    weights.save(target, imported)
    print(f"{target}: {access.size(target) / 1e6:.1f} MB; {imported}; mean {mean}, std {std}")


def read_names(path: paths.Path, count: int) -> tuple[str, ...]:
    """Returns the class names in a text file, one per line.

    Raises:
      DataError: if there are not `count`.
      OSError, BucketError: if the file cannot be read.
    """
    try:
        names = tuple(access.read_bytes(path).decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        raise DataError(f"--class_names={path}: must be UTF-8 text: {error}") from error
    if not count:
        raise DataError(
            f"--class_names={path}: the weights have no classifier, so no classes; omit the flag"
        )
    if len(names) != count:
        raise DataError(
            f"--class_names={path}: has {len(names)} lines; must have {count}, one per class"
        )
    return names


def read_state_dict(path: paths.Path) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a state dict by name.

    Args:
      path: of a safetensors file, or of a torch.save file with a state dict, possibly nested in
        dictionaries, whose keys then prefix the names ("model.conv1.conv.weight").

    Raises:
      DataError: if it cannot be read.
    """
    from inception_jax.models import weights

    try:
        with access.local_copy(path) as local:
            if weights.looks_like_pickle(local):
                state = _load_with_torch(local, str(path))
                return {name: _array(tensor) for name, tensor in _tensors(state)}
    except OSError as error:
        raise DataError(f"--input={path}: cannot be read: {error.strerror}") from error
    return weights.read_arrays(path)[0]


def _tensors(values: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the tensors of nested dictionaries with their dot-separated keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _tensors(value, f"{prefix}{key}.")
        elif hasattr(value, "detach"):
            yield f"{prefix}{key}", value


def _array(tensor: Any) -> np.ndarray:
    # NumPy does not support PyTorch's bfloat16.
    detached = tensor.detach()
    return (detached.float() if detached.is_floating_point() else detached).numpy()


def _load_with_torch(local: pathlib.Path, path: str) -> dict[str, Any]:
    """Returns the contents of a local file; `path` names it in messages."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--input={path}: PyTorch's format requires PyTorch: pip install torch. Or convert the "
            "file to .safetensors where PyTorch is installed, with safetensors.torch.save_file"
        ) from error
    try:
        # weights_only runs no code from the file. Training scripts store their arguments next to
        # the weights, as a Namespace, which is safe, as it contains only values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(local, map_location="cpu", weights_only=True)
    except (
        OSError,
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        IndexError,
        struct.error,
    ) as error:
        object_name = re.search(r"GLOBAL (\S+)", str(error))
        if object_name:
            raise DataError(
                f"{path}: contains a {object_name[1]} next to the weights; objects are not loaded "
                "because that can run arbitrary code. Save only the weights where the file was "
                "made, with torch.save(model.state_dict(), FILE), or, if you trust it, with "
                'torch.save(torch.load(FILE, weights_only=False)["state_dict"], NEW)'
            ) from error
        raise DataError(
            f"{path}: not a state dict, or truncated: {advice.first_line(error)}. Copy it again, "
            "or save it again with torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: must contain a state dict, got {type(state).__name__}")
    return state


if __name__ == "__main__":
    cli.run(main, USAGE)
