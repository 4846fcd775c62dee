"""Networks with random weights, as in files of weights."""

import numpy as np

from inception_jax.config import Model
from inception_jax.models import networks
from inception_jax.models.weights import Weights
from tests import small

SIZE = 17
MINI = Model(name="mini_googlenet", width=0.1)


def make(model: Model = MINI, size: int = SIZE, evaluated: int = 0) -> Weights:
    """Returns random weights of a network with 7 classes, including BatchNorm statistics.

    Args:
      model: the network.
      size: image size, pixels.
      evaluated: image size in evaluation, pixels; 0: the same.
    """
    return Weights(
        variables=small.random_variables(networks.create(model, 7), size),
        model=model,
        image_size=size,
        eval_image_size=evaluated,
        class_names=tuple("abcdefg"),
        mean=np.array([0.4, 0.5, 0.6], np.float32),
        std=np.array([0.2, 0.25, 0.3], np.float32),
    )
