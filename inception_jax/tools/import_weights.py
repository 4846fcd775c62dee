"""Converts torchvision's GoogLeNet to a file of weights."""

import dataclasses
import pathlib
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from inception_jax import cli
from inception_jax.errors import DataError, UserError

USAGE = """
Convert the state dict of torchvision's GoogLeNet, with or without auxiliary heads, to a file of
weights of the model googlenet_torchvision.

  python -m inception_jax.tools.import_weights --input googlenet.pth --output FILE.safetensors

The input is PyTorch's .pth, which needs PyTorch, or a .safetensors of the same entries, which does
not. torchvision's pretrained GoogLeNet (transform_input) takes pixels from -1 to 1, and the file
says so: mean and std 0.5. With --notransform_input they are those of ImageNet.
"""

_INPUT = cli.define_path("input", "state dict: .pth or .safetensors", required=True)
_OUTPUT = cli.define_path("output", "file to write; one that is there is replaced", required=True)
_CLASS_NAMES = cli.define_path(
    "class_names", "text file of the classes' names in the order of the logits, a line each"
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
    from inception_jax import runtime
    from inception_jax.config import Config, Data
    from inception_jax.models import torchvision_weights, weights
    from inception_jax.telemetry import summary

    runtime.initialize(platform="cpu", log=cli.say)
    source, target = cli.given(_INPUT), cli.given(_OUTPUT)
    state = read_state_dict(source)
    try:
        model, variables = torchvision_weights.from_torchvision(state)
    except DataError as error:
        raise DataError(f"--input={source}: {error}") from error
    mean, std = _TRANSFORMED if _TRANSFORM_INPUT.value else _IMAGENET
    imported = weights.Weights(
        variables=variables,
        config=Config(name="torchvision", data=Data(image_size=224), model=model),
        class_names=(),
        mean=np.array(mean, np.float32),
        std=np.array(std, np.float32),
        revision=summary.revision(),
    )
    if _CLASS_NAMES.value is not None:
        names = read_names(_CLASS_NAMES.value, imported.num_classes)
        imported = dataclasses.replace(imported, class_names=names)
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
    if len(names) != count:
        raise DataError(
            f"--class_names={path}: has {len(names)} lines; the weights have {count} classes, and "
            "each needs one"
        )
    return names


def read_state_dict(path: pathlib.Path) -> Mapping[str, np.ndarray]:
    """Returns the arrays of a state dict by name.

    Args:
      path: of a safetensors file, or of a file by torch.save, of the state dict or of a dictionary
        that holds it as "state_dict" or, as torchvision's training does, "model".

    Raises:
      DataError: if it cannot be read as that.
    """
    from inception_jax.models import weights

    if path.suffix.lower() == ".safetensors":
        return weights.read_arrays(path)[0]
    state = _load_with_torch(path)
    for key in ("state_dict", "model"):
        state = state.get(key, state)
    if others := [name for name, value in state.items() if not hasattr(value, "detach")]:
        raise DataError(
            f"{path}: {', '.join(map(str, others[:3]))} are no tensors. Save it anew with "
            "torch.save(model.state_dict(), FILE)"
        )
    # float32 first: NumPy knows no bfloat16 of PyTorch's.
    return {
        name.removeprefix("module."): tensor.detach().float().numpy()
        for name, tensor in state.items()
    }


def _load_with_torch(path: pathlib.Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"--input={path}: reading PyTorch's format needs PyTorch: pip install torch. Or "
            "convert the file to .safetensors where PyTorch is, with safetensors.torch.save_file"
        ) from error
    try:
        # weights_only: nothing in the file is run.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be read as a state dict: {str(error).splitlines()[0]}. Save it anew "
            "with torch.save(model.state_dict(), FILE)"
        ) from error
    if not isinstance(state, dict):
        raise DataError(f"{path}: holds {type(state).__name__}, where a state dict was expected")
    return state


if __name__ == "__main__":
    cli.run(main, USAGE)
