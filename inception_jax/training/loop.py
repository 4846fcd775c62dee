"""The training loop: read it from top to bottom, it is the whole of what happens to a run."""

import collections
import contextlib
import itertools
import math
from collections.abc import Callable, Mapping
from concurrent import futures
from typing import Any

import jax
import numpy as np

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.datasets.splits import Split
from inception_jax.errors import Preempted, RunError, during
from inception_jax.input import crops, pipeline
from inception_jax.runtime import environment
from inception_jax.storage import integrity, lock
from inception_jax.telemetry import compilations, resources
from inception_jax.telemetry import progress as progress_lines
from inception_jax.telemetry.clock import Clock, Rate, Share
from inception_jax.telemetry.progress import Progress
from inception_jax.telemetry.watchdog import Watchdog
from inception_jax.telemetry.writers import RunWriter, informative
from inception_jax.training import initialization, nonfinite, norm, schedules
from inception_jax.training import state as states
from inception_jax.training import workdir as workdirs
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.metrics import TrainMetrics
from inception_jax.training.run import Run
from inception_jax.training.state import TrainState
from inception_jax.training.step import CompiledStep, compile_train_steps
from inception_jax.training.workdir import Workdir

# The report is written after each evaluation, unless those before took more than 0.1 s plus this
# share of the time, and always at the end. With 40 pictures it takes longer than evaluating.
REPORT_SHARE = 0.02

Evaluate = Callable[[states.Variables, Split], dict[str, float]]
OnEvaluation = Callable[[dict[str, Any]], None]


def _steps_ahead() -> int:
    """Returns how many steps the host may be ahead of the device.

    Enough to hide the dispatch, few enough that batches do not pile up and the progress shown is
    true. On the CPU none: a step that waits already holds its memory, which then is not at hand for
    the step before it, at a tenth of the speed.
    """
    return 0 if jax.default_backend() == "cpu" else 2


def train(
    run: Run,
    workdir: Workdir,
    evaluate: Evaluate,
    *,
    changed: list[str],
    on_evaluation: OnEvaluation = lambda result: None,
    stop: Callable[[int], bool] = lambda step: False,
) -> dict[str, Any]:
    """Trains a run to its end, going on from the newest checkpoint if there is one.

    Args:
      run: what to train.
      workdir: where its checkpoints and metrics are and go.
      evaluate: maps model variables and a split to loss, top1, count and, of more than five
        classes, top5. If it has a method `compile`, that is called ahead in the background, with
        shapes and types of the variables.
      changed: settings that differ from an earlier start, to be said and recorded.
      on_evaluation: called by the lead process after the last evaluation, and after those before it
        that leave it within `REPORT_SHARE` of the time; once all that it found is on disk, with
        what result.json would hold if the run ended there.
      stop: asked after each step, by its number, whether the run must be saved and end there. Where
        there are several processes, it says the same in all.

    Returns:
      The contents of result.json: the last evaluation, with the speed and time of the whole run.

    Raises:
      RunError: at a loss or gradient that is not finite; the last checkpoint is from before it.
      UserError: if the workdir cannot be written to, or another process is training in it.
      Preempted: if `stop` said so, once the checkpoint is on disk.
    """
    config = run.config
    with (
        lock.exclusive(workdir.path, integrity.say) if run.is_lead else contextlib.nullcontext(),
        Checkpoints(
            workdir.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        ) as checkpoints,
        contextlib.ExitStack() as cleanup,
    ):
        background = futures.ThreadPoolExecutor(1)
        # An error does not wait for sizes that are still to be compiled.
        cleanup.callback(background.shutdown, cancel_futures=True)
        state, clock, train_steps, notes = _start(run, checkpoints, background)
        first = int(state.step)
        if first and run.is_lead and (old := workdirs.recorded(workdir)):
            notes += _rate_rise(run, configs.from_dict(old["config"]), first)
        if run.is_lead:
            workdirs.record_start(
                workdir,
                config,
                step=first,
                changed=changed,
                dataset=run.dataset_record(),
                experiment=run.experiment,
            )
        with (
            RunWriter(
                workdir.path,
                resume_step=first,
                is_lead=run.is_lead,
                patient=_goes_on(config),
            ) as writer,
            Progress(
                run.total_steps,
                initial_step=first,
                batch_size=config.train.batch_size,
                enabled=run.is_lead,
                # Of the training step, and in this thread of the first evaluation.
                pauses=lambda: clock.seconds("compile") + compilations.seconds(),
            ) as progress,
            Watchdog(
                clock,
                limit=60 * config.watch.stall_minutes,
                long_limit=60 * config.watch.long_stall_minutes,
                log=integrity.say,
            ),
            clock.phase("other"),
        ):
            reporter = _Reporter(run, writer, progress, clock, workdir, on_evaluation)
            reporter.started(state, first, changed, notes)
            ready = _ready_for_evaluation(run, state, evaluate, cleanup)
            result = _train(run, state, train_steps, ready, evaluate, checkpoints, reporter, stop)
    if result["step"] < run.total_steps:
        raise Preempted(
            f"stopped as a signal asked, after step {result['step']:,} of {run.total_steps:,}, "
            "which is saved; the same command goes on from it"
        )
    if run.is_lead:
        workdirs.write_json(workdir.result, result)
    return result


