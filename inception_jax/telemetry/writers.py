"""The metrics of a run on disk and elsewhere, row by row, in the writers that the settings name.

`metrics.jsonl` is always written: a resumed run and its report need it. The others are those of
`config.log.writers`: the package's own, TensorBoard events, and a user's, all registered by
`registry.register_writer`.

A resumed run repeats the steps after its last checkpoint. What the killed run had written of those
is removed (JSON lines) or hidden (TensorBoard), so that each curve has each step once.
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
from inception_jax.storage import atomic, integrity
from inception_jax.storage.workdir import Workdir

if TYPE_CHECKING:
    # It imports JAX, which reading metrics does without.
    from inception_jax.telemetry.clu_writers import metric_writers

# The values of a row that another run of the same settings does not repeat to the last bit.
MEASURED = ("seconds", "images_per_second", "input_wait", "resident_memory", "free_disk")

_METHODS = ("write", "flush", "close")


class Writer(Protocol):
    """What the function of a registered writer returns.

    It may also have a method `resume(resume_step)`, called once before the first row: rows up to
    that step were written before, and later ones are written anew. 0: the run begins, and what an
    earlier one left in the folder is of no use.
    """

    def write(self, step: int, *, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Takes a row: numbers by name, some of which may be NaN; `count` is an int."""

    def flush(self) -> None:
        """Returns when every row is where it outlives the process; called before each save."""

    def close(self) -> None:
        """Ends the writing."""


