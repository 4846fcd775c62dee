"""What is left in a folder for a reader: the report, plots, and what they mean.

The training loop knows nothing of this. All but `publish` is made of the folder's files alone, so
a later call, on another machine and without the data set, gives the same page.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from inception_jax.datasets.splits import Split
from inception_jax.errors import UserError
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Predictions
from inception_jax.reporting import html, plots, run_record
from inception_jax.reporting.diagnosis import Diagnosis
from inception_jax.reporting.run_record import RunRecord
from inception_jax.storage import atomic
from inception_jax.storage.workdir import Workdir


def publish(path: pathlib.Path, result: dict[str, Any], found: Predictions, split: Split) -> None:
    """Leaves an evaluation in a run's folder: predictions.npz, and the report.

    Args:
      path: of the run.
      result: what result.json would hold if the run ended there.
      found: what the network predicted for each example.
      split: the examples.

    Raises:
      UserError: if they cannot be written.
    """
    predictions.write(path, predictions.gather(result, found, split))
    write_page(path)


def write_page(path: pathlib.Path, output: pathlib.Path | None = None) -> pathlib.Path:
    """Writes the report of a run, from what its folder holds, and returns where it is.

    Args:
      path: of the run.
      output: the file to write; None: report.html in the folder.

    Raises:
      UserError: if the files of the run cannot be read, or the report cannot be written.
    """
    output = output or Workdir(path).report
    html.write(output, html.run_page(run_record.read(path)))
    return output


def write_comparison(paths: Sequence[pathlib.Path], output: pathlib.Path) -> pathlib.Path:
    """Writes a report that compares several runs, and returns where it is.

    Args:
      paths: of the runs.
      output: the file to write; not the report of one of the runs.

    Raises:
      UserError: if the files of a run cannot be read, the report cannot be written, or it would
        replace that of a run.
    """
    if output.resolve() in {Workdir(path).report.resolve() for path in paths}:
        raise UserError(
            f"--output={output}: is the report of one of the compared runs; use another file"
        )
    html.write(output, html.comparison_page([run_record.read(path) for path in paths], output))
    return output


def plot(path: pathlib.Path) -> list[pathlib.Path]:
    """Draws all plots of a run as PNG files in its plots/, and returns them.

    Raises:
      UserError: if the files of the run cannot be read, or the plots cannot be written.
    """
    return plots.plot_run(run_record.read(path))


def plot_comparison(paths: Sequence[pathlib.Path], output: pathlib.Path) -> list[pathlib.Path]:
    """Draws the curves of several runs together as PNG files in a folder, and returns them.

    Raises:
      UserError: if the files of a run cannot be read, or the plots cannot be written.
    """
    return plots.plot_comparison([run_record.read(path) for path in paths], output)


def finish(path: pathlib.Path, log: Callable[[str], None]) -> None:
    """Draws the plots of a run, says and stores its diagnosis, and writes its report.

    Args:
      path: of the run.
      log: takes the lines of the diagnosis.

    Raises:
      UserError: if the files of the run cannot be read, or none written beside them.
    """
    record = run_record.read(path)
    plots.plot_run(record)
    for line in _store_diagnosis(record).lines():
        log(line)
    html.write(record.workdir.report, html.run_page(record))
    log(f"report: {record.workdir.report}")


def write_diagnosis(path: pathlib.Path) -> Diagnosis:
    """Returns what a run's evaluations say, and writes it to diagnosis.json.

    Raises:
      UserError: if its files cannot be read, or diagnosis.json cannot be written.
    """
    return _store_diagnosis(run_record.read(path))


def _store_diagnosis(record: RunRecord) -> Diagnosis:
    found = record.diagnosis
    if found is None:
        raise UserError(f"{record.workdir.path}: config.json not found; use the workdir of a run")
    with _explained(record.workdir.diagnosis):
        atomic.write_json(record.workdir.diagnosis, _jsonable(dataclasses.asdict(found)))
    return found


def write_range_test(path: pathlib.Path, values: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes find_lr.json, and find_lr.png, which is drawn from it, and returns both.

    Args:
      path: of the folder, which is there.
      values: as `training.lr_range_test.record` gives them.

    Raises:
      UserError: if they cannot be written.
    """
    json_path, png_path = path / "find_lr.json", path / "find_lr.png"
    values = _jsonable(values)
    with _explained(path):
        atomic.write_json(json_path, values)
        plots.plot_range_test(png_path, values)
    return [json_path, png_path]


@contextmanager
def _explained(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path}: cannot write: {error}. Free disk space or make the directory writable"
        ) from error


def _jsonable(value: Any) -> Any:
    """Returns a value with null, which JSON has, for what is not finite."""
    if isinstance(value, Mapping):
        return {name: _jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
