"""Everything that a run is made of, built once from its configuration."""

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
from inception_jax.datasets.dataset import Dataset, data_directory, prepare
from inception_jax.errors import ConfigError, UserError, during
from inception_jax.input import augment, crops, pipeline
from inception_jax.models import networks, ops, protocol
from inception_jax.runtime import hosts, sharding
from inception_jax.training import optimizers, schedules
from inception_jax.training.metrics import MetricSet

Batch = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A configuration with what follows from it.

    Args:
      config: the validated settings.
      dataset: the prepared examples.
      mesh: the devices.
      model: the network; returns logits and auxiliary logits.
      timeline: converts durations to steps.
      total_steps: length of training, optimizer steps.
      schedule: learning rate by finished steps.
      optimizer: the update rule.
      applies_schedule: whether its rate is that of the schedule; a caller's own has another.
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

    def train_image_size(self, step: int) -> int:
        """Returns the side of the training images after `step` finished steps, pixels."""
        sizes = self.config.train.image_sizes or (self.dataset.image_size,)
        return sizes[bisect.bisect_right(self._image_size_begins, step)]

    def train_image_sizes(self, step: int) -> list[int]:
        """Returns the sides, in order, that are left to train on after `step` finished steps."""
        begins = [step, *(begin for begin in self._image_size_begins if begin > step)]
        return [self.train_image_size(begin) for begin in begins if begin < self.total_steps]

    @functools.cached_property
    def _image_size_begins(self) -> list[int]:
        return [self.timeline.steps(each) for each in self.config.train.image_size_boundaries]

    @functools.cached_property
    def metric_set(self) -> MetricSet:
        """The metrics that the settings name, once they are checked.

        Raises:
          ConfigError: if one of them returns what is no metric.
        """
        return MetricSet(self.config.evaluation, self.dataset.num_classes)

    @property
    def model_name(self) -> str:
        """What the network is called in messages."""
        if isinstance(self.model, protocol.Adapter):
            return self.model.called
        return self.config.model.name

    def compile_kind(self) -> str:
        """Returns what decides how long this run's programs take to compile, in words."""
        model, train = self.config.model, self.config.train
        layers = (self.model_name, model.stem, f"width {model.width:g}", model.norm, model.dtype)
        device = f"{self.mesh.size} × {self.mesh.devices.flat[0].device_kind}"
        return ", ".join((*layers, self.config.optimizer.name, f"batch {train.batch_size}", device))


def check_settings(
    config: Config, recorded: Config | None = None, log: Callable[[str], None] = print
) -> None:
    """Checks all that can be checked before anything is written or computed.

    Args:
      config: of a start.
      recorded: settings of the run that goes on, or is evaluated; None: it is a new one.
      log: takes a line for each setting that today's rules would refuse in a new run.

    Raises:
      ConfigError: naming every setting that is wrong.
      UserError: if prepared data cannot be kept where the settings say.
    """
    for problem in configs.validate(config, recorded=recorded):
        log(f"{problem}; as the run was started so, it goes on")
    data_directory(config.data.directory)


def adapted(config: Config, dataset: Dataset) -> Config:
    """Returns the settings for a data set of the caller's, which has an image size of its own.

    Raises:
      ConfigError: if it is no data set.
    """
    _check_kind("dataset", dataset, Dataset, "of inception_jax.datasets.dataset")
    config = copy.deepcopy(config)
    config.data.image_size = dataset.image_size
    return config


