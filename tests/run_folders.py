"""Writes workdirs of runs that were never trained, with files like those of training."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config, Data, Schedule, Train
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Predictions, SavedEvaluation
from inception_jax.storage.workdir import Workdir

STEPS, BATCH, EXAMPLES, EVALUATED = 400, 36, 1440, 600
ENVIRONMENT = {"date": "2026-11-21T10:00:00+00:00", "device": "cpu", "packages": {"jax": "0.12"}}

# Names of classes and runs that plots, pages and tables might misinterpret.
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
    """Returns the lines of metrics.jsonl: a report every 10 steps, an evaluation every 40."""
    rows: list[dict[str, Any]] = []
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
        rows.append({**common, "split": "train", **train})
        if step % 40 == 0:
            rows.append(
                {
                    **common,
                    "split": "test",
                    "loss": 2.3 * (1 - 0.8 * learned),
                    "top1": 100 * (0.1 + 0.7 * learned),
                    "top5": 100 * (0.5 + 0.42 * learned),
                    "count": EVALUATED,
                }
            )
    return rows


def fake_predictions(classes: int, *, count: int = EVALUATED, seed: int = 0) -> Predictions:
    """Returns predictions that are mostly correct, and confuse each class with the next."""
    random = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % classes
    logits = random.normal(size=(count, classes))
    logits[np.arange(count), labels] += 3
    logits[np.arange(count), (labels + 1) % classes] += 2
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    top_classes = np.argsort(-probabilities, axis=1)[:, : predictions.TOP_K].astype(np.int32)
    return Predictions(
        labels=labels,
        top_classes=top_classes,
        top_probs=np.take_along_axis(probabilities, top_classes, axis=1).astype(np.float32),
        true_prob=probabilities[np.arange(count), labels].astype(np.float32),
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
    """Writes the workdir of a run and returns it.

    Args:
      folder: the workdir, created if missing.
      names: class names.
      settings: the run's settings; None: those of `config`.
      experiment: the experiment's entry in config.json.
      skill: speed of learning.
      steps: steps done, of STEPS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = lines(skill=skill, steps=steps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
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
        **{key: rows[-1][key] for key in ("step", "epoch", "split", "loss", "top1", "count")},
        "images_per_second": 1234.5,
        "seconds": rows[-1]["seconds"],
        "seconds_by_phase": {"train": 150.0, "compile": 30.0, "evaluate": 15.0, "save": 5.0},
        "environment": ENVIRONMENT,
    }
    if steps == STEPS:
        (folder / "result.json").write_text(json.dumps(result))
    made = fake_predictions(len(names))
    shown = predictions.select_examples(made)
    random = np.random.default_rng(1)
    images = random.integers(0, 255, size=(len(shown), 16, 16, 3), dtype=np.uint8)
    files = tuple(f"picture_{index}.png" for index in shown)
    predictions.write(Workdir(folder), SavedEvaluation(result, made, shown, files, images))
    return folder
