"""The Python API, reached as `inception_jax.NAME`; docs/python.md shows it by example.

A user's mistake raises a `UserError` of `inception_jax.errors`, which says how to fix it.
"""

import contextlib
import copy
import functools
import os
from collections.abc import Iterator
from typing import Any, overload

import flax.linen as nn
import jax
import numpy as np
import optax
from absl import logging

from inception_jax import console, session
from inception_jax.config import Config
from inception_jax.datasets.dataset import Dataset, prepare
from inception_jax.errors import Preempted, UserError
from inception_jax.evaluation.evaluate import Evaluator, evaluate_weights, summary
from inception_jax.experiment import check_not_registering
from inception_jax.experiment import load_config as load_config
from inception_jax.inference import load
from inception_jax.inference.predictor import Predictor as Predictor
from inception_jax.models import weights as weight_files
from inception_jax.models.weights import Weights, check_weights
from inception_jax.runtime import devices, preemption
from inception_jax.storage import paths
from inception_jax.storage.workdir import Workdir
from inception_jax.training import run
from inception_jax.training.initialization import create_state as create_state
from inception_jax.training.norm import NormEstimator
from inception_jax.training.run import Run
from inception_jax.training.run import train_batches as train_batches
from inception_jax.training.state import TrainState, Variables
from inception_jax.training.step import make_train_step as make_train_step

Path = str | os.PathLike[str]
# Images uint8 [N, H, W, 3] and labels int [N].
Arrays = tuple[np.ndarray, np.ndarray]


