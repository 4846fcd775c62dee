"""Computes the values that the templates of a report show, section by section.

Pure functions of a `RunRecord`. Each returns None, or an empty list, if the workdir lacks the data;
the template then omits the section.
"""

import base64
import dataclasses
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.evaluation import calibration
from inception_jax.reporting.evidence import Row
from inception_jax.reporting.run_record import RunRecord, display_names
from inception_jax.telemetry.writers import NONDETERMINISTIC_FIELDS

# Limits on the size of a page.
MAX_POINTS = 1000
MAX_ROWS = 60
MAX_CONFUSED_CLASSES = 14
MAX_CONFUSED_PAIRS = 15
NUM_EXTREME_CLASSES = 10
# Longest side, pixels, of images embedded as PNG; larger ones are embedded as JPEG to save space.
MAX_PNG_SIDE = 64


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a metric of metrics.jsonl is displayed.

    Attributes:
      name: key in the rows.
      title: title of the chart.
      label: name in sentences, legends and column headers.
      unit: "%" or "".
      digits: number of decimals; None: five significant digits.
    """

    name: str
    title: str
    label: str
    unit: str = ""
    digits: int | None = None

    @property
    def column_header(self) -> str:
        """Returns the header of the metric's column."""
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def format(self, value: float | None) -> str:
        """Returns a value as text; a dash for None."""
        if value is None:
            return "–"
        return f"{value:,.5g}" if self.digits is None else f"{value:,.{self.digits}f}"


# The built-in metrics in display order; others follow.
_KNOWN_METRICS = (
    Metric("loss", "Loss", "loss", digits=4),
    Metric("top1", "Top-1 accuracy", "top-1", "%", 2),
    Metric("top5", "Top-5 accuracy", "top-5", "%", 2),
    Metric("learning_rate", "Learning rate", "learning rate"),
    Metric("gradient_norm", "Gradient norm", "gradient norm"),
)
_NON_METRICS = {"step", "epoch", "split", "count", *NONDETERMINISTIC_FIELDS}
# Labels of splits, and the splits that have their own color in report.css.
_SPLIT_LABELS = {
    "train": "training",
    "train_eval": "training images (evaluated)",
    "flip": "horizontal-flip average",
}
_COLORED_SPLITS = ("train", "train_eval", "validation", "test", "holdout")
_EXTRA_COLORS = ("run4", "run5", "run6", "run3", "run7")

