"""Writes a run's report, plots and diagnosis into its workdir.

Independent of the training loop. Everything except `publish` uses only the files of the workdir,
so a later call, on another machine and without the dataset, gives the same page.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from inception_jax.datasets.splits import Split
from inception_jax.errors import UserError
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Predictions
from inception_jax.reporting import html, plots, run_record
from inception_jax.reporting.diagnosis import Diagnosis
from inception_jax.reporting.run_record import RunRecord
from inception_jax.storage import atomic, buckets, paths
from inception_jax.storage.workdir import Workdir


def publish(workdir: Workdir, result: dict[str, Any], predicted: Predictions, split: Split) -> None:
    """Stores an evaluation in a workdir: predictions.npz and the report.

    Args:
      workdir: the workdir.
      result: contents of result.json if the run ended here.
      predicted: predictions for each example.
      split: the examples.

    Raises:
      UserError: if the files cannot be written.
    """
    predictions.write(workdir, predictions.with_images(result, predicted, split))
    html.write(workdir.report, html.run_page(run_record.read(workdir)))


def write_page(location: paths.Path, output: paths.Path | None = None) -> paths.Path:
    """Writes the report of a run and returns its path.

    Args:
      location: the run's folder, local or in a bucket.
      output: the file to write; None: report.html in the run's folder.

    Raises:
      UserError: if the run cannot be read or the report cannot be written.
    """
    record = _read(location)
    output = output or record.workdir.location_of(record.workdir.report)
    html.write(output, html.run_page(record))
    return output


def write_comparison(locations: Sequence[paths.Path], output: paths.Path) -> paths.Path:
    """Writes a report that compares several runs and returns its path.

    Args:
      locations: the runs' folders, local or in buckets.
      output: the file to write; must not be the report of one of the runs.

    Raises:
      UserError: if a run cannot be read, the report cannot be written, or it would overwrite the
        report of a run.
    """
    records = [_read(location) for location in locations]
    reports = [record.workdir.location_of(record.workdir.report) for record in records]
    if paths.absolute(output) in map(paths.absolute, reports):
        raise UserError(
            f"--output={output}: is the report of one of the compared runs; use another file"
        )
    html.write(output, html.comparison_page(records, output))
    return output


def plot(location: paths.Path) -> list[paths.Path]:
    """Draws all plots of a run as PNG files in plots/ of its folder and returns their paths.

    Args:
      location: the run's folder, local or in a bucket.

    Raises:
      UserError: if the run cannot be read or the plots cannot be written.
    """
    record = _read(location)
    names = plots.plot_run(record)
    record.workdir.upload()
    folder = record.workdir.location_of(record.workdir.plots)
    return [folder / name for name in names]


def plot_comparison(locations: Sequence[paths.Path], output: paths.Path) -> list[paths.Path]:
    """Draws the curves of several runs together as PNG files in a directory.

    Returns:
      The files written.

    Raises:
      UserError: if a run cannot be read or the plots cannot be written.
    """
    return plots.plot_comparison([_read(location) for location in locations], output)


def finish(workdir: Workdir, log: Callable[[str], None]) -> None:
    """Draws the plots of a run, logs and stores its diagnosis, and writes its report.

    Args:
      workdir: the workdir.
      log: called with each line of the diagnosis.

    Raises:
      UserError: if the run cannot be read or files cannot be written.
    """
    record = run_record.read(workdir)
    plots.plot_run(record)
    for line in _store_diagnosis(record).lines():
        log(line)
    html.write(workdir.report, html.run_page(record))
    log(f"report: {workdir.location_of(workdir.report)}")


def write_diagnosis(location: paths.Path) -> Diagnosis:
    """Diagnoses a run, writes diagnosis.json and returns the diagnosis.

    Args:
      location: the run's folder, local or in a bucket.

    Raises:
      UserError: if the run cannot be read or diagnosis.json cannot be written.
    """
    record = _read(location)
    diagnosis = _store_diagnosis(record)
    record.workdir.upload()
    return diagnosis


def _read(location: paths.Path) -> RunRecord:
    """Reads a run, downloaded first if it is in a bucket."""
    workdir = Workdir(location)
    workdir.download()
    record = run_record.read(workdir)
    if record.config:
        buckets.set_retry_seconds(record.config.bucket.retry_seconds, is_recorded=True)
    return record


def _store_diagnosis(record: RunRecord) -> Diagnosis:
    diagnosis = record.diagnosis
    if diagnosis is None:
        raise UserError(f"{record.workdir}: config.json not found; use the workdir of a run")
    atomic.write_json(record.workdir.diagnosis, _nonfinite_as_null(dataclasses.asdict(diagnosis)))
    return diagnosis


def write_range_test(path: paths.Path, values: Mapping[str, Any]) -> list[paths.Path]:
    """Writes find_lr.json and its plot, find_lr.png, and returns both paths.

    Args:
      path: an existing directory, or one in a bucket.
      values: from `training.lr_range_test.record`.

    Raises:
      WriteError: if the files cannot be written.
    """
    json_path, png_path = path / "find_lr.json", path / "find_lr.png"
    values = _nonfinite_as_null(values)
    atomic.write_json(json_path, values)
    with atomic.replacing(png_path) as temporary:
        plots.plot_range_test(temporary, values)
    return [json_path, png_path]


def _nonfinite_as_null(value: Any) -> Any:
    """Returns a value with None in place of non-finite floats, which JSON lacks."""
    if isinstance(value, Mapping):
        return {name: _nonfinite_as_null(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_nonfinite_as_null(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