def train(
    config: Config,
    workdir: Path,
    *,
    dataset: Dataset | Arrays | None = None,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> dict[str, Any]:
    """Trains to the end, as the command does: goes on from the newest checkpoint, leaves a report.

    Ctrl-C, or a notebook's stop button, saves the run and then raises KeyboardInterrupt; the same
    call goes on from there. Nothing that is set up for the run stays after the call.

    Args:
      config: the settings, as `load_config` returns them.
      workdir: folder of the run; made if missing.
      dataset, model, optimizer: as `assemble` takes them. config.json records that the run has
        them, so that it goes on by the same call alone.

    Returns:
      The contents of result.json: the last evaluation, with the speed and time of the whole run.

    Raises:
      UserError: if a setting is wrong, the folder is another run's, or data are missing.
      RunError: if the loss or gradient is not finite.
    """
    _check_config(config)
    check_not_registering("trains")
    if jax.process_count() > 1:
        raise UserError(
            f"inception_jax.train: this is one of {jax.process_count()} processes, which it does "
            "not keep together; start the command in each: python -m inception_jax.main"
        )
    path = paths.local(_checked_path(workdir, "workdir", "a run's folder"), str(workdir))
    own = {"dataset": _dataset(dataset), "model": model, "optimizer": optimizer}
    with (
        _quiet_libraries(),
        devices.settings_of_a_run(console.say),
        preemption.saved_on_interrupt(console.say) as stop,
    ):
        try:
            return session.train_and_evaluate(
                copy.deepcopy(config), path, own=own, join=lambda config: stop
            )
        except Preempted as end:
            raise KeyboardInterrupt(str(end)) from end


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silences library logging, as the commands do; errors are still raised."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def assemble(
    config: Config,
    dataset: Dataset | Arrays | None = None,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Run:
    """Returns what a configuration makes: for `create_state`, `make_train_step` and the others.

    Args:
      config: the settings, as `load_config` returns them.
      dataset: in place of the one that they name: a `Dataset`, or a pair of images, uint8
        [N, H, W, 3], and labels, int [N], of which a fifth is held out for evaluation.
      model: a network in place of the one that they name: called as `model(images, train=train)`
        with float32 images [B, H, W, 3], normalized by the data set's mean and std, it returns
        float32 logits [B, K] or a `models.layers.ModelOutput`.
      optimizer: in place of the one that they name.

    Returns:
      A `Run`: config, dataset, model, optimizer, schedule, mesh, timeline and total_steps.

    Raises:
      ConfigError: if a setting is wrong, or an object is not what it must be.
      DataError: if the data set cannot be prepared.
    """
    _check_config(config)
    config = copy.deepcopy(config)
    run.check_settings(config)
    return run.assemble(config, _dataset(dataset), model, optimizer, log=console.say)


def load_weights(
    path: Path, checkpoint: str | int = "best", *, model: nn.Module | None = None
) -> Weights:
    """Returns the weights of a run, or those in a file.

    Args:
      path: of a run's folder, or of a file that `tools.export --to=savedweights` wrote.
      checkpoint: of a run: "best", "last" or the number of a step.
      model: the network, of a run that `train` was given one.

    Raises:
      UserError: if it is no path.
      CheckpointError: if there is no run or no such checkpoint in the folder.
      DataError: if the file cannot be used.
    """
    place = paths.local(_checked_path(path, "path", "a run's folder or of a file"), str(path))
    if not place.is_dir():
        return weight_files.load(place, console.say)
    with _quiet_libraries():
        return load.from_checkpoint(Workdir(place), str(checkpoint), console.say, model=model)


def load_model(weights: Weights) -> tuple[nn.Module, Variables]:
    """Returns the network that weights are of, and its variables.

    Call it as `network.apply(variables, images, train=False).logits`, with float32 images
    [B, H, W, 3] that are normalized: (pixel / 255 - weights.mean) / weights.std.
    """
    check_weights(weights)
    return weights.network, weights.variables


def load_dataset(config: Config) -> Dataset:
    """Returns the data set of an experiment, prepared now if it was not before.

    Raises:
      DataError: if the source is damaged or missing, or the disk full.
    """
    _check_config(config)
    return prepare(config.data, log=console.say)


@overload
def evaluate(what: Weights, how: Config) -> dict[str, Any]: ...
@overload
def evaluate(what: Run, how: TrainState) -> dict[str, Any]: ...
def evaluate(what: Weights | Run, how: Config | TrainState) -> dict[str, Any]:
    """Evaluates on a data set's evaluation split, each example counted once.

    Args:
      what: weights of the network that the settings describe; or, in a loop of one's own, what
        `assemble` returned.
      how: for weights, the settings, which say the data set and its split, the batch size, and
        whether to average mirror images; in a loop, its state, which it can go on with.

    Returns:
      count, loss (mean cross-entropy), top1 and, of more than five classes, top5 (percent); of
      weights also checkpoint ("best", "last", "best and last", or "": neither or unknown), step and
      epoch (None: unknown) and split.

    Raises:
      ConfigError: if the weights are of another network or other classes.
      DataError: if the data set cannot be prepared.
    """
    if isinstance(what, Run):
        if not isinstance(how, TrainState):
            raise UserError(
                f"state: must be a TrainState, as create_state and a step return it, got "
                f"{type(how).__name__}"
            )
        estimate_norm, evaluator = _evaluation(what)
        return summary(evaluator(estimate_norm(how).eval_variables()))
    check_weights(what)
    _check_config(how)
    assert isinstance(how, Config)
    return evaluate_weights(run.assemble(how, log=console.say), what)


@functools.lru_cache(maxsize=2)
def _evaluation(setup: Run) -> tuple[NormEstimator, Evaluator]:
    """Returns what evaluates a run's states, kept so that it is compiled once."""
    return NormEstimator(setup), Evaluator(setup)


def _dataset(given: Dataset | Arrays | None) -> Dataset | None:
    """Returns the data set that a caller gave, made of arrays where it is a pair of them."""
    if isinstance(given, tuple):
        if len(given) != 2:
            raise UserError(
                f"dataset: must be a pair of images and labels, got {len(given)} values"
            )
        return Dataset.from_arrays(*given)
    return given


def _checked_path(path: object, name: str, what: str) -> Path:
    """Checks that a caller gave a path, not what could be loaded from one."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{name}: must be the path of {what}, got {type(path).__name__}")
    if not os.fspath(path):
        raise UserError(f"{name}: is empty; give the path of {what}")
    return path


def _check_config(config: object) -> None:
    """Checks that a caller gave settings, not the path of an experiment."""
    if not isinstance(config, Config):
        raise UserError(
            f"config: must be a Config, got {type(config).__name__}; load an experiment with "
            "inception_jax.load_config(PATH)"
        )
