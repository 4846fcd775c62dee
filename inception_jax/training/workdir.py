"""Checks that a workdir matches the run, and records each start in it.

`config.json` holds the resolved configuration, the identity of the data set, the environment, and
the settings changed by later starts. A workdir belongs to one model on one data set; a start that
would mix two is refused.
"""

import contextlib
import dataclasses
import datetime
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from inception_jax import config as configs
from inception_jax import console, registry
from inception_jax.config import Config, Record
from inception_jax.datasets.dataset import Dataset, class_changes
from inception_jax.errors import CheckpointError, ConfigError
from inception_jax.experiment import custom_parts, import_parts
from inception_jax.runtime import environment, hosts
from inception_jax.storage import access, atomic, buckets, integrity, paths
from inception_jax.storage.workdir import Workdir

# Keys of a data set's record.
_CLASS_NAMES, _ORDER = "class names", "training file names"
_EMPTY: Mapping[str, str] = {}


def check_writable(workdir: Workdir) -> None:
    """Creates a workdir, and checks that files can be written in it.

    Raises:
      UserError: if it cannot be created or written to.
    """
    location = workdir.location
    access.check_output_folder(location, "workdir")
    if not paths.is_local(location):
        # Files of a run are replaced, for which permission to delete is required.
        with access.naming_flag("workdir", location), _probe(location):
            pass


def check_shared(workdir: Workdir) -> None:
    """Checks that all processes of a run see the same workdir; does nothing for a single process.

    Raises:
      UserError: in all processes, naming those that see another one.
    """
    if not hosts.is_multi_process():
        return
    with _probe(workdir.location) as name:
        # A name that no process has looked up before, as network file systems cache lookups.
        written = workdir.location / hosts.gather("folder", name)[0]
        hosts.check_consistent(
            "shared folder",
            # Without the path, which may differ between hosts that see the same folder.
            lambda: {"--workdir contains the file that process 0 wrote": access.is_file(written)},
            "Hosts of a TPU slice share no disk. Use --workdir=gs://BUCKET/PATH, or a folder that "
            "all hosts mount",
        )


@contextlib.contextmanager
def _probe(folder: paths.Path) -> Iterator[str]:
    """Yields the name of a file in a folder, which exists during the block."""
    probe = folder / f".probe.{secrets.token_hex(8)}"
    if paths.is_local(probe):
        probe.touch()
    else:
        buckets.write_bytes(probe, b"")
    try:
        yield probe.name
    finally:
        if paths.is_local(probe):
            probe.unlink()
        else:
            buckets.delete(probe)


def load_record(workdir: Workdir) -> Record | None:
    """Returns the contents of config.json, or None in a new workdir.

    Without settings of this process, the run's determine how long requests are repeated.

    Raises:
      CheckpointError: if the file is not readable.
    """
    try:
        record = configs.read_record(workdir.config, workdir.location_of(workdir.config))
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    buckets.set_retry_seconds(record.config.bucket.retry_seconds, is_recorded=True)
    return record


def require_record(
    workdir: Workdir, *, has_model: bool = False, needs_data: bool = False
) -> Record:
    """Registers a run's network and returns the contents of its config.json.

    Logs which file is executed for that. The parts that only training uses are not registered:
    their files may need what is not installed here.

    Args:
      workdir: the run's workdir.
      has_model: whether the caller provides the network, for runs whose network is a Python object.
      needs_data: whether the caller needs the data set, which is registered, too.

    Raises:
      CheckpointError: if there is no run, its record is not readable or written by an older
        version, or its network or data set is not available.
    """
    record = load_record(workdir)
    if record is None:
        raise CheckpointError(f"--workdir={workdir}: no run found here (no config.json)")
    if _CLASS_NAMES not in record.dataset:
        raise CheckpointError(
            f"{workdir.location_of(workdir.config)}: written by an older version, without class "
            "names. Rerun the training command once to add them; a finished run is only evaluated"
        )
    network = record.own.get("model")
    if network and not has_model:
        raise CheckpointError(
            f"--workdir={workdir}: its network is an object passed by a program ({network}). "
            "Load it in that program with inception_jax.load_weights(PATH, model=…). To use "
            "commands, register it with inception_jax.register_model and train by its name"
        )
    if needs_data and "dataset" in record.own:
        raise CheckpointError(
            f"--workdir={workdir}: its data set is an object passed by a program. To use this "
            "command, register it with inception_jax.register_dataset and train by its name"
        )
    kinds = [registry.MODELS.kind] * (not has_model) + [registry.DATASETS.kind] * needs_data
    parts = [part for part in record.parts if part["kind"] in kinds]
    import_parts(parts, str(workdir.location_of(workdir.config)), console.log_once)
    return record


