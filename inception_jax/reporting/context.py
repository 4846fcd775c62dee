"""The parts of a report, as the values that its templates show.

Pure functions of a `RunRecord`; each returns None, or an empty list, where the folder does not hold
what it needs, and the template then leaves the part out.
"""

import base64
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.evaluation import calibration
from inception_jax.reporting.evidence import Row
from inception_jax.reporting.run_record import RunRecord, names
from inception_jax.telemetry.writers import MEASURED

# What a page can hold and a reader take in.
MOST_POINTS = 1000
MOST_ROWS = 60
MOST_CONFUSED = 14
MOST_PAIRS = 15
EXTREMES = 10
# Beyond this side, pixels, a picture without loss takes too much of the page.
LOSSLESS = 64


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of the rows of metrics.jsonl.

    Attributes:
      name: in the rows.
      title: of its chart.
      label: in a sentence, a legend, or a column's head.
      unit: "%" or "".
      digits: after the point; None: five that count.
    """

    name: str
    title: str
    label: str
    unit: str = ""
    digits: int | None = None

    @property
    def head(self) -> str:
        """The head of its column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def text(self, value: float | None) -> str:
        """Returns a value for a reader; a dash where there is none."""
        if value is None:
            return "–"
        return f"{value:,.5g}" if self.digits is None else f"{value:,.{self.digits}f}"


# Those that the package itself knows, in the order in which they are shown; others come after.
_KNOWN = (
    Metric("loss", "Loss", "loss", digits=4),
    Metric("top1", "Top-1 accuracy", "top-1", "%", 2),
    Metric("top5", "Top-5 accuracy", "top-5", "%", 2),
    Metric("learning_rate", "Learning rate", "learning rate"),
    Metric("gradient_norm", "Gradient norm", "gradient norm"),
)
_NO_METRICS = {"step", "epoch", "split", "count", *MEASURED}
# Of curves: what a split is called, and which have a colour of their own in report.css.
_SPLITS = {
    "train": "training",
    "train_eval": "training images (evaluated)",
    "flip": "horizontal-flip average",
}
_COLOURED = ("train", "train_eval", "validation", "test", "holdout")
_OTHER_COLOURS = ("run4", "run5", "run6", "run3", "run7")

# The phases of telemetry.clock, in words.
PHASES = {
    "train": "training steps",
    "input": "waiting for input data",
    "evaluate": "evaluation",
    "compile": "compilation",
    "save": "saving checkpoints",
    "report": "writing this report",
    "other": "everything else",
}

Values = dict[str, Any]


def metrics(rows: Sequence[Row]) -> list[Metric]:
    """Returns what is measured in some rows: what the package knows first, the rest by its name."""
    found = dict.fromkeys(name for row in rows for name in row if name not in _NO_METRICS)
    known = [metric for metric in _KNOWN if metric.name in found]
    return known + [Metric(n, n, n) for n in found if n not in {m.name for m in known}]


def result(record: RunRecord) -> Values | None:
    """Returns the last evaluation, the best one, and what the experiment expects."""
    evaluations = [row for row in record.evaluations if row.get("top1") is not None]
    if not evaluations:
        return None
    last, best = evaluations[-1], max(evaluations, key=lambda row: row["top1"])
    count = last.get("count")
    top1 = last["top1"] / 100
    return {
        "last": last,
        "metrics": [metric for metric in metrics([last]) if metric.name != "top1"],
        "role": record.role(last["step"]),
        "best": best if best["top1"] > last["top1"] else None,
        # Two standard errors of a share of independent examples.
        "margin": 200 * math.sqrt(top1 * (1 - top1) / count) if count else None,
        "expected": _expected(record, last["top1"]),
        "hours": (record.result.get("seconds") or last.get("seconds") or 0) / 3600,
        "images_per_second": record.result.get("images_per_second"),
    }


def _expected(record: RunRecord, top1: float) -> Values | None:
    if record.config is None or not record.config.expected.top1:
        return None
    expected = record.config.expected
    return {
        "top1": expected.top1,
        "source": expected.source,
        "difference": top1 - expected.top1,
        "changed": len(overridden(record)),
    }


def other_evaluations(record: RunRecord) -> Values | None:
    """Returns the last evaluation of each split and view but the one that the result is of."""
    last = {row["split"]: row for row in record.rows if row["split"] not in ("train", record.split)}
    if not last:
        return None
    rows = list(last.values())
    return {
        "metrics": metrics(rows),
        "rows": [{"row": row, "label": _SPLITS.get(row["split"], row["split"])} for row in rows],
    }


def curves(records: Sequence[RunRecord]) -> Values:
    """Returns the curves of some runs, for the script of the page and for the plots.

    Returns:
      runs: of each run its name and, by split, a label, a colour, and arrays of step, epoch, hours
        and the metrics, with None where a row has none; at most MOST_POINTS of each split. Of
        several runs without the evaluations that their results are not of.
    """
    labels = names(records)
    return {
        "runs": [
            {"name": name, "splits": _splits(record, whole=len(records) == 1)}
            for name, record in zip(labels, records, strict=True)
        ]
    }


