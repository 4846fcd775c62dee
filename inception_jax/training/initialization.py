"""Weights of a file as the start of a run, and in the place of a run's own in an evaluation."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.datasets.dataset import Dataset, class_changes
from inception_jax.errors import ConfigError
from inception_jax.models import protocol
from inception_jax.models import weights as files
from inception_jax.models.weights import Weights
from inception_jax.storage import paths
from inception_jax.training import state as states
from inception_jax.training.run import Run
from inception_jax.training.state import TrainState, Variables

_SHOWN = 10


class InitialWeights(NamedTuple):
    """What a run starts from.

    Attributes:
      values: the variables to take over, by path; the others are drawn as always.
      notes: what is taken and what is not, for the user.
    """

    values: dict[str, np.ndarray]
    notes: list[str]


def create_state(run: Run) -> TrainState:
    """Returns the state before a run's first step, on all devices.

    Its parameters are drawn with config.seed, or read from config.init.pretrained.

    Raises:
      UserError: if that file cannot be used.
    """
    abstract, create = states.lower_init(run)
    if not run.config.init.pretrained:
        return create()
    return states.with_initial_weights(create(), initialize_from(run, abstract).values)


def initialize_from(run: Run, abstract_state: TrainState) -> InitialWeights:
    """Returns what a new run takes from the file that config.init.pretrained names.

    The classifiers are re-initialized where the classes differ. Auxiliary heads are taken where
    both sides have them and they fit, for their shapes depend on the size of the images.

    Args:
      run: with config.init.pretrained.
      abstract_state: shapes of the state.

    Raises:
      DataError: if the file cannot be used.
      ConfigError: if its weights are of another network.
    """
    notes: list[str] = []
    path = paths.local(run.config.init.pretrained, "config.init.pretrained")
    found = files.load(path, notes.append)
    expected = files.flatten(
        {"params": abstract_state.params, "batch_stats": abstract_state.batch_stats}
    )
    values = files.flatten(found.variables)
    notes.append(f"starts from {found.origin}: {found}")
    notes += [f"weights of other settings: {line}" for line in _other_settings(found, run.config)]
    if reason := other_classes(found, run.dataset):
        notes.append(f"the classifier is re-initialized: {reason}")
        classifiers = protocol.needed(
            run.model, "classifiers", "starting from weights of other classes"
        )
        values, expected = (_without(tree, *classifiers) for tree in (values, expected))
    for head in _heads_that_do_not_fit(values, expected, _heads(run)):
        here = any(_is_inside(name, head) for name in expected)
        notes.append(
            f"the auxiliary head {head} starts anew: the file has none of its shape"
            if here
            else f"the auxiliary head {head} of the file is left out"
        )
        values, expected = (_without(tree, head) for tree in (values, expected))
    _check_fit(values, expected, found, run.config)
    if not _same_normalisation(found, run.dataset):
        notes.append("the first layer is adapted to this data set's mean and std")
        values |= _renormalised(values, found, run)
    return InitialWeights(values, notes)


def other_classes(found: Weights, dataset: Dataset) -> str:
    """Returns how the classes of weights differ from a data set's, or ''."""
    if not found.num_classes:
        return "the weights have no classifier"
    if not found.class_names and found.num_classes != dataset.num_classes:
        return f"the weights have {found.num_classes}, {dataset.name} {dataset.num_classes}"
    # Weights of other programs may not say what their classes are called.
    return class_changes(found.class_names or dataset.class_names, dataset.class_names)


def check_classes(found: Weights, dataset: Dataset) -> None:
    """Checks that weights are of a data set's classes.

    Raises:
      ConfigError: if they are not.
    """
    if reason := other_classes(found, dataset):
        raise ConfigError(
            f"{found.origin}: its weights are of other classes: {reason}. Give the data set they "
            "were trained on, or train on this one from them: --config.init.pretrained"
        )


def variables_for_eval(run: Run, found: Weights) -> Variables:
    """Returns the variables that evaluating weights as a run's network takes.

    Args:
      run: with the network and the data set.
      found: the weights.

    Raises:
      ConfigError: if they are of another network or other classes.
    """
    check_classes(found, run.dataset)
    state = states.abstract_state(run)
    expected = files.flatten({"params": state.params, "batch_stats": state.batch_stats})
    # Evaluation needs no auxiliary heads.
    values = _without(files.flatten(found.variables), *_heads(run))
    _check_fit(values, _without(expected, *_heads(run)), found, run.config)
    if lines := _other_settings(found, run.config):
        raise ConfigError(
            f"{found.origin}: its weights are of another network:\n  "
            + "\n  ".join(lines)
            + "\nGive the settings of the file's network"
        )
    return files.unflatten(values)


