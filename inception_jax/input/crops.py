"""Samples random crops of the original training images, on the host.

The decoding threads crop the images, so the boxes cannot be sampled on the devices, unlike all
other augmentation (`augment`). They depend only on the seed and the position in training.
"""

import math

import numpy as np

from inception_jax import config
from inception_jax.datasets.decode import CropBox, CropFn
from inception_jax.input.pipeline import CropSampler

# Number of tries of torchvision's RandomResizedCrop to find a box that fits.
_MAX_TRIES = 10
# The last word of Philox's counter, which separates these streams from those of the epoch orders:
# those have keys of the same form and leave that word 0.
_STREAM = 1


def crop_sampler(settings: config.Augment, seed: int) -> CropSampler | None:
    """Returns a function from training position to crop function, or None if not configured.

    Positions count the training examples in training order, from 0.

    Args:
      settings: uses crop, crop_scale_min and crop_ratio_max.
      seed: seed of the run.
    """
    if settings.crop != "inception":
        return None

    def sample_crop(position: int) -> CropFn:
        def choose(height: int, width: int) -> CropBox:
            draws = position_rng(seed, position).random((_MAX_TRIES, 4))
            return random_crop_box(
                draws, height, width, settings.crop_scale_min, settings.crop_ratio_max
            )

        return choose

    return sample_crop


def position_rng(seed: int, position: int) -> np.random.Generator:
    """Returns the random generator of a position, using NumPy's counter-based Philox."""
    key = np.array([seed, position], np.uint64)
    counter = np.array([0, 0, 0, _STREAM], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def random_crop_box(
    draws: np.ndarray, height: int, width: int, crop_scale_min: float, crop_ratio_max: float
) -> CropBox:
    """Returns a box inside an image, sampled as in torchvision's RandomResizedCrop.

    Szegedy et al. 2015, section 6: area uniform in [crop_scale_min, 1] of the image's, width /
    height log-uniform in [1 / crop_ratio_max, crop_ratio_max], both sides rounded to pixels,
    position uniform. Returns the first of ten such boxes that fits the image; if none fits, the
    largest centered box with an allowed aspect ratio.

    Args:
      draws: float64 [10, 4], uniform in [0, 1): area, aspect ratio, row and column of each try.
      height, width: of the image, pixels.
      crop_scale_min: fraction of the image's area.
      crop_ratio_max: at least 1.
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
