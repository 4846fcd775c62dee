"""Writes the metrics of a run, row by row, with the configured writers.

`metrics.jsonl` is always written, because resuming and reports need it. `config.log.writers` adds
others, registered with `registry.register_writer`: the built-in TensorBoard writer and custom ones.

A resumed run repeats the steps after its last checkpoint. Rows of these steps that the killed run
had written are removed (JSON lines) or hidden (TensorBoard), so each curve has each step once.
"""

import collections
import contextlib
import functools
import json
import pathlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol, Self

from inception_jax import console, registry
from inception_jax.config import Log
from inception_jax.errors import ConfigError, UserError, WriteError
from inception_jax.storage import atomic, integrity, paths
from inception_jax.storage.workdir import Workdir

if TYPE_CHECKING:
    # Imports JAX, which is not needed for reading metrics.
    from inception_jax.telemetry.clu_writers import metric_writers

# Fields of a row that differ between otherwise bit-identical runs.
NONDETERMINISTIC_FIELDS = (
    "seconds",
    "images_per_second",
    "input_wait",
    "resident_memory",
    "free_disk",
)

_REQUIRED_METHODS = ("write", "flush", "close")


class Writer(Protocol):
    """The interface of the object that a registered writer's function returns.

    It may also have a method `resume(resume_step)`, called once before the first row: rows up to
    that step have been written before, and later ones will be written again. 0 means a new run;
    anything that an earlier run left in the directory is obsolete.
    """

    def write(self, step: int, *, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes a row: numbers by name, possibly NaN; `count` is an int."""

    def flush(self) -> None:
        """Blocks until all rows would survive a kill of the process; called before each save."""

    def close(self) -> None:
        """Closes the writer."""


class CluWriter:
    """Passes rows to one of CLU's metric writers, as scalars named `split/name`.

    Args:
      open_at: opens the writer, given the step after which rows will be written again.
    """

    def __init__(self, open_at: "Callable[[int], metric_writers.MetricWriter]") -> None:
        self._open_at = open_at
        self._writer: metric_writers.MetricWriter | None = None

    def resume(self, resume_step: int) -> None:
        """Opens the writer."""
        self._writer = self._open_at(resume_step)

    def write(self, step: int, *, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes a row."""
        assert self._writer is not None, "resume must be called first"
        named = {"epoch": epoch, **values}
        self._writer.write_scalars(step, {f"{split}/{name}": named[name] for name in named})

    def flush(self) -> None:
        """Blocks until everything written is on disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Closes the writer."""
        if self._writer is not None:
            self._writer.close()


def _metrics_file(settings: Log, workdir: Workdir) -> CluWriter:
    def open_at(resume_step: int) -> "metric_writers.MetricWriter":
        from inception_jax.telemetry import clu_writers

        workdir.path.mkdir(parents=True, exist_ok=True)
        _truncate_after(workdir, resume_step)
        return clu_writers.JsonLinesWriter(workdir.metrics)

    return CluWriter(open_at)


@registry.register_writer("tensorboard")
def _tensorboard(settings: Log, workdir: Workdir) -> CluWriter:
    def open_at(resume_step: int) -> "metric_writers.MetricWriter":
        from inception_jax.telemetry import clu_writers

        purge_step = resume_step + 1 if resume_step else 0
        return clu_writers.TensorBoardWriter(workdir.tensorboard, purge_step=purge_step)

    return CluWriter(open_at)


# Step, epoch, split, values.
_Row = tuple[int, float, str, Mapping[str, float]]


class _GuardedWriter:
    """A writer whose errors name it and whose rows are queued while writing fails.

    With `retry_on_error`, errors of a custom writer are only logged: neither a checkpoint nor the
    end of the run waits for a service that is down.

    Args:
      part: the registered writer.
      settings, workdir, retry_on_error, log: as in `RunWriter`.
    """

    def __init__(
        self,
        part: registry.Part,
        settings: Log,
        workdir: Workdir,
        *,
        retry_on_error: bool,
        log: Callable[[str], None],
    ) -> None:
        self._part, self._workdir, self._retry_on_error = part, workdir, retry_on_error
        self._logged_errors = functools.partial(
            integrity.log_write_errors, retry_on_error and not part.is_builtin, log
        )
        self._pending = collections.deque[_Row]()
        with self._translated_errors("open"):
            self._writer: Writer = part.build(
                registry.settings_with_defaults(part, settings), workdir
            )
        if missing := [
            n for n in _REQUIRED_METHODS if not callable(getattr(self._writer, n, None))
        ]:
            raise ConfigError(
                f"writer {part.name!r} ({part.location}): returned {self._writer!r} without "
                f"{', '.join(f'{name}()' for name in missing)}; return an object with the methods "
                "write(step, *, epoch, split, values), flush() and close()"
            )

    def resume(self, resume_step: int) -> None:
        if resume := getattr(self._writer, "resume", None):
            with self._translated_errors("open"):
                resume(resume_step)

    def write(self, row: _Row) -> None:
        self._pending.append(row)
        with contextlib.suppress(*[WriteError] * self._retry_on_error):
            self._write_pending()

    def flush(self) -> None:
        with self._logged_errors():
            self._write_pending()
            with self._translated_errors("flush"):
                self._writer.flush()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with self._logged_errors(), self._translated_errors("close"):
                self._writer.close()

    def _write_pending(self) -> None:
        while self._pending:
            step, epoch, split, values = self._pending[0]
            with self._translated_errors(f"write the {split} row of step {step:,}"):
                # A copy, so that no writer can change the row that the next one gets.
                self._writer.write(step, epoch=epoch, split=split, values=dict(values))
            self._pending.popleft()

    @contextlib.contextmanager
    def _translated_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            resume = "then rerun the same command to continue from the saved files"
            if not self._part.is_builtin:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                remedies = "Fix the writer, or remove it from config.log.writers"
                if what != "open":  # Every start must open it.
                    remedies += ", or set config.checkpoint.on_write_error=continue"
                raise WriteError(
                    f"writer {self._part.name!r}: cannot {what}: {type(error).__name__}: {error} "
                    f"({frame.filename}, line {frame.lineno}). {remedies}; {resume}"
                ) from error
            if not isinstance(error, OSError):
                raise
            raise WriteError(
                f"{self._workdir.path}: cannot write metrics: {error}. Free disk space or make the "
                f"directory writable, {resume}"
            ) from error


class RunWriter:
    """Writes the metrics of a run to metrics.jsonl and the configured writers; a context manager.

    Writes happen in the calling thread: a row costs about 0.1 ms, and an error is raised by the
    write that caused it.

    Args:
      workdir: the run's workdir, created if missing.
      settings: the writers in addition to metrics.jsonl, with their options.
      resume_step: step from which the run continues. Existing metrics of later steps are dropped;
        0 drops all.
      is_lead: whether this process writes; in others every method does nothing.
      retry_on_error: queue rows that a writer fails to write and retry at the next write. Only
        `flush` and `close` raise errors that persist; those of custom writers are logged.
      log: called with lines for the user.

    Raises:
      WriteError: from each method, if a writer fails.
      ConfigError: if a registered function does not return a writer.
    """

    def __init__(
        self,
        workdir: Workdir,
        settings: Log,
        *,
        resume_step: int,
        is_lead: bool = True,
        retry_on_error: bool = False,
        log: Callable[[str], None] = console.log,
    ) -> None:
        self._writers: list[_GuardedWriter] = []
        self._opened = contextlib.ExitStack()
        if not is_lead:
            return
        metrics = registry.Part(name="metrics.jsonl", build=_metrics_file, file=__file__)
        with contextlib.ExitStack() as opened:
            for part in (metrics, *map(registry.WRITERS.get, settings.writers)):
                self._writers.append(
                    _GuardedWriter(part, settings, workdir, retry_on_error=retry_on_error, log=log)
                )
                self._writers[-1].resume(resume_step)
                opened.callback(self._writers[-1].close)
            self._opened = opened.pop_all()

    def write(self, step: int, *, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes a row of metrics with every writer.

        Args:
          step: optimizer steps so far.
          epoch: epochs so far.
          split: "train", or the evaluation's name, such as "validation".
          values: numbers by name, such as loss, top1, learning_rate.
        """
        numbers = {n: v if isinstance(v, int) else float(v) for n, v in values.items()}
        for writer in self._writers:
            writer.write((int(step), float(epoch), split, numbers))

    def flush(self) -> None:
        """Blocks until everything written is on disk."""
        for writer in self._writers:
            writer.flush()

    def close(self) -> None:
        """Flushes and closes all writers."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except WriteError:
            # The error that ends the run is more informative.
            if kind is None:
                raise


def drop_trivial_top5(metrics: Mapping[str, float], classes: int) -> dict[str, float]:
    """Returns metrics without top-5 if it is always 100%, which older versions wrote.

    >>> drop_trivial_top5({"top1": 90.0, "top5": 100.0}, classes=5)
    {'top1': 90.0}
    """
    return {n: value for n, value in metrics.items() if classes > 5 or not n.endswith("top5")}


def read_metrics(path: pathlib.Path, shown: paths.Path | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl, in order.

    Skips an incomplete last line, which a kill leaves behind.

    Args:
      path: the file.
      shown: its path for messages, if that is another one.

    Raises:
      UserError: if another line is not a JSON object with a step.
      OSError: if the file cannot be read.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(
                f"{shown or path}, line {number}: {line[:60]!r} is not a JSON object with an "
                'integer "step"; delete this line or the file, and rerun the command'
            )
        rows.append(row)
    return rows


def _truncate_after(workdir: Workdir, resume_step: int) -> None:
    """Removes the rows after a step, or all for step 0, and an incomplete last line."""
    kept, path = [], workdir.metrics
    if resume_step and path.exists():
        rows = read_metrics(path, workdir.location_of(path))
        kept = [row for row in rows if row["step"] <= resume_step]
    with atomic.replacing(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in kept)