def _splits(record: RunRecord, *, whole: bool) -> dict[str, Values]:
    rows = record.rows
    seconds = {row["step"]: row["seconds"] for row in rows if row.get("seconds") is not None}
    found: dict[str, Values] = {}
    others = iter(range(len(rows)))
    for split in sorted({row["split"] for row in rows}, key=lambda s: (s != "train", s)):
        if not whole and split not in ("train", "train_eval", record.split):
            continue
        points = thinned([row for row in rows if row["split"] == split], MOST_POINTS)
        hours = [row.get("seconds", seconds.get(row["step"])) for row in points]
        coloured = split in _COLOURED
        found[split] = {
            "label": _SPLITS.get(split, split),
            "colour": split if coloured else _OTHER_COLOURS[next(others) % len(_OTHER_COLOURS)],
            "step": [row["step"] for row in points],
            "epoch": [_short(row["epoch"]) for row in points],
            "hours": [None if each is None else _short(each / 3600) for each in hours],
            "metrics": {
                metric.name: [_short(row.get(metric.name)) for row in points]
                for metric in metrics(points)
            },
        }
    return found


def thinned(rows: Sequence[Any], most: int) -> list[Any]:
    """Returns at most so many of some rows, evenly spaced, the first and the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[index] for index in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _short(value: float | None) -> float | None:
    """Returns a number as six digits say it, for the page's size."""
    return None if value is None else float(f"{value:.6g}")


def curve_table(record: RunRecord) -> Values:
    """Returns the curves as rows: the evaluations, each with the training report before it."""
    train = [row for row in record.rows if row["split"] == "train"]
    evaluated = [row for row in record.rows if row["split"] != "train"] or train
    steps = set(thinned(sorted({row["step"] for row in evaluated}), MOST_ROWS))
    before = {step: [row for row in train if row["step"] <= step][-1:] for step in steps}
    return {
        "metrics": metrics(evaluated),
        "training": metrics(train),
        "rows": [
            {"row": row, "train": before[row["step"]][0] if before[row["step"]] else {}}
            for row in evaluated
            if row["step"] in steps
        ],
    }


def evaluated(record: RunRecord) -> Values | None:
    """Returns which evaluation classes, pictures and calibration are of."""
    if record.evaluated is None:
        return None
    found = record.evaluated.result
    return {
        "split": found["split"],
        "step": found["step"],
        "role": record.role(found["step"]),
        "guesses": record.evaluated.predictions.guesses.shape[1],
    }


def classes(record: RunRecord) -> Values | None:
    """Returns the accuracy of each class, and which are the best and the worst."""
    matrix = record.confusion
    if matrix is None:
        return None
    # Those of which the split has an example.
    rows = [
        _class_row(record, matrix, label) for label in np.flatnonzero(matrix.sum(axis=1)).tolist()
    ]
    ranked = sorted(rows, key=lambda row: -row["accuracy"])
    groups = [("All classes, best first", ranked)]
    if len(ranked) > 2 * EXTREMES:
        groups = [("Best", ranked[:EXTREMES]), ("Worst", ranked[-EXTREMES:][::-1])]
    return {"rows": rows, "groups": groups}


def _class_row(record: RunRecord, matrix: np.ndarray, label: int) -> Values:
    count, right = int(matrix[label].sum()), int(matrix[label, label])
    others = matrix[label].copy()
    others[label] = 0
    taken_for = int(others.argmax())
    return {
        "name": record.class_name(label),
        "count": count,
        "right": right,
        "accuracy": 100 * right / count,
        "taken_for": record.class_name(taken_for) if others[taken_for] else "",
        "times": int(others[taken_for]),
    }


def confusion(record: RunRecord) -> Values | None:
    """Returns the confusion matrix of the most confused classes, and the most frequent mistakes."""
    matrix = record.confusion
    if matrix is None:
        return None
    chosen = calibration.most_confused(matrix, MOST_CONFUSED)
    totals = np.maximum(matrix.sum(axis=1), 1)
    pairs = calibration.confused_pairs(matrix, MOST_PAIRS)
    return {
        "names": [record.class_name(label) for label in chosen],
        "whole": len(chosen) == len(matrix),
        "rows": [
            {
                "name": record.class_name(true),
                "cells": [
                    {
                        "count": int(matrix[true, guess]),
                        "share": float(matrix[true, guess] / totals[true]),
                        "right": bool(true == guess),
                    }
                    for guess in chosen
                ],
                "others": int(matrix[true].sum() - matrix[true, chosen].sum()),
                "total": int(matrix[true].sum()),
            }
            for true in chosen
        ],
        "pairs": [
            {
                "true": record.class_name(true),
                "guess": record.class_name(guess),
                "count": int(matrix[true, guess]),
                "share": 100 * float(matrix[true, guess] / totals[true]),
            }
            for true, guess in pairs
        ],
    }


