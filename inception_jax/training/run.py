"""Builds everything that a run consists of from its configuration."""

import bisect
import copy
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from inception_jax import config as configs
from inception_jax.config import Config, Timeline, auto_settings
from inception_jax.datasets.dataset import Dataset, data_location, prepare
from inception_jax.errors import ConfigError, UserError, during
from inception_jax.input import augment, crops, pipeline
from inception_jax.models import networks, ops, protocol
from inception_jax.runtime import hosts, sharding
from inception_jax.training import optimizers, schedules
from inception_jax.training.metrics import MetricSet

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A configuration and everything built from it.

    Args:
      config: the validated settings.
      dataset: the prepared data set.
      mesh: the devices.
      model: the network; returns logits and auxiliary logits.
      timeline: converts durations to steps.
      total_steps: length of training in optimizer steps.
      schedule: learning rate as a function of finished steps.
      optimizer: the update rule.
      applies_schedule: whether the optimizer uses the schedule; False for one passed by the caller.
    """

    config: Config
    dataset: Dataset
    mesh: Mesh
    model: nn.Module
    timeline: Timeline
    total_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    applies_schedule: bool = True

    @property
    def is_lead(self) -> bool:
        """Whether this process writes the metrics and messages."""
        return jax.process_index() == 0

    @property
    def device(self) -> jax.Device:
        """The first of the devices, which are all of the same kind."""
        first: jax.Device = self.mesh.devices.flat[0]
        return first

    def train_image_size(self, step: int) -> int:
        """Returns the side of the training images in pixels after `step` finished steps."""
        sizes = self.config.train.image_sizes or (self.dataset.image_size,)
        return sizes[bisect.bisect_right(self._image_size_starts, step)]

    def train_image_sizes(self, step: int) -> list[int]:
        """Returns the image sizes, in order, that remain to be trained on after `step` steps."""
        starts = [step, *(start for start in self._image_size_starts if start > step)]
        return [self.train_image_size(start) for start in starts if start < self.total_steps]

    @functools.cached_property
    def _image_size_starts(self) -> list[int]:
        return [self.timeline.steps(each) for each in self.config.train.image_size_boundaries]

    @functools.cached_property
    def metric_set(self) -> MetricSet:
        """The configured metrics, after checking them.

        Raises:
          ConfigError: if one of them does not return a valid metric.
        """
        return MetricSet(self.config.evaluation, self.dataset.num_classes)

    @property
    def model_name(self) -> str:
        """The network's name in messages."""
        if isinstance(self.model, protocol.Adapter):
            return self.model.display_name
        return self.config.model.name

    def compilation_key(self) -> str:
        """Returns the settings that most affect this run's compilation time."""
        model, train = self.config.model, self.config.train
        layers = (self.model_name, model.stem, f"width {model.width:g}", model.norm, model.dtype)
        device = f"{self.mesh.size} × {self.device.device_kind}"
        return ", ".join((*layers, self.config.optimizer.name, f"batch {train.batch_size}", device))


def check_settings(
    config: Config, recorded: Config | None = None, log: Callable[[str], None] = print
) -> None:
    """Checks everything that can be checked before anything is written or computed.

    Args:
      config: settings of this start.
      recorded: settings of the run that is resumed or evaluated; None for a new run.
      log: called with a line for each setting that current rules would reject in a new run.

    Raises:
      ConfigError: naming every invalid setting.
      UserError: if prepared data cannot be stored in config.data.directory.
    """
    for problem in configs.validate(config, recorded=recorded):
        log(f"{problem}; kept, because the run was started with this value")
    data_location(config.data.directory, config.data.cache)


def config_for_dataset(config: Config, dataset: Dataset) -> Config:
    """Returns the settings with the image size of a data set passed by the caller.

    Raises:
      ConfigError: if `dataset` is not a Dataset, or examples are to be held out of it.
    """
    _check_kind("dataset", dataset, Dataset, "an inception_jax.datasets.dataset.Dataset")
    if config.data.holdout:
        raise ConfigError(
            f"config.data.holdout = {config.data.holdout}: must be 0 with a data set that is "
            "passed in, which already has a split to evaluate on"
        )
    config = copy.deepcopy(config)
    config.data.image_size = dataset.image_size
    return config


