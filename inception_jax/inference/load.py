"""Loads trained weights from a workdir or a weights file."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np

from inception_jax import config as configs
from inception_jax.config import Timeline
from inception_jax.models import networks, protocol
from inception_jax.models import weights as files
from inception_jax.models.weights import Weights
from inception_jax.runtime import environment
from inception_jax.storage import paths
from inception_jax.storage.workdir import Workdir


def load(
    *,
    workdir: paths.Path | None,
    weights: paths.Path | None,
    checkpoint: str,
    log: Callable[[str], None] = print,
) -> Weights:
    """Returns the weights that a command's flags name: those of a run or of a file.

    Args:
      workdir: of a run, or None.
      weights: path of a weights file, used if `workdir` is None.
      checkpoint: of the run: "best", "last" or a step number.
      log: receives a line for each recorded setting that this version does not have.

    Raises:
      UserError: if they cannot be loaded.
    """
    if workdir is not None:
        return from_checkpoint(open_workdir(workdir), checkpoint, log)
    assert weights is not None
    return files.load(weights, log)


def for_inference(
    weights: Weights, dtype: str = "auto", log: Callable[[str], None] = print
) -> Weights:
    """Returns weights whose network computes in a dtype that suits a command.

    Args:
      weights: as `load` returns them.
      dtype: "float32" or "bfloat16"; "auto": the dtype of the training, except that a CPU computes
        in float32, because only programs in float32 can be loaded from the compilation cache there
        (`ops.compiler_options`).
      log: receives a line if the dtype is not that of the training.
    """
    reason = ""
    if dtype == "auto":
        if jax.default_backend() != "cpu":
            return weights
        dtype = "float32"
        reason = ": on a CPU that starts faster; --dtype=bfloat16 overrides"
    model = dataclasses.replace(weights.model, dtype=dtype)
    changed = dataclasses.replace(weights, model=model)
    # A network that was given as an object, or that does not follow the setting, stays as it is.
    before, after = (getattr(each.network, "dtype", None) for each in (weights, changed))
    if before != after:
        log(f"computing in {after}, not in {before} as in training{reason}")
    return changed


def open_workdir(location: paths.Path) -> Workdir:
    """Returns the folder of a run to read; of one in a bucket, only config.json is copied.

    Raises:
      BucketError: if it cannot be read.
    """
    workdir = Workdir(location)
    workdir.download(workdir.config)
    return workdir


def from_checkpoint(
    workdir: Workdir,
    which: str,
    log: Callable[[str], None] = print,
    *,
    model: nn.Module | None = None,
) -> Weights:
    """Returns the evaluation variables of a checkpoint, with their metadata.

    Needs only the workdir, not the data set or the training devices.

    Args:
      workdir: of a run that has saved a checkpoint.
      which: "best", "last" or a step number.
      log: see `load`.
      model: the network, if the run was given an object; None: the one named by its settings.

    Raises:
      UserError: if `which` is none of these.
      CheckpointError: if the run or checkpoint does not exist, or does not match the model.
      ConfigError: if the run's network is not registered.
    """
    # Half a second of imports, which a file of weights does not need.
    from inception_jax.telemetry.writers import drop_trivial_top5
    from inception_jax.training import state as states
    from inception_jax.training import workdir as workdirs
    from inception_jax.training.checkpoints import Checkpoints

    record = workdirs.require_record(workdir, has_model=model is not None)
    for note in record.notes:
        log(note)
    config, dataset = record.config, record.dataset
    abstract_model = states.abstract_model_item(
        networks.create(config.model, dataset["classes"])
        if model is None
        else protocol.adapt(model, name=type(model).__name__, place="model"),
        image_size=config.data.image_size,
        has_average=config.train.keeps_average,
    )
    with Checkpoints(workdir.checkpoints, read_only=True) as checkpoints:
        step = checkpoints.resolve(which)
        restored = checkpoints.restore_model(step, abstract_model)
        metrics = checkpoints.metrics(step)
        roles = checkpoints.roles(step)
    return Weights(
        variables=jax.device_get(states.eval_variables(**restored)),
        model=config.model,
        image_size=config.data.image_size,
        class_names=tuple(dataset["class names"]),
        mean=np.array(dataset["mean"], np.float32),
        std=np.array(dataset["std"], np.float32),
        eval_crop=config.data.eval_crop_pct,
        eval_image_size=config.evaluation.image_size,
        resize_kernel=config.data.resize_kernel,
        bit_depth=dataset.get("bit depth", configs.unrecorded_bit_depth(config.data.name)),
        experiment=config.name,
        dataset=dataset["name"] if "dataset" in record.own else config.data.name,
        dataset_version=dataset.get("version", ""),
        is_average=bool(restored["average"]),
        step=step,
        epoch=Timeline(config.train.batch_size, dataset["training examples"]).epoch(step),
        metrics=drop_trivial_top5(metrics, dataset["classes"]),
        checkpoint=roles,
        revision=environment.revision(),
        origin=f"{workdir}, step {step:,}",
        module=model,
    )
