"""Networks with random weights, as files of weights hold them."""

from typing import Any

import jax
import numpy as np

from inception_jax.config import Config, Data, Evaluation, Model
from inception_jax.models import registry
from inception_jax.models.weights import Weights

SIZE = 17
MINI = Model(name="mini_googlenet", width=0.1)


def variables(network: registry.Network, size: int) -> dict[str, Any]:
    """Returns random variables of a network; quicker than its own, for which much is compiled.

    Args:
      network: to fill.
      size: of its images, pixels.
    """
    images = np.zeros((1, size, size, 3), np.float32)
    shapes: Any = jax.eval_shape(lambda x: network.init(jax.random.key(0), x), images)
    rng = np.random.default_rng(0)

    def value(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        if len(leaf.shape) > 1:
            spread = (2 / np.prod(leaf.shape[:-1])) ** 0.5
            return rng.normal(0, spread, leaf.shape).astype(np.float32)
        # Scales and variances must not be negative.
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    return {"batch_stats": {}} | jax.tree.map(value, shapes)


def make(model: Model = MINI, size: int = SIZE, evaluated: int = 0) -> Weights:
    """Returns a network of 7 classes, its statistics of BatchNorm other than those it starts with.

    Args:
      model: the network.
      size: of its images, pixels.
      evaluated: what evaluation resizes them to, pixels; 0: nothing.
    """
    return Weights(
        variables=variables(registry.create(model, 7), size),
        config=Config(
            data=Data(image_size=size), model=model, evaluation=Evaluation(image_size=evaluated)
        ),
        class_names=tuple("abcdefg"),
        mean=np.array([0.4, 0.5, 0.6], np.float32),
        std=np.array([0.2, 0.25, 0.3], np.float32),
    )