def _rate_rise(run: Run, old: Config, first: int) -> list[str]:
    """Returns a warning where a changed schedule raises the rate of a run that is resumed.

    Args:
      run: as it is now.
      old: its settings before.
      first: finished steps.
    """
    schedule = schedules.make_schedule(
        old.schedule, timeline=run.timeline, total_steps=run.timeline.steps(old.train.length)
    )
    # Where the old schedule would have gone on to is no change, such as in its warm-up.
    before = max(float(schedule(first - 1)), float(schedule(first)))
    now = float(run.schedule(first))
    if now <= 1.01 * before:
        return []
    return [
        f"warning: the learning rate rises from {before:.2g} to {now:.2g} at step {first:,}, as "
        "the schedule or the length was changed. Accuracy may fall before it rises; for a lower "
        "rate give --config.schedule.learning_rate too"
    ]


def _goes_on(config: Config) -> bool:
    """Whether a run outlives a failure to write.

    Several processes do not: the others are waiting for the one that failed.
    """
    return config.checkpoint.on_write_error == "continue" and jax.process_count() == 1


def _start(
    run: Run, checkpoints: Checkpoints, background: futures.Executor
) -> tuple[TrainState, Clock, dict[int, CompiledStep], list[str]]:
    """Returns the state and the clock of the newest checkpoint, or new ones; the steps; and notes.

    The steps, one for each image size, compile in the background, while the state is made or read
    and all else gets ready.
    """
    like, create = states.plan(run)
    first = checkpoints.latest_step()
    # Read before anything is compiled, as it may be refused.
    start = initialization.start(run, like) if first is None and run.config.init.weights else None
    log = progress_lines.say if run.is_lead else lambda line: None
    train_steps = compile_train_steps(run, like, background, first=first or 0, log=log)
    if start:
        return states.start_from(create(), start.values), Clock(), train_steps, start.notes
    if first is None:
        return create(), Clock(), train_steps, []
    state, progress = checkpoints.restore(first, like)
    return state, Clock(initial=progress["seconds"]), train_steps, []


