"""Logs the progress of a run and writes its metrics."""

import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from inception_jax.errors import RunError
from inception_jax.runtime import environment
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry import resources
from inception_jax.telemetry.clock import Clock, Laps
from inception_jax.telemetry.progress import Progress
from inception_jax.telemetry.writers import RunWriter
from inception_jax.training import nonfinite
from inception_jax.training.metrics import TrainMetrics
from inception_jax.training.run import Run
from inception_jax.training.state import TrainState

# The report is written after each evaluation, unless earlier reports took more than 0.1 s plus this
# fraction of the time, and always at the end. With 40 images it takes longer than evaluating.
REPORT_TIME_FRACTION = 0.02


class EvalResult(Protocol):
    """The part of an evaluation's result that is reported."""

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics by name: loss, top1, count and others."""


# Results by name of the evaluation.
EvalResults = Mapping[str, EvalResult]
# Called with the result.json that the run would write if it ended now, and the main evaluation.
OnEvaluation = Callable[[dict[str, Any], Any], None]


class Reporter:
    """Logs progress and writes metrics.

    Args:
      run: the run being trained.
      writer: writes the metrics.
      progress: shows log lines and the current step.
      clock: the run's clock.
      workdir: the run's workdir.
      on_evaluation: called by the lead process after evaluations.
    """

    def __init__(
        self,
        run: Run,
        *,
        writer: RunWriter,
        progress: Progress,
        clock: Clock,
        workdir: Workdir,
        on_evaluation: OnEvaluation,
    ) -> None:
        self.clock = clock
        self._workdir = workdir
        self._on_evaluation = on_evaluation
        self._run = run
        # As one program: each operation by itself would be compiled before the first report.
        self._schedule = jax.jit(run.schedule)
        self._main = run.dataset.eval_split
        self._writer = writer
        self._progress = progress
        self._laps = Laps(clock)
        self._last_report = 0
        self._modules: list[str] = []
        # Flags of the steps since the last check; only the newest where reports are very rare.
        self._finite: collections.deque[tuple[int, jax.Array]] = collections.deque(maxlen=1000)
        self._pending: tuple[int, TrainMetrics, dict[str, float]] | None = None

    def log(self, line: str) -> None:
        """Logs a line."""
        self._progress.note(line)

    def flush(self) -> None:
        """Flushes everything written so far to disk."""
        self._writer.flush()

    def on_start(self, state: TrainState, notes: Sequence[str]) -> None:
        """Logs the model, data, devices, starting point and further notes."""
        run, first = self._run, int(state.step)
        if not first:
            self.log(environment.parameter_table(state.params))
        self._modules = sorted(state.params)
        devices = f"{run.mesh.size} × {jax.devices()[0].device_kind}"
        if jax.process_count() > 1:
            devices += f" in {jax.process_count()} processes"
        self.log(
            f"{run.config.name}: {run.model_name} on {run.dataset.name}, "
            f"{len(run.dataset.train):,} training and {len(run.dataset.evaluation):,} "
            f"{self._main} images, {run.total_steps:,} steps of {run.config.train.batch_size}, on "
            f"{devices}"
        )
        if first >= run.total_steps:
            self.log(f"already finished at step {first:,}; nothing left to train")
        elif first:
            self.log(f"resumed at step {first:,}, epoch {run.timeline.epoch(first):.2f}")
        for line in notes:
            self.log(line)
        self._last_report = first

    def on_step(self, step: int, finite: jax.Array) -> None:
        """Records a dispatched step; reports the one before it if that is due.

        Args:
          step: its number.
          finite: bool [1 + M], as in `StepOutput`; may still be computing.
        """
        self._finite.append((step, finite))
        self._progress.step(step)
        if self._pending and self._pending[0] < step:
            self.report_pending()

    def report_later(self, step: int, metrics: TrainMetrics) -> None:
        """Holds metrics until the next step is dispatched, so that the device does not wait."""
        images = (step - self._last_report) * self._run.config.train.batch_size
        self._last_report = step
        self._pending = (step, metrics, self._timing(images))

    def report_pending(self) -> None:
        """Reports the metrics held by `report_later`."""
        if self._pending is None:
            return
        (step, metrics, timing), self._pending = self._pending, None
        # If the device is still running that step, waiting for it counts as training.
        with self.clock.phase("train"):
            jax.block_until_ready(metrics)
        self.check_finite(step, metrics)
        if metrics.is_empty:
            return
        values = metrics.compute()
        rate = self._learning_rate(step)
        self._write(step, "train", {**values, **rate, **timing})
        self._progress.status(step, {"loss": values["loss"], "top1": values["top1"], **rate})

    def check_finite(self, step: int, metrics: TrainMetrics) -> None:
        """Logs skipped steps; raises at a non-finite loss or gradient, or at too many in a row.

        Args:
          step: the last step included in the metrics.
          metrics: metrics of all steps since the last call.

        Raises:
          RunError: naming the step and the modules.
        """
        train = self._run.config.train
        bad = {n: np.asarray(finite) for n, finite in self._finite if n <= step}
        bad = {n: finite for n, finite in bad.items() if not finite.all()}
        while self._finite and self._finite[0][0] <= step:
            self._finite.popleft()
        first = metrics.first_nonfinite_step.compute()
        skip = train.on_nonfinite == "skip"
        for n, finite in bad.items() if skip else ():
            what = nonfinite.describe(finite, self._modules)
            self.log(f"step {n:,} skipped: {what} not finite")
        if first < 0 or (skip and step - first + 1 < train.nonfinite_limit):
            return
        self._write(first, "train", {"loss": math.nan, **self._learning_rate(first)})
        what = "the loss or the gradient was"
        if first in bad:
            what = nonfinite.describe(bad[first], self._modules)
        raise self._nonfinite_error(what, first, train.nonfinite_limit if skip else 1)

    def _learning_rate(self, step: int) -> dict[str, float]:
        """Returns the learning rate of a step; empty with an optimizer passed by the caller."""
        if not self._run.applies_schedule:
            return {}
        # The schedule counts finished steps.
        return {"learning_rate": float(self._schedule(np.int32(step - 1)))}

    def _nonfinite_error(self, what: str, step: int, times: int = 1) -> RunError:
        remedies = "Lower the optimizer's learning rate"
        if rate := self._learning_rate(step):
            remedies = (
                "Set a lower config.schedule.learning_rate (it was "
                f"{rate['learning_rate']:.4g}), a longer config.schedule.warmup or "
                "config.optimizer.clip_norm=1"
            )
        if self._run.config.train.on_nonfinite != "skip":
            remedies += ", or set config.train.on_nonfinite=skip to skip single steps"
        streak = f", the first of {times} in a row" if times > 1 else ""
        return RunError(
            f"{what} not finite at step {step}, epoch {self._run.timeline.epoch(step):.2f}"
            f"{streak}. The same command resumes from the last checkpoint, if there is one, whose "
            f"parameters are from before that. {remedies}"
        )

    def report_eval(self, step: int, results: EvalResults) -> None:
        """Writes the metrics of each evaluation under its name, the main one first, and logs it.

        Raises:
          RunError: if the main evaluation's loss is not finite; nothing was saved since then.
        """
        for name in sorted(results, key=lambda name: name != self._main):
            metrics = results[name].metrics
            if name != self._main:
                self._write(step, name, metrics)
                continue
            self._write(step, name, {**metrics, "seconds": round(self.clock.total(), 3)})
            if not math.isfinite(metrics["loss"]):
                raise self._nonfinite_error(f"the {name} loss was", step)
            self.log(
                f"epoch {self._run.timeline.epoch(step):.2f}, step {step:,}: {self._main} loss "
                f"{metrics['loss']:.4f}, top-1 {metrics['top1']:.2f}%"
                + (f", top-5 {metrics['top5']:.2f}%" if "top5" in metrics else "")
            )

    def publish_eval(self, step: int, results: EvalResults) -> None:
        """Passes an evaluation to `on_evaluation`, for a report to read during training.

        Skipped if reports would exceed `REPORT_TIME_FRACTION`, except at the end.
        """
        last = step >= self._run.total_steps
        too_often = self.clock.seconds("report") > 0.1 + REPORT_TIME_FRACTION * self.clock.total()
        if self._run.is_lead and (last or not too_often):
            with self.clock.phase("report"):
                self._on_evaluation(self.result(step, results), results[self._main])
                self._workdir.upload_soon()

    def result(self, step: int, results: EvalResults) -> dict[str, Any]:
        """Returns the contents of result.json for a run that ends at a step."""
        run, clock = self._run, self.clock
        busy = clock.seconds("train") + clock.seconds("input")
        metrics = {name: each.metrics for name, each in results.items()}
        main_metrics = metrics.pop(self._main, {})
        return {
            "name": run.config.name,
            "checkpoint": "last",
            "step": step,
            "epoch": run.timeline.epoch(step),
            "split": self._main,
            **main_metrics,
            **({"evaluations": metrics} if metrics else {}),
            "images_per_second": round(step * run.config.train.batch_size / busy, 2),
            "seconds": round(clock.total(), 3),
            "seconds_by_phase": {k: round(v, 3) for k, v in clock.state().items()},
            "environment": environment.environment(),
        }

    def _timing(self, images: int) -> dict[str, float]:
        rate, input_wait = self._laps.since_last(images)
        timing = {
            "images_per_second": round(rate, 2),
            "seconds": round(self.clock.total(), 3),
            "input_wait": round(input_wait, 4),
        }
        for name, value in (
            ("resident_memory", resources.resident_memory()),
            ("free_disk", resources.free_disk(self._workdir.path)),
        ):
            if value is not None:
                timing[name] = round(value, 3)
        return timing

    def _write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._writer.write(step, epoch=self._run.timeline.epoch(step), split=split, values=values)
        self._workdir.upload_soon()
