"""The metrics of a run on disk: `metrics.jsonl` for programs, TensorBoard events for the eye.

A resumed run repeats the steps after its last checkpoint. What the killed run had written of those
is removed (JSON lines) or hidden (TensorBoard), so that each curve has each step once.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

from inception_jax.errors import UserError, WriteError
from inception_jax.storage import atomic
from inception_jax.telemetry import clu_writers
from inception_jax.telemetry.clu_writers import metric_writers

# The values of a line that another run of the same settings does not repeat to the last bit.
MEASURED = ("seconds", "images_per_second", "input_wait", "resident_memory", "free_disk")


class RunWriter:
    """Writes the metrics of a run into its workdir; a context manager.

    The files are written in the calling thread: a line costs some 0.1 ms, and an error surfaces at
    the write that it belongs to.

    Args:
      workdir: folder of the run; made if it is missing.
      resume_step: the step the run continues from. Earlier metrics of later steps are dropped; 0
        drops them all.
      is_lead: whether this process writes; in all others every method does nothing.
      patient: keep what cannot be written in memory and try again at the next write, where only
        `flush` and `close` raise what still fails.

    Raises:
      WriteError: from each method, if the files cannot be written.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        resume_step: int,
        is_lead: bool = True,
        patient: bool = False,
    ) -> None:
        self._workdir = workdir
        self._writer = metric_writers.MultiWriter([])
        if not is_lead:
            return
        with self._explained():
            workdir.mkdir(parents=True, exist_ok=True)
            lines = workdir / "metrics.jsonl"
            _drop_later_lines(lines, resume_step)
            self._writer = metric_writers.MultiWriter(
                [
                    clu_writers.JsonLinesWriter(lines, retry_on_error=patient),
                    clu_writers.TensorBoardWriter(
                        workdir / "tensorboard",
                        purge_step=resume_step + 1 if resume_step else 0,
                        retry_on_error=patient,
                    ),
                ]
            )

    def write(self, step: int, *, epoch: float, split: str, values: Mapping[str, float]) -> None:
        """Writes one line of metrics, and a point of each TensorBoard curve `split/name`.

        Args:
          step: optimizer steps done so far.
          epoch: the same in passes over the training split.
          split: "train", "train_eval", "validation", "test" or "holdout".
          values: numbers by name, such as loss, top1, learning_rate.
        """
        named = {"epoch": epoch, **values}
        with self._explained():
            self._writer.write_scalars(
                step, {f"{split}/{name}": value for name, value in named.items()}
            )

    def flush(self) -> None:
        """Returns when everything written is on the disk."""
        with self._explained():
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        with self._explained():
            try:
                self._writer.flush()
            finally:
                self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(
                f"Cannot write metrics to {self._workdir}: {error}. The folder must be writable, "
                "with space left, as long as the run lasts. Mend that, and start the same command "
                "again: it continues from the last checkpoint."
            ) from error


def has_top5(classes: int) -> bool:
    """Returns whether top-5 accuracy says anything: of five classes and fewer it is always 100%."""
    return classes > 5


def informative(metrics: Mapping[str, float], classes: int) -> dict[str, float]:
    """Returns metrics without those that are always 100% of so many classes."""
    return {
        name: value
        for name, value in metrics.items()
        if has_top5(classes) or not name.endswith("top5")
    }


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
                f"{path}, line {number}: {line[:60]!r} is not a line of metrics, which is a JSON "
                'object with a "step". Remove the line, or the file, and start again.'
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
