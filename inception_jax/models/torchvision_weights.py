"""Converts names and layouts of torchvision's GoogLeNet (torchvision/models/googlenet.py).

torchvision numbers the inception branches, and names the layers before the first module conv1 to
conv3; PyTorch's kernels have their output channels first.
"""

import collections
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax import config
from inception_jax.errors import DataError, join_truncated
from inception_jax.models import networks
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

_HEADS = ("aux1", "aux2")
# The classifier's input features.
_NUM_FEATURES = 1024
# Parts of names inserted by torch.compile, FSDP and activation checkpointing.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def torch_name(path: str) -> str:
    """Returns torchvision's name of a variable of `GoogLeNet`.

    >>> torch_name("batch_stats/inception_3a/conv_3x3/norm/var")
    'inception3a.branch2.1.bn.running_var'
    """
    _, module, rest = path.split("/", 2)
    if match := re.fullmatch(r"inception_(\w+)", module):
        layer, leaf = rest.split("/", 1)
        return f"inception{match[1]}.{_BRANCHES[layer]}.{_LEAVES[leaf]}"
    if module.startswith("aux_"):
        layer, leaf = rest.split("/", 1)
        return f"{_MODULES[module]}.{_HEAD_LAYERS[layer]}.{_LEAVES[leaf]}"
    return f"{_MODULES[module]}.{_LEAVES[rest]}"


class ImportedWeights(NamedTuple):
    """A converted state dict of torchvision's GoogLeNet.

    Attributes:
      model: settings of its network.
      variables: of that network; without a classifier if the state dict has no matching one.
      notes: log lines: where the parts were found, and what was skipped.
    """

    model: config.Model
    variables: Variables
    notes: list[str]


def convert(state: Mapping[str, np.ndarray], abstract_variables: Variables) -> Variables:
    """Returns the variables of a `GoogLeNet` from a PyTorch state dict with torchvision's names.

    Args:
      state: the state dict.
      abstract_variables: nested variables or their shapes, as the network's init returns them.

    Raises:
      DataError: naming entries that are missing, unexpected, non-finite, or of the wrong shape or
        dtype.
    """
    leaves = flatten(abstract_variables)
    problems = _find_mismatches(_parameters(state), leaves)
    if problems:
        count = sum(problems.values())
        raise DataError(
            f"{count} entries do not match torchvision's GoogLeNet:\n  "
            + join_truncated(list(problems), limit=10, separator="\n  ")
        )
    return unflatten(
        {
            path: _from_torch(state[torch_name(path)], path, _flattened_channels(path, leaves))
            for path in leaves
        }
    )


def from_torchvision(
    state: Mapping[str, np.ndarray], *, prefix: str | None = None, classifier: str | None = None
) -> ImportedWeights:
    """Returns settings and variables of `googlenet_torchvision` from torchvision's state dict.

    The names may have any prefix, such as "module." or "model._orig_mod.", and the state dict may
    also contain other modules. The classifier is fc, or the only layer inside fc; its size is the
    number of classes. Auxiliary heads are kept if both exist, with the same classes.

    Args:
      state: arrays by name.
      prefix: of the network's entries; None: detected, if there is only one.
      classifier: full name of the linear layer that computes the logits, such as "head.1"; None: as
        described above.

    Raises:
      DataError: if the entries do not match torchvision's GoogLeNet, contain several networks, or
        the layer named as classifier cannot be one.
    """
    model = _settings()
    remaining = {_strip_wrappers(name): value for name, value in _parameters(state).items()}
    names = [torch_name(path) for path in _abstract_leaves(1)]
    trunk = {name for name in names if _top_module(name) not in ("fc", *_HEADS)}
    prefix = _find_prefix(remaining, trunk, prefix)
    notes = [f"network: {prefix}*"] if prefix else []
    fc, note = _pop_classifier(remaining, prefix, classifier)
    notes += [note] if note else []
    leaves = _abstract_leaves(len(fc["fc.bias"]) if fc else 1)
    if not fc:
        leaves = {
            path: leaf for path, leaf in leaves.items() if _top_module(torch_name(path)) != "fc"
        }

    heads = _pop_modules(remaining, prefix, _HEADS)
    head_leaves = {p: leaf for p, leaf in leaves.items() if _top_module(torch_name(p)) in _HEADS}
    mismatches = list(_find_mismatches(heads, head_leaves)) if fc else ["no classifier"]
    if mismatches:
        model.aux_heads = False
        leaves = {path: leaf for path, leaf in leaves.items() if path not in head_leaves}
        if heads:
            modules = " and ".join(sorted({f"{prefix}{_top_module(name)}" for name in heads}))
            notes.append(
                f"skipped: {modules}, auxiliary heads used only in training: "
                + join_truncated(mismatches, limit=2, separator="; ")
            )
        heads = {}
    body = _pop_modules(remaining, prefix, {_top_module(name) for name in trunk})
    if remaining:
        notes.append(f"skipped: {join_truncated(sorted(remaining), limit=5)}")
    try:
        variables = convert(body | fc | heads, unflatten(leaves))
    except DataError as error:
        # A missing entry may be among the skipped ones, under another name.
        raise DataError("\n".join([str(error), *notes])) from error
    return ImportedWeights(model, variables, notes)


