"""Initializes runs from weights files, and matches weights with a run for evaluation."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.datasets.dataset import Dataset, class_changes
from inception_jax.errors import ConfigError, join_truncated
from inception_jax.models import protocol
from inception_jax.models import weights as files
from inception_jax.models.weights import Weights
from inception_jax.storage import access, paths
from inception_jax.training import kernels
from inception_jax.training import state as states
from inception_jax.training.run import Run, check_run
from inception_jax.training.state import TrainState, Variables


class InitialWeights(NamedTuple):
    """Initial variables read from a weights file.

    Attributes:
      values: variables to use from the file, by path; all others are initialized at random.
      notes: lines for the log on what is used and what is not.
    """

    values: dict[str, np.ndarray]
    notes: list[str]


def create_state(run: Run) -> TrainState:
    """Returns the state before a run's first step, on all devices.

    Parameters are initialized at random from config.seed and as config.init says, or read from
    config.init.pretrained.

    Raises:
      UserError: if that file cannot be used, or `run` is not a run.
    """
    check_run(run)
    abstract, create = states.lower_init(run)
    weights = initialize_from(run, abstract) if run.config.init.pretrained else None
    return with_initial_values(run, create(), weights)


def with_initial_values(
    run: Run, state: TrainState, weights: InitialWeights | None = None
) -> TrainState:
    """Returns the state before the first step with what does not start at random.

    Args:
      run: the run.
      state: its state from `states.create`.
      weights: from `initialize_from`, if config.init.pretrained is set.

    Raises:
      ConfigError: if config.init.whiten is set, and the network does not declare `first_conv`.
    """
    if weights:
        return states.with_initial_weights(state, weights.values)
    if run.config.init.whiten:
        return states.with_initial_weights(state, kernels.whitened(run, state.params))
    return state


def check_file(config: Config) -> None:
    """Checks that the file in config.init.pretrained exists, before data are prepared.

    Raises:
      ConfigError: if it does not.
      BucketError: if it is in a bucket that cannot be read.
    """
    name = config.init.pretrained
    if name and not access.is_file(_pretrained_path(config)):
        raise ConfigError(
            f"config.init.pretrained = {name!r}: file not found; set it to a weights file, such as "
            "one written by tools.export"
        )


def _pretrained_path(config: Config) -> paths.Path:
    name = config.init.pretrained
    return paths.user_path(name, f"config.init.pretrained = {name!r}")


def initialize_from(run: Run, abstract_state: TrainState) -> InitialWeights:
    """Reads the variables for a new run from the file in config.init.pretrained.

    The classifiers are re-initialized if the classes differ. Auxiliary heads are used if both sides
    have them in the same shapes, which depend on the image size.

    Args:
      run: a run with config.init.pretrained.
      abstract_state: shapes of the state.

    Raises:
      DataError: if the file cannot be used.
      ConfigError: if its weights belong to another network.
    """
    notes: list[str] = []
    weights = files.load(_pretrained_path(run.config), notes.append)
    expected = files.flatten(
        {"params": abstract_state.params, "batch_stats": abstract_state.batch_stats}
    )
    values = files.flatten(weights.variables)
    notes.append(f"initialized from {weights.origin}: {weights}")
    notes += [f"setting differs: {line}" for line in _setting_differences(weights, run.config)]
    if reason := class_mismatch(weights, run.dataset):
        notes.append(f"the classifier is re-initialized: {reason}")
        classifiers = protocol.require_attribute(
            run.model, "classifiers", "initializing from weights for other classes"
        )
        values, expected = (_drop_modules(tree, *classifiers) for tree in (values, expected))
    for head in _mismatched_heads(values, expected, _heads(run)):
        in_network = any(_is_inside(name, head) for name in expected)
        notes.append(
            f"the auxiliary head {head} is re-initialized: the file has none of its shape"
            if in_network
            else f"the auxiliary head {head} of the file is ignored"
        )
        values, expected = (_drop_modules(tree, head) for tree in (values, expected))
    _check_fit(values, expected, weights, run.config)
    if not _same_normalization(weights, run.dataset):
        notes.append("the first layer is adapted to this data set's mean and std")
        values |= _adapt_first_layer(values, weights, run)
    return InitialWeights(values, notes)


def class_mismatch(weights: Weights, dataset: Dataset) -> str:
    """Returns a description of how the classes of weights and data set differ, or ''."""
    if not weights.num_classes:
        return "the weights have no classifier"
    if not weights.class_names and weights.num_classes != dataset.num_classes:
        return (
            f"the weights have {weights.num_classes} classes, {dataset.name} has "
            f"{dataset.num_classes}"
        )
    # Weights of other programs may lack class names.
    return class_changes(weights.class_names or dataset.class_names, dataset.class_names)


def check_classes(weights: Weights, dataset: Dataset) -> None:
    """Checks that weights are for the classes of a data set.

    Raises:
      ConfigError: if they are not.
    """
    if reason := class_mismatch(weights, dataset):
        raise ConfigError(
            f"{weights.origin}: the weights are for other classes: {reason}. Use the data set they "
            "were trained on, or fine-tune them on this one with --config.init.pretrained"
        )


def variables_for_eval(run: Run, weights: Weights) -> Variables:
    """Returns the variables for evaluating weights with a run's network.

    Args:
      run: a run with the network and the classes of the weights.
      weights: the weights.

    Raises:
      ConfigError: if the weights belong to another network or other classes.
    """
    check_classes(weights, run.dataset)
    state = states.abstract_state(run)
    expected = files.flatten({"params": state.params, "batch_stats": state.batch_stats})
    # Evaluation does not need auxiliary heads.
    values = _drop_modules(files.flatten(weights.variables), *_heads(run))
    _check_fit(values, _drop_modules(expected, *_heads(run)), weights, run.config)
    if lines := _setting_differences(weights, run.config):
        raise ConfigError(
            f"{weights.origin}: the weights belong to another network:\n  "
            + "\n  ".join(lines)
            + "\nUse the settings of the file's network"
        )
    return files.unflatten(values)


def _setting_differences(weights: Weights, config: Config) -> list[str]:
    """Returns the network settings that differ between weights and config, with both values.

    Except auxiliary heads, which evaluation does not need.
    """
    return [
        f"config.{path}: {theirs!r} in the file, {ours!r} here"
        for path in _NETWORK_SETTINGS
        if (theirs := configs.get(weights, path)) != (ours := configs.get(config, path))
    ]


# Settings that determine the state's shapes, and the only other one that evaluation depends on.
_NETWORK_SETTINGS = [
    path
    for path, _, field in configs.leaves()
    if path.startswith("model.") and not field.metadata["resumable"] and path != "model.aux_heads"
] + ["model.norm_epsilon"]


def _same_normalization(weights: Weights, dataset: Dataset) -> bool:
    """Whether images are normalized by the same mean and std."""
    return np.array_equal(weights.mean, dataset.mean) and np.array_equal(weights.std, dataset.std)


def _check_fit(
    values: Mapping[str, Any],
    expected: Mapping[str, Any],
    weights: Weights,
    config: Config,
) -> None:
    """Raises a ConfigError naming the variables and settings of a file that do not match."""
    differences = list(_differences(values, expected))
    if not differences:
        return
    lines = [
        join_truncated(differences, separator="\n  "),
        *_setting_differences(weights, config),
    ]
    raise ConfigError(
        f"{weights.origin}: the weights belong to another network; "
        f"{len(differences)} variables differ:\n  "
        + "\n  ".join(lines)
        + "\nUse the settings of the file's network, or weights of this one"
    )


def _differences(values: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"missing: {name}" for name in expected if name not in values)
    yield from (f"unexpected: {name}" for name in values if name not in expected)
    for name in expected:
        if name in values and (theirs := values[name].shape) != (ours := expected[name].shape):
            yield f"shape mismatch: {name}: {theirs} in the file, {ours} here"


def _heads(run: Run) -> tuple[str, ...]:
    """Returns the modules used only in training, whether this instance has them or not."""
    heads: tuple[str, ...] = protocol.get_attribute(run.model, "heads", ())
    return heads


def _is_inside(name: str, *modules: str) -> bool:
    """Whether a variable of any collection belongs to one of the modules."""
    return protocol.is_inside(name.partition("/")[2], *modules)


def _drop_modules(leaves: Mapping[str, Any], *modules: str) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if not _is_inside(name, *modules)}


def _mismatched_heads(
    values: Mapping[str, Any], expected: Mapping[str, Any], heads: tuple[str, ...]
) -> list[str]:
    """Returns the heads that are on one side only or differ in their shapes."""

    def shapes(leaves: Mapping[str, Any], head: str) -> dict[str, tuple[int, ...]]:
        return {name: leaf.shape for name, leaf in leaves.items() if _is_inside(name, head)}

    return [head for head in heads if shapes(values, head) != shapes(expected, head)]


def _adapt_first_layer(
    values: Mapping[str, np.ndarray], weights: Weights, run: Run
) -> dict[str, np.ndarray]:
    """Adapts the first layer's variables to images normalized by another mean and std.

    With x = (p - mean) / std on both sides, theirs = scale * ours + shift. The kernel absorbs the
    scale; the shift adds a constant to the output, absorbed by the running mean or the bias. This
    is exact except at the image's border, where the zero padding means another color.
    """
    purpose = "initializing from weights for images with another mean or std"
    first = protocol.require_attribute(run.model, "first_conv", purpose)
    norm = protocol.get_attribute(run.model, "first_norm", "")
    scale = run.dataset.std / weights.std
    shift = (run.dataset.mean - weights.mean) / weights.std
    kernel = values[f"params/{first}/kernel"]
    constant = np.einsum("hwio,i->o", kernel, shift)
    adapted = {f"params/{first}/kernel": kernel * scale[:, None]}
    for name, sign in ((f"batch_stats/{norm}/mean", -1), (f"params/{first}/bias", 1)):
        if name in values:
            adapted[name] = values[name] + np.float32(sign) * constant
    if len(adapted) == 1 and constant.any():
        raise ConfigError(
            f"{purpose} needs a bias of {first}, or the BatchNorm after it as the network's "
            "attribute 'first_norm'"
        )
    return adapted
