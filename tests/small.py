"""A run small enough to train inside a test: a thin MiniGoogLeNet on the embedded digits."""

import pathlib
from typing import Any

import flax.linen as nn
import jax

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
from inception_jax.models.layers import Classifier, ModelOutput


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
