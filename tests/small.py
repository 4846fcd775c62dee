"""A run small enough to train inside a test: a thin MiniGoogLeNet on the embedded digits."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from inception_jax.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Duration,
    Evaluation,
    Log,
    Model,
    Schedule,
    Train,
)
from inception_jax.models import registry
from inception_jax.models import weights as files
from inception_jax.models.layers import Classifier, ModelOutput
from inception_jax.models.weights import Weights


def config(directory: pathlib.Path, **changes: Any) -> Config:
    """Returns the settings, with their data under `directory` and some groups replaced."""
    groups: dict[str, Any] = {
        "name": "small",
        "data": Data(name="digits", directory=str(directory), image_size=8),
        "augment": Augment(crop="pad", pad=1, flip=False, mixup=0.2),
        "model": Model(name="mini_googlenet", width=0.125, dropout=0.1),
        "schedule": Schedule(name="cosine", learning_rate=0.05, warmup=Duration(steps=2)),
        "train": Train(batch_size=64, length=Duration(steps=11), ema=Duration(steps=5)),
        "evaluation": Evaluation(batch_size=100, every=Duration(steps=5)),
        "checkpoint": Checkpoint(every=Duration(steps=2), keep_last=20),
        "log": Log(every=Duration(steps=3)),
    }
    return Config(**(groups | changes))


class Linear(nn.Module):
    """A linear classifier of the digits, which compiles in a moment."""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        classifier = Classifier(10, dropout=0.0, train=train, name="classifier")
        return ModelOutput(classifier(images.reshape(len(images), -1)))


def weights(directory: pathlib.Path = pathlib.Path(), *, seed: int = 0, **changes: Any) -> Weights:
    """Returns weights that were drawn instead of trained: another picture, other classes.

    Args:
      directory, changes: as of `config`.
      seed: of the draw.
    """
    settings = config(directory, **changes)
    size, classes = settings.data.image_size, 10
    model = registry.create(settings.model, classes)
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, size, size, 3), np.float32))
    random = np.random.default_rng(seed)

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        normal = random.normal(size=shape).astype(np.float32)
        if name.endswith("kernel"):
            return normal * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
        # BatchNorm's scales and variances are positive.
        return 0.1 * normal + np.float32(name.endswith(("scale", "var")))

    drawn = {name: draw(name, leaf.shape) for name, leaf in files.flatten(shapes).items()}
    return Weights(
        variables=files.unflatten(drawn),
        config=settings,
        class_names=tuple(f"kind {label}" for label in range(classes)),
        mean=np.array([0.4, 0.5, 0.6], np.float32),
        std=np.array([0.3, 0.25, 0.2], np.float32),
    )
