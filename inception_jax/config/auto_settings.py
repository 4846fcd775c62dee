"""Chooses settings that an experiment leaves open, by the size of the data and the hardware.

Settings that suit 40 images make thousands take too long to train on or to evaluate; settings for
thousands would end a run on 40 images before its BatchNorm statistics have settled. An experiment
with `train.auto_size` leaves such settings open (`config.OPEN`), and `resolve` fills them in once,
before the timeline is made. They are recorded as if they had been set.
"""

import math
import shlex

from inception_jax.config import durations
from inception_jax.config.fields import fill_open, get, is_open
from inception_jax.config.schema import OPEN, Config
from inception_jax.config.timeline import Timeline
from inception_jax.config.views import views

# Epochs for between FEW_IMAGES and MANY_IMAGES training images. Beyond either end, the number
# falls with the square root of the ratio: more images need fewer epochs, and fewer images offer
# less to learn, so that a first try takes a minute. Pretrained weights need a third.
BASE_EPOCHS, FEW_IMAGES, MANY_IMAGES, MIN_EPOCHS = 60, 128, 1000, 15
PRETRAINED_FACTOR = 1 / 3

# A network needs this many updates to learn anything, however few the images are.
MIN_STEPS = 120
MIN_STEPS_PRETRAINED = 60  # The diagnosis needs at least 50.

# The batch size is a power of two that gives about six updates per epoch, within what BatchNorm
# can handle.
STEPS_PER_EPOCH = 6
MIN_BATCH_SIZE, MAX_BATCH_SIZE = 8, 64

# Learning rate of SGD with momentum 0.9, per image of the batch: 0.05 for 64.
LR_PER_IMAGE = 0.05 / 64

WARMUP_FRACTION = 0.05

# Mixup needs many images, FEW_IMAGES at least, and many steps.
MIXUP, MIN_MIXUP_STEPS = 0.2, 400

# Evaluating an image takes a third of the work of training on it; evaluations may take a twentieth
# of the run. Each, with its checkpoint and report, takes about as long as 20 updates.
EVALUATION_FRACTION = 0.05
MIN_STEPS_PER_EVALUATION = 20
MIN_EVALUATIONS, MAX_EVALUATIONS = 5, 20
LOGS_PER_EVALUATION = 4


def resolve(
    config: Config, *, train_examples: int, eval_examples: int, devices: int, dtype: str
) -> Config:
    """Returns the configuration with all open settings filled in.

    Args:
      config: validated settings.
      train_examples, eval_examples: sizes of the two splits.
      devices: number of devices; the batch size is rounded up to a multiple of it.
      dtype: the compute type that suits the hardware, for model.dtype = 'auto'.
    """
    if not config.train.auto_size and config.model.dtype != "auto":
        return config
    resolved = config

    def fill(path: str, value: int | float | str) -> None:
        nonlocal resolved
        resolved = fill_open(resolved, {path: value})

    fill("model.dtype", dtype)
    share = devices * config.train.grad_accum_steps
    wanted = max(MIN_BATCH_SIZE, min(MAX_BATCH_SIZE, train_examples // STEPS_PER_EPOCH))
    fill("train.batch_size", -(-(1 << wanted.bit_length() - 1) // share) * share)
    batch_size = resolved.train.batch_size
    fill("schedule.learning_rate", LR_PER_IMAGE * batch_size)
    fill("train.duration", f"{epochs(config, train_examples, batch_size)} epochs")
    timeline = Timeline(batch_size, train_examples)
    total_steps = timeline.steps(resolved.train.duration)
    fill("schedule.warmup", _steps(int(WARMUP_FRACTION * total_steps)))
    mixed = train_examples >= FEW_IMAGES and total_steps >= MIN_MIXUP_STEPS
    fill("augment.mixup", MIXUP if mixed else 0.0)
    images = eval_examples + min(config.evaluation.norm_examples, train_examples)
    for view in views(config).values():
        available = train_examples if view.split == "train" else eval_examples
        # At most: evaluations of the same images share passes over them.
        passes = (1 + view.flip_tta) * (3 if view.shift_tta else 1)
        images += min(view.examples or available, available) * passes
    affordable = EVALUATION_FRACTION * 3 * total_steps * batch_size / images
    evaluations = min(affordable, total_steps / MIN_STEPS_PER_EVALUATION, MAX_EVALUATIONS)
    every = math.ceil(total_steps / max(evaluations, MIN_EVALUATIONS))
    fill("evaluation.every", _steps(every))
    fill("checkpoint.every", _steps(every))
    fill("log.every", _steps(max(1, every // LOGS_PER_EVALUATION)))
    return resolved


def epochs(config: Config, train_examples: int, batch_size: int) -> int:
    """Returns the number of epochs chosen if `train.duration` is left open."""
    factor = min(
        1.0, math.sqrt(train_examples / FEW_IMAGES), math.sqrt(MANY_IMAGES / train_examples)
    )
    chosen, least = max(BASE_EPOCHS * factor, MIN_EPOCHS), MIN_STEPS
    if config.init.pretrained:
        chosen, least = chosen * PRETRAINED_FACTOR, MIN_STEPS_PRETRAINED
    return math.ceil(max(chosen, least * batch_size / train_examples))


def _steps(number: int) -> str:
    return str(durations.Duration(number, "steps"))


def describe(before: Config, after: Config) -> str:
    """Returns what `resolve` chose by the data, as flags would set it; '' if nothing was open."""
    paths = [path for path in OPEN if path != "model.dtype" and is_open(before, path)]
    chosen = {path: get(after, path) for path in paths}
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={shlex.quote(str(value))}"
        for name, value in chosen.items()
    )