def _ready_for_evaluation(
    run: Run,
    state: TrainState,
    evaluate: Evaluate,
    cleanup: contextlib.ExitStack,
) -> Callable[[TrainState, Clock], TrainState]:
    """Returns what an evaluation waits for: its programs, and BatchNorm's statistics.

    The programs are traced and compiled in the background, beside the training step: tracing is
    free while that compiles, and would slow down training later.
    """
    estimate_norm = norm.NormEstimator(run)
    # Shapes only: the training step gives up the arrays.
    variables = jax.eval_shape(state.eval_variables)

    def compile_all() -> None:
        with during("train"):  # Its batches are those of training.
            estimate_norm.compile(variables)
        with during("evaluate"):
            getattr(evaluate, "compile", lambda variables: None)(variables)

    background = futures.ThreadPoolExecutor(1)
    cleanup.callback(background.shutdown, cancel_futures=True)
    # A finished run is evaluated at once, and waits for nothing.
    compiled = background.submit(compile_all) if int(state.step) < run.total_steps else None

    def ready(state: TrainState, clock: Clock) -> TrainState:
        assert compiled is not None
        with clock.phase("compile"):
            compiled.result()
        with clock.phase("evaluate"), during("train"):
            return estimate_norm(state)

    return ready


def _train(
    run: Run,
    state: TrainState,
    train_steps: Mapping[int, CompiledStep],
    ready: Callable[[TrainState, Clock], TrainState],
    evaluate: Evaluate,
    checkpoints: Checkpoints,
    reporter: "_Reporter",
    stop: Callable[[int], bool],
) -> dict[str, Any]:
    config, clock, timeline = run.config, reporter.clock, run.timeline
    first = int(state.step)
    metrics: dict[str, float] = {}
    if first >= run.total_steps:
        # Killed between its last checkpoint and its result, or shortened since.
        metrics = evaluate(state.eval_variables(), run.dataset.evaluation)
        reporter.show(first, metrics)
        return reporter.result(first, metrics)
    batches = pipeline.train_batches(
        run.dataset.train,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=first,
        stop=run.total_steps,
        mesh=run.mesh,
        box_at=crops.train_boxes(config.augment, config.seed),
    )
    empty_metrics = states.empty_metrics(run)
    in_flight: collections.deque[jax.Array] = collections.deque()
    steps_ahead = _steps_ahead()
    train_sample = run.train_sample()
    goes_on = _goes_on(config)
    with clock.phase("compile"):
        # The first batch is read while the step compiles.
        batches = itertools.chain([next(batches)], batches)
        train_steps[run.train_image_size(first)].result()

    for step in range(first + 1, run.total_steps + 1):
        with clock.phase("input"):
            batch = next(batches)
        with clock.phase("compile"):
            # Done already, but where the next image size begins too soon.
            run_step = train_steps[run.train_image_size(step - 1)].result()
        with clock.phase("train"):
            state, found = run_step(state, batch)
            in_flight.append(found.loss)
            if len(in_flight) > steps_ahead:
                in_flight.popleft().block_until_ready()
        reporter.stepped(step, found.finite)

        last = step == run.total_steps
        stop_now = not last and stop(step)
        evaluate_now = last or timeline.due(config.evaluation.every, step)
        save_now = stop_now or evaluate_now or timeline.due(config.checkpoint.every, step)
        if last or timeline.due(config.log.every, step):
            reporter.report_later(step, state.metrics)
            state = state.replace(metrics=empty_metrics(state.metrics))
        if save_now:
            with clock.phase("train"):
                jax.block_until_ready(state)
            in_flight.clear()
            reporter.report_pending()
            reporter.check_finite(step, state.metrics)
        if evaluate_now or (save_now and config.evaluation.norm_examples):
            state = ready(state, clock)
        if evaluate_now:
            with clock.phase("evaluate"):
                metrics = evaluate(state.eval_variables(), run.dataset.evaluation)
                sample = evaluate(state.eval_variables(), train_sample) if train_sample else None
            reporter.evaluated(step, metrics, sample)
        if save_now:
            with clock.phase("save"):
                with integrity.tolerated(goes_on, reporter.note):
                    checkpoints.wait()
                with integrity.tolerated(goes_on and not (last or stop_now), reporter.note):
                    # Lines up to this step must be on disk before a checkpoint says they are.
                    reporter.flush()
                    checkpoints.save(
                        state,
                        progress={"seconds": clock.state()},
                        metrics=metrics if evaluate_now else None,
                    )
        if evaluate_now:
            with integrity.tolerated(goes_on and not last, reporter.note):
                reporter.show(step, metrics)
        if stop_now:
            break

    return reporter.result(step, metrics)


