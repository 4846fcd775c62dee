"""Implements CLU's writer interface for scalars: TensorBoard events and JSON lines."""

import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from inception_jax.storage.append_only import AppendOnlyFile
from inception_jax.telemetry import _clu_private, _tensorboardx_private

# "as" exports it, because CLU's writers must not be imported before that module.
from inception_jax.telemetry._clu_private import metric_writers as metric_writers

_EVENTS_PREFIX = "events.out.tfevents."


class _ScalarWriter(metric_writers.MetricWriter):
    """A CLU writer of scalars; other kinds of values raise an error instead of being lost."""

    _file: AppendOnlyFile

    def flush(self) -> None:
        """Blocks until everything written is on disk."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _unsupported(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} writes scalars only")

    write_summaries = _unsupported
    write_images = _unsupported
    write_videos = _unsupported
    write_audios = _unsupported
    write_texts = _unsupported
    write_histograms = _unsupported
    write_hparams = _unsupported


class TensorBoardWriter(_ScalarWriter):
    """Writes scalars as TensorBoard events, shown under "Scalars".

    Args:
      logdir: directory of the event files, created if missing. Each writer adds a file.
      purge_step: TensorBoard hides values of this and later steps in earlier files.
    """

    def __init__(self, logdir: pathlib.Path, *, purge_step: int = 0) -> None:
        self._encode = _tensorboardx_private.event_encoder()
        logdir.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names. The names have nanoseconds,
        # because a run resumed within a second would repeat the names that tensorboardX uses.
        now = _increasing_timestamp(logdir, time.time_ns())
        self._file = AppendOnlyFile(logdir / f"{_EVENTS_PREFIX}{now}")
        self._file.append(self._encode(file_version="brain.Event:2"))
        self._file.append(self._encode(step=purge_step, starts=True))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes named values of a step."""
        numbers = {tag: float(value) for tag, value in scalars.items()}
        self._file.append(self._encode(step=int(step), scalars=numbers))


def _increasing_timestamp(logdir: pathlib.Path, now: int) -> int:
    """Returns `now`, or a time after all existing event files if the clock was set back.

    Args:
      logdir: directory of event files, whose names end in their time.
      now: nanoseconds.
    """
    ends = (path.name.removeprefix(_EVENTS_PREFIX) for path in logdir.glob(f"{_EVENTS_PREFIX}*"))
    return max([now, *(int(end) + 1 for end in ends if end.isdecimal())])


class JsonLinesWriter(_ScalarWriter):
    """Appends one JSON object to a file per call and split.

    Scalars are named "split/name". The line of a split contains `step`, `split`, and its scalars by
    name. Floats round-trip exactly; non-finite ones, which JSON lacks, are written as null.

    Args:
      path: the file, in an existing directory.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._file = AppendOnlyFile(path)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes named values of a step."""
        splits: dict[str, dict[str, int | float | None]] = {}
        for tag, value in scalars.items():
            split, _, name = tag.rpartition("/")
            splits.setdefault(split, {})[name] = _json_number(value)
        for split, values in splits.items():
            line = {"step": int(step), "split": split, **values}
            self._file.append(json.dumps(line, allow_nan=False).encode() + b"\n")


def _json_number(value: Any) -> int | float | None:
    """Converts a number, or NumPy or JAX scalar, to a Python number; None if not finite."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


_clu_private.make_summary_writer = TensorBoardWriter
