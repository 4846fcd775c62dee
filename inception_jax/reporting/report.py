"""What is left in a folder for a reader: the report, plots, and what they mean.

The training loop knows nothing of this: it is handed `refresher` as what to call after each
evaluation. The report is made of the folder's files alone, so a later call, on
another machine and without the data set, gives the same page.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import UserError
from inception_jax.evaluation import predictions
from inception_jax.reporting import html, plots, prediction_plots, run_record
from inception_jax.reporting.diagnosis import Diagnosis
from inception_jax.runtime import environment
from inception_jax.training import lr_range_test, workdir
from inception_jax.training.lr_range_test import Point, Proposal

if TYPE_CHECKING:
    # They import what training takes, which a report is written without.
    from inception_jax.evaluation.evaluate import EvalResult
    from inception_jax.training.reporter import OnEvaluation
    from inception_jax.training.run import Run

PAGE = "report.html"


def refresher(run: "Run", folder: pathlib.Path) -> "OnEvaluation":
    """Returns what the loop calls after each evaluation: it leaves predictions.npz and the report.

    Args:
      run: that is trained.
      folder: of the run.
    """

    def refresh(result: dict[str, Any], evaluated: "EvalResult") -> None:
        found = predictions.gather(result, evaluated.predictions, run.dataset.evaluation)
        predictions.write(folder, found)
        write_page(folder)

    return refresh


def write_page(folder: pathlib.Path, output: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the report of a run, from what its folder holds, and returns where it is.

    Args:
      folder: of the run.
      output: the file to write; None: report.html in the folder.

    Raises:
      UserError: if the files of the run cannot be read, or the report cannot be written.
    """
    path = output or folder / PAGE
    html.write(path, html.run_page(run_record.read(folder)))
    return path


def write_comparison(folders: Sequence[pathlib.Path], output: pathlib.Path) -> pathlib.Path:
    """Writes a report that compares several runs, and returns where it is.

    Args:
      folders: of the runs.
      output: the file to write; not the report of one of the runs.

    Raises:
      UserError: if the files of a run cannot be read, the report cannot be written, or it would
        replace that of a run.
    """
    if output.resolve() in {(folder / PAGE).resolve() for folder in folders}:
        raise UserError(
            f"--output={output}: is the report of one of the runs that are compared; name another "
            "file"
        )
    records = [run_record.read(folder) for folder in folders]
    html.write(output, html.comparison_page(records, output))
    return output


def plot(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws all plots of a run as PNG files in its plots/, and returns them.

    Args:
      folder: of the run.

    Raises:
      UserError: if the files of the run cannot be read, or the plots cannot be written.
    """
    return [*plots.plot_run(folder), *prediction_plots.plot_run(run_record.read(folder))]


def plot_comparison(folders: Sequence[pathlib.Path], output: pathlib.Path) -> list[pathlib.Path]:
    """Draws the curves of several runs together as PNG files, and returns them.

    Args:
      folders: of the runs.
      output: the folder to write to.

    Raises:
      UserError: if the files of a run cannot be read, or the plots cannot be written.
    """
    records = [run_record.read(folder) for folder in folders]
    lines = {
        name: each.lines for name, each in zip(run_record.names(records), records, strict=True)
    }
    return plots.plot_comparison(lines, output)


def finish(folder: pathlib.Path, log: Callable[[str], None]) -> None:
    """Draws the plots of a run, says and stores its diagnosis, and writes its report.

    Args:
      folder: of the run.
      log: takes the lines of the diagnosis.

    Raises:
      UserError: if the files of the run cannot be read, or none written beside them.
    """
    plot(folder)
    for line in write_diagnosis(folder).lines():
        log(line)
    log(f"report: {write_page(folder)}")


def write_diagnosis(folder: pathlib.Path) -> Diagnosis:
    """Returns what a run's evaluations say, and writes it to diagnosis.json.

    Args:
      folder: of the run.

    Raises:
      UserError: if one of these cannot be read, or diagnosis.json cannot be written.
    """
    found = run_record.read(folder).diagnosis()
    if found is None:
        raise UserError(
            f"{folder} has no config.json, which says what was trained and how. Give the --workdir "
            "of a run"
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
    folder: pathlib.Path,
    points: Sequence[Point],
    proposal: Proposal | None,
    doubts: Sequence[str] = (),
    *,
    config: Config,
) -> list[pathlib.Path]:
    """Writes find_lr.json and find_lr.png.

    Args:
      folder: where to; it exists.
      points: the steps of the range test.
      proposal: what they propose, if anything.
      doubts: why that cannot be relied on.
      config: of the run that was tested.

    Returns:
      The files written.

    Raises:
      UserError: if they cannot be written.
    """
    json_path, png_path = folder / "find_lr.json", folder / "find_lr.png"
    proposed = None if doubts else proposal
    found = f"proposed rate {proposed.rate:g}" if proposed else "no rate to propose"
    values = {
        "proposal": proposed and dataclasses.asdict(proposed),
        "doubts": list(doubts),
        "rule": f"the rate with the least smoothed loss, divided by {lr_range_test.BELOW_LEAST:g}, "
        f"or the first with {lr_range_test.MOST_OF_FALL:.0%} of its fall, if that is less",
        "points": [_jsonable(dataclasses.asdict(point)) for point in points],
        "config": configs.to_dict(config),
        "environment": environment.environment(),
    }
    try:
        workdir.write_json(json_path, values)
        title = f"{plots.short(config.name, 40)}: {found}"
        plots.plot_range_test(png_path, points, proposed, title=title)
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
