"""The training loop: read it from top to bottom, it is the whole of what happens to a run."""

import collections
import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax

from inception_jax import config as configs
from inception_jax.errors import Preempted, during
from inception_jax.storage import atomic, integrity
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.clock import Clock
from inception_jax.training import norm
from inception_jax.training import state as states
from inception_jax.training.reporter import EvalResults, OnEvaluation
from inception_jax.training.run import Batch, Run, train_batches
from inception_jax.training.startup import (
    TrainSteps,
    continue_on_write_error,
    in_background,
    started,
)
from inception_jax.training.state import TrainState

# Maps model variables and names of evaluations to what each of them gave, by its name.
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
      run: what to train.
      workdir: where its checkpoints and metrics are and go.
      evaluate: maps model variables and names of evaluations to what each of them gave. The run's
        own is named as its split, the others as in `config.views`. If it has a method `compile`,
        that is called ahead in the background, with shapes and types of the variables.
      on_start: called by the lead process with the finished steps, once the state is there; returns
        lines for the user.
      on_evaluation: called by the lead process after the last evaluation, and after those before it
        that leave it within `reporter.REPORT_SHARE` of the time; once all that it gave is on disk.
      stop: asked after each step, by its number, whether the run must be saved and end there. Where
        there are several processes, it says the same in all.

    Returns:
      The contents of result.json: the last evaluation, with the speed and time of the whole run.

    Raises:
      RunError: at a loss or gradient that is not finite; the last checkpoint is from before it.
      UserError: if the workdir cannot be written to.
      Preempted: if `stop` said so, once the checkpoint is on disk.
    """
    config, timeline = run.config, run.timeline
    last_step, main = run.total_steps, run.dataset.eval_split
    preempted = False
    with (
        started(run, workdir, on_start, on_evaluation) as (
            state,
            train_steps,
            checkpoints,
            reporter,
        ),
        contextlib.ExitStack() as cleanup,
    ):
        clock, step = reporter.clock, int(state.step)
        ready = _ready_for_evaluation(run, state, evaluate, cleanup)
        results: EvalResults = {}
        if step >= last_step:
            # Killed between its last checkpoint and its result, or shortened since.
            results = evaluate(state.eval_variables(), _due_evaluations(run, last_step))
            reporter.publish_eval(step, results)

        batches = _batches(run, step, train_steps, clock)
        clear = states.empty_metrics(run)
        in_flight: collections.deque[jax.Array] = collections.deque()
        go_on = continue_on_write_error(config)
        while step < last_step:
            step += 1
            with clock.phase("input"):
                batch = next(batches)
            with clock.phase("compile"):
                # Done already, but where the next image size begins too soon.
                run_step = train_steps[run.train_image_size(step - 1)].result()
            with clock.phase("train"):
                state, output = run_step(state, batch)
                in_flight.append(output.loss)
                if len(in_flight) > _max_in_flight():
                    in_flight.popleft().block_until_ready()
            reporter.on_step(step, output.finite)

            last = step == last_step
            preempted = not last and stop(step)
            due = _due_evaluations(run, step)
            save = preempted or main in due or timeline.due(config.checkpoint.every, step)
            if last or timeline.due(config.log.every, step):
                reporter.report_later(step, state.metrics)
                state = state.replace(metrics=clear(state.metrics))
            if save or due:
                with clock.phase("train"):
                    jax.block_until_ready(state)
                in_flight.clear()
                reporter.report_pending()
                reporter.check_finite(step, state.metrics)
            if due or (save and config.evaluation.norm_examples):
                state = ready(state, clock)
            if due:
                with clock.phase("evaluate"):
                    results = evaluate(state.eval_variables(), due)
                reporter.report_eval(step, results)
            if save:
                with clock.phase("save"):
                    with integrity.log_write_errors(go_on, reporter.log):
                        checkpoints.wait()
                    with integrity.log_write_errors(
                        go_on and not (last or preempted), reporter.log
                    ):
                        # Lines up to this step must be on disk before a checkpoint says they are.
                        reporter.flush()
                        checkpoints.save(
                            state,
                            progress={"seconds": clock.state()},
                            metrics=results[main].metrics if main in due else None,
                        )
            if main in due:
                with integrity.log_write_errors(go_on and not last, reporter.log):
                    reporter.publish_eval(step, results)
            if preempted:
                break
        result = reporter.result(step, results)

    # The last checkpoint is whole once the block above is left.
    if preempted:
        raise Preempted(
            f"stopped by a signal after step {step:,} of {last_step:,}; the state is saved. Rerun "
            "the same command to resume"
        )
    if run.is_lead:
        atomic.write_json(workdir.result, result)
    return result


def _batches(run: Run, first: int, train_steps: TrainSteps, clock: Clock) -> Iterator[Batch]:
    """Returns the batches after `first` finished steps, once there is a program that takes them."""
    if first >= run.total_steps:
        return iter(())
    batches = train_batches(run, first)
    with clock.phase("compile"):
        # The first batch is read while the step compiles.
        batches = itertools.chain([next(batches)], batches)
        train_steps[run.train_image_size(first)].result()
    return batches


def _due_evaluations(run: Run, step: int) -> list[str]:
    """Returns the names of the evaluations that are due after a step; after the last, all."""
    config = run.config
    every = {run.dataset.eval_split: config.evaluation.every}
    for name, view in configs.views(config).items():
        every[name] = view.every or config.evaluation.every
    if step == run.total_steps:
        return list(every)
    return [name for name, period in every.items() if run.timeline.due(period, step)]


def _ready_for_evaluation(
    run: Run, state: TrainState, evaluate: Evaluate, cleanup: contextlib.ExitStack
) -> Callable[[TrainState, Clock], TrainState]:
    """Returns what an evaluation waits for: its programs, and BatchNorm's statistics.

    The programs are traced and compiled in the background, beside the training step: tracing is
    free while that compiles, and would slow down training later.
    """
    estimate_norm = norm.NormEstimator(run)
    # Shapes only: the training step donates the arrays.
    variables = jax.eval_shape(state.eval_variables)

    def compile_all() -> None:
        with during("train"):  # Its batches are those of training.
            estimate_norm.compile(variables)
        with during("evaluate"):
            getattr(evaluate, "compile", lambda variables: None)(variables)

    # A finished run is evaluated at once, and waits for nothing.
    finished = int(state.step) >= run.total_steps
    compiled = None if finished else in_background(cleanup).submit(compile_all)

    def ready(state: TrainState, clock: Clock) -> TrainState:
        assert compiled is not None
        with clock.phase("compile"):
            compiled.result()
        with clock.phase("evaluate"), during("train"):
            return estimate_norm(state)

    return ready


def _max_in_flight() -> int:
    """Returns how many steps the host may be ahead of the device.

    Enough to hide the dispatch, few enough that batches do not pile up and the progress shown is
    true. On the CPU none: a step that waits already holds its memory, which then is not at hand for
    the step before it, at a tenth of the speed.
    """
    return 0 if jax.default_backend() == "cpu" else 2
