"""A narrow network with one inception module, whose step compiles in half a minute for a TPU.

  PYTHONPATH=. python -m tests.programs.narrow v5e-8 FILE.txt.xz

writes the text of its compiled training step, as in tests/fixtures/programs.
"""

import functools
import lzma
import pathlib
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from inception_jax.config import Augment, Config
from inception_jax.models import ops
from inception_jax.models.layers import (
    Classifier,
    ConvUnit,
    Inception,
    InceptionWidths,
    ModelOutput,
)
from inception_jax.programs import compile as programs
from inception_jax.programs import targets
from inception_jax.training import state as states
from inception_jax.training import step as steps
from tests import small


class Network(nn.Module):
    """Has every kind of layer of a GoogLeNet."""

    norm_momentum = 0.9

    dtype: Any = jnp.bfloat16
    norm_group_size: int = 0
    rewrite: ops.Rewrite = ""

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> ModelOutput:
        unit = functools.partial(
            ConvUnit,
            dtype=self.dtype,
            train=train,
            rewrite=self.rewrite,
            group_size=self.norm_group_size,
        )
        x = unit(8, 3, name="conv1")(images)
        x = ops.max_pool(x, window=3, stride=2, rewrite=self.rewrite)
        widths = InceptionWidths(8, 4, 8, 4, 8, 8)
        x = Inception(widths, "5x5", unit, self.rewrite, name="inception_3a")(x)
        return ModelOutput(Classifier(10, 0.1, train, name="classifier")(x.mean((1, 2))))


def config(**changes: Any) -> Config:
    """Returns the settings: bfloat16, batches of 64 images of 16 pixels."""
    settings = small.config(pathlib.Path(), **changes)
    settings.data.image_size = 16
    settings.model.dtype = "bfloat16"
    return settings


def text(target: str) -> str:
    """Returns the text of the network's compiled training step, without random crops and mixing."""
    settings = config(augment=Augment(crop="none", flip=False))
    run = programs.assemble(settings, targets.get(target), model=Network())
    lowered = steps.lower_train_step(run, states.abstract_state(run), 16)
    compiled = lowered.compile().as_text()
    assert compiled
    return compiled


if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_bytes(lzma.compress(text(sys.argv[1]).encode()))
