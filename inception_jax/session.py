"""A run from settings to report: what is checked, read and written, and in which order.

The training command and `inception_jax.train` are thin wrappers around this module. All checks that
can fail early run before anything is written or computed, and config.json is read once.
"""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from inception_jax import config as configs
from inception_jax import console
from inception_jax.config import Config, reference
from inception_jax.evaluation import evaluate
from inception_jax.experiment import custom_parts
from inception_jax.models import weights
from inception_jax.reporting import report
from inception_jax.runtime import devices, environment, preemption
from inception_jax.storage import access, buckets, lock, paths
from inception_jax.storage.workdir import Workdir
from inception_jax.training import checkpoints, initialization, loop, run, schedules
from inception_jax.training import workdir as workdirs
from inception_jax.training.reporter import OnEvaluation
from inception_jax.training.run import Run
from inception_jax.training.workdir import PreviousRun

# Returns, given the number of finished steps, whether the run must be saved and stopped.
ShouldStop = Callable[[int], bool]


class Origin(NamedTuple):
    """The origin of the settings of a start.

    Attributes:
      experiment: the file, and its values of the overridden settings, as in `cli.experiment`.
      overridden: paths of the settings, and of entries of mappings, set on the command line.
    """

    experiment: Mapping[str, Any]
    overridden: Collection[str] = ()


def train_and_evaluate(
    config: Config,
    location: paths.Path,
    *,
    origin: Origin | None = None,
    objects: Mapping[str, Any] | None = None,
    join: Callable[[Config], ShouldStop],
) -> dict[str, Any]:
    """Trains to the end, from the latest checkpoint if there is one, and writes all results.

    Args:
      config: settings; those that this start does not set are replaced by the run's recorded ones.
      location: folder of the run, local or in a bucket.
      origin: origin of the settings; None: unknown, and all of them count as set.
      objects: objects that replace what the settings name, as for `run.assemble`.
      join: initializes the devices, and returns the function that tells when to stop.

    Returns:
      The contents of result.json.

    Raises:
      UserError, RunError, Preempted: as `loop.train`; UserError also if the settings are not
        compatible with the folder.
    """
    objects = {kind: each for kind, each in (objects or {}).items() if each is not None}
    names = {kind: type(each).__qualname__ for kind, each in objects.items()}
    if "dataset" in objects:
        config = run.config_for_dataset(config, objects["dataset"])
    workdir = _open_workdir(location)
    before, config, changed, experiment = _resolve_settings(workdir, config, origin, names)
    workdirs.check_writable(workdir)
    stop = join(config)
    workdirs.check_shared(workdir)
    setup = _assemble(config, before, objects)
    workdirs.check_order(before, setup.dataset)
    evaluator = evaluate.Evaluator(setup)
    return train_run(
        setup,
        before,
        evaluator,
        changed=changed,
        experiment=experiment,
        own=names,
        on_evaluation=lambda result, evaluated: report.publish(
            workdir, result, evaluated.predictions, setup.dataset.evaluation
        ),
        on_end=lambda: report.finish(workdir, log=console.log),
        stop=stop,
    )


def settings_in_use(config: Config, location: paths.Path | None, *, origin: Origin) -> str:
    """Returns a line with the value and origin of each setting that a start would use.

    Args:
      config: settings; those that this start does not set are replaced by the run's recorded ones.
      location: folder of the run, if any.
      origin: origin of the settings.
    """
    experiment: Mapping[str, Any] | None = origin.experiment
    recorded = "the run that --config names"
    opened = {name for name, _, _ in configs.leaves() if configs.is_open(config, name)}
    if location is None:
        run.check_settings(config, log=console.log)
    else:
        workdir = _open_workdir(location)
        _, config, _, experiment = _resolve_settings(workdir, config, origin, {})
        recorded = str(workdir.location_of(workdir.config))
    assert experiment is not None, "its origin is known"
    set_here = {configs.mapping_of(each)[0] or each for each in origin.overridden}
    origins: dict[str, str] = {}
    for name, _, _ in configs.leaves():
        if name in set_here:
            origins[name] = "command line"
        elif configs.is_open(config, name):
            origins[name] = "chosen at startup from the data or hardware"
        elif name in opened or name in experiment["own"]:
            origins[name] = recorded
        elif configs.get(config, name) != configs.get(Config(), name):
            origins[name] = experiment["file"]
    return reference.listing(config, origins)


def evaluate_checkpoint(
    config: Config,
    location: paths.Path,
    checkpoint: str,
    *,
    origin: Origin,
    join: Callable[[Config], ShouldStop],
) -> dict[str, Any]:
    """Evaluates a checkpoint of a run: "best", "last" or a step."""
    workdir = _open_workdir(location)
    before, config, _, _ = _resolve_settings(workdir, config, origin, {})
    join(config)
    # Before data are prepared, but not before the processes have compared their commands.
    checkpoints.check_exists(workdir.checkpoints, checkpoint)
    setup = _assemble(config, before, {}, trains=False)
    return evaluate.evaluate_checkpoint(setup, workdir, checkpoint, console.log)


def evaluate_weights(
    config: Config, path: paths.Path, *, join: Callable[[Config], ShouldStop]
) -> dict[str, Any]:
    """Evaluates a file of weights on the configured data set."""
    run.check_settings(config, log=console.log)
    join(config)
    loaded = weights.load(path, console.log)
    setup = run.assemble(config, trains=False, log=console.log)
    return evaluate.evaluate_weights(setup, loaded, console.log)


