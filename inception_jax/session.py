"""A run from its settings to its report: what a start checks, reads and writes, in which order.

The training command and `inception_jax.train` are this with other surroundings. What can be refused
is refused before anything is written or computed, and config.json is read once.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from inception_jax import config as configs
from inception_jax.config import Config, reference
from inception_jax.console import say
from inception_jax.evaluation import evaluate
from inception_jax.experiment import used_parts
from inception_jax.models import weights
from inception_jax.reporting import report
from inception_jax.runtime import devices, environment, preemption
from inception_jax.storage import lock
from inception_jax.storage.workdir import Workdir
from inception_jax.training import loop, run, schedules
from inception_jax.training import workdir as workdirs
from inception_jax.training.reporter import OnEvaluation
from inception_jax.training.run import Run
from inception_jax.training.workdir import Previous

# Asked after each step, by its number, whether the run must be saved and end there.
Stop = Callable[[int], bool]


class Origin(NamedTuple):
    """Where the settings of a start are from.

    Attributes:
      experiment: the file, and its own values of what was overridden, as `cli.experiment` says it.
      given: paths of the settings that this start overrides.
    """

    experiment: Mapping[str, Any]
    given: Collection[str] = ()


def train_and_evaluate(
    config: Config,
    path: pathlib.Path,
    *,
    origin: Origin | None = None,
    own: Mapping[str, Any] | None = None,
    join: Callable[[Config], Stop],
) -> dict[str, Any]:
    """Trains to the end, going on from the newest checkpoint, and leaves all that a run leaves.

    Args:
      config: the settings; changed to what the run had where this start leaves it out.
      path: folder of the run.
      origin: where the settings are from; None: it is not known, and all of them are meant.
      own: objects in place of what the settings name, as `run.assemble` takes them.
      join: starts the devices, and returns what says when to stop.

    Returns:
      The contents of result.json.

    Raises:
      UserError, RunError, Preempted: as `loop.train`; and if this start does not fit the folder.
    """
    own = {kind: each for kind, each in (own or {}).items() if each is not None}
    names = {kind: type(each).__qualname__ for kind, each in own.items()}
    folder = Workdir(path)
    if "dataset" in own:
        config = run.adapted(config, own["dataset"])
    before, config, changed, experiment = _settle(folder, config, origin, names)
    workdirs.check_writable(folder.path)
    stop = join(config)
    workdirs.check_shared(folder)
    setup = _assemble(config, before, own)
    evaluator = evaluate.Evaluator(setup)
    result = train_run(
        setup,
        before,
        evaluator,
        changed=changed,
        experiment=experiment,
        own=names,
        on_evaluation=lambda result, evaluated: report.publish(
            path, result, evaluated.predictions, setup.dataset.evaluation
        ),
        stop=stop,
    )
    if setup.is_lead:
        report.finish(path, log=say)
    return result


def settings_in_use(config: Config, path: pathlib.Path | None, *, origin: Origin) -> str:
    """Returns the value of every setting that a start would use and its origin, a line each.

    Args:
      config: the settings of this start; changed to those the run has where this start omits them.
      path: folder of the run, if any.
      origin: where the settings come from.
    """
    experiment: Mapping[str, Any] | None = origin.experiment
    recorded = ""
    opened = {name for name, _, _ in configs.leaves() if configs.is_open(config, name)}
    if path is None:
        run.check_settings(config, log=say)
    else:
        before, config, _, experiment = _settle(Workdir(path), config, origin, {})
        recorded = str(before.workdir.config)
    assert experiment is not None, "its origin is known"
    origins: dict[str, str] = {}
    for name, _, _ in configs.leaves():
        if name in origin.given:
            origins[name] = "command line"
        elif configs.is_open(config, name):
            origins[name] = "chosen at the start, from the data or the hardware"
        elif name in opened or name in experiment["own"]:
            origins[name] = recorded
        elif configs.get(config, name) != configs.get(Config(), name):
            origins[name] = experiment["file"]
    return reference.listing(config, origins)


def evaluate_checkpoint(
    config: Config,
    path: pathlib.Path,
    checkpoint: str,
    *,
    origin: Origin,
    join: Callable[[Config], Stop],
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run: "best", "last" or the number of a step."""
    folder = Workdir(path)
    before, config, _, _ = _settle(folder, config, origin, {})
    join(config)
    return evaluate.evaluate_checkpoint(_assemble(config, before, {}), folder, checkpoint, say)


