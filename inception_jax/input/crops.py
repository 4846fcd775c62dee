"""Random boxes of the original training images, drawn on the host.

The decoding threads cut them, so they cannot be drawn on the devices as all else is (`augment`).
What is drawn depends on the seed and the position in training alone.
"""

import math

import numpy as np

from inception_jax import config
from inception_jax.datasets.decode import Box, ChooseBox
from inception_jax.input.pipeline import BoxAt

# torchvision's RandomResizedCrop gives up after this many boxes that do not fit.
_TRIES = 10
# The last word of Philox's counter, which keeps these streams apart from those of the epochs'
# orders: they have keys of the same form, and leave that word 0.
_STREAM = 1


def train_boxes(settings: config.Augment, seed: int) -> BoxAt | None:
    """Returns the box of each position in training, or None if `settings` ask for none.

    A position counts training examples in the order that training sees them, from 0.

    Args:
      settings: crop, crop_scale_min and crop_ratio_max matter.
      seed: of the run.
    """
    if settings.crop != "inception":
        return None

    def box_at(position: int) -> ChooseBox:
        def choose(height: int, width: int) -> Box:
            draws = generator(seed, position).random((_TRIES, 4))
            return random_box(
                draws, height, width, settings.crop_scale_min, settings.crop_ratio_max
            )

        return choose

    return box_at


def generator(seed: int, position: int) -> np.random.Generator:
    """Returns the random numbers of one position: NumPy's counter-based Philox."""
    key = np.array([seed, position], np.uint64)
    counter = np.array([0, 0, 0, _STREAM], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def random_box(
    draws: np.ndarray, height: int, width: int, crop_scale_min: float, crop_ratio_max: float
) -> Box:
    """Returns a box inside an image, as torchvision's RandomResizedCrop draws it.

    Szegedy et al. 2015, section 6: an area uniform in [crop_scale_min, 1] of the image's, width /
    height log-uniform in [1 / crop_ratio_max, crop_ratio_max], both sides rounded to pixels, the
    position uniform. The first of ten such boxes that fits the image is taken; if none does, the
    largest centred one of an allowed shape.

    Args:
      draws: float64 [10, 4], uniform in [0, 1): area, shape, row and column of each try.
      height, width: of the image, pixels.
      crop_scale_min: share of the image's area.
      crop_ratio_max: a ratio of at least 1.
    """
    for area_draw, aspect_draw, row_draw, column_draw in draws.tolist():
        area = (crop_scale_min + (1 - crop_scale_min) * area_draw) * height * width
        aspect = crop_ratio_max ** (2 * aspect_draw - 1)
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 1 <= box_height <= height and 1 <= box_width <= width:
            top = int(row_draw * (height - box_height + 1))
            left = int(column_draw * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height = min(height, round(width * crop_ratio_max))
    box_width = min(width, round(height * crop_ratio_max))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width
