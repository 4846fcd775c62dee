"""CLU's metric writers without TensorFlow: scalars as TensorBoard events and as JSON lines.

Importing `clu.metric_writers` imports TensorFlow, which costs 680 MB of memory and 5 seconds at the
start of every process, through one file: `clu/metric_writers/summary_writer.py`
(google/CommonLoopUtils#358 asks for a lazy import, and is open). This module puts a module of its
own in that one's place before the first import. As the place is private to CLU, its version is
pinned, and a test runs CLU's own `create_default_writer` on it. Everything else takes CLU's writers
from here.
"""

import contextlib
import importlib.util
import json
import math
import pathlib
import struct
import sys
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from inception_jax.storage.append_only import AppendOnlyFile


def _summary_writer(logdir: str) -> "TensorBoardWriter":
    """What CLU's create_default_writer finds as `SummaryWriter`."""
    return TensorBoardWriter(pathlib.Path(logdir))


_replacement = types.ModuleType("clu.metric_writers.summary_writer", "TensorBoard by tensorboardX.")
vars(_replacement)["SummaryWriter"] = _summary_writer
sys.modules.setdefault(_replacement.__name__, _replacement)

# "as": exported, since it must not be imported before this module.
from clu import metric_writers as metric_writers  # noqa: E402

_EVENTS = "events.out.tfevents."


@contextlib.contextmanager
def _without_its_init(package: str) -> Iterator[None]:
    """Lets modules of a package be imported without what its __init__.py imports.

    tensorboardX's imports PyTorch where there is one: 1.2 s and 150 MB.
    """
    spec = importlib.util.find_spec(package)
    if package in sys.modules or spec is None:
        yield
        return
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package] = bare
    try:
        yield
    finally:
        del sys.modules[package]


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

    tensorboardX makes the messages and checksums; its own SummaryWriter is not used, since an error
    in its thread is lost, and ten writes later the run would wait for that thread for ever.

    Args:
      logdir: folder of the event files; made if it is missing. Each writer adds a file.
      purge_step: TensorBoard hides what earlier files in the folder say of this and later steps.
    """

    def __init__(self, logdir: pathlib.Path, *, purge_step: int = 0) -> None:
        with _without_its_init("tensorboardX"):
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import masked_crc32c

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._checksum = masked_crc32c
        logdir.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names. Nanoseconds, as a run may be
        # resumed within the second that tensorboardX's own names would repeat.
        now = _later_than_all(logdir, time.time_ns())
        self._file = AppendOnlyFile(logdir / f"{_EVENTS}{now}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=start)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Writes named values of one step."""
        value = self._summary.Value
        values = [value(tag=tag, simple_value=float(scalars[tag])) for tag in scalars]
        self._write(step=int(step), summary=self._summary(value=values))

    def _write(self, **fields: Any) -> None:
        """Appends one event, framed as a TFRecord: length, its checksum, data, their checksum."""
        data = self._event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", self._checksum(part)) for part in (length, data)]
        self._file.append(length + checksums[0] + data + checksums[1])


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