def has_checkpoint(workdir: Workdir) -> bool:
    """Whether there is a finished checkpoint."""
    return bool(integrity.list_steps(workdir.checkpoints))


@dataclasses.dataclass(frozen=True)
class PreviousRun:
    """Record of earlier starts in a workdir, read once per start.

    Attributes:
      workdir: the workdir.
      record: the contents of config.json; None without a checkpoint, as such a workdir is
        compatible with any config.
    """

    workdir: Workdir
    record: Record | None = None


def load_previous_run(workdir: Workdir) -> PreviousRun:
    """Registers the parts that earlier starts used and returns their record.

    Logs which files are executed for that, and which settings are ignored.

    Raises:
      CheckpointError: if config.json is not readable, or a part is not available.
    """
    record = _load_checkpointed_record(workdir)
    if record:
        for note in record.notes:
            console.log_once(note)
        import_parts(record.parts, str(workdir.location_of(workdir.config)), console.log_once)
    return PreviousRun(workdir, record)


def _load_checkpointed_record(workdir: Workdir) -> Record | None:
    return load_record(workdir) if has_checkpoint(workdir) else None


def check_unchanged(previous: PreviousRun) -> None:
    """Checks, once a workdir is locked, that no other start has used it since it was read.

    Of a workdir in a bucket, this downloads what has changed.

    Raises:
      CheckpointError: if one has, because then its settings were not considered.
    """
    previous.workdir.download()
    if _load_checkpointed_record(previous.workdir) != previous.record:
        raise CheckpointError(
            f"--workdir={previous.workdir}: another process has trained in this folder while this "
            "one was starting; rerun the same command"
        )


def check_compatible(
    previous: PreviousRun, config: Config, custom_objects: Mapping[str, str] = _EMPTY
) -> list[str]:
    """Checks that a workdir belongs to this model and data set; an empty one fits any config.

    Args:
      previous: record of earlier starts.
      config: settings of this start.
      custom_objects: objects passed by the caller, as in `record_start`.

    Returns:
      'path: old → new' for each setting that differs and may be changed on resume.

    Raises:
      CheckpointError: naming the settings and objects that differ and must not.
    """
    record = previous.record
    if record is None:
        return []
    if missing := [
        f"{kind} ({name})" for kind, name in record.own.items() if kind not in custom_objects
    ]:
        raise CheckpointError(
            f"--workdir={previous.workdir}: this run uses objects passed by its program: "
            f"{', '.join(missing)}. Resume it from that program: inception_jax.train(config, "
            "workdir, …) with the same objects"
        )
    refused, allowed = configs.changes(record.config, config)
    refused += [
        f"{kind}: {old or 'as configured'} → {name}, an object passed by the program"
        for kind, name in custom_objects.items()
        if (old := record.own.get(kind)) != name
    ]
    if refused:
        raise _other_run_error(
            previous.workdir,
            refused,
            "Pass only --workdir to use the run's own settings, or use another --workdir",
        )
    return allowed


