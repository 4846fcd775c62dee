"""Folders of runs that were never trained: files as training leaves them, with made-up numbers."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config, Data, Schedule, Train
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Evaluated, Predictions

STEPS, BATCH, EXAMPLES, EVALUATED = 400, 36, 1440, 600
ENVIRONMENT = {"date": "2026-11-21T10:00:00+00:00", "device": "cpu", "packages": {"jax": "0.12"}}

# Of classes and runs: what plots, pages and tables might take for something else.
ODD_NAMES = [
    "$100 bill",
    r"$\frac{$",
    "100%",
    "%s %(a)d",
    'it\'s "so"',
    "_private",
    "a\nb",
    "a\tb",
    "猫 😀",
    "x" * 300,
    "{0}",
    "a<b>&c",
    "back\\slash",
    "caf\udce9",
    "^_^",
    "#",
]


def config(**groups: Any) -> Config:
    """Returns the settings of a run of STEPS steps, ten epochs."""
    return Config(
        **{
            "name": "made_up",
            "data": Data(name="digits", image_size=16),
            "schedule": Schedule(name="cosine", learning_rate=0.05),
            "train": Train(batch_size=BATCH, duration=f"{STEPS} steps"),
        }
        | groups
    )


def lines(*, skill: float = 1.0, steps: int = STEPS) -> list[dict[str, Any]]:
    """Returns the lines of metrics.jsonl: a report each 10 steps, an evaluation each 40."""
    found: list[dict[str, Any]] = []
    for step in range(10, steps + 1, 10):
        done = step / STEPS
        common = {"step": step, "epoch": step * BATCH / EXAMPLES, "seconds": 0.5 * step}
        learned = 1 - np.exp(-4 * done * skill)
        noise = 0.03 * np.sin(step)
        train = {
            "loss": 2.3 * (1 - 0.9 * learned) + noise,
            "top1": 100 * (0.1 + 0.8 * learned),
            "top5": 100 * (0.5 + 0.45 * learned),
            "learning_rate": 0.025 * (1 + np.cos(np.pi * done)),
            "gradient_norm": 1.0,
        }
        found.append({**common, "split": "train", **train})
        if step % 40 == 0:
            found.append(
                {
                    **common,
                    "split": "test",
                    "loss": 2.3 * (1 - 0.8 * learned),
                    "top1": 100 * (0.1 + 0.7 * learned),
                    "top5": 100 * (0.5 + 0.42 * learned),
                    "count": EVALUATED,
                }
            )
    return found


def predicted(classes: int, *, count: int = EVALUATED, seed: int = 0) -> Predictions:
    """Returns predictions that are mostly right, and mix up each class with the next."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % classes
    logits = random.normal(size=(count, classes))
    logits[np.arange(count), labels] += 3
    logits[np.arange(count), (labels + 1) % classes] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    guesses = np.argsort(-probabilities, axis=1)[:, : predictions.BEST].astype(np.int32)
    return Predictions(
        labels=labels,
        guesses=guesses,
        probabilities=np.take_along_axis(probabilities, guesses, axis=1).astype(np.float32),
        own=probabilities[np.arange(count), labels].astype(np.float32),
    )


def write(
    folder: pathlib.Path,
    *,
    names: Sequence[str] = tuple("0123456789"),
    settings: Config | None = None,
    experiment: dict[str, Any] | None = None,
    skill: float = 1.0,
    steps: int = STEPS,
) -> pathlib.Path:
    """Writes the folder of a run and returns it.

    Args:
      folder: made if it is missing.
      names: of the classes.
      settings: of the run; None: those of `config`.
      experiment: what config.json says of the experiment.
      skill: how fast it learned.
      steps: how far it came, of STEPS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = lines(skill=skill, steps=steps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in found))
    record: dict[str, Any] = {
        "config": configs.to_dict(settings or config()),
        "experiment": experiment,
        "dataset": {
            "name": "digits",
            "classes": len(names),
            "training examples": EXAMPLES,
            "class names": list(names),
        },
        "environment": ENVIRONMENT,
        "changes": [],
    }
    (folder / "config.json").write_text(json.dumps(record))
    result = {
        "name": "made_up",
        **{key: found[-1][key] for key in ("step", "epoch", "split", "loss", "top1", "count")},
        "images_per_second": 1234.5,
        "seconds": found[-1]["seconds"],
        "seconds_by_phase": {"train": 150.0, "compile": 30.0, "evaluate": 15.0, "save": 5.0},
        "environment": ENVIRONMENT,
    }
    if steps == STEPS:
        (folder / "result.json").write_text(json.dumps(result))
    made = predicted(len(names))
    shown = predictions.choose(made)
    random = np.random.default_rng(1)
    pictures = random.integers(0, 255, size=(len(shown), 16, 16, 3), dtype=np.uint8)
    files = tuple(f"picture_{index}.png" for index in shown)
    predictions.write(folder, Evaluated(result, made, shown, files, pictures))
    return folder
