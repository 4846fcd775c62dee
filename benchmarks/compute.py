"""Counts the compute of training from the traced network; docs/results.md has the definition."""

import dataclasses
import functools
import json
from typing import NamedTuple

from inception_jax import config as configs
from inception_jax.config import Config, Timeline
from inception_jax.inspection import structure
from inception_jax.models import networks

# A multiply-add is two operations; forward pass, gradients of activations, gradients of weights.
FLOP_PER_MULTIPLY_ADD = 2 * 3


class Phase(NamedTuple):
    """A part of training with images of one size.

    Attributes:
      image_size: side of the images, pixels.
      images: number of images trained on.
      multiply_adds: of the network for one of them.
      passes: number of times that each goes through the network, forward and back.
    """

    image_size: int
    images: int
    multiply_adds: int
    passes: int = 1


def multiply_adds(settings: configs.Model, size: int, classes: int) -> int:
    """Returns those of one image, with auxiliary heads, as tools.summarize counts them."""
    # Recipes differ in these, which change no number.
    alike = dataclasses.replace(settings, dtype="float32", dropout=0.0)
    return _multiply_adds(json.dumps(dataclasses.asdict(alike)), size, classes)


@functools.cache
def _multiply_adds(model: str, size: int, classes: int) -> int:
    network = networks.create(configs.Model(**json.loads(model)), classes, rewrite="")
    return sum(block.multiply_adds for block in structure.analyze(network, size).blocks())


def phases(config: Config, *, examples: int, classes: int, steps: int = 0) -> list[Phase]:
    """Returns the phases of training, in order.

    Args:
      config: settings of the run.
      examples: size of the training split.
      classes: number of classes.
      steps: number of finished steps; 0: the whole duration.
    """
    train = config.train
    timeline = Timeline(train.batch_size, examples)
    steps = steps or timeline.steps(train.duration)
    sizes = train.image_sizes or (config.data.image_size,)
    begins = [0, *(timeline.steps(each) for each in train.image_size_boundaries)]
    begins = [each for each in begins if each < steps]  # The sizes that the run has reached.
    passes = 2 if config.optimizer.sam_rho else 1  # SAM takes the gradient twice.
    return [
        Phase(
            size,
            images=(end - begin) * train.batch_size,
            multiply_adds=multiply_adds(config.model, size, classes),
            passes=passes,
        )
        for size, begin, end in zip(sizes, begins, [*begins[1:], steps], strict=False)
    ]


def pflop(trained: list[Phase]) -> float:
    """Returns the training compute of all phases, 10¹⁵ operations."""
    multiplied = sum(each.images * each.multiply_adds * each.passes for each in trained)
    return FLOP_PER_MULTIPLY_ADD * multiplied / 1e15