def restore_overrides(
    previous: PreviousRun,
    config: Config,
    experiment: Mapping[str, Any],
    given: Collection[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Applies the overrides of earlier starts that this start does not repeat.

    So the command that resumes or evaluates a run need not repeat them. Applies only if both use
    the same experiment: the same file, or one with the same settings.

    Args:
      previous: record of earlier starts.
      config: settings of this start; changed in place.
      experiment: origin of the settings, as returned by `cli.experiment`.
      given: paths of the settings, and entries of mappings, that this start overrides.
      log: called with a line that names the changed settings.

    Returns:
      The updated `experiment`.
    """
    own = dict(experiment["own"])
    if previous.record is None or not previous.record.experiment:
        return {**experiment, "own": own}
    old, origin = previous.record.config, previous.record.experiment
    restored: list[str] = []
    same_file = _resolved(origin["file"]) == _resolved(experiment["file"])
    chosen = tuple(path for path in configs.OPEN if configs.is_open(config, path))
    if same_file or _experiment_settings(old, origin, chosen) == _experiment_settings(
        config, experiment, chosen
    ):
        for path in origin["own"]:
            value, here = configs.get(old, path), configs.get(config, path)
            if configs.is_mapping(path):
                changed = _changed_entries(path, value, origin["own"][path], here)
            else:
                changed = {path: value} if value != here else {}
            for each, kept in changed.items():
                # A value on the command line may itself be a mapping.
                if not any(f"{each}.".startswith(f"{path}.") for path in given):
                    own.setdefault(path, configs.plain(here))
                    configs.put(config, each, kept)
                    restored.append(f"config.{each} = {kept!r}")
    if restored:
        log(f"kept from this run's start, as not on this command line: {', '.join(restored)}")
    return {**experiment, "own": own}


def _changed_entries(path: str, recorded: Any, recorded_own: Any, here: Any) -> dict[str, Any]:
    """Returns the entries of a mapping, by path, that earlier starts set and this one has not.

    A group that neither the experiment nor this start has is returned whole, without its defaults,
    so perhaps empty; of other groups, the settings that were set. Options are returned whole.

    Args:
      path: of the setting.
      recorded, here: its value in the record and in this start.
      recorded_own: the experiment's value of it when it was recorded.
    """
    group = configs.entry_group(path)
    defaults = configs.plain(group()) if group else {}
    recorded, recorded_own, here = (configs.plain(each) for each in (recorded, recorded_own, here))
    changed: dict[str, Any] = {}
    for name, entry in recorded.items():
        known = [each[name] for each in (recorded_own, here) if name in each]
        if group and known:
            others = [defaults | each.get(name, {}) for each in (recorded_own, here)]
            changed |= {
                f"{path}.{name}.{setting}": value
                for setting, value in entry.items()
                if value not in [other[setting] for other in others]
            }
        elif group:
            changed[f"{path}.{name}"] = {k: v for k, v in entry.items() if v != defaults[k]}
        elif entry not in known:
            changed[f"{path}.{name}"] = entry
    return changed


def _resolved(file: str) -> paths.Path:
    return paths.absolute(paths.user_path(file, file))


def _experiment_settings(
    config: Config, experiment: Mapping[str, Any], chosen: tuple[str, ...]
) -> dict[str, Any]:
    """Returns the experiment's own value of each setting by path, except those in `chosen`."""
    values = {path: configs.plain(configs.get(config, path)) for path, _, _ in configs.leaves()}
    values |= experiment["own"]
    return {path: value for path, value in values.items() if path not in chosen}


def with_recorded_auto_settings(previous: PreviousRun, config: Config) -> Config:
    """Returns the settings with automatic ones as resolved when the run started."""
    if previous.record is None:
        return config
    old = previous.record.config
    return configs.fill_open(config, {path: configs.get(old, path) for path in configs.OPEN})


def dataset_identity(dataset: Dataset) -> dict[str, Any]:
    """Returns what must stay the same for a resumed run to use the same examples and classes."""
    return {
        "name": dataset.name,
        "version": dataset.version,
        "classes": dataset.num_classes,
        "training examples": len(dataset.train),
        f"{dataset.eval_split} examples": len(dataset.evaluation),
        _CLASS_NAMES: list(dataset.class_names),
        "bit depth": dataset.bit_depth,
    }


def dataset_record(dataset: Dataset) -> dict[str, Any]:
    """Returns a data set's entry in config.json: its identity, and what else readers need."""
    record = dataset_identity(dataset) | {_ORDER: _order(dataset)}
    if (overlap := dataset.eval_train_overlap) is not None:
        record["evaluated and trained on"] = dataclasses.asdict(overlap)
    # Every float32 is exact as a double, so reading the text gives the same bits.
    return record | {"mean": dataset.mean.tolist(), "std": dataset.std.tolist()}


def _order(dataset: Dataset) -> str:
    """Returns a checksum of the training examples' names in their order."""
    return dataset.train.names_checksum[:16]


def check_order(previous: PreviousRun, dataset: Dataset) -> None:
    """Checks that a resumed run gets its training examples in the same order.

    A folder and its archive may give other orders; then batches would change, and examples that
    were held out might be trained on.

    Args:
      previous: record of earlier starts; those of older versions lack the checksum.
      dataset: this start's data set.

    Raises:
      CheckpointError: if names or order differ.
    """
    recorded = previous.record.dataset.get(_ORDER) if previous.record else None
    if recorded and recorded != _order(dataset):
        raise _other_run_error(
            previous.workdir,
            ["data set: the names or the order of the training files differ"],
            "Use data prepared from the same folder or archive, or another --workdir",
        )


def check_dataset(previous: PreviousRun, dataset: Mapping[str, Any]) -> None:
    """Checks that a run was trained on these examples.

    Two sources of the same name may differ in their counts or in the names or order of their
    classes, in which case the network would confuse labels.

    Args:
      previous: record of earlier starts.
      dataset: this start's data set, from `dataset_identity`.

    Raises:
      CheckpointError: naming the differences.
    """
    if previous.record is None:
        return
    # Without files of 16 bits per channel, the bit depth assumed for them does not matter.
    implied = dataset.get("bit depth") and configs.unrecorded_bit_depth(dataset["name"])
    old: dict[str, Any] = {"bit depth": implied, **previous.record.dataset}
    differing = [
        f"data set's {key}: {old.get(key)!r} → {value!r}"
        for key, value in dataset.items()
        if key != _CLASS_NAMES and old.get(key) != value
    ]
    # Older versions did not record them.
    if _CLASS_NAMES in old and (changes := class_changes(old[_CLASS_NAMES], dataset[_CLASS_NAMES])):
        differing.append(f"data set's {_CLASS_NAMES}: {changes}")
    if differing:
        raise _other_run_error(
            previous.workdir,
            differing,
            "Use the data set that it was trained on, or another --workdir",
        )


def _other_run_error(workdir: Workdir, differing: list[str], remedy: str) -> CheckpointError:
    lines = "\n  ".join(differing)
    return CheckpointError(
        f"--workdir={workdir}: belongs to another run; differences:\n  {lines}\n{remedy}"
    )


def record_start(
    previous: PreviousRun,
    config: Config,
    *,
    step: int,
    changed: Sequence[str],
    dataset: Mapping[str, Any],
    experiment: Mapping[str, Any] | None = None,
    custom_objects: Mapping[str, str] = _EMPTY,
) -> None:
    """Writes config.json at the start of a process.

    Args:
      previous: record of earlier starts.
      config: settings of this start.
      step: number of finished steps.
      changed: lines returned by `check_compatible`.
      dataset: the data set, from `dataset_record`.
      experiment: origin of the settings; None if unknown.
      custom_objects: names of objects passed in place of configured ones, keyed by "model",
        "optimizer" or "dataset".
    """
    changes = list(previous.record.changes) if previous.record else []
    if changed:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        changes.append({"step": step, "date": now, "settings": list(changed)})
    values = configs.to_dict(config)
    # Preparing changed data again is requested per start: a later start must not inherit it.
    values["data"]["on_change"] = configs.Data().on_change
    record = {
        "changes": changes,
        "config": values,
        "experiment": experiment,
        "parts": custom_parts(config),
        "own": dict(custom_objects),
        "dataset": dataset,
        "environment": environment.environment(),
    }
    atomic.write_json(previous.workdir.config, record)
