"""Runs small enough for a test: a narrow MiniGoogLeNet, or less, on the embedded digits."""

import dataclasses
import functools
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from inception_jax import session
from inception_jax.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Log,
    Model,
    Schedule,
    Train,
)
from inception_jax.evaluation.evaluate import EvalResult, Evaluator
from inception_jax.evaluation.predictions import Predictions
from inception_jax.models import networks, ops
from inception_jax.models import weights as files
from inception_jax.models.layers import Classifier, ConvUnit, ModelOutput, adaptive_average_pool
from inception_jax.models.weights import Weights
from inception_jax.storage.workdir import Workdir
from inception_jax.training import loop, run, state
from inception_jax.training import workdir as workdirs
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.run import Run


def config(directory: pathlib.Path, **changes: Any) -> Config:
    """Returns the settings, with the data in `directory` and some groups replaced."""
    groups: dict[str, Any] = {
        "name": "small",
        "data": Data(name="digits", directory=str(directory), image_size=8),
        "augment": Augment(crop="pad", pad=1, flip=False, mixup=0.2),
        "model": Model(name="mini_googlenet", width=0.125, dropout=0.1),
        "schedule": Schedule(name="cosine", learning_rate=0.05, warmup="2 steps"),
        "train": Train(batch_size=64, duration="11 steps", ema="5 steps"),
        "evaluation": Evaluation(batch_size=100, every="5 steps"),
        "checkpoint": Checkpoint(every="2 steps", keep_last=20),
        "log": Log(every="3 steps"),
    }
    return Config(**(groups | changes))


class Network(nn.Module):
    """A network with few layers, but all kinds with state or randomness; compiles in seconds.

    Replaces MiniGoogLeNet in tests that work with any network. Images must be at least 4 px.
    """

    first_conv, first_norm = "conv1/conv", "conv1/norm"
    classifiers = ("classifier/dense",)
    norm_momentum = 0.9

    dropout: float = 0.0
    classes: int = 10
    norm_group_size: int = 0

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        unit = functools.partial(ConvUnit, train=train, group_size=self.norm_group_size)
        x = unit(8, 3, name="conv1")(images)
        x = ops.max_pool(x, window=3, stride=2)
        x = unit(16, 3, name="conv2")(x)
        x = adaptive_average_pool(x, 2).reshape(len(x), -1)
        return ModelOutput(Classifier(self.classes, self.dropout, train, name="classifier")(x))


def build(settings: Config) -> Run:
    """Returns the run for some settings, with `Network` as its network."""
    this = run.assemble(settings, log=lambda _: None)
    return dataclasses.replace(this, model=Network(settings.model.dropout))


class Linear(nn.Module):
    """A linear classifier of the digits, which compiles quickly."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        classifier = Classifier(10, dropout=0.0, train=train, name="classifier")
        return ModelOutput(classifier(images.reshape(len(images), -1)))


def random_variables(model: nn.Module, image_size: int, *, seed: int = 0) -> dict[str, Any]:
    """Returns random variables of a network, as NumPy arrays."""
    images = np.zeros((1, image_size, image_size, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    random = np.random.default_rng(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = random.normal(size=shape).astype(np.float32)
        if name.endswith("kernel"):
            return normal * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        # BatchNorm's scales and variances are positive.
        return 0.1 * normal + np.float32(name.endswith(("scale", "var")))

    leaves = {name: drawn(name, leaf.shape) for name, leaf in files.flatten(shapes).items()}
    return files.unflatten(leaves)


def weights(directory: pathlib.Path = pathlib.Path(), *, seed: int = 0, **changes: Any) -> Weights:
    """Returns random weights with normalization and class names that differ from the digits'.

    Args:
      directory, changes: as in `config`.
      seed: seed of the random weights.
    """
    settings = config(directory, **changes)
    classes = 10
    model = networks.create(settings.model, classes)
    return Weights(
        variables=random_variables(model, settings.data.image_size, seed=seed),
        model=settings.model,
        image_size=settings.data.image_size,
        eval_crop=settings.data.eval_crop_pct,
        eval_image_size=settings.evaluation.image_size,
        resize_kernel=settings.data.resize_kernel,
        dataset=settings.data.name,
        class_names=tuple(f"kind {label}" for label in range(classes)),
        mean=np.array([0.4, 0.5, 0.6], np.float32),
        std=np.array([0.3, 0.25, 0.2], np.float32),
    )


def train(
    this: Run, folder: Workdir, evaluate: loop.Evaluate, *, changed: Sequence[str] = (), **more: Any
) -> dict[str, Any]:
    """Trains a run in a workdir as the command does, with its lock and config.json."""
    before = workdirs.load_previous_run(folder)
    return session.train_run(this, before, evaluate, changed=changed, **more)


def fake_results(names: Collection[str], **metrics: float) -> dict[str, EvalResult]:
    """Returns made-up metrics for each of some evaluations, without predictions."""
    nothing = np.zeros((0, 1), np.float32)
    none = Predictions(nothing[:, 0].astype(np.int32), nothing.astype(np.int32), nothing, nothing)
    return {name: EvalResult(metrics, none) for name in names}


def finished(settings: Config, folder: pathlib.Path) -> tuple[Run, Workdir]:
    """Returns a run and its workdir with a checkpoint at step 11, without training.

    The random weights are evaluated, so the workdir contains everything needed to use them. Saves
    the time of compiling the training step.
    """
    this, workdir = run.assemble(settings, log=lambda _: None), Workdir(folder)
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state.abstract_state(this))
    now, average = (
        jax.device_put(random_variables(this.model, this.dataset.image_size, seed=seed))
        for seed in (0, 1)
    )
    end = empty.replace(step=jnp.int32(11), **now, average=average if empty.average else {})
    metrics = Evaluator(this)(end.eval_variables())[this.dataset.eval_split].metrics
    with Checkpoints(workdir.checkpoints) as checkpoints:
        checkpoints.save(end, progress={"seconds": {}}, metrics=metrics)
    workdirs.record_start(
        workdirs.PreviousRun(workdir),
        settings,
        step=0,
        changed=[],
        dataset=workdirs.dataset_record(this.dataset),
    )
    return this, workdir