def examples(record: RunRecord) -> Values | None:
    """Returns the pictures: the most confident mistakes, and right answers."""
    evaluated = record.evaluated
    if evaluated is None:
        return None
    predictions = evaluated.predictions
    found: Values = {"mistakes": [], "right": [], "side": evaluated.pictures.shape[1]}
    for index, name, pixels in zip(
        evaluated.shown, evaluated.names, evaluated.pictures, strict=True
    ):
        label, guesses = predictions.labels[index], predictions.guesses[index]
        found["right" if predictions.right[index] else "mistakes"].append(
            {
                "source": data_uri(pixels),
                "file": name,
                "label": record.class_name(label),
                "guesses": [
                    {
                        "name": record.class_name(guess),
                        "percent": 100 * float(probability),
                        "right": bool(guess == label),
                    }
                    for guess, probability in zip(
                        guesses, predictions.probabilities[index], strict=True
                    )
                ],
            }
        )
    return found


def data_uri(pixels: np.ndarray) -> str:
    """Returns a picture, uint8 [H, W, 3], as an address that holds it."""
    kind = "png" if max(pixels.shape[:2]) <= LOSSLESS else "jpeg"
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def reliability(record: RunRecord) -> Values | None:
    """Returns the reliability diagram's bins, and the expected calibration error in percent."""
    if record.evaluated is None:
        return None
    predictions = record.evaluated.predictions
    found = calibration.calibration(predictions.confidence, predictions.right)
    bins = [
        {
            "low": 100 * float(found.edges[n]),
            "high": 100 * float(found.edges[n + 1]),
            "count": int(count),
            "share": float(count / len(predictions)),
            "confidence": 100 * float(found.confidence[n]),
            "accuracy": 100 * float(found.accuracy[n]),
        }
        for n, count in enumerate(found.count)
    ]
    return {
        "bins": bins,
        "error": 100 * found.error,
        "excess": 100 * found.excess,
        "confidence": 100 * float(predictions.confidence.mean()),
        "accuracy": 100 * float(predictions.right.mean()),
    }


def time(record: RunRecord) -> Values | None:
    """Returns the seconds that each phase of the run took, the longest first."""
    seconds: Mapping[str, float] = record.result.get("seconds_by_phase", {})
    total = sum(seconds.values())
    if not total:
        return None
    ordered = sorted(seconds.items(), key=lambda phase: -phase[1])
    return {
        "total": total,
        "step": record.result["step"],
        "phases": [
            {"name": PHASES.get(name, name), "seconds": s, "share": s / total}
            for name, s in ordered
        ],
    }


def overridden(record: RunRecord) -> list[Values]:
    """Returns the settings that differ from the experiment's own, with both values."""
    if record.config is None or not record.experiment:
        return []
    # Where the data lie is no part of a recipe.
    own = {
        path: tuple(value) if isinstance(value, list) else value
        for path, value in record.experiment["own"].items()
        if path not in ("data.directory", "data.source")
    }
    return [
        {"path": path, "own": value, "run": configs.get(record.config, path)}
        for path, value in own.items()
        if configs.get(record.config, path) != value
    ]


def settings(config: Config | None) -> list[Values]:
    """Returns every setting, with its meaning and whether it is not the default."""
    if config is None:
        return []
    default = Config()
    return [
        {
            "path": path,
            "value": configs.get(config, path),
            "changed": configs.get(config, path) != configs.get(default, path),
            "help": field.metadata["help"],
        }
        for path, _, field in configs.leaves()
    ]


def machine(record: RunRecord) -> list[tuple[str, Any]]:
    """Returns what the run ran on, and with which versions, as names and values."""
    environment = dict(record.environment)
    packages = environment.pop("packages", {})
    words = {"cpu": "processor", "cpu_count": "cores", "process_count": "processes"}
    rows = [(words.get(name, name.replace("_", " ")), v) for name, v in environment.items()]
    return [*rows, *((name, version) for name, version in packages.items())]


def differing(records: Sequence[RunRecord]) -> list[str]:
    """Returns the dotted paths of the settings that are not the same in all runs."""
    known = [record.config for record in records if record.config is not None]
    return [
        path
        for path, _, _ in configs.leaves()
        if len({repr(configs.get(config, path)) for config in known}) > 1 and path != "name"
    ]


def comparison(records: Sequence[RunRecord]) -> list[Values]:
    """Returns a row for each run: its result, and its settings where the runs differ."""
    paths = differing(records)
    return [
        {
            "name": name,
            "result": result(record),
            "epoch": record.rows[-1]["epoch"],
            "finished": record.finished,
            "calibration": reliability(record),
            "diagnosis": record.diagnosis,
            "settings": [record.config and configs.get(record.config, path) for path in paths],
        }
        for name, record in zip(names(records), records, strict=True)
    ]
