"""Opens the files of a run, and creates or restores its state."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures

import jax

from inception_jax import console
from inception_jax.config import Config
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry import compilations
from inception_jax.telemetry.clock import Clock
from inception_jax.telemetry.progress import Progress
from inception_jax.telemetry.watchdog import Watchdog
from inception_jax.telemetry.writers import RunWriter
from inception_jax.training import initialization
from inception_jax.training import state as states
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.reporter import OnEvaluation, Reporter
from inception_jax.training.run import Run
from inception_jax.training.state import TrainState
from inception_jax.training.step import CompiledStep, compile_train_steps

TrainSteps = Mapping[int, CompiledStep]


@contextlib.contextmanager
def open_run(
    run: Run, workdir: Workdir, on_start: Callable[[int], list[str]], on_evaluation: OnEvaluation
) -> Iterator[tuple[TrainState, TrainSteps, Checkpoints, Reporter]]:
    """Opens everything a run writes; yields its state, steps, checkpoints and reporter."""
    config = run.config
    with (
        Checkpoints(
            workdir.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            # So that the bucket of a run has all metrics up to each of its checkpoints.
            before_commit=workdir.upload,
        ) as checkpoints,
        contextlib.ExitStack() as cleanup,
    ):
        state, clock, train_steps, notes = _restore_or_initialize(run, checkpoints, cleanup)
        first = int(state.step)
        if run.is_lead:
            notes += on_start(first)
        with (
            RunWriter(
                workdir,
                config.log,
                resume_step=first,
                is_lead=run.is_lead,
                retry_on_error=continue_on_write_error(config),
            ) as writer,
            Progress(
                run.total_steps,
                initial_step=first,
                batch_size=config.train.batch_size,
                enabled=run.is_lead,
                # Compiling the training step and, in this thread, the first evaluation.
                pauses=lambda: clock.seconds("compile") + compilations.thread_seconds(),
                train_seconds=lambda: clock.seconds("train") + clock.seconds("input"),
            ) as progress,
            Watchdog(
                clock,
                limit=60 * config.watch.stall_minutes,
                long_limit=60 * config.watch.long_stall_minutes,
                log=console.log,
            ),
            clock.phase("other"),
        ):
            reporter = Reporter(
                run,
                writer=writer,
                progress=progress,
                clock=clock,
                workdir=workdir,
                on_evaluation=on_evaluation,
            )
            reporter.on_start(state, notes)
            yield state, train_steps, checkpoints, reporter


def _restore_or_initialize(
    run: Run, checkpoints: Checkpoints, cleanup: contextlib.ExitStack
) -> tuple[TrainState, Clock, TrainSteps, list[str]]:
    """Returns state and clock (restored from the newest checkpoint or new), steps, and notes.

    The steps, one per image size, compile in the background while the state is created or restored
    and everything else gets ready.
    """
    abstract_state, create = states.lower_init(run)
    first = checkpoints.latest_step()
    # Load before anything is compiled, as the file may be rejected.
    weights = None
    if first is None and run.config.init.pretrained:
        weights = initialization.initialize_from(run, abstract_state)
    log = console.log if run.is_lead else lambda line: None
    train_steps = compile_train_steps(
        run, abstract_state, background_thread(cleanup), first=first or 0, log=log
    )
    if first is None:
        state = initialization.with_initial_values(run, create(), weights)
        return state, Clock(), train_steps, weights.notes if weights else []
    state, progress = checkpoints.restore(first, abstract_state)
    if run.config.train.on_nonfinite != "skip":
        # Steps that an earlier start skipped did not change the parameters.
        state = state.replace(metrics=state.metrics.without_nonfinite_step())
    return state, Clock(initial=progress["seconds"]), train_steps, []


def background_thread(cleanup: contextlib.ExitStack) -> futures.Executor:
    """Returns a background thread; on exit, its pending tasks are canceled."""
    thread = futures.ThreadPoolExecutor(1)
    cleanup.callback(thread.shutdown, cancel_futures=True)
    return thread


def continue_on_write_error(config: Config) -> bool:
    """Whether training continues after a failed write.

    Not with several processes: the others would wait for the one that failed.
    """
    return config.checkpoint.on_write_error == "continue" and jax.process_count() == 1