def _other_settings(found: Weights, config: Config) -> list[str]:
    """Returns the settings that make another network of the same weights, with both values.

    Heads are left out: evaluation needs none.
    """
    return [
        f"config.{path}: {theirs!r} in the file, {ours!r} here"
        for path in _NETWORK
        if (theirs := configs.get(found, path)) != (ours := configs.get(config, path))
    ]


# What decides the state's shape, and the one further setting that evaluation computes with.
_NETWORK = [
    path
    for path, _, field in configs.leaves()
    if path.startswith("model.") and not field.metadata["resumable"] and path != "model.aux_heads"
] + ["model.norm_epsilon"]


def _same_normalisation(found: Weights, dataset: Dataset) -> bool:
    """Whether images are normalised by the same numbers."""
    return np.array_equal(found.mean, dataset.mean) and np.array_equal(found.std, dataset.std)


def _check_fit(
    values: Mapping[str, Any],
    expected: Mapping[str, Any],
    found: Weights,
    config: Config,
) -> None:
    """Checks that the variables of a file are those of a network.

    Args:
      values, expected: variables of the file and of the network, by path.
      found: the whole file.
      config: of the network.

    Raises:
      ConfigError: naming what is missing, unexpected or of another shape, and other settings.
    """
    differences = list(_differences(values, expected))
    if not differences:
        return
    lines = differences[:_SHOWN]
    if len(differences) > _SHOWN:
        lines.append(f"… and {len(differences) - _SHOWN} more")
    lines += _other_settings(found, config)
    raise ConfigError(
        f"{found.origin}: its weights are of another network; "
        f"{len(differences)} variables differ:\n  "
        + "\n  ".join(lines)
        + "\nGive the settings of the file's network, or weights of this one"
    )


def _differences(values: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"missing: {name}" for name in expected if name not in values)
    yield from (f"unexpected: {name}" for name in values if name not in expected)
    for name in expected:
        if name in values and (theirs := values[name].shape) != (ours := expected[name].shape):
            yield f"other shape: {name}: {theirs} in the file, {ours} here"


def _heads(run: Run) -> tuple[str, ...]:
    """Returns the modules that only training computes, whether the network has them or not."""
    heads: tuple[str, ...] = protocol.said(run.model, "heads", ())
    return heads


def _is_inside(name: str, *modules: str) -> bool:
    """Whether a variable, of any collection, belongs to one of some modules."""
    return protocol.is_inside(name.partition("/")[2], *modules)


def _without(leaves: Mapping[str, Any], *modules: str) -> dict[str, Any]:
    return {name: leaf for name, leaf in leaves.items() if not _is_inside(name, *modules)}


def _heads_that_do_not_fit(
    values: Mapping[str, Any], expected: Mapping[str, Any], heads: tuple[str, ...]
) -> list[str]:
    """Returns the heads that the two sides do not both have, or neither, in the same shapes."""

    def shapes(leaves: Mapping[str, Any], head: str) -> dict[str, tuple[int, ...]]:
        return {name: leaf.shape for name, leaf in leaves.items() if _is_inside(name, head)}

    return [head for head in heads if shapes(values, head) != shapes(expected, head)]


def _renormalised(
    values: Mapping[str, np.ndarray], found: Weights, run: Run
) -> dict[str, np.ndarray]:
    """Returns the first layer's variables for images that are normalised by other numbers.

    With x = (p - mean) / std on both sides, theirs = scale * ours + shift. The convolution takes
    the scale; the shift adds a constant to its output, which the running mean or the bias takes.
    Only at the image's border is it not exact: the zeros around are another colour.
    """
    purpose = "starting from weights of images of another mean and deviation"
    first = protocol.needed(run.model, "first_conv", purpose)
    norm = protocol.said(run.model, "first_norm", "")
    scale = run.dataset.std / found.std
    shift = (run.dataset.mean - found.mean) / found.std
    kernel = values[f"params/{first}/kernel"]
    constant = np.einsum("hwio,i->o", kernel, shift)
    renormalised = {f"params/{first}/kernel": kernel * scale[:, None]}
    for name, sign in ((f"batch_stats/{norm}/mean", -1), (f"params/{first}/bias", 1)):
        if name in values:
            renormalised[name] = values[name] + np.float32(sign) * constant
    return renormalised