def assemble(
    config: Config,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    mesh: Mesh | None = None,
    trains: bool = True,
    log: Callable[[str], None] = print,
) -> Run:
    """Builds a run from its configuration, preparing the data set if necessary.

    Args:
      config: validated settings; the run's copy has automatic settings filled in.
      dataset, model, optimizer: used in place of the configured ones, as in `api.assemble`.
      mesh: the devices, which may be ones that this machine does not have; None: all of JAX's.
      trains: whether it will be trained, so that its batches must be divisible by the devices.
      log: called with lines about the preparation, and a warning if the dtype is slow here.

    Raises:
      UserError: if the data cannot be prepared, a setting does not fit the data or the devices, or
        processes of the run have different data.
      ConfigError: if an object has the wrong type, or the network's output is invalid.
    """
    mesh = mesh or sharding.make_mesh()
    device = mesh.devices.flat[0]
    if trains:
        sharding.check_batch_size(config.train.batch_size, mesh.size, config.train.grad_accum_steps)
    if dataset is None:
        with during("prepare"):
            dataset = prepare(config.data, log=log)
    else:
        config = config_for_dataset(config, dataset)
    hosts.check_consistent("data set", lambda: dataset_fingerprint(dataset))
    config = _resolve_auto_settings(config, dataset, mesh, log)
    if config.model.dtype == "bfloat16" and (slow := ops.bfloat16_slowdown(device)):
        log(
            f"warning: config.model.dtype = 'bfloat16': {slow}, so it is slower than float32; set "
            "--config.model.dtype=float32"
        )
    if model is None:
        network = networks.create(
            config.model,
            dataset.num_classes,
            rewrite=ops.preferred_rewrite(device),
        )
    else:
        _check_kind("model", model, nn.Module, "an instance of a flax.linen.Module")
        network = protocol.adapt(model, name=type(model).__name__, place="model")
    networks.check(network, config, dataset.num_classes)
    if config.evaluation.norm_examples and protocol.get_attribute(network, "norm_momentum") is None:
        log(
            f"config.evaluation.norm_examples = {config.evaluation.norm_examples}: the network "
            "does not declare norm_momentum, so BatchNorm's running statistics are used"
        )
    augment.check(config.augment, dataset.image_size)
    timeline = Timeline(config.train.batch_size, len(dataset.train))
    total_steps = timeline.steps(config.train.duration)
    begins = zip(config.train.image_size_boundaries, config.train.image_sizes[1:], strict=True)
    if unused := [size for begin, size in begins if timeline.steps(begin) >= total_steps]:
        sizes = " and ".join(map(str, unused))
        log(f"config.train.image_sizes: the run ends before its boundary to {sizes} px")
    schedule = schedules.make_schedule(config.schedule, timeline=timeline, total_steps=total_steps)
    applies_schedule = optimizer is None
    if optimizer is None:
        optimizer = optimizers.make_optimizer(config.optimizer, schedule, network)
    else:
        log(
            "optimizer: using the object passed in; config.schedule and, except sam_rho, "
            "config.optimizer are unused"
        )
        _check_kind(
            "optimizer",
            optimizer,
            optax.GradientTransformation,
            "an optax.GradientTransformation such as optax.adam(1e-3)",
        )
    return Run(
        config=config,
        dataset=dataset,
        mesh=mesh,
        model=network,
        timeline=timeline,
        total_steps=total_steps,
        schedule=schedule,
        optimizer=optimizer,
        applies_schedule=applies_schedule,
    )


def _check_kind(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        is_class = isinstance(value, type)
        got = f"the class {value.__name__}" if is_class else type(value).__name__
        raise ConfigError(f"{name}: must be {expected}, got {got}")


def check_run(value: object) -> None:
    """Checks that a caller passed a run, not its settings.

    Raises:
      UserError: if not.
    """
    if not isinstance(value, Run):
        raise UserError(f"run: must be a Run from assemble(config), got {type(value).__name__}")


def train_batches(run: Run, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yields the training batches of a run, each a function of its step alone.

    Args:
      run: the run, from `assemble`.
      start: number of finished steps before the first batch.
      stop: number of finished steps after the last batch; None: the run's total.

    Yields:
      image: uint8 [B, H, W, 3] and label: int32 [B], sharded over the devices.

    Raises:
      UserError: if an argument is invalid.
    """
    check_run(run)
    stop = run.total_steps if stop is None else stop
    integers = all(hasattr(each, "__index__") for each in (start, stop))
    if not integers or not 0 <= start <= stop:
        raise UserError(f"start = {start}, stop = {stop}: must be integers with 0 <= start <= stop")
    config = run.config
    return pipeline.train_batches(
        run.dataset.train,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=start,
        stop=stop,
        mesh=run.mesh,
        sample_crop=crops.crop_sampler(config.augment, config.seed),
        alternate_flips=config.augment.flip and config.augment.alternating_flip,
    )


def _resolve_auto_settings(
    config: Config, dataset: Dataset, mesh: Mesh, log: Callable[[str], None]
) -> Config:
    """Returns the settings with automatic ones filled in, and logs those."""
    device = mesh.devices.flat[0]
    resolved = auto_settings.resolve(
        config,
        train_examples=len(dataset.train),
        eval_examples=len(dataset.evaluation),
        devices=mesh.size,
        dtype=ops.auto_dtype(device),
    )
    if configs.is_open(config, "model.dtype"):
        log(f"{config.name}: {_describe_dtype(device)}")
    if chosen := auto_settings.describe(config, resolved):
        log(
            f"{config.name}: settings chosen for {len(dataset.train):,} training images: {chosen}; "
            "override any with --config.NAME=VALUE"
        )
    if resolved is not config:
        # What was accepted before is accepted; a chosen value may break a rule.
        configs.validate(resolved, recorded=config)
        hosts.check_consistent("settings", lambda: configs.shared(resolved))
    return resolved


def _describe_dtype(device: jax.Device) -> str:
    """Returns which dtype model.dtype = 'auto' chooses for a device, and why."""
    if slow := ops.bfloat16_slowdown(device):
        return f"computing in float32, not bfloat16: {slow}"
    kind = "this CPU" if device.platform == "cpu" else device.device_kind
    return f"computing in bfloat16, which {kind} multiplies; --config.model.dtype=float32 overrides"


def dataset_fingerprint(dataset: Dataset) -> dict[str, Any]:
    """Returns a data set's properties and digests of its content, for JSON.

    Pixels are represented by the training split's mean and standard deviation, measured over all of
    them, and by a few images of each split.
    """
    fingerprint: dict[str, Any] = {
        "data set": f"{dataset.name} {dataset.version}, {dataset.image_size} px",
        "class names": _digest("\n".join(dataset.class_names).encode()),
        "mean and standard deviation": [*dataset.mean.tolist(), *dataset.std.tolist()],
    }
    for name, split in dataset.splits.items():
        some = np.unique(np.linspace(0, len(split) - 1, 8, dtype=np.int64))
        fingerprint |= {
            f"{name} examples": len(split),
            f"{name} labels": _digest(split.labels.tobytes()),
            f"{name} file names": split.names_checksum,
            f"some {name} images": _digest(split.read(some).tobytes()),
        }
    return fingerprint


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
