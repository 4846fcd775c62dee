"""The names and layouts of torchvision's GoogLeNet (torchvision/models/googlenet.py).

torchvision names the inception branches by number and the layers before the first module conv1 to
conv3; PyTorch's kernels have their output channels first.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax import config
from inception_jax.errors import DataError
from inception_jax.models import registry
from inception_jax.models.weights import Variables, flatten, unflatten

_MODULES = {
    "conv1": "conv1",
    "conv2_reduce": "conv2",
    "conv2": "conv3",
    "aux_4a": "aux1",
    "aux_4d": "aux2",
    "classifier": "fc",
}
_BRANCHES = {
    "conv_1x1": "branch1",
    "reduce_3x3": "branch2.0",
    "conv_3x3": "branch2.1",
    "reduce_5x5": "branch3.0",
    "conv_5x5": "branch3.1",
    "pool_proj": "branch4.1",
}
_HEAD_LAYERS = {"conv": "conv", "hidden": "fc1", "classifier": "fc2"}
_LEAVES = {
    "conv/kernel": "conv.weight",
    "conv/bias": "conv.bias",
    "norm/scale": "bn.weight",
    "norm/bias": "bn.bias",
    "norm/mean": "bn.running_mean",
    "norm/var": "bn.running_var",
    "dense/kernel": "weight",
    "dense/bias": "bias",
    "kernel": "weight",
    "bias": "bias",
}


def torch_name(path: str) -> str:
    """Returns torchvision's name of a variable of `GoogLeNet`.

    Args:
      path: such as "batch_stats/inception_3a/conv_3x3/norm/var".

    Returns:
      Such as "inception3a.branch2.1.bn.running_var".
    """
    _, module, rest = path.split("/", 2)
    if match := re.fullmatch(r"inception_(\w+)", module):
        layer, leaf = rest.split("/", 1)
        return f"inception{match[1]}.{_BRANCHES[layer]}.{_LEAVES[leaf]}"
    if module.startswith("aux_"):
        layer, leaf = rest.split("/", 1)
        return f"{_MODULES[module]}.{_HEAD_LAYERS[layer]}.{_LEAVES[leaf]}"
    return f"{_MODULES[module]}.{_LEAVES[rest]}"


def convert(state: Mapping[str, np.ndarray], like: Variables) -> Variables:
    """Returns the variables of a `GoogLeNet` from a PyTorch module with torchvision's names.

    Args:
      state: the module's state dict.
      like: nested variables with shapes, as the network's init gives them.

    Raises:
      DataError: naming entries that are missing, left over or of another shape.
    """
    leaves = flatten(like)
    names = {path: torch_name(path) for path in leaves}
    # How many batches BatchNorm has seen decides nothing.
    left = set(state) - set(names.values())
    left = {name for name in left if not name.endswith("num_batches_tracked")}
    converted = {
        path: _from_torch(state[name], path, channels=_flattened_channels(path, leaves))
        for path, name in names.items()
        if name in state
    }
    problems = [f"missing: {name}" for name in names.values() if name not in state]
    problems += [f"not of this network: {name}" for name in sorted(left)]
    problems += [
        f"{names[path]}: {value.shape} here, {leaves[path].shape} in the network"
        for path, value in converted.items()
        if value.shape != leaves[path].shape
    ]
    if problems:
        raise DataError("\n  ".join(_first(problems)))
    return unflatten(converted)


def from_torchvision(state: Mapping[str, np.ndarray]) -> tuple[config.Model, Variables]:
    """Returns settings and variables of `googlenet_torchvision` from torchvision's state dict.

    Whether there are auxiliary heads, and how many classes, is read from the entries.

    Raises:
      DataError: if the entries are not those of torchvision's GoogLeNet.
    """
    if "fc.bias" not in state:
        raise DataError("missing: fc.bias, so this is not torchvision's GoogLeNet")
    # 0.2 is what torchvision's constructor gives its main dropout.
    model = config.Model(
        name="googlenet_torchvision",
        aux_heads=any(name.startswith("aux") for name in state),
        norm_epsilon=1e-3,
        dropout=0.2,
        aux_dropout=0.7,
    )
    module = registry.create(model, state["fc.bias"].shape[0])
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    return model, convert(state, like)


def _flattened_channels(path: str, leaves: Mapping[str, Any]) -> int | None:
    """Returns the channels of the image that a dense layer reads flattened, None elsewhere."""
    head, _, layer = path.partition("/hidden/")
    return leaves[f"{head}/conv/conv/kernel"].shape[-1] if layer == "kernel" else None


def _from_torch(value: np.ndarray, path: str, channels: int | None) -> np.ndarray:
    value = np.asarray(value, np.float32)
    if path.endswith("kernel") and value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    elif path.endswith("kernel") and value.ndim == 2:
        if channels and value.shape[1] % channels == 0:
            # torch flattens [C, H, W], this package [H, W, C].
            pieces = value.reshape(value.shape[0], channels, -1)
            value = pieces.transpose(0, 2, 1).reshape(value.shape)
        value = value.T
    return np.ascontiguousarray(value)


def _first(problems: list[str], count: int = 10) -> Iterator[str]:
    yield f"{len(problems)} entries do not fit torchvision's GoogLeNet:"
    yield from problems[:count]
    if len(problems) > count:
        yield f"… and {len(problems) - count} more"
