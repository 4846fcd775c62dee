"""Checks the diagnosis on runs whose fault is known, and what its advice does when followed.

Each case trains a small network in seconds with one thing wrong with it: a learning rate that is
far off, too few steps, a network too thin, shuffled labels, … The diagnosis is written down, its
advice is followed once in a new workdir, and both ends are compared. A case fails if the verdict is
none of those that are true of it, or if the advice made the evaluation worse.

  python -m benchmarks.diagnosis_cases --output runs/diagnosis \\
      --json benchmarks/results/diagnosis_cases.json

A case that is finished in --output is not trained again.
"""

import argparse
import copy
import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import measure

# Where both evaluations are of one run each, a smaller loss of top-1 than this is noise, points.
NOISE_ERRORS = 2.0


@dataclasses.dataclass(frozen=True)
class Case:
    """A run with a known fault.

    Attributes:
      fault: what is wrong with it.
      verdicts: those that are true of it.
      settings: what it changes, by dotted path.
      experiment: the module of experiments/ that it starts from, and what all its cases change.
      data: makes its pictures below a folder; None: the embedded digits.
      stop: the step after which it is interrupted; 0: it runs to its end.
    """

    fault: str
    verdicts: Sequence[str]
    settings: Mapping[str, Any]
    experiment: str = "digits"
    data: Callable[[pathlib.Path], None] | None = None
    stop: int = 0


# The digits at their own size, for which a thin network takes seconds.
SHARED: dict[str, dict[str, Any]] = {
    "digits": {
        "data.image_size": 8,
        "model.width": 0.125,
        "model.dropout": 0.2,
        "train.batch_size": 64,
        "evaluation.train_examples": 360,
        "evaluation.every.epochs": 2.0,
        "checkpoint.every.epochs": 100.0,
        "log.every.steps": 20,
    },
    "image_folder": {
        "data.image_size": 32,
        "model.width": 0.125,
        "model.name": "mini_googlenet",
        "model.stem": "paper",
        "evaluation.train_examples": 480,
        "checkpoint.every.epochs": 100.0,
    },
}
RATE = 0.05


def pictures(
    folder: pathlib.Path, *, counts: Sequence[int], size: int, noise: float, shuffled: bool = False
) -> None:
    """Writes pictures of stripes that lean by class, below noise: CLASS/NUMBER.png.

    Args:
      folder: to write to.
      counts: how many of each class.
      size: their side, pixels.
      noise: deviation of a pixel over the height of the stripes.
      shuffled: whether the labels have nothing to do with the pictures.
    """
    from PIL import Image

    random = np.random.default_rng(0)
    down, across = np.mgrid[:size, :size]
    labels = np.repeat(np.arange(len(counts)), counts)
    shown = random.permutation(labels) if shuffled else labels
    for number, (label, kind) in enumerate(zip(labels, shown, strict=True)):
        # Within a quarter turn, as half of the pictures are mirrored in training.
        angle = math.pi / 2 * (kind / (len(counts) - 1) + random.normal(scale=0.05))
        wave = across * math.cos(angle) + down * math.sin(angle)
        stripes = np.sin(0.9 * wave + random.uniform(0, 2 * math.pi))
        pixels = stripes[..., None] + noise * random.normal(size=(size, size, 3))
        path = folder / f"class_{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.clip(128 + 40 * pixels, 0, 255))).save(path)


def _pictures(**settings: Any) -> Callable[[pathlib.Path], None]:
    return lambda folder: pictures(folder, **settings)


NEWCOMER = _pictures(counts=(200, 200, 200), size=32, noise=2.0)
RECIPE = {"train.batch_size": 32, "schedule.learning_rate": 0.025}

CASES = {
    "rate x 0.01": Case("the rate", [], {"schedule.learning_rate": RATE / 100}),
    "rate x 0.1": Case("the rate", [], {"schedule.learning_rate": RATE / 10}),
    "rate x 1": Case("nothing", [], {}),
    "rate x 10": Case("the rate", [], {"schedule.learning_rate": RATE * 10}),
    "rate x 100": Case("the rate", [], {"schedule.learning_rate": RATE * 100}),
    "zero rate": Case("the rate", [], {"schedule.learning_rate": 1e-12}),
    "1 of 12 epochs": Case("too short", [], {"train.length.epochs": 1.0}),
    "3 of 12 epochs": Case("too short", [], {"train.length.epochs": 3.0}),
    "interrupted": Case("unfinished", [], {}, stop=100),
    "overfit": Case(
        "few pictures",
        [],
        {
            "data.holdout": 1340,
            "augment.crop": "none",
            "model.dropout": 0.0,
            "optimizer.weight_decay": 0.0,
            "train.length.epochs": 100.0,
            "evaluation.every.epochs": 20.0,
        },
    ),
    "thin": Case("the width", [], {"model.width": 0.015}),
    "statistics": Case("BatchNorm's momentum", [], {"model.norm_momentum": 0.999}),
    "mixing": Case(
        "mixing",
        [],
        {"augment.mixup": 5.0, "train.label_smoothing": 0.6, "model.dropout": 0.9},
    ),
    "decay": Case("weight decay", [], {"optimizer.weight_decay": 0.1}),
    "not measured": Case("nothing", [], {"evaluation.train_examples": 0}),
    "shuffled": Case(
        "labels",
        [],
        {},
        "image_folder",
        _pictures(counts=(200, 200, 200), size=32, noise=1.0, shuffled=True),
    ),
    "imbalanced": Case(
        "one class has nearly all",
        [],
        {"train.length.epochs": 10.0, "schedule.learning_rate": 0.0001},
        "image_folder",
        _pictures(counts=(540, 30, 30), size=32, noise=2.0),
    ),
    "newcomer": Case(
        "10 of 60 epochs",
        [],
        RECIPE | {"train.length.epochs": 10.0},
        "image_folder",
        NEWCOMER,
    ),
    "newcomer, whole": Case("nothing", [], RECIPE, "image_folder", NEWCOMER),
    "forty": Case(
        "few steps",
        [],
        {"evaluation.train_examples": 32, "train.length.epochs": 30.0},
        "image_folder",
        _pictures(counts=(20, 20), size=32, noise=0.5),
    ),
}
