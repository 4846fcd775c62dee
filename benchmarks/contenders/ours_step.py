"""Our training and evaluation step, bare: the batch is on the device, nothing is read.

The step is that of the training command, with its augmentation, loss and metrics; the dataset is
noise in memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.contenders import network, serve
from inception_jax import config, console
from inception_jax.config import Config
from inception_jax.datasets import splits
from inception_jax.datasets.dataset import Dataset
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.input import pipeline
from inception_jax.runtime import devices
from inception_jax.training import state as states
from inception_jax.training.initialization import create_state
from inception_jax.training.run import Run, assemble, train_batches
from inception_jax.training.state import TrainState
from inception_jax.training.step import make_train_step

# As in Tiny ImageNet, so that durations in epochs become the same number of steps.
_EXAMPLES = 100_000


def make_config(settings: dict[str, Any]) -> Config:
    """Returns settings["config"], or the configuration of the contenders' network."""
    if "config" in settings:
        return config.from_dict(settings["config"])
    built = Config(
        model=config.Model(
            name="googlenet",
            stem=settings["stem"],
            width=settings.get("width", 1.0),
            dtype=settings["dtype"],
            norm_epsilon=network.NORM_EPSILON,
            norm_momentum=network.NORM_MOMENTUM,
            dropout=network.DROPOUT,
        ),
        data=config.Data(image_size=settings["image_size"]),
        optimizer=config.Optimizer(name="sgd_nesterov", momentum=network.MOMENTUM),
        schedule=config.Schedule(name="constant", learning_rate=network.LEARNING_RATE),
        train=config.Train(batch_size=settings["batch_size"]),
        evaluation=config.Evaluation(batch_size=settings["batch_size"]),
    )
    config.validate(built)
    return built


def noise(settings: dict[str, Any]) -> Dataset:
    """Returns a dataset of random images and labels."""
    random = np.random.default_rng(0)
    size, count, classes = (settings[key] for key in ("image_size", "batch_size", "classes"))

    def split() -> tuple[np.ndarray, np.ndarray]:
        images = random.integers(0, 256, (count, size, size, 3), np.uint8)
        return images, random.integers(0, classes, count, np.int32)

    names = tuple(map(str, range(classes)))
    dataset = Dataset.from_arrays(*split(), evaluation=split(), class_names=names)
    # The same batch in every step.
    train = splits.subset(dataset.train, np.resize(np.arange(count), _EXAMPLES))
    return dataclasses.replace(dataset, splits={**dataset.splits, "train": train})


def make_run(settings: dict[str, Any]) -> Run:
    """Returns a run on noise."""
    return assemble(make_config(settings), noise(settings), log=console.log)


def compiled(run: Run) -> tuple[jax.stages.Compiled, TrainState]:
    """Returns the compiled training step of the first image size, and the initial state."""
    state, batch = create_state(run), next(iter(train_batches(run)))
    return make_train_step(run).lower(state, batch).compile(), state


def timed_step(run: Run) -> tuple[jax.stages.Compiled, serve.TimedOperation]:
    """Returns the compiled training step, and the timed step, warmed up."""
    step, state = compiled(run)
    batch = next(iter(train_batches(run)))

    def train() -> None:
        nonlocal state
        state, output = step(state, batch)
        # As in the training loop, which explains the reason.
        if jax.default_backend() == "cpu":
            output.loss.block_until_ready()

    return step, serve.TimedOperation(train, lambda: jax.block_until_ready(state)).warm_up()


def timed_eval_step(run: Run) -> serve.TimedOperation:
    """Returns the timed evaluation step, compiled and warmed up."""
    # Only the step, because calling the evaluator also reads a split.
    step, split = Evaluator(run).step, run.dataset.evaluation
    (batch,) = pipeline.eval_batches(split, batch_size=len(split), mesh=run.mesh)
    variables = create_state(run).eval_variables()
    metrics: Any = None

    def evaluate() -> None:
        nonlocal metrics
        metrics = step(variables, batch)

    return serve.TimedOperation(evaluate, lambda: jax.block_until_ready(metrics)).warm_up()


def timed_matmul(size: int, dtype: str) -> serve.TimedOperation:
    """Returns a timed product of two square matrices, compiled and warmed up."""
    a = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(jnp.matmul)
    result = a

    def multiply() -> None:
        nonlocal result
        result = product(a, a)

    return serve.TimedOperation(multiply, lambda: jax.block_until_ready(result)).warm_up()


def make(settings: dict[str, Any]) -> serve.Contender:
    """Creates the contender with the modes (train, eval, matmul) of settings["modes"]."""
    devices.initialize(platform=settings["platform"])
    run = make_run(settings)
    makers = {
        "train": lambda: timed_step(run)[1],
        "eval": lambda: timed_eval_step(run),
        "matmul": lambda: timed_matmul(settings["matmul_size"], settings["dtype"]),
    }
    shapes = states.abstract_state(run).params
    facts = {
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)),
    }
    return serve.Contender(facts, {mode: makers[mode]() for mode in settings["modes"]})
