"""The Python API, also available as `inception_jax.NAME`; see docs/python.md.

A user's mistake raises an `inception_jax.errors.UserError` with a message that says how to fix it.
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
from inception_jax.programs import report, targets
from inception_jax.programs.report import Report
from inception_jax.programs.targets import Target
from inception_jax.runtime import devices, preemption
from inception_jax.storage import buckets, paths
from inception_jax.training import run
from inception_jax.training.initialization import create_state as create_state
from inception_jax.training.norm import NormEstimator
from inception_jax.training.run import Run
from inception_jax.training.run import train_batches as train_batches
from inception_jax.training.state import TrainState, Variables
from inception_jax.training.step import make_train_step as make_train_step

PathLike = str | os.PathLike[str]
# Images uint8 [N, H, W, 3] and labels int [N].
Arrays = tuple[np.ndarray, np.ndarray]

buckets.log_outages(console.log)


def train(
    config: Config,
    workdir: PathLike,
    *,
    dataset: Dataset | Arrays | None = None,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> dict[str, Any]:
    """Trains to the end, like the command: resumes from the latest checkpoint, writes a report.

    Ctrl-C or a notebook's stop button saves the run and raises KeyboardInterrupt; the same call
    resumes it. Signal handlers, JAX settings and logging are restored after the call.

    Args:
      config: settings, as returned by `load_config`.
      workdir: folder of the run, local or gs://BUCKET/PATH; created if missing.
      dataset, model, optimizer: as for `assemble`. config.json records their use, so that only a
        call that passes them again can resume the run.

    Returns:
      The contents of result.json: the last evaluation, with the speed and duration of the run.

    Raises:
      UserError: if a setting is invalid, the folder belongs to another run, or data is missing.
      RunError: if the loss or gradient is not finite.
    """
    _use_settings(config)
    check_not_registering("trains")
    if jax.process_count() > 1:
        raise UserError(
            f"inception_jax.train: runs in a single process, but this is one of "
            f"{jax.process_count()}; use python -m inception_jax.main in each of them"
        )
    location = paths.user_path(_require_path(workdir, "workdir", "a run's folder"), str(workdir))
    objects = {"dataset": _as_dataset(dataset), "model": model, "optimizer": optimizer}
    with (
        _quiet_libraries(),
        devices.run_settings(console.log),
        preemption.save_on_interrupt(console.log) as stop,
    ):
        try:
            result = session.train_and_evaluate(
                copy.deepcopy(config), location, objects=objects, join=lambda config: stop
            )
        except Preempted as end:
            raise KeyboardInterrupt(str(end)) from end
        if stop(result["step"]):
            raise KeyboardInterrupt(f"interrupted after the last step; {location} is complete")
        return result


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silences the logging of libraries, as the commands do."""
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
    """Builds the parts of a run, for `create_state`, `make_train_step` and the other functions.

    Args:
      config: settings, as returned by `load_config`.
      dataset: replaces the configured one: a `Dataset`, or a pair of images, uint8 [N, H, W, 3],
        and labels, int [N], of which a fifth is held out for evaluation.
      model: replaces the configured network: called as `model(images, train=train)` with float32
        images [B, H, W, 3], normalized by the data set's mean and std, it returns float32 logits
        [B, K] or a `models.layers.ModelOutput`.
      optimizer: replaces the configured one.

    Returns:
      A `Run` with config, dataset, model, optimizer, schedule, mesh, timeline and total_steps.

    Raises:
      ConfigError: if a setting is invalid, or an object has the wrong type.
      DataError: if the data set cannot be prepared.
      UserError: if JAX computes in 64 bits.
    """
    _use_settings(config)
    if jax.config.jax_enable_x64:
        raise UserError(
            "inception_jax.assemble: jax_enable_x64 is set, but training computes in 32 bits; "
            "first call jax.config.update('jax_enable_x64', False)"
        )
    given = _as_dataset(dataset)
    config = copy.deepcopy(config) if given is None else run.config_for_dataset(config, given)
    run.check_settings(config)
    return run.assemble(config, given, model, optimizer, log=console.log)


def compile_for(
    config: Config,
    target: str | Target,
    *,
    classes: int = 0,
    examples: int = 0,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    largest_batch: bool = False,
) -> Report:
    """Compiles the training step and the evaluation for a TPU or GPU that need not be there.

    Needs the compiler, which comes with the extra tpu or cuda, but no device and no data.

    Args:
      config: settings, as returned by `load_config`.
      target: "v5e-8", "h100" or another name (docs/compile.md), or a `Target`.
      classes, examples: numbers of classes and of training images, if the data set does not define
        them.
      model, optimizer: as for `assemble`.
      largest_batch: whether to look for the largest batch that fits, too, which takes several more
        compilations.

    Returns:
      A report: `print` it, or use the figures in its attribute `record`.

    Raises:
      UserError: if a setting is invalid, there is no such target, its compiler is not installed,
        the devices cannot share the batch, or a program does not fit into their memory.
      RunError: if the compiler fails.
    """
    _use_settings(config)
    return report.compile_for(
        config,
        targets.get(target) if isinstance(target, str) else target,
        classes=classes,
        examples=examples,
        model=model,
        optimizer=optimizer,
        largest_batch=largest_batch,
        log=console.log,
    )


