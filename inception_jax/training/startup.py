"""Opens what a run reads and writes, and makes or restores what training starts from."""

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
def started(
    run: Run, workdir: Workdir, on_start: Callable[[int], list[str]], on_evaluation: OnEvaluation
) -> Iterator[tuple[TrainState, TrainSteps, Checkpoints, Reporter]]:
    """Opens all that a run writes, and yields its state, steps, checkpoints and reporter."""
    config = run.config
    with (
        Checkpoints(
            workdir.checkpoints,
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
        ) as checkpoints,
        contextlib.ExitStack() as cleanup,
    ):
        state, clock, train_steps, notes = _initial(run, checkpoints, cleanup)
        first = int(state.step)
        if run.is_lead:
            notes += on_start(first)
        with (
            RunWriter(
                workdir,
                config.log,
                resume_step=first,
                is_lead=run.is_lead,
                patient=continue_on_write_error(config),
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
                log=console.say,
            ),
            clock.phase("other"),
        ):
            reporter = Reporter(
                run,
                writer=writer,
                progress=progress,
                clock=clock,
                path=workdir.path,
                on_evaluation=on_evaluation,
            )
            reporter.on_start(state, notes)
            yield state, train_steps, checkpoints, reporter


def _initial(
    run: Run, checkpoints: Checkpoints, cleanup: contextlib.ExitStack
) -> tuple[TrainState, Clock, TrainSteps, list[str]]:
    """Returns the state and the clock of the newest checkpoint, or new ones; the steps; and notes.

    The steps, one for each image size, compile in the background, while the state is made or read
    and all else gets ready.
    """
    abstract_state, create = states.lower_init(run)
    first = checkpoints.latest_step()
    # Read before anything is compiled, as it may be refused.
    weights = None
    if first is None and run.config.init.pretrained:
        weights = initialization.initialize_from(run, abstract_state)
    log = console.say if run.is_lead else lambda line: None
    train_steps = compile_train_steps(
        run, abstract_state, in_background(cleanup), first=first or 0, log=log
    )
    if weights:
        return (
            states.with_initial_weights(create(), weights.values),
            Clock(),
            train_steps,
            weights.notes,
        )
    if first is None:
        return create(), Clock(), train_steps, []
    state, progress = checkpoints.restore(first, abstract_state)
    return state, Clock(initial=progress["seconds"]), train_steps, []


def in_background(cleanup: contextlib.ExitStack) -> futures.Executor:
    """Returns a thread; an error does not wait for what that has not begun."""
    thread = futures.ThreadPoolExecutor(1)
    cleanup.callback(thread.shutdown, cancel_futures=True)
    return thread


def continue_on_write_error(config: Config) -> bool:
    """Whether a run survives a failure to write.

    Several processes do not: the others are waiting for the one that failed.
    """
    return config.checkpoint.on_write_error == "continue" and jax.process_count() == 1
