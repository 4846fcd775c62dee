"""The training loop: everything that happens during a run, from top to bottom."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from typing import Any

import jax

from inception_jax import config as configs
from inception_jax.errors import Preempted, during
from inception_jax.storage import atomic, integrity
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.clock import Clock
from inception_jax.telemetry.writers import read_metrics
from inception_jax.training import norm
from inception_jax.training import state as states
from inception_jax.training.reporter import EvalResults, OnEvaluation
from inception_jax.training.run import Batch, Run, train_batches
from inception_jax.training.startup import (
    TrainSteps,
    background_thread,
    continue_on_write_error,
    open_run,
)
from inception_jax.training.state import TrainState

# Maps model variables and names of evaluations to the result of each, by name.
Evaluate = Callable[[states.Variables, Collection[str]], EvalResults]


def train(
    run: Run,
    workdir: Workdir,
    evaluate: Evaluate,
    *,
    on_start: Callable[[int], list[str]] = lambda first: [],
    on_evaluation: OnEvaluation = lambda result, evaluated: None,
    stop: Callable[[int], bool] = lambda step: False,
) -> dict[str, Any]:
    """Trains a run to its end, resuming from the newest checkpoint if there is one.

    Args:
      run: the run to train.
      workdir: directory of its checkpoints and metrics.
      evaluate: maps model variables and names of evaluations to the result of each. The main
        evaluation is named after its split, the others as in `config.views`. If it has a method
        `compile`, that is called in the background with shapes and dtypes of the variables.
      on_start: called by the lead process with the number of finished steps once the state exists;
        returns lines to log.
      on_evaluation: called by the lead process once the evaluation's files are on disk: after the
        last evaluation, and after earlier ones while it takes no more than
        `reporter.REPORT_TIME_FRACTION` of the time.
      stop: called with the number of each finished step; returns whether to save and stop there.
        Must return the same in all processes.

    Returns:
      The contents of result.json: the last evaluation, and the speed and time of the entire run.

    Raises:
      RunError: if a loss or gradient is not finite; the last checkpoint's parameters are from
        before that.
      UserError: if the workdir cannot be written to.
      Preempted: if `stop` returned True, once the checkpoint is on disk.
    """
    config, timeline = run.config, run.timeline
    last_step, main_eval = run.total_steps, run.dataset.eval_split
    preempted = False
    with (
        open_run(run, workdir, on_start, on_evaluation) as (
            state,
            train_steps,
            checkpoints,
            reporter,
        ),
        contextlib.ExitStack() as cleanup,
    ):
        clock, step = reporter.clock, int(state.step)
        first = step
        compile_eval, prepare_eval = _make_prepare_eval(run, state, evaluate, cleanup)
        results: EvalResults = {}
        if step >= last_step:
            # Killed between its last checkpoint and its result, or shortened since then.
            with clock.phase("evaluate"):
                results = evaluate(state.eval_variables(), _due_evaluations(run, last_step))
            if run.is_lead:  # What was not evaluated when this step was trained.
                rows = read_metrics(workdir.metrics, workdir.location_of(workdir.metrics))
                written = {row["split"] for row in rows if row["step"] == step}
                missing = {name: each for name, each in results.items() if name not in written}
                reporter.report_eval(step, missing)
            reporter.publish_eval(step, results)

        batches = _batches(run, step, train_steps, clock)
        reset_metrics = states.make_reset_metrics(run)
        in_flight: collections.deque[jax.Array] = collections.deque()
        continue_on_error = continue_on_write_error(config)
        while step < last_step:
            step += 1
            with clock.phase("input"):
                batch = next(batches)
            with clock.phase("compile"):
                # Already compiled, unless the next image size starts too soon.
                run_step = train_steps[run.train_image_size(step - 1)].result()
            with clock.phase("train"):
                state, output = run_step(state, batch)
                in_flight.append(output.loss)
                if len(in_flight) > _max_in_flight():
                    in_flight.popleft().block_until_ready()
            if step == first + 1:
                compile_eval()
            reporter.on_step(step, output.finite)

            last = step == last_step
            preempted = not last and stop(step)
            due_evals = _due_evaluations(run, step)
            save = (
                preempted or main_eval in due_evals or timeline.due(config.checkpoint.every, step)
            )
            if last or timeline.due(config.log.every, step):
                reporter.report_later(step, state.metrics)
                state = state.replace(metrics=reset_metrics(state.metrics))
            if save or due_evals:
                with clock.phase("train"):
                    jax.block_until_ready(state)
                in_flight.clear()
                reporter.report_pending()
                reporter.check_finite(step, state.metrics)
            if due_evals or (save and config.evaluation.norm_examples):
                state = prepare_eval(state, clock)
            if due_evals:
                with clock.phase("evaluate"):
                    results = evaluate(state.eval_variables(), due_evals)
                reporter.report_eval(step, results)
            if save:
                with clock.phase("save"):
                    with integrity.log_write_errors(continue_on_error, reporter.log):
                        checkpoints.wait()
                    with integrity.log_write_errors(
                        continue_on_error and not (last or preempted), reporter.log
                    ):
                        # Metrics up to this step must be on disk before its checkpoint is.
                        reporter.flush()
                        workdir.check_lock()
                        checkpoints.save(
                            state,
                            progress={"seconds": clock.state()},
                            metrics=results[main_eval].metrics if main_eval in due_evals else None,
                        )
            if main_eval in due_evals:
                with integrity.log_write_errors(continue_on_error and not last, reporter.log):
                    reporter.publish_eval(step, results)
            if preempted:
                break
        result = reporter.result(step, results)

    # Leaving the block above has completed the last checkpoint.
    if preempted:
        raise Preempted(
            f"stopped by a signal after step {step:,} of {last_step:,}; the state is saved. Rerun "
            "the same command to resume"
        )
    if run.is_lead:
        atomic.write_json(workdir.result, result)
    return result


def _batches(run: Run, first: int, train_steps: TrainSteps, clock: Clock) -> Iterator[Batch]:
    """Returns the batches after `first` finished steps, once the training step is compiled."""
    if first >= run.total_steps:
        return iter(())
    batches = train_batches(run, first)
    with clock.phase("compile"):
        # Read the first batch while the step compiles.
        batches = itertools.chain([next(batches)], batches)
        train_steps[run.train_image_size(first)].result()
    return batches


def _due_evaluations(run: Run, step: int) -> list[str]:
    """Returns the names of the evaluations due after a step; all of them after the last step."""
    config = run.config
    every = {run.dataset.eval_split: config.evaluation.every}
    for name, view in configs.views(config).items():
        is_set = configs.parse_duration(view.every)
        every[name] = view.every if is_set else config.evaluation.every
    if step == run.total_steps:
        return list(every)
    return [name for name, period in every.items() if run.timeline.due(period, step)]


def _make_prepare_eval(
    run: Run, state: TrainState, evaluate: Evaluate, cleanup: contextlib.ExitStack
) -> tuple[Callable[[], None], Callable[[TrainState, Clock], TrainState]]:
    """Returns functions that compile the evaluation, and that wait for it and prepare the state.

    The first compiles its programs in the background. It is called after the first step, which it
    would otherwise delay: tracing takes Python's lock, and compiling takes cores. The second
    re-estimates BatchNorm.
    """
    estimate_norm = norm.NormEstimator(run)
    # Shapes only: the training step donates the arrays.
    variables = jax.eval_shape(state.eval_variables)

    def compile_all() -> None:
        with during("train"):  # It uses training batches.
            estimate_norm.compile(variables)
        with during("evaluate"):
            getattr(evaluate, "compile", lambda variables: None)(variables)

    compiled: list[futures.Future[None]] = []

    def start() -> None:
        compiled.append(background_thread(cleanup).submit(compile_all))

    def prepare_eval(state: TrainState, clock: Clock) -> TrainState:
        with clock.phase("compile"):
            compiled[0].result()
        with clock.phase("evaluate"), during("train"):
            return estimate_norm(state)

    return start, prepare_eval


def _max_in_flight() -> int:
    """Returns how many steps the host may run ahead of the device.

    Enough to hide dispatch, few enough that batches do not pile up and the progress shown is
    accurate. None on the CPU: a queued step already holds its memory, which the running step then
    lacks, at a tenth of the speed.
    """
    return 0 if jax.default_backend() == "cpu" else 2