def load_weights(
    path: PathLike, checkpoint: str | int = "best", *, model: nn.Module | None = None
) -> Weights:
    """Returns the weights of a run or from a file.

    Args:
      path: the folder of a run, or a file written by `tools.export --to=savedweights`; local or
        gs://BUCKET/PATH.
      checkpoint: checkpoint of the run: "best", "last" or a step.
      model: the network, if it was passed to `train`.

    Raises:
      UserError: if `path` is not a path.
      CheckpointError: if the folder contains no run or no such checkpoint.
      DataError: if the file cannot be used.
      BucketError: if it is in a bucket that cannot be read.
    """
    place = paths.user_path(_require_path(path, "path", "a run's folder or of a file"), str(path))
    # Buckets have no folders, only files below a path.
    is_run = place.is_dir() if paths.is_local(place) else bool(buckets.list_files(place))
    if not is_run:
        return weight_files.load(place, console.log)
    workdir = load.open_workdir(place)
    with _quiet_libraries():
        return load.from_checkpoint(workdir, str(checkpoint), console.log, model=model)


def load_model(weights: Weights) -> tuple[nn.Module, Variables]:
    """Returns the network of some weights, and its variables.

    Call it as `network.apply(variables, images, train=False).logits`, with normalized float32
    images [B, H, W, 3]: (pixel / 255 - weights.mean) / weights.std.
    """
    check_weights(weights)
    return weights.network, weights.variables


def load_dataset(config: Config) -> Dataset:
    """Returns the data set of an experiment; prepares it first if necessary.

    Raises:
      ConfigError: naming every invalid setting.
      DataError: if the source is corrupt or missing, or the disk is full.
      WriteError: if data are in a bucket that cannot be read, or not be written.
    """
    _use_settings(config)
    run.check_settings(config)
    return prepare(config.data, log=console.log)


@overload
def evaluate(subject: Weights, context: Config, /) -> dict[str, Any]: ...
@overload
def evaluate(subject: Run, context: TrainState, /) -> dict[str, Any]: ...
def evaluate(subject: Weights | Run, context: Config | TrainState, /) -> dict[str, Any]:
    """Evaluates weights or the state of a custom loop on the evaluation split, each example once.

    Call it as `evaluate(weights, config)` or, in a custom loop, `evaluate(setup, state)`.

    Args:
      subject: weights of the configured network; or the `Run` that `assemble` returned.
      context: for weights, the settings, which determine the data set, its split, the batch size
        and whether to average mirror images; for a `Run`, its state, which stays valid.

    Returns:
      count, loss (mean cross-entropy), top1 and, with more than five classes, top5 (percent); with
      other configured evaluations, "evaluations" has the same of each by name. For weights also
      checkpoint ("best", "last", "best and last", or "": neither or unknown), step and epoch (None:
      unknown) and split.

    Raises:
      ConfigError: if the weights belong to another network or other classes.
      DataError: if the data set cannot be prepared.
    """
    if isinstance(subject, Run):
        if not isinstance(context, TrainState):
            raise UserError(
                f"state: must be a TrainState from create_state or a training step, got "
                f"{type(context).__name__}"
            )
        estimate_norm, evaluator = _cached_evaluator(subject)
        return summary(evaluator(estimate_norm(context).eval_variables()))
    check_weights(subject)
    _use_settings(context)
    assert isinstance(context, Config)
    run.check_settings(context)
    setup = run.assemble(context, model=subject.module, trains=False, log=console.log)
    return evaluate_weights(setup, subject, console.log)


@functools.lru_cache(maxsize=2)
def _cached_evaluator(setup: Run) -> tuple[NormEstimator, Evaluator]:
    """Returns the evaluator of a run, cached so that it is compiled only once."""
    return NormEstimator(setup), Evaluator(setup)


def _as_dataset(given: Dataset | Arrays | None) -> Dataset | None:
    """Returns the data set passed by a caller, built from arrays if it is a pair of them."""
    if isinstance(given, tuple):
        if len(given) != 2:
            raise UserError(f"dataset: must be a pair (images, labels), got {len(given)} values")
        return Dataset.from_arrays(*given)
    return given


def _require_path(path: object, name: str, what: str) -> PathLike:
    """Checks that a caller passed a path, not an object loaded from one."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"{name}: must be the path of {what}, got {type(path).__name__}")
    if not os.fspath(path):
        raise UserError(f"{name}: must not be empty; pass the path of {what}")
    return path


def _use_settings(config: object) -> None:
    """Checks that a caller passed settings, not a path, and applies those of the whole process."""
    if not isinstance(config, Config):
        raise UserError(
            f"config: must be a Config, got {type(config).__name__}; load an experiment with "
            "inception_jax.load_config(PATH)"
        )
    buckets.set_retry_seconds(config.bucket.retry_seconds)
