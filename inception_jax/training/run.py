"""Everything that a run is made of, built once from its configuration."""

import bisect
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import Mesh

from inception_jax import config as configs
from inception_jax.config import Config, Duration, Timeline
from inception_jax.datasets.dataset import Dataset, data_directory, prepare
from inception_jax.datasets.splits import Split, subset
from inception_jax.errors import ConfigError, during
from inception_jax.models import ops, registry
from inception_jax.runtime import hosts, sharding
from inception_jax.training import auto_settings, optimizers


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
      experiment: where the configuration is from, for config.json; None: it is not known.
    """

    config: Config
    dataset: Dataset
    mesh: Mesh
    model: nn.Module
    timeline: Timeline
    total_steps: int
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    experiment: Mapping[str, Any] | None = None

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
        epochs = self.config.train.image_size_epochs
        return [self.timeline.steps(Duration(epochs=epoch)) for epoch in epochs]

    def train_sample(self) -> Split | None:
        """Returns the training examples that evaluations cover besides; None if there are none."""
        split = self.dataset.train_evaluated
        examples = min(self.config.evaluation.train_examples, len(split))
        return subset(split, np.arange(examples)) if examples else None

    def compile_kind(self) -> str:
        """Returns what decides how long this run's programs take to compile, in words."""
        model, train = self.config.model, self.config.train
        layers = (model.name, model.stem, f"width {model.width:g}", model.norm, model.dtype)
        device = f"{self.mesh.size} × {self.mesh.devices.flat[0].device_kind}"
        return ", ".join((*layers, self.config.optimizer.name, f"batch {train.batch_size}", device))

    def dataset_identity(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to see the same examples and classes."""
        dataset = self.dataset
        return {
            "name": dataset.name,
            "version": dataset.version,
            "classes": dataset.num_classes,
            "training examples": len(dataset.train),
            f"{dataset.eval_split} examples": len(dataset.evaluation),
            "class names": list(dataset.class_names),
            "bit depth": dataset.bit_depth,
        }

    def dataset_record(self) -> dict[str, Any]:
        """What config.json says of the data set: its identity, and what else a reader needs."""
        found = self.dataset.trained_on
        trained_on = (
            {} if found is None else {"evaluated and trained on": dataclasses.asdict(found)}
        )
        return (
            self.dataset_identity()
            | trained_on
            | {
                # Every float32 is a double too, so the text gives back the same bits.
                "mean": self.dataset.mean.tolist(),
                "std": self.dataset.std.tolist(),
            }
        )


def check_settings(config: Config) -> None:
    """Checks all that can be checked before anything is written or computed.

    Raises:
      ConfigError: naming every setting that is wrong.
      UserError: if prepared data cannot be kept where the settings say.
    """
    configs.validate(config)
    data_directory(config.data.directory)


def build(
    config: Config,
    log: Callable[[str], None] = print,
    *,
    experiment: Mapping[str, Any] | None = None,
) -> Run:
    """Builds a run, preparing its data first where that was not done before.

    Args:
      config: validated settings; the run has them with what they leave open filled in.
      log: receives lines about the preparation, and a warning where the dtype is slow here.
      experiment: where the settings are from, as `cli.experiment` says it; None: not known.

    Raises:
      UserError: if the data cannot be prepared, a setting does not fit the data or the devices, or
        the processes of the run have other data.
    """
    mesh = sharding.make_mesh()
    sharding.check_batch_size(config.train.batch_size, mesh.size, config.train.accumulate)
    with during("prepare"):
        dataset = prepare(config.data, log=log)
    hosts.agree("data set", lambda: content(dataset))
    config = _sized(config, dataset, mesh.size, log)
    if config.model.dtype == "bfloat16" and (slow := ops.slow_bfloat16()):
        log(
            f"warning: config.model.dtype = 'bfloat16': {slow}, so it is slower than float32; give "
            "--config.model.dtype=float32"
        )
    model = registry.create(config.model, dataset.num_classes)
    _check_image_sizes(config, model.least_image_size)
    timeline = Timeline(config.train.batch_size, len(dataset.train))
    total_steps = timeline.steps(config.train.length)
    schedule = optimizers.make_schedule(config.schedule, timeline=timeline, total_steps=total_steps)
    return Run(
        config=config,
        dataset=dataset,
        mesh=mesh,
        model=model,
        timeline=timeline,
        total_steps=total_steps,
        schedule=schedule,
        optimizer=optimizers.make_optimizer(config.optimizer, schedule),
        experiment=experiment,
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
        hosts.agree("settings", lambda: configs.shared(sized))
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


def _check_image_sizes(config: Config, least: int) -> None:
    """Raises ConfigError if a size that is only reached later is less than the network takes."""
    later = [("train.image_sizes", size) for size in config.train.image_sizes]
    # 0: the data set's own, which the network sees first.
    later += [("evaluation.image_size", config.evaluation.image_size or least)]
    for path, size in later:
        if size < least:
            raise ConfigError(
                f"config.{path} = {size}: {config.model.name} needs at least {least} px, with its "
                "stem; raise it, or take a model or stem that shrinks the image less"
            )
