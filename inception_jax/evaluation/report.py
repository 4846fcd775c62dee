"""What is left in a folder for a reader: plots, and what they mean."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import UserError
from inception_jax.evaluation import plots
from inception_jax.evaluation.diagnosis import Diagnosis, diagnose
from inception_jax.telemetry import summary
from inception_jax.training import range_test, workdir
from inception_jax.training.range_test import Point, Proposal


def finish(folder: pathlib.Path, log: Callable[[str], None]) -> None:
    """Draws the curves of a run, and says and stores what they say.

    Args:
      folder: of the run.
      log: takes the lines of the diagnosis.

    Raises:
      UserError: if the files of the run cannot be read, or none written beside them.
    """
    plots.plot_run(folder)
    for line in write_diagnosis(folder).lines():
        log(line)


def write_diagnosis(folder: pathlib.Path) -> Diagnosis:
    """Returns what a run's curves say, and writes it to diagnosis.json.

    Args:
      folder: of the run; metrics.jsonl and config.json are read.

    Raises:
      UserError: if one of these cannot be read, or diagnosis.json cannot be written.
    """
    lines = plots.read_metrics(folder / "metrics.jsonl")
    record = workdir.recorded(workdir.Workdir(folder))
    if record is None:
        raise UserError(
            f"{folder} has no config.json, which says what was trained and how. Give the --workdir "
            "of a run"
        )
    found = diagnose(
        lines,
        configs.from_dict(record["config"]),
        classes=record["dataset"]["classes"],
        train_examples=record["dataset"]["training examples"],
    )
    values = dataclasses.asdict(found)
    values["evidence"] = _jsonable(values["evidence"])
    path = folder / "diagnosis.json"
    try:
        workdir.write_json(path, values)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error}. Make the folder writable, with space left"
        ) from error
    return found


def write_range_test(
    folder: pathlib.Path, points: Sequence[Point], proposal: Proposal | None, *, config: Config
) -> list[pathlib.Path]:
    """Writes find_lr.json and find_lr.png.

    Args:
      folder: where to; it exists.
      points: the steps of the range test.
      proposal: what they propose, if anything.
      config: of the run that was tested.

    Returns:
      The files written.

    Raises:
      UserError: if they cannot be written.
    """
    json_path, png_path = folder / "find_lr.json", folder / "find_lr.png"
    found = f"proposed rate {proposal.rate:g}" if proposal else "no rate to propose"
    values = {
        "proposal": proposal and dataclasses.asdict(proposal),
        "rule": f"the rate with the least smoothed loss, divided by {range_test.BELOW_LEAST:g}",
        "points": [_jsonable(dataclasses.asdict(point)) for point in points],
        "config": configs.to_dict(config),
        "environment": summary.environment(),
    }
    try:
        workdir.write_json(json_path, values)
        plots.plot_range_test(png_path, points, proposal, title=f"{config.name}: {found}")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error}. Make the folder writable, with space left"
        ) from error
    return [json_path, png_path]


def _jsonable(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values with null, which JSON has, for what is not finite."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in values.items()
    }
