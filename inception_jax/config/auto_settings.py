"""Settings that an experiment leaves open, chosen by the size of the data and by the hardware.

What suits 40 pictures takes thousands too long to learn, or to evaluate; the other way round, forty
would have been seen before the first statistics have settled. An experiment with `train.auto_size`
leaves such settings open (`config.OPEN`), and `resolve` fills them in once, before the timeline is
made. They are recorded as if they had been given.
"""

import math
import shlex

from inception_jax.config import durations
from inception_jax.config.fields import fill_open, get, is_open
from inception_jax.config.schema import OPEN, Config
from inception_jax.config.timeline import Timeline

# Epochs for `FEW` to `MANY` images. Outside, fewer by the root of how far they are off: more images
# take fewer epochs to learn from, and of fewer images there is less to learn, so that a first try
# takes a minute. Weights that were trained need a third.
EPOCHS, FEW, MANY, LEAST_EPOCHS = 60, 128, 1000, 15
PRETRAINED = 1 / 3

# However few the images are, a network takes that many updates to move.
LEAST_STEPS = 120
LEAST_STEPS_PRETRAINED = 60  # The diagnosis judges no run of fewer than 50.

# Batches are a power of two that makes some six updates an epoch, and that BatchNorm can do with.
STEPS_AN_EPOCH = 6
LEAST_BATCH, LARGEST_BATCH = 8, 64

# Of SGD with a momentum of 0.9, for an image of the batch: 0.05 for 64.
RATE_AN_IMAGE = 0.05 / 64

WARMUP = 0.05  # Of the run.

# Mixing takes many images, `FEW` at least, and many steps.
MIXUP, MIXED_FROM_STEPS = 0.2, 400

# Evaluating an image takes a third of the work of training on it, and a twentieth of the run is
# spent so; with a checkpoint and a report after each evaluation, that is some 20 updates' time.
EVALUATION = 0.05
STEPS_AN_EVALUATION = 20
LEAST_EVALUATIONS, MOST_EVALUATIONS = 5, 20
REPORTS_AN_EVALUATION = 4


def resolve(
    config: Config, *, train_examples: int, eval_examples: int, devices: int, dtype: str
) -> Config:
    """Returns a configuration in which nothing is left open; the same one if nothing was.

    Args:
      config: validated settings.
      train_examples, eval_examples: sizes of the two splits.
      devices: that share a batch; it is made a multiple of them.
      dtype: that the hardware multiplies well.
    """
    if not config.train.auto_size and config.model.dtype != "auto":
        return config
    resolved = config

    def fill(path: str, value: int | float | str) -> None:
        nonlocal resolved
        resolved = fill_open(resolved, {path: value})

    fill("model.dtype", dtype)
    share = devices * config.train.grad_accum_steps
    wished = max(LEAST_BATCH, min(LARGEST_BATCH, train_examples // STEPS_AN_EPOCH))
    fill("train.batch_size", -(-(1 << wished.bit_length() - 1) // share) * share)
    batch_size = resolved.train.batch_size
    fill("schedule.learning_rate", RATE_AN_IMAGE * batch_size)
    fill("train.duration", f"{epochs(config, train_examples, batch_size)} epochs")
    timeline = Timeline(batch_size, train_examples)
    total_steps = timeline.steps(resolved.train.duration)
    fill("schedule.warmup", _steps(int(WARMUP * total_steps)))
    mixed = train_examples >= FEW and total_steps >= MIXED_FROM_STEPS
    fill("augment.mixup", MIXUP if mixed else 0.0)
    settings = config.evaluation
    images = eval_examples + sum(
        min(examples, train_examples)
        for examples in (settings.train_eval_examples, settings.norm_examples)
    )
    for view in config.evaluations.values():
        there = train_examples if view.split == "train" else eval_examples
        images += min(view.examples or there, there)
    affordable = EVALUATION * 3 * total_steps * batch_size / images
    evaluations = min(affordable, total_steps / STEPS_AN_EVALUATION, MOST_EVALUATIONS)
    every = math.ceil(total_steps / max(evaluations, LEAST_EVALUATIONS))
    fill("evaluation.every", _steps(every))
    fill("checkpoint.every", _steps(every))
    fill("log.every", _steps(max(1, every // REPORTS_AN_EVALUATION)))
    return resolved


def epochs(config: Config, train_examples: int, batch_size: int) -> int:
    """Returns the length that is chosen where `train.duration` is left open."""
    factor = min(1.0, math.sqrt(train_examples / FEW), math.sqrt(MANY / train_examples))
    chosen, least = max(EPOCHS * factor, LEAST_EPOCHS), LEAST_STEPS
    if config.init.pretrained:
        chosen, least = chosen * PRETRAINED, LEAST_STEPS_PRETRAINED
    return math.ceil(max(chosen, least * batch_size / train_examples))


def _steps(number: int) -> str:
    return str(durations.Duration(number, "steps"))


def describe(before: Config, after: Config) -> str:
    """Returns what `resolve` chose, as flags would give it; '' if nothing was left open."""
    chosen = {path: get(after, path) for path in OPEN if is_open(before, path)}
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={shlex.quote(str(value))}"
        for name, value in chosen.items()
    )