def assemble(
    config: Config,
    dataset: Dataset | None = None,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    *,
    log: Callable[[str], None] = print,
) -> Run:
    """Returns what a configuration makes, preparing its data first where that was not done before.

    Args:
      config: validated settings; the run has them with what they leave open filled in.
      dataset, model, optimizer: in place of those that the settings name, as `api.assemble`
        describes them.
      log: receives lines about the preparation, and a warning where the dtype is slow here.

    Raises:
      UserError: if the data cannot be prepared, a setting does not fit the data or the devices, or
        the processes of the run have other data.
      ConfigError: if an object is of another kind, or the network returns something else.
    """
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.train.batch_size, mesh.size, config.train.grad_accum_steps)
    if dataset is None:
        with during("prepare"):
            dataset = prepare(config.data, log=log)
    else:
        config = adapted(config, dataset)
    hosts.check_consistent("data set", lambda: content(dataset))
    config = _sized(config, dataset, mesh.size, log)
    if config.model.dtype == "bfloat16" and (slow := ops.slow_bfloat16()):
        log(
            f"warning: config.model.dtype = 'bfloat16': {slow}, so it is slower than float32; give "
            "--config.model.dtype=float32"
        )
    if model is None:
        network = networks.create(config.model, dataset.num_classes)
    else:
        _check_kind("model", model, nn.Module, "of flax.linen, not its class")
        network = protocol.adapted(model, name=type(model).__name__, place="model")
    networks.check(network, config, dataset.num_classes)
    if config.evaluation.norm_examples and protocol.said(network, "norm_momentum") is None:
        log(
            f"config.evaluation.norm_examples = {config.evaluation.norm_examples}: the network "
            "does not say its norm_momentum, so BatchNorm's running statistics are used"
        )
    augment.check(config.augment, dataset.image_size)
    timeline = Timeline(config.train.batch_size, len(dataset.train))
    total_steps = timeline.steps(config.train.duration)
    schedule = schedules.make_schedule(config.schedule, timeline=timeline, total_steps=total_steps)
    applies_schedule = optimizer is None
    if optimizer is None:
        optimizer = optimizers.make_optimizer(config.optimizer, schedule, network)
    else:
        log("optimizer: the one given; config.optimizer and config.schedule are not used")
        _check_kind(
            "optimizer", optimizer, optax.GradientTransformation, "such as optax.adam(1e-3)"
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


def _check_kind(name: str, value: object, kind: type, hint: str) -> None:
    if not isinstance(value, kind):
        found = value.__name__ if isinstance(value, type) else type(value).__name__
        raise ConfigError(f"{name}: must be a {kind.__name__} {hint}, got {found}")


def train_batches(run: Run, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
    """Yields the batches of a run's steps, as its loop sees them: a function of the step alone.

    Args:
      run: what is trained.
      start: finished steps before the first.
      stop: finished steps after the last; None: all of the run.

    Yields:
      image: uint8 [B, H, W, 3] and label: int32 [B], split over the devices.
    """
    if not isinstance(run, Run):
        raise UserError(f"run: must be what assemble(config) returned, got {type(run).__name__}")
    stop = run.total_steps if stop is None else stop
    if not 0 <= start <= stop or start != int(start):
        raise UserError(
            f"start = {start}, stop = {stop}: must be whole numbers, 0 <= start <= stop"
        )
    config = run.config
    return pipeline.train_batches(
        run.dataset.train,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=start,
        stop=stop,
        mesh=run.mesh,
        box_at=crops.train_boxes(config.augment, config.seed),
    )


def _sized(config: Config, dataset: Dataset, devices: int, log: Callable[[str], None]) -> Config:
    """Returns the settings with what they left open, and logs it."""
    sized = auto_settings.resolve(
        config,
        train_examples=len(dataset.train),
        eval_examples=len(dataset.evaluation),
        devices=devices,
        dtype=ops.auto_dtype(),
    )
    if chosen := auto_settings.describe(config, sized):
        log(
            f"{config.name}: chosen for {len(dataset.train):,} training images: {chosen}; "
            "override any with --config.NAME=VALUE"
        )
        configs.validate(sized)
        hosts.check_consistent("settings", lambda: configs.shared(sized))
    return sized


def content(dataset: Dataset) -> dict[str, Any]:
    """Returns what tells a data set from others, for JSON: its facts, and digests of its content.

    Of the pixels it has the training split's mean and standard deviation, which are measured over
    all of them, and a few images of each split.
    """
    facts: dict[str, Any] = {
        "data set": f"{dataset.name} {dataset.version}, {dataset.image_size} px",
        "class names": _digest("\n".join(dataset.class_names).encode()),
        "mean and standard deviation": [*dataset.mean.tolist(), *dataset.std.tolist()],
    }
    for name, split in dataset.splits.items():
        some = np.unique(np.linspace(0, len(split) - 1, 8, dtype=np.int64))
        facts |= {
            f"{name} examples": len(split),
            f"{name} labels": _digest(split.labels.tobytes()),
            f"{name} file names": split.names_checksum,
            f"some {name} images": _digest(split.read(some).tobytes()),
        }
    return facts


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
