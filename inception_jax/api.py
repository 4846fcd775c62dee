"""The few names that a notebook needs, also reached as `inception_jax.NAME`.

All of them together::

    import pathlib
    import inception_jax

    config = inception_jax.load_config("experiments/tiny.py", {"data.directory": "data"})
    dataset = inception_jax.load_dataset(config)
    weights = inception_jax.load_weights("runs/tiny")  # Or a file of weights.
    metrics = inception_jax.evaluate(weights, config)

    predictor = inception_jax.Predictor(weights)
    pixels = predictor.read(pathlib.Path("cat.jpg").read_bytes(), "cat.jpg")
    guesses = predictor.guesses(pixels[None])

    network, variables = inception_jax.load_model(weights)
    logits = network.apply(variables, predictor.prepared(pixels[None])).logits

A user's mistake raises a `UserError` of `inception_jax.errors`, which says how to mend it.
"""

import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from inception_jax import cli
from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.datasets.dataset import Dataset, prepare
from inception_jax.errors import UserError
from inception_jax.evaluation.evaluate import evaluate_weights
from inception_jax.inference.predictor import Predictor
from inception_jax.models import networks
from inception_jax.models import weights as weight_files
from inception_jax.models.weights import Weights, check_weights
from inception_jax.storage import paths
from inception_jax.training import initialization, run
from inception_jax.training.state import Variables
from inception_jax.training.workdir import Workdir

__all__ = ["Predictor", "evaluate", "load_config", "load_dataset", "load_model", "load_weights"]

Path = str | os.PathLike[str]


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Returns the settings of an experiment, checked as a whole.

    Args:
      path: of the experiment, a Python file with a get_config(), which is run; or of the
        config.json of a run.
      overrides: settings to change, by path: {"train.batch_size": 256}.

    Raises:
      UserError: if there is no such file, or it is no experiment.
      ConfigError: if a setting is unknown or wrong, or contradicts another.
    """
    config = cli.load_experiment(os.fspath(path))
    for name, value in (overrides or {}).items():
        configs.check_path(name)
        configs.put(config, name, value)
    configs.validate(config)
    return config


def load_weights(path: Path, checkpoint: str | int = "best") -> Weights:
    """Returns the weights of a run, or those in a file.

    Args:
      path: of a run's folder, or of a file that `tools.export --to=savedweights` wrote.
      checkpoint: of a run: "best", "last" or the number of a step.

    Raises:
      UserError: if it is no path.
      CheckpointError: if there is no run or no such checkpoint in the folder.
      DataError: if the file cannot be used.
    """
    _check_path(path)
    place = paths.local(path, str(path))
    if place.is_dir():
        return initialization.from_checkpoint(Workdir(place), str(checkpoint))
    return weight_files.load(place)


def _check_path(path: object) -> None:
    """Checks that a caller gave a path, not what could be loaded from one."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(
            f"path: must be the path of a run's folder or of a file, got {type(path).__name__}"
        )


def load_model(weights: Weights) -> tuple[nn.Module, Variables]:
    """Returns the network that weights are of, and its variables.

    Call it as `network.apply(variables, images, train=False).logits`, with float32 images
    [B, H, W, 3] that are normalised: (pixel / 255 - weights.mean) / weights.std.
    """
    check_weights(weights)
    return networks.create(weights.config.model, weights.num_classes), weights.variables


def load_dataset(config: Config) -> Dataset:
    """Returns the data set of an experiment, prepared now if it was not before.

    Raises:
      DataError: if the source is damaged or missing, or the disk full.
    """
    _check_config(config)
    return prepare(config.data)


def _check_config(config: object) -> None:
    """Checks that a caller gave settings, not the path of an experiment."""
    if not isinstance(config, Config):
        raise UserError(
            f"config: must be a Config, got {type(config).__name__}; load an experiment with "
            "inception_jax.load_config(PATH)"
        )


def evaluate(weights: Weights, config: Config) -> dict[str, Any]:
    """Evaluates weights on the data set of an experiment, each example counted once.

    Args:
      weights: of the network that the settings describe.
      config: says the data set and its split, the batch size, and whether to average mirror images.

    Returns:
      checkpoint ("best", "last", "best and last", or "": neither or unknown), step and epoch (None:
      unknown), split, count, loss (mean cross-entropy), top1 and, of more than five classes, top5
      (percent).

    Raises:
      ConfigError: if the weights are of another network or other classes.
      DataError: if the data set cannot be prepared.
    """
    check_weights(weights)
    _check_config(config)
    return evaluate_weights(run.build(config), weights)
