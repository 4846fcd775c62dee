"""Writers of scalars with CLU's interface: as TensorBoard events and as JSON lines."""

import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from inception_jax.storage.append_only import AppendOnlyFile
from inception_jax.telemetry import _clu_private, _tensorboardx_private

# "as": exported, since CLU's must not be imported before that module.
from inception_jax.telemetry._clu_private import metric_writers as metric_writers

_EVENTS = "events.out.tfevents."


class _ScalarWriter(metric_writers.MetricWriter):
    """A CLU writer of scalars; CLU's other kinds of values raise instead of being lost."""

    _file: AppendOnlyFile

    def flush(self) -> None:
        """Returns when everything written is on the disk."""
        self._file.sync()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} writes scalars only")

    write_summaries = _refuse
    write_images = _refuse
    write_videos = _refuse
    write_audios = _refuse
    write_texts = _refuse
    write_histograms = _refuse
    write_hparams = _refuse


class TensorBoardWriter(_ScalarWriter):
    """Writes scalars as TensorBoard events, which TensorBoard shows under "Scalars".

    Args:
      logdir: folder of the event files; made if it is missing. Each writer adds a file.
      purge_step: TensorBoard hides what earlier files in the folder say of this and later steps.
    """

    def __init__(self, logdir: pathlib.Path, *, purge_step: int = 0) -> None:
        self._encode = _tensorboardx_private.event_encoder()
        logdir.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names. Nanoseconds, as a run may be
        # resumed within the second that tensorboardX's own names would repeat.
        now = _later_than_all(logdir, time.time_ns())
        self._file = AppendOnlyFile(logdir / f"{_EVENTS}{now}")
        self._file.append(self._encode(file_version="brain.Event:2"))
        self._file.append(self._encode(step=purge_step, starts=True))

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes named values of one step."""
        numbers = {tag: float(value) for tag, value in scalars.items()}
        self._file.append(self._encode(step=int(step), scalars=numbers))


def _later_than_all(logdir: pathlib.Path, now: int) -> int:
    """Returns a time in ns, `now` unless a clock that was set back makes it no later than others.

    Args:
      logdir: folder of event files, whose names end in their time.
      now: nanoseconds.
    """
    ends = (path.name.removeprefix(_EVENTS) for path in logdir.glob(f"{_EVENTS}*"))
    return max([now, *(int(end) + 1 for end in ends if end.isdecimal())])


class JsonLinesWriter(_ScalarWriter):
    """Appends to a file one JSON object for each call and split.

    Scalars are named "split/name". The line of a split holds `step`, `split`, and its scalars by
    name. Floats are written so that they read back the same; those that are not finite, which JSON
    does not have, as null.

    Args:
      path: the file; its folder exists.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._file = AppendOnlyFile(path)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes named values of one step."""
        splits: dict[str, dict[str, int | float | None]] = {}
        for tag, value in scalars.items():
            split, _, name = tag.rpartition("/")
            splits.setdefault(split, {})[name] = _json_number(value)
        for split, values in splits.items():
            line = {"step": int(step), "split": split, **values}
            self._file.append(json.dumps(line, allow_nan=False).encode() + b"\n")


def _json_number(value: Any) -> int | float | None:
    """Returns a number, or NumPy or JAX scalar, as Python's; None if it is not finite."""
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None


_clu_private.make_summary_writer = TensorBoardWriter