class CluWriter:
    """Hands rows to a metric writer of CLU's, as scalars named `split/name`.

    Args:
      open_at: returns the writer, given the step from which rows are written anew.
    """

    def __init__(self, open_at: "Callable[[int], metric_writers.MetricWriter]") -> None:
        self._open_at = open_at
        self._writer: metric_writers.MetricWriter | None = None

    def resume(self, resume_step: int) -> None:
        """Opens the writer."""
        self._writer = self._open_at(resume_step)

    def write(self, step: int, *, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes a row."""
        assert self._writer is not None, "resume comes first"
        named = {"epoch": epoch, **values}
        self._writer.write_scalars(step, {f"{split}/{name}": named[name] for name in named})

    def flush(self) -> None:
        """Returns when everything written is on the disk."""
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
        _drop_later_lines(workdir.metrics, resume_step)
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


class _Guarded:
    """A writer whose errors name it, and whose rows wait while it cannot take them.

    Where the run is patient, a user's own only has its errors logged: neither a checkpoint nor the
    end of the run waits for a service that is down.

    Args:
      part: what is registered.
      settings, workdir, patient, log: as of `RunWriter`.
    """

    def __init__(
        self,
        part: registry.Part,
        settings: Log,
        workdir: Workdir,
        *,
        patient: bool,
        log: Callable[[str], None],
    ) -> None:
        self._part, self._workdir, self._patient = part, workdir, patient
        self._tolerated = functools.partial(
            integrity.log_write_errors, patient and not part.is_own, log
        )
        self._waiting = collections.deque[_Row]()
        with self._explained("open"):
            self._writer: Writer = part.build(registry.fill(part, settings), workdir)
        if missing := [n for n in _METHODS if not callable(getattr(self._writer, n, None))]:
            raise ConfigError(
                f"writer {part.name!r} ({part.place}): returned {self._writer!r} without "
                f"{', '.join(f'{name}()' for name in missing)}; return an object with the methods "
                "write(step, *, epoch, split, values), flush() and close()"
            )

    def resume(self, resume_step: int) -> None:
        if resume := getattr(self._writer, "resume", None):
            with self._explained("open"):
                resume(resume_step)

    def write(self, row: _Row) -> None:
        self._waiting.append(row)
        with contextlib.suppress(*[WriteError] * self._patient):
            self._write_waiting()

    def flush(self) -> None:
        with self._tolerated():
            self._write_waiting()
            with self._explained("flush"):
                self._writer.flush()

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with self._tolerated(), self._explained("close"):
                self._writer.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            step, epoch, split, values = self._waiting[0]
            with self._explained(f"write the {split} row of step {step:,}"):
                # A copy: no writer changes what the next one gets.
                self._writer.write(step, epoch=epoch, split=split, values=dict(values))
            self._waiting.popleft()

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            resume = "then rerun the same command to resume from the last checkpoint"
            if not self._part.is_own:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                raise WriteError(
                    f"writer {self._part.name!r}: cannot {what}: {type(error).__name__}: {error} "
                    f"({frame.filename}, line {frame.lineno}). Fix the writer, remove it from "
                    "config.log.writers, or set config.checkpoint.on_write_error=continue; "
                    f"{resume}"
                ) from error
            if not isinstance(error, OSError):
                raise
            raise WriteError(
                f"{self._workdir.path}: cannot write metrics: {error}. Free disk space or make the "
                f"directory writable, {resume}"
            ) from error


class RunWriter:
    """Writes the metrics of a run into its workdir and to its other writers; a context manager.

    All is written in the calling thread: a row costs some 0.1 ms, and an error surfaces at the
    write that it belongs to.

    Args:
      workdir: of the run; made if it is missing.
      settings: which writers there are besides metrics.jsonl, with their options.
      resume_step: the step the run continues from. Earlier metrics of later steps are dropped; 0
        drops them all.
      is_lead: whether this process writes; in all others every method does nothing.
      patient: keep the rows that a writer cannot take and try again at the next write, where only
        `flush` and `close` raise what still fails, and of a user's own writers log it.
      log: takes lines for the user.

    Raises:
      WriteError: from each method, if a writer fails.
      ConfigError: if what a part returns is no writer.
    """

    def __init__(
        self,
        workdir: Workdir,
        settings: Log,
        *,
        resume_step: int,
        is_lead: bool = True,
        patient: bool = False,
        log: Callable[[str], None] = console.say,
    ) -> None:
        self._writers: list[_Guarded] = []
        self._opened = contextlib.ExitStack()
        if not is_lead:
            return
        metrics = registry.Part(name="metrics.jsonl", build=_metrics_file, file=__file__)
        with contextlib.ExitStack() as opened:
            for part in (metrics, *map(registry.WRITERS.get, settings.writers)):
                self._writers.append(_Guarded(part, settings, workdir, patient=patient, log=log))
                opened.callback(self._writers[-1].close)
                self._writers[-1].resume(resume_step)
            self._opened = opened.pop_all()

    def write(self, step: int, *, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Hands a row of metrics to every writer.

        Args:
          step: optimizer steps done so far.
          epoch: the same in passes over the training split.
          split: "train", or what was evaluated, such as "validation".
          values: numbers by name, such as loss, top1, learning_rate.
        """
        numbers = {n: v if isinstance(v, int) else float(v) for n, v in values.items()}
        for writer in self._writers:
            writer.write((int(step), float(epoch), split, numbers))

    def flush(self) -> None:
        """Returns when everything written is on the disk."""
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
            # The error that ends the run says more.
            if kind is None:
                raise


def informative(metrics: Mapping[str, float], classes: int) -> dict[str, float]:
    """Returns metrics without top-5 where it is always 100%, which older versions reported too."""
    return {n: value for n, value in metrics.items() if classes > 5 or not n.endswith("top5")}


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the objects of a metrics.jsonl, in order.

    A last line without its end, which a kill leaves behind, is left out.

    Raises:
      UserError: if another line is no JSON object with a step.
      OSError: if the file cannot be read.
    """
    objects = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise UserError(
                f"{path}, line {number}: {line[:60]!r} is not a JSON object with an integer "
                '"step"; delete this line or the file, and rerun the command'
            )
        objects.append(found)
    return objects


def _drop_later_lines(path: pathlib.Path, resume_step: int) -> None:
    """Leaves in a metrics.jsonl the whole lines up to a step; none for step 0."""
    kept = []
    if resume_step and path.exists():
        kept = [line for line in read_lines(path) if line["step"] <= resume_step]
    with atomic.replacing(path) as temporary, temporary.open("w") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