# Labels of the phases of telemetry.clock.
PHASE_LABELS = {
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
    """Returns the metrics that occur in rows: built-in ones first, then others as they occur."""
    present = dict.fromkeys(name for row in rows for name in row if name not in _NON_METRICS)
    known = [metric for metric in _KNOWN_METRICS if metric.name in present]
    return known + [Metric(n, n, n) for n in present if n not in {m.name for m in known}]


def result(record: RunRecord) -> Values | None:
    """Returns the last and the best evaluation, and the result that the experiment expects."""
    evaluations = [row for row in record.evaluations if row.get("top1") is not None]
    if not evaluations:
        return None
    # Of equal ones the last, as --checkpoint=best chooses.
    last, best = evaluations[-1], max(evaluations, key=lambda row: (row["top1"], row["step"]))
    count = last.get("count")
    # result.json may be from an earlier evaluation than the last row.
    seconds = (record.result if record.result.get("step") == last["step"] else last).get("seconds")
    return {
        "last": last,
        "metrics": [metric for metric in metrics([last]) if metric.name != "top1"],
        "role": record.role(last["step"]),
        "best": best if best["top1"] > last["top1"] else None,
        "margin": _margin(last["top1"], count) if count else None,
        "expected": _expected_result(record, last["top1"]),
        "hours": (seconds or record.result.get("seconds") or 0) / 3600,
        "images_per_second": record.result.get("images_per_second"),
    }


def _margin(top1: float, count: int) -> float:
    """Returns half the width of the 95% interval of an accuracy, in points.

    Two standard errors of a proportion of independent examples, as in the interval of Wilson (1927,
    "Probable Inference, the Law of Succession, and Statistical Inference"), which is not 0 wide
    when all of them are right.

    >>> round(_margin(50.0, 10_000), 2), round(_margin(100.0, 400), 2)
    (1.0, 0.5)
    """
    right, z = top1 / 100, 2.0
    deviation = math.sqrt(right * (1 - right) / count + z**2 / (4 * count**2))
    return 100 * z * deviation / (1 + z**2 / count)


def _expected_result(record: RunRecord, top1: float) -> Values | None:
    if record.config is None or not record.config.expected.top1:
        return None
    expected = record.config.expected
    return {
        "top1": expected.top1,
        "source": expected.source,
        "difference": top1 - expected.top1,
        "changed": len(overridden_settings(record)),
    }


def other_evaluations(record: RunRecord) -> Values | None:
    """Returns the last evaluation of each split and view other than the run's main one."""
    last = {row["split"]: row for row in record.rows if row["split"] not in ("train", record.split)}
    if not last:
        return None
    rows = list(last.values())
    return {
        "metrics": metrics(rows),
        "rows": [
            {"row": row, "label": _SPLIT_LABELS.get(row["split"], row["split"])} for row in rows
        ],
    }


def curves(records: Sequence[RunRecord], *, all_splits: bool = True) -> Values:
    """Returns the curves of runs, for the page's script and for the plots.

    Args:
      records: the runs.
      all_splits: whether to return all splits of a single run.

    Returns:
      {"runs": [...]}, for each run its name and, by split, a label, a color, and lists of step,
      epoch, hours and each metric, with None for missing values; at most MAX_POINTS per split. For
      several runs, or without `all_splits`, only the splits "train" and "train_eval" and each run's
      main evaluation.
    """
    labels = display_names(records)
    all_splits = all_splits and len(records) == 1
    return {
        "runs": [
            {"name": name, "splits": _split_curves(record, all_splits=all_splits)}
            for name, record in zip(labels, records, strict=True)
        ]
    }


def _split_curves(record: RunRecord, *, all_splits: bool) -> dict[str, Values]:
    rows = record.rows
    seconds = {row["step"]: row["seconds"] for row in rows if row.get("seconds") is not None}
    curves: dict[str, Values] = {}
    extra_colors = itertools.cycle(_EXTRA_COLORS)
    for split in sorted({row["split"] for row in rows}, key=lambda s: (s != "train", s)):
        if not all_splits and split not in ("train", "train_eval", record.split):
            continue
        points = subsample([row for row in rows if row["split"] == split], MAX_POINTS)
        hours = [row.get("seconds", seconds.get(row["step"])) for row in points]
        curves[split] = {
            "label": _SPLIT_LABELS.get(split, split),
            "color": split if split in _COLORED_SPLITS else next(extra_colors),
            "step": [row["step"] for row in points],
            "epoch": [_six_digits(row["epoch"]) for row in points],
            "hours": [None if each is None else _six_digits(each / 3600) for each in hours],
            "metrics": {
                metric.name: [_six_digits(row.get(metric.name)) for row in points]
                for metric in metrics(points)
            },
        }
    return curves


def subsample(rows: Sequence[Any], max_rows: int) -> list[Any]:
    """Returns at most `max_rows` rows, evenly spaced, including the first and the last.

    >>> subsample(range(10), 4)
    [0, 3, 6, 9]
    """
    if len(rows) <= max_rows:
        return list(rows)
    return [rows[index] for index in np.linspace(0, len(rows) - 1, max_rows).round().astype(int)]


def _six_digits(value: float | None) -> float | None:
    """Returns a number rounded to six significant digits, to keep the page small."""
    return None if value is None else float(f"{value:.6g}")


def curve_table(record: RunRecord) -> Values:
    """Returns the evaluations as table rows, each with the latest training report before it."""
    train = [row for row in record.rows if row["split"] == "train"]
    evaluated = [row for row in record.rows if row["split"] != "train"] or train
    steps = set(subsample(sorted({row["step"] for row in evaluated}), MAX_ROWS))
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


def evaluation_info(record: RunRecord) -> Values | None:
    """Returns which evaluation the sections on classes, images and calibration come from."""
    if record.evaluated is None:
        return None
    result = record.evaluated.result
    return {
        "split": result["split"],
        "step": result["step"],
        "role": record.role(result["step"]),
        "num_predictions": record.evaluated.predictions.top_classes.shape[1],
    }


def class_accuracy(record: RunRecord) -> Values | None:
    """Returns the accuracy of each class, and the best and the worst classes."""
    matrix = record.confusion
    if matrix is None:
        return None
    # Only classes with an example in the split.
    rows = [
        _class_row(record, matrix, label) for label in np.flatnonzero(matrix.sum(axis=1)).tolist()
    ]
    ranked = sorted(rows, key=lambda row: -row["accuracy"])
    groups = [("All classes, best first", ranked)]
    if len(ranked) > 2 * NUM_EXTREME_CLASSES:
        groups = [
            ("Best", ranked[:NUM_EXTREME_CLASSES]),
            ("Worst", ranked[-NUM_EXTREME_CLASSES:][::-1]),
        ]
    return {"rows": rows, "groups": groups}


def _class_row(record: RunRecord, matrix: np.ndarray, label: int) -> Values:
    count, correct = int(matrix[label].sum()), int(matrix[label, label])
    others = matrix[label].copy()
    others[label] = 0
    confused = int(others.argmax())
    return {
        "name": record.class_name(label),
        "count": count,
        "correct": correct,
        "accuracy": 100 * correct / count,
        "confused_with": record.class_name(confused) if others[confused] else "",
        "times": int(others[confused]),
    }


def confusion(record: RunRecord) -> Values | None:
    """Returns the confusion matrix of the most confused classes, and the most frequent mistakes."""
    matrix = record.confusion
    if matrix is None:
        return None
    chosen = calibration.most_confused_classes(matrix, MAX_CONFUSED_CLASSES)
    totals = np.maximum(matrix.sum(axis=1), 1)
    pairs = calibration.confused_pairs(matrix, MAX_CONFUSED_PAIRS)
    return {
        "names": [record.class_name(label) for label in chosen],
        "complete": len(chosen) == len(matrix),
        "rows": [
            {
                "name": record.class_name(true),
                "cells": [
                    {
                        "count": int(matrix[true, predicted]),
                        "fraction": float(matrix[true, predicted] / totals[true]),
                        "correct": bool(true == predicted),
                    }
                    for predicted in chosen
                ],
                "others": int(matrix[true].sum() - matrix[true, chosen].sum()),
                "total": int(matrix[true].sum()),
            }
            for true in chosen
        ],
        "pairs": [
            {
                "true": record.class_name(true),
                "predicted": record.class_name(predicted),
                "count": int(matrix[true, predicted]),
                "percent": 100 * float(matrix[true, predicted] / totals[true]),
            }
            for true, predicted in pairs
        ],
    }


def examples(record: RunRecord) -> Values | None:
    """Returns example images: the most confident mistakes, and correct predictions."""
    evaluated = record.evaluated
    if evaluated is None:
        return None
    predictions = evaluated.predictions
    images: Values = {"mistakes": [], "correct": [], "side": evaluated.images.shape[1]}
    for index, name, pixels in zip(
        evaluated.indices, evaluated.names, evaluated.images, strict=True
    ):
        label, guesses = predictions.labels[index], predictions.top_classes[index]
        images["correct" if predictions.correct[index] else "mistakes"].append(
            {
                "source": data_uri(pixels),
                "file": name,
                "label": record.class_name(label),
                "predictions": [
                    {
                        "name": record.class_name(guess),
                        "percent": 100 * float(probability),
                        "correct": bool(guess == label),
                    }
                    for guess, probability in zip(
                        guesses, predictions.top_probs[index], strict=True
                    )
                ],
            }
        )
    return images


def data_uri(pixels: np.ndarray) -> str:
    """Returns an image, uint8 [H, W, 3], as a data URI."""
    kind = "png" if max(pixels.shape[:2]) <= MAX_PNG_SIDE else "jpeg"
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def reliability(record: RunRecord) -> Values | None:
    """Returns the bins of the reliability diagram and the expected calibration error, percent."""
    if record.evaluated is None:
        return None
    predictions = record.evaluated.predictions
    result = calibration.calibration(predictions.confidence, predictions.correct)
    bins = [
        {
            "low": 100 * float(result.edges[n]),
            "high": 100 * float(result.edges[n + 1]),
            "count": int(count),
            "fraction": float(count / len(predictions)),
            "confidence": 100 * float(result.confidence[n]),
            "accuracy": 100 * float(result.accuracy[n]),
        }
        for n, count in enumerate(result.count)
    ]
    return {
        "bins": bins,
        "error": 100 * result.error,
        "excess": 100 * result.overconfidence,
        "confidence": 100 * float(predictions.confidence.mean()),
        "accuracy": 100 * float(predictions.correct.mean()),
    }


def time_by_phase(record: RunRecord) -> Values | None:
    """Returns the seconds that each phase of the run took, longest first."""
    seconds: Mapping[str, float] = record.result.get("seconds_by_phase", {})
    total = sum(seconds.values())
    if not total:
        return None
    ordered = sorted(seconds.items(), key=lambda phase: -phase[1])
    return {
        "total": total,
        "step": record.result["step"],
        "phases": [
            {"name": PHASE_LABELS.get(name, name), "seconds": s, "fraction": s / total}
            for name, s in ordered
        ],
    }


def overridden_settings(record: RunRecord) -> list[Values]:
    """Returns the settings that differ from the experiment file, with both values."""
    if record.config is None or not record.experiment:
        return []
    # The location of the data is not part of a recipe.
    return [
        {
            "path": path,
            "experiment": tuple(value) if isinstance(value, list) else value,
            "run": configs.get(record.config, path),
        }
        for path, value in record.experiment["own"].items()
        if path not in ("data.directory", "data.source")
    ]


def all_settings(config: Config | None) -> list[Values]:
    """Returns every setting, its description, and whether it differs from the default."""
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


def environment(record: RunRecord) -> list[tuple[str, Any]]:
    """Returns the hardware and the package versions of the run, as (name, value) pairs."""
    values = dict(record.environment)
    packages = values.pop("packages", {})
    labels = {"cpu": "processor", "cpu_count": "cores", "process_count": "processes"}
    rows = [(labels.get(name, name.replace("_", " ")), v) for name, v in values.items()]
    return [*rows, *((name, version) for name, version in packages.items())]


def differing_settings(records: Sequence[RunRecord]) -> list[str]:
    """Returns the dotted paths of the settings that differ between runs."""
    known = [record.config for record in records if record.config is not None]
    return [
        path
        for path, _, _ in configs.leaves()
        if len({repr(configs.get(config, path)) for config in known}) > 1 and path != "name"
    ]


def comparison_rows(records: Sequence[RunRecord]) -> list[Values]:
    """Returns a row per run: its result, and the values of the settings that differ."""
    paths = differing_settings(records)
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
        for name, record in zip(display_names(records), records, strict=True)
    ]