def evaluate_weights(
    config: Config, path: pathlib.Path, *, join: Callable[[Config], Stop]
) -> dict[str, Any]:
    """Evaluates a file of weights on the data set of some settings."""
    run.check_settings(config, log=say)
    join(config)
    return evaluate.evaluate_weights(run.assemble(config, log=say), weights.load(path, say))


def join_processes(
    config: Config, *, processes: Mapping[str, Any], command: Mapping[str, Any]
) -> Stop:
    """Starts the devices, joins the other processes, and listens for signals from then on.

    Args:
      config: of the run.
      processes: on which devices, and with which other processes, as `devices.initialize` takes it.
      command: what else must be the same in all processes.
    """
    parts = used_parts(config)
    notify_preemption = devices.initialize(
        **processes,
        heartbeat_timeout=config.watch.heartbeat_timeout_seconds,
        fingerprint=lambda: (
            environment.software()
            | configs.shared(config)
            | {f"{each['kind']} {each['name']}": _checksum(each["file"]) for each in parts}
            | dict(command)
        ),
        log=say,
    )
    return preemption.Preemption(notify_preemption).requested


def _checksum(file: str) -> str:
    """Returns that of a file that registers a part, or '' of what is none."""
    path = pathlib.Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def train_run(
    setup: Run,
    before: Previous,
    evaluator: loop.Evaluate,
    *,
    changed: Sequence[str] = (),
    experiment: Mapping[str, Any] | None = None,
    own: Mapping[str, str] | None = None,
    on_evaluation: OnEvaluation = lambda result, evaluated: None,
    stop: Stop = lambda step: False,
) -> dict[str, Any]:
    """Trains in a folder that no other process trains in meanwhile, and records the start there.

    Args:
      setup: what to train.
      before: what earlier starts left in the folder.
      evaluator, on_evaluation, stop: as `loop.train` takes them.
      changed, experiment, own: as `workdir.record_start` takes them.
    """

    def record(first: int) -> list[str]:
        lines: list[str] = []
        if first and before.record and setup.applies_schedule:
            lines = _rate_rise(setup, before.record.config, first)
        workdirs.record_start(
            before,
            setup.config,
            step=first,
            changed=changed,
            dataset=workdirs.dataset_record(setup.dataset),
            experiment=experiment,
            own=own or {},
        )
        return lines + [f"changed since the run began: {line}" for line in changed]

    folder = before.workdir
    with lock.lock_workdir(folder.path, say) if setup.is_lead else contextlib.nullcontext():
        return loop.train(
            setup, folder, evaluator, on_start=record, on_evaluation=on_evaluation, stop=stop
        )


def _settle(
    folder: Workdir, config: Config, origin: Origin | None, own: Mapping[str, str]
) -> tuple[Previous, Config, list[str], Mapping[str, Any] | None]:
    """Returns what a folder held, the settings of this start, what they change, and their origin.

    Raises:
      UserError: if a setting is wrong, or the folder is another run's.
    """
    before = workdirs.previous(folder)
    experiment: Mapping[str, Any] | None
    if origin:
        experiment = workdirs.recall(before, config, *origin, say)
    else:
        experiment = before.record.experiment if before.record else None
    run.check_settings(config, before.record.config if before.record else None, say)
    config = workdirs.with_recorded(before, config)
    return before, config, workdirs.check_compatible(before, config, own), experiment


def _assemble(config: Config, before: Previous, own: Mapping[str, Any]) -> Run:
    setup = run.assemble(config, **own, log=say)
    workdirs.check_dataset(before, workdirs.dataset_identity(setup.dataset))
    return setup


def _rate_rise(setup: Run, old: Config, first: int) -> list[str]:
    """Returns a warning where a changed schedule raises the rate of a run that is resumed.

    Args:
      setup: as it is now.
      old: its settings before.
      first: finished steps.
    """
    schedule = schedules.make_schedule(
        old.schedule, timeline=setup.timeline, total_steps=setup.timeline.steps(old.train.duration)
    )
    # Where the old schedule would have gone on to is no change, such as in its warm-up.
    before = max(float(schedule(first - 1)), float(schedule(first)))
    now = float(setup.schedule(first))
    if now <= 1.01 * before:
        return []
    return [
        f"warning: the learning rate rises from {before:.2g} to {now:.2g} at step {first:,}, as "
        "the schedule or the length was changed. Accuracy may fall before it rises; for a lower "
        "rate give --config.schedule.learning_rate too"
    ]
