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

import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from inception_jax import cli, paths
from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import ConfigError, UserError
from inception_jax.evaluation.evaluate import evaluate_weights
from inception_jax.evaluation.predict import Predictor
from inception_jax.input.dataset import Dataset, prepare
from inception_jax.models import registry
from inception_jax.models import weights as weight_files
from inception_jax.models.registry import Network
from inception_jax.models.weights import Weights
from inception_jax.training import pretrained, run
from inception_jax.training.state import Variables
from inception_jax.training.workdir import Workdir

__all__ = ["Predictor", "evaluate", "load_config", "load_dataset", "load_model", "load_weights"]

Path = str | os.PathLike[str]


def load_config(path: Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Returns the settings of an experiment, checked as a whole.

    Args:
      path: of the experiment, a Python file with a get_config(). It is run.
      overrides: settings to change, by path: {"train.batch_size": 256}.

    Raises:
      UserError: if there is no such file, or it is no experiment.
      ConfigError: if a setting is unknown or wrong, or contradicts another.
    """
    file = paths.local(path, str(path))
    if not file.is_file():
        raise UserError(f"{file}: there is no such file; give an experiment, such as tiny.py")
    cli.make_importable(file)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise UserError(f"{file}: is no Python file; give an experiment, such as tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if hasattr(module, "get_config") else None
    if not isinstance(config, Config):
        raise UserError(f"{file}: has no get_config() that returns a Config")
    known = {path for path, _, _ in configs.leaves()}
    for name, value in (overrides or {}).items():
        if name not in known:
            raise ConfigError(configs.unknown_field(name))
        parent, _, field = name.rpartition(".")
        setattr(configs.get(config, parent) if parent else config, field, value)
    configs.validate(config)
    return config


def load_weights(path: Path, checkpoint: str = "best") -> Weights:
    """Returns the weights of a run, or those in a file.

    Args:
      path: of a run's folder, or of a file that `tools.export --to=savedweights` wrote.
      checkpoint: of a run: "best", "last" or the number of a step.

    Raises:
      CheckpointError: if there is no run or no such checkpoint in the folder.
      DataError: if the file cannot be used.
    """
    place = paths.local(path, str(path))
    if place.is_dir():
        return pretrained.from_checkpoint(Workdir(place), checkpoint)
    return weight_files.load(place)


def load_model(weights: Weights) -> tuple[Network, Variables]:
    """Returns the network that weights are of, and its variables.

    Call it as `network.apply(variables, images, train=False).logits`, with float32 images
    [B, H, W, 3] that are normalised: (pixel / 255 - weights.mean) / weights.std.
    """
    return registry.create(weights.config.model, weights.num_classes), weights.variables


def load_dataset(config: Config) -> Dataset:
    """Returns the data set of an experiment, prepared now if it was not before.

    Raises:
      DataError: if the source is damaged or missing, or the disk full.
    """
    return prepare(config.data)


def evaluate(weights: Weights, config: Config) -> dict[str, Any]:
    """Evaluates weights on the data set of an experiment, each example counted once.

    Args:
      weights: of the network that the settings describe.
      config: says the data set and its split, the batch size, and whether to average mirror images.

    Returns:
      step and epoch (None: unknown), split, count, loss (mean cross-entropy), top1 and top5
      (percent).

    Raises:
      ConfigError: if the weights are of another network or other classes.
      DataError: if the data set cannot be prepared.
    """
    return evaluate_weights(run.build(config), weights)