def join_processes(
    config: Config, *, processes: Mapping[str, Any], command: Mapping[str, Any]
) -> ShouldStop:
    """Initializes the devices, connects to the other processes, and starts signal handling.

    Args:
      config: settings of the run.
      processes: arguments of `devices.initialize` that select devices and processes.
      command: other JSON values that must be equal in all processes.
    """
    parts = custom_parts(config)
    notify_preemption = devices.initialize(
        **processes,
        heartbeat_timeout=config.watch.heartbeat_timeout_seconds,
        fingerprint=lambda: (
            environment.software()
            | configs.shared(config)
            | {f"{each['kind']} {each['name']}": _checksum(each["file"]) for each in parts}
            | dict(command)
        ),
        log=console.log,
    )
    return preemption.Preemption(notify_preemption).requested


def _checksum(file: str) -> str:
    """Returns the start of the SHA-256 of a file that registers a part; '' if it does not exist."""
    path = pathlib.Path(file)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


def train_run(
    setup: Run,
    before: PreviousRun,
    evaluator: loop.Evaluate,
    *,
    changed: Sequence[str] = (),
    experiment: Mapping[str, Any] | None = None,
    own: Mapping[str, str] | None = None,
    on_evaluation: OnEvaluation = lambda result, evaluated: None,
    on_end: Callable[[], None] = lambda: None,
    stop: ShouldStop = lambda step: False,
) -> dict[str, Any]:
    """Trains with the folder locked, and records the start in it.

    Args:
      setup: the run to train.
      before: the state that earlier starts left in the folder.
      evaluator, on_evaluation, stop: as for `loop.train`.
      changed, experiment, own: as for `workdir.record_start`.
      on_end: called by the lead process once result.json exists.

    Returns:
      The contents of result.json.

    Raises:
      UserError: if another process is training in the folder, or was since `before` was read.
      WriteError: if the folder is in a bucket, and its last files cannot be uploaded.
      Exception: as `loop.train`.
    """

    def record(start_step: int) -> list[str]:
        lines: list[str] = []
        if start_step and before.record and setup.applies_schedule:
            lines = _learning_rate_increase(setup, before.record.config, start_step)
        workdirs.record_start(
            before,
            setup.config,
            step=start_step,
            changed=changed,
            dataset=workdirs.dataset_record(setup.dataset),
            experiment=experiment,
            custom_objects=own or {},
        )
        return lines + [f"changed since the run began: {line}" for line in changed]

    workdir = before.workdir
    with contextlib.ExitStack() as block:
        if setup.is_lead:
            check_lock = block.enter_context(lock.lock_workdir(workdir.location, console.log))
            workdirs.check_unchanged(before)
            block.enter_context(workdir.uploading(check_lock, console.log))
        result = loop.train(
            setup, workdir, evaluator, on_start=record, on_evaluation=on_evaluation, stop=stop
        )
        if setup.is_lead:
            on_end()
    return result


def _open_workdir(location: paths.Path) -> Workdir:
    """Returns a folder with its files downloaded, if it is in a bucket.

    Raises:
      WriteError: if its bucket cannot be read.
    """
    workdir = Workdir(location)
    with access.naming_flag("workdir", location):
        workdir.download()
    return workdir


def _resolve_settings(
    workdir: Workdir, config: Config, origin: Origin | None, own: Mapping[str, str]
) -> tuple[PreviousRun, Config, list[str], Mapping[str, Any] | None]:
    """Returns the earlier state of a folder, the settings to use, their changes and their origin.

    Raises:
      UserError: if a setting is invalid, or the folder belongs to another run.
    """
    before = workdirs.load_previous_run(workdir)
    experiment: Mapping[str, Any] | None
    if origin:
        experiment = workdirs.restore_overrides(before, config, *origin, console.log)
    else:
        experiment = before.record.experiment if before.record else None
    run.check_settings(config, before.record.config if before.record else None, console.log)
    buckets.set_retry_seconds(config.bucket.retry_seconds)  # Perhaps that of an earlier start.
    if before.record is None:
        initialization.check_file(config)
    config = workdirs.with_recorded_auto_settings(before, config)
    return before, config, workdirs.check_compatible(before, config, own), experiment


def _assemble(
    config: Config, before: PreviousRun, objects: Mapping[str, Any], *, trains: bool = True
) -> Run:
    setup = run.assemble(config, **objects, trains=trains, log=console.log)
    workdirs.check_dataset(before, workdirs.dataset_identity(setup.dataset))
    return setup


def _learning_rate_increase(setup: Run, old: Config, start_step: int) -> list[str]:
    """Returns a warning if a changed schedule increases the learning rate of a resumed run.

    Args:
      setup: the run with the new settings.
      old: its previous settings.
      start_step: number of finished steps.
    """
    schedule = schedules.make_schedule(
        old.schedule, timeline=setup.timeline, total_steps=setup.timeline.steps(old.train.duration)
    )
    # An increase that the old schedule would have made too, as in its warm-up, is not reported.
    before = max(float(schedule(start_step - 1)), float(schedule(start_step)))
    now = float(setup.schedule(start_step))
    if now <= 1.01 * before:
        return []
    return [
        f"warning: the learning rate rises from {before:.2g} to {now:.2g} at step {start_step:,} "
        "because the schedule or duration changed. Accuracy may drop at first; for a lower rate, "
        "also set --config.schedule.learning_rate"
    ]