def _settings() -> config.Model:
    """Returns the settings of torchvision's network, auxiliary heads included."""
    return config.Model(
        name="googlenet_torchvision",
        aux_heads=True,
        norm_epsilon=1e-3,
        dropout=0.2,  # The main dropout's default in torchvision's constructor.
        aux_dropout=0.7,
    )


@functools.cache
def _abstract_leaves(classes: int) -> Mapping[str, Any]:
    """Returns the shapes of the network's variables by path."""
    module = networks.create(_settings(), classes)
    images = jnp.zeros((1, 224, 224, 3))
    return flatten(jax.eval_shape(module.init, jax.random.key(0), images))


def _parameters(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns a state dict without BatchNorm's batch counts, which have no effect."""
    return {name: a for name, a in state.items() if not name.endswith("num_batches_tracked")}


def _strip_wrappers(name: str) -> str:
    """Returns a name without the parts that PyTorch's compiler and wrappers insert."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _top_module(name: str) -> str:
    """Returns the outermost module of an entry: "conv1" for "conv1.bn.weight"."""
    return name.partition(".")[0]


def _find_prefix(names: Iterable[str], trunk: Collection[str], prefix: str | None) -> str:
    """Returns the prefix of a network's names among all names.

    Args:
      names: of all entries.
      trunk: the network's names without prefix.
      prefix: given by the user, or None.

    Raises:
      DataError: if there is no such network, or there are several.
    """
    names = list(names)
    counts = collections.Counter(
        name.removesuffix(suffix) for name in names for suffix in _suffixes(name) if suffix in trunk
    )
    # With fewer entries it is another network that shares some layer names.
    candidates = [each for each, count in counts.items() if 4 * count >= len(trunk)]
    if prefix is not None:
        given = _strip_wrappers(prefix.removesuffix("."))
        candidates = [each for each in candidates if each.removesuffix(".") == given]
    if not candidates:
        where = f" below {prefix!r}" if prefix else ""
        raise DataError(
            f"not torchvision's GoogLeNet: has {max(counts.values(), default=0)} of its "
            f"{len(trunk)} entries{where}. The file contains {len(names):,} arrays"
            + (f": {join_truncated(names, limit=5)}" if names else "")
        )
    if len(candidates) > 1:
        listing = ", ".join(each.removesuffix(".") or "''" for each in candidates)
        raise DataError(
            f"contains {len(candidates)} networks, named {listing}, such as weights and their "
            "average; choose one with --prefix"
        )
    return candidates[0]


def _suffixes(name: str) -> Iterator[str]:
    """Yields a name and its suffixes: a.b.c, b.c, c."""
    while name:
        yield name
        name = name.partition(".")[2]


def _pop_modules(
    rest: dict[str, np.ndarray], prefix: str, modules: Collection[str]
) -> dict[str, np.ndarray]:
    """Removes the entries of some modules from a state dict, and returns them without the prefix.

    Counters left by tools such as profilers stay: they are single numbers, unlike real entries.
    """
    names = [
        name
        for name in rest
        if name.startswith(prefix)
        and _top_module(name.removeprefix(prefix)) in modules
        and np.size(rest[name]) > 1
    ]
    return {name.removeprefix(prefix): rest.pop(name) for name in names}


def _pop_classifier(
    rest: dict[str, np.ndarray], prefix: str, layer: str | None
) -> tuple[dict[str, np.ndarray], str]:
    """Removes the classifier from a state dict, and returns it.

    Args:
      rest: the state dict.
      prefix: of the network.
      layer: full name of the linear layer; None: fc, or the only layer inside fc.

    Returns:
      fc.weight [classes, 1024] and fc.bias [classes], or nothing without a matching classifier; and
      a line for the log.

    Raises:
      DataError: if `layer` is given and is not a classifier.
    """
    name = f"{prefix}fc" if layer is None else _strip_wrappers(layer)
    entries = [each for each in rest if each.startswith(f"{name}.") and np.size(rest[each]) > 1]
    weights = [each for each in entries if each.endswith(".weight")]
    reason = ""
    if not entries:
        reason = f"{name} not found"
    elif len(weights) != 1 or set(entries) - {weights[0], _bias(weights[0])}:
        reason = f"{name} is not a single linear layer: {join_truncated(sorted(entries), limit=4)}"
    elif rest[weights[0]].ndim != 2 or rest[weights[0]].shape[1] != _NUM_FEATURES:
        reason = (
            f"{weights[0]} has shape {rest[weights[0]].shape}, must be (classes, {_NUM_FEATURES})"
        )
    elif len(rest[weights[0]]) < 2:
        reason = f"{weights[0]} has one output, must have one per class"
    if reason and layer is not None:
        raise DataError(f"--classifier={layer}: {reason}")
    if reason:
        return {}, f"no classifier: {reason}"
    weight = rest.pop(weights[0])
    bias = rest.pop(_bias(weights[0]), np.zeros(len(weight), np.float32))
    taken = weights[0].removesuffix(".weight")
    return {
        "fc.weight": weight,
        "fc.bias": bias,
    }, "" if taken == f"{prefix}fc" else f"classifier: {taken}"


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


def _find_mismatches(state: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> dict[str, int]:
    """Returns the differences between a state dict and a network.

    Args:
      state: arrays by torchvision's names.
      leaves: shapes of the network's variables by path.

    Returns:
      The number of entries affected, by a message describing them.
    """
    names = {torch_name(path): leaf for path, leaf in leaves.items()}
    lines: dict[str, int] = {}
    missing: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        if name not in state:
            missing[_top_module(name)].append(name)
    for module, (first, *more) in missing.items():
        others = f" and {len(more)} more of {module}" if more else ""
        lines[f"missing: {first}{others}"] = 1 + len(more)
    lines |= {f"unexpected: {name}": 1 for name in sorted(set(state) - set(names))}
    for name, leaf in names.items():
        if name not in state:
            continue
        value, expected = state[name], _torch_shape(leaf.shape)
        if value.shape != expected:
            lines[f"{name}: has shape {value.shape}, must be {expected}"] = 1
        elif not jnp.issubdtype(value.dtype, jnp.floating):
            lines[f"{name}: has type {value.dtype}, must be floating-point"] = 1
        elif not np.isfinite(_float32(value)).all():
            lines[f"{name}: has non-finite values"] = 1
    return lines


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns PyTorch's shape for an array of this package's shape."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _float32(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # Too large for float32: becomes infinite.
        return np.asarray(value, np.float32)


def _flattened_channels(path: str, leaves: Mapping[str, Any]) -> int | None:
    """Returns the channels of the feature map that a dense layer reads flattened, else None."""
    head, _, layer = path.partition("/hidden/")
    return leaves[f"{head}/conv/conv/kernel"].shape[-1] if layer == "kernel" else None


def _from_torch(value: np.ndarray, path: str, channels: int | None) -> np.ndarray:
    value = _float32(value)
    if path.endswith("kernel") and value.ndim == 4:
        value = value.transpose(2, 3, 1, 0)
    elif path.endswith("kernel") and value.ndim == 2:
        if channels and value.shape[1] % channels == 0:
            # torch flattens [C, H, W], this package [H, W, C].
            value = value.reshape(value.shape[0], channels, -1).transpose(0, 2, 1)
            value = value.reshape(value.shape[0], -1)
        value = value.T
    return np.ascontiguousarray(value)