class _Reporter:
    """Says and writes what the loop does."""

    def __init__(
        self,
        run: Run,
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
        self._writer = writer
        self._progress = progress
        self._rate = Rate(clock)
        self._input_wait = Share(clock, "input")
        self._last_report = 0
        self._modules: list[str] = []
        # Of the steps since the last look; not all of them where reports are very rare.
        self._finite: collections.deque[tuple[int, jax.Array]] = collections.deque(maxlen=1000)
        self._pending: tuple[int, TrainMetrics, dict[str, float]] | None = None

    def started(self, state: TrainState, first: int, changed: list[str], notes: list[str]) -> None:
        """Says what is trained, on what, from where."""
        run, note = self._run, self._progress.note
        if not first:
            note(environment.parameter_table(state.params))
        self._modules = sorted(state.params)
        devices = f"{run.mesh.size} × {jax.devices()[0].device_kind}"
        if jax.process_count() > 1:
            devices += f" in {jax.process_count()} processes"
        note(
            f"{run.config.name}: {run.config.model.name} on {run.dataset.name}, "
            f"{len(run.dataset.train):,} training and {len(run.dataset.evaluation):,} "
            f"{run.dataset.eval_split} images, {run.total_steps:,} steps of "
            f"{run.config.train.batch_size}, on {devices}"
        )
        if first:
            note(f"resumed at step {first:,}, epoch {run.timeline.epoch(first):.2f}")
        for line in notes:
            note(line)
        for line in changed:
            note(f"changed since the run began: {line}")
        self._last_report = first

    def stepped(self, step: int, finite: jax.Array) -> None:
        """Takes note of a dispatched step, and reports the step before it if that is due.

        Args:
          step: its number.
          finite: bool [1 + M], as of `step.Found`; still being computed.
        """
        self._finite.append((step, finite))
        self._progress.step(step)
        if self._pending and self._pending[0] < step:
            self.report_pending()

    def report_later(self, step: int, metrics: TrainMetrics) -> None:
        """Keeps metrics until the next step is dispatched, so that the device does not wait."""
        rate = self._rate.since_last((step - self._last_report) * self._run.config.train.batch_size)
        self._last_report = step
        self._pending = (step, metrics, self._timing(rate))

    def report_pending(self) -> None:
        """Reports the metrics that were kept."""
        if self._pending is None:
            return
        (step, metrics, timing), self._pending = self._pending, None
        # Where the device is still at that step, the wait for it is part of training.
        with self.clock.phase("train"):
            jax.block_until_ready(metrics)
        self.check_finite(step, metrics)
        values = informative(metrics.compute(), self._run.dataset.num_classes)
        del values["first_nonfinite_step"]
        # The rate that the step applied: the schedule counts finished steps.
        rate = float(self._run.schedule(step - 1))
        self._write(step, "train", {**values, "learning_rate": rate, **timing})
        self._progress.status(
            {"loss": values["loss"], "top1": values["top1"], "learning_rate": rate}
        )

    def check_finite(self, step: int, metrics: TrainMetrics) -> None:
        """Stops the run at a loss or gradient that is not finite, or at too many in a row.

        Args:
          step: the last that the metrics contain.
          metrics: of all steps since the last call.
        """
        train = self._run.config.train
        bad = {n: np.asarray(finite) for n, finite in self._finite if n <= step}
        bad = {n: finite for n, finite in bad.items() if not finite.all()}
        while self._finite and self._finite[0][0] <= step:
            self._finite.popleft()
        first = metrics.first_nonfinite_step.compute()
        skip = train.nonfinite == "skip"
        for n, finite in bad.items() if skip else ():
            what = nonfinite.describe(finite, self._modules)
            self._progress.note(f"step {n:,} was left out: {what} not finite")
        if first < 0 or (skip and step - first + 1 < train.nonfinite_limit):
            return
        rate = float(self._run.schedule(first - 1))
        self._write(first, "train", {"loss": math.nan, "learning_rate": rate})
        what = "the loss or the gradient was"
        if first in bad:
            what = nonfinite.describe(bad[first], self._modules)
        raise self._not_finite(what, first, train.nonfinite_limit if skip else 1)

    def _not_finite(self, what: str, step: int, times: int = 1) -> RunError:
        rate = float(self._run.schedule(step - 1))
        row = f", the first of {times} in a row" if times > 1 else ""
        return RunError(
            f"{what} not finite at step {step}, epoch {self._run.timeline.epoch(step):.2f}"
            f"{row}. The last checkpoint is from before that, and the same command goes on from "
            f"it. Try a lower config.schedule.learning_rate (it was {rate:.4g}), a longer "
            "config.schedule.warmup, config.optimizer.clip_norm=1, or config.train.nonfinite=skip, "
            "which leaves single steps out"
        )

    def evaluated(
        self, step: int, metrics: Mapping[str, float], sample: Mapping[str, float] | None
    ) -> None:
        """Reports an evaluation; stops the run if its loss is not finite, before it is saved."""
        split = self._run.dataset.eval_split
        self._write(step, split, {**metrics, "seconds": round(self.clock.total(), 3)})
        if not math.isfinite(metrics["loss"]):
            raise self._not_finite(f"the {split} loss was", step)
        if sample is not None:
            self._write(step, "train_eval", sample)
        self._progress.note(
            f"epoch {self._run.timeline.epoch(step):.2f}, step {step:,}: {split} loss "
            f"{metrics['loss']:.4f}, top-1 {metrics['top1']:.2f}%"
            + (f", top-5 {metrics['top5']:.2f}%" if "top5" in metrics else "")
        )

    def note(self, line: str) -> None:
        """Says a line."""
        self._progress.note(line)

    def flush(self) -> None:
        """Puts all that was written on disk."""
        self._writer.flush()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands on what the evaluation found, for a report that is read while the run goes on.

        Not every evaluation's, where reports would take more than their share of the time.
        """
        last = step >= self._run.total_steps
        too_often = self.clock.seconds("report") > 0.1 + REPORT_SHARE * self.clock.total()
        if self._run.is_lead and (last or not too_often):
            with self.clock.phase("report"):
                self._on_evaluation(self.result(step, metrics))

    def result(self, step: int, metrics: Mapping[str, float]) -> dict[str, Any]:
        """Returns what result.json holds."""
        run, clock = self._run, self.clock
        busy = clock.seconds("train") + clock.seconds("input")
        return {
            "name": run.config.name,
            "checkpoint": "last",
            "step": step,
            "epoch": run.timeline.epoch(step),
            "split": run.dataset.eval_split,
            **metrics,
            "images_per_second": round(step * run.config.train.batch_size / busy, 2),
            "seconds": round(clock.total(), 3),
            "seconds_by_phase": {k: round(v, 3) for k, v in clock.state().items()},
            "environment": environment.environment(),
        }

    def _timing(self, rate: float) -> dict[str, float]:
        found = {
            "images_per_second": round(rate, 2),
            "seconds": round(self.clock.total(), 3),
            "input_wait": round(self._input_wait.since_last(), 4),
        }
        for name, value in (
            ("resident_memory", resources.resident_memory()),
            ("free_disk", resources.free_disk(self._workdir.path)),
        ):
            if value is not None:
                found[name] = round(value, 3)
        return found

    def _write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        self._writer.write(step, epoch=self._run.timeline.epoch(step), split=split, values=values)
