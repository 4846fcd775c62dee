"""Classes of images that are in no data set, by a trained network."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax.datasets import images
from inception_jax.input import augment
from inception_jax.models import ops, registry
from inception_jax.models.weights import Weights
from inception_jax.training.state import Variables


class Guess(NamedTuple):
    """A class that an image may be of.

    Attributes:
      label: its number.
      name: its name; its number where the weights bring no names.
      probability: by the softmax of the logits, between 0 and 1.
    """

    label: int
    name: str
    probability: float


class Predictor:
    """Classifies images with trained weights, prepared as an evaluation prepares them.

    Images are cut and resized by the settings `data.image_size`, `data.eval_crop` and
    `evaluation.image_size` of the weights' training, and normalised by its mean and standard
    deviation, so an image of the data set gets the logits that the evaluation saw.

    Attributes:
      weights: what it was made of.

    Args:
      weights: the network's.
      batch_size: images computed at a time; smaller batches are filled up, so that there is one
        program to compile.
    """

    def __init__(self, weights: Weights, *, batch_size: int = 64) -> None:
        self.weights = weights
        self._batch_size = batch_size
        self._model = registry.create(weights.config.model, weights.num_classes)
        self._variables: Variables = jax.device_put(weights.variables)
        options = ops.compiler_options(weights.config.model.dtype)
        self._logits = jax.jit(self._compute_logits, compiler_options=options)

    def read(self, data: bytes, name: str) -> np.ndarray:
        """Returns an image file's pixels as `logits` takes them.

        Args:
          data: the file's content, of any format, size and colour mode that PIL knows; what its
            EXIF data say of the camera's orientation is honoured.
          name: what an error calls it.

        Returns:
          uint8 [S, S, 3], S the size of the images of the training.

        Raises:
          DataError: if it cannot be decoded.
        """
        settings = self.weights.config.data
        return images.decode(data, settings.image_size, name, settings.eval_crop)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the network's logits, float32 [N, classes], of images uint8 [N, S, S, 3]."""
        starts = range(0, len(pixels), self._batch_size)
        found = [self._padded(pixels[start : start + self._batch_size]) for start in starts]
        return np.concatenate(found) if found else np.zeros((0, self.weights.num_classes), "f4")

    def guesses(self, pixels: np.ndarray, count: int = 5) -> list[list[Guess]]:
        """Returns the most probable classes of each image, the first first.

        Args:
          pixels: uint8 [N, S, S, 3].
          count: how many; fewer if there are fewer classes.
        """
        return [self.best(row, count) for row in self.logits(pixels)]

    def best(self, logits: np.ndarray, count: int = 5) -> list[Guess]:
        """Returns the most probable classes of one image, float32 [classes], the first first."""
        probabilities = np.asarray(jax.nn.softmax(logits))
        # Stable: of equal probabilities the lower label comes first.
        order = np.argsort(-probabilities, kind="stable")[:count]
        return [Guess(int(k), self.class_name(int(k)), float(probabilities[k])) for k in order]

    def class_name(self, label: int) -> str:
        """Returns the name of a class, its number where the weights bring no names."""
        return self.weights.class_names[label] if self.weights.class_names else str(label)

    def prepared(self, pixels: jax.Array) -> jax.Array:
        """Returns the network's input, float32 [N, H, W, 3], of images uint8 [N, S, S, 3]."""
        weights = self.weights
        size = weights.config.evaluation.image_size or weights.image_size
        return augment.normalise(augment.resize(pixels, size), weights.mean, weights.std)

    def _padded(self, pixels: np.ndarray) -> np.ndarray:
        missing = self._batch_size - len(pixels)
        filled = np.pad(pixels, ((0, missing), (0, 0), (0, 0), (0, 0)))
        return np.asarray(self._logits(self._variables, filled))[: len(pixels)]

    def _compute_logits(self, variables: Variables, pixels: jax.Array) -> jax.Array:
        output: Any = self._model.apply(variables, self.prepared(pixels), train=False)
        return output.logits.astype(jnp.float32)
