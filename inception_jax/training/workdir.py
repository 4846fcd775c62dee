"""The folder of a run: whose it is, and what was changed when it was resumed.

`config.json` holds the resolved configuration, what the data set was, the environment, and the
settings that later starts changed. A folder is used by one model on one data set; a start that
would mix two is refused.
"""

import dataclasses
import datetime
import os
import pathlib
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from inception_jax import config as configs
from inception_jax import console
from inception_jax.config import Config, Record
from inception_jax.datasets.dataset import Dataset, class_changes
from inception_jax.errors import CheckpointError, ConfigError, UserError
from inception_jax.experiment import import_parts, used_parts
from inception_jax.runtime import environment, hosts
from inception_jax.storage import atomic, paths
from inception_jax.storage.workdir import Workdir

# What the record of a data set calls them.
_NAMES = "class names"
_NONE: Mapping[str, str] = {}


def check_writable(folder: pathlib.Path, *, flag: str = "workdir", own: bool = True) -> None:
    """Makes the folder and checks that files can be written in it.

    Args:
      folder: to write in.
      flag: that named it, for the message.
      own: whether all in it is to be this program's, as of a run.

    Raises:
      UserError: if they cannot.
    """
    probe = folder / f".probe.{os.getpid()}"
    try:
        if own:
            atomic.make_output_folder(folder)
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--{flag}={folder}: cannot be written to: {error.strerror}. "
            "Give a folder on a disk with room that you may write to"
        ) from error


def check_shared(workdir: Workdir) -> None:
    """Checks that all processes of a run see the same folder; nothing to do for one alone.

    Raises:
      UserError: in all of them, naming those that do not.
    """
    if not hosts.is_multi_process():
        return
    own = workdir.path / f".probe.{secrets.token_hex(8)}"
    own.touch()
    try:
        # A name that no process has asked for before, as network file systems remember answers.
        written = workdir.path / hosts.gather("folder", own.name)[0]
        what = f"--workdir={workdir.path} holds what process 0 wrote there"
        hosts.check_consistent("shared folder", lambda: {what: written.exists()})
    finally:
        own.unlink()


def recorded(workdir: Workdir) -> Record | None:
    """Returns what config.json holds, or None in a new folder.

    Raises:
      CheckpointError: if the file cannot be read as that.
    """
    try:
        return configs.read_record(workdir.config)
    except FileNotFoundError:
        return None
    except ConfigError as error:
        raise CheckpointError(str(error)) from error


def recorded_run(workdir: Workdir, *, has_model: bool = False) -> Record:
    """Returns what a folder's config.json holds, once the parts that its run uses are registered.

    Says which files are run for that.

    Args:
      workdir: of the run.
      has_model: whether the caller has the run's network, if that is an object of a program's own.

    Raises:
      CheckpointError: if there is no run, its record cannot be read, an older version wrote it, or
        its network cannot be had.
    """
    record = recorded(workdir)
    if record is None:
        raise CheckpointError(f"--workdir={workdir.path}: there is no run here (no config.json)")
    if _NAMES not in record.dataset:
        raise CheckpointError(
            f"{workdir.config}: an older version wrote it, without the names of the classes. Start "
            "the training's command once more: it adds them, and ends at once where it is finished"
        )
    network = record.own.get("model")
    if network and not has_model:
        raise CheckpointError(
            f"--workdir={workdir.path}: its network is an object that a program gave ({network}). "
            "That program has it: inception_jax.load_weights(PATH, model=…). For commands, "
            "register it with inception_jax.register_model, and train by its name"
        )
    import_parts(record.parts, str(workdir.config), console.say_once)
    return record


def has_checkpoint(workdir: Workdir) -> bool:
    """Whether a finished checkpoint is in the folder. Orbax gives it its plain name at the end."""
    return workdir.checkpoints.is_dir() and any(
        child.name.isdecimal() for child in workdir.checkpoints.iterdir()
    )


@dataclasses.dataclass(frozen=True)
class Previous:
    """What earlier starts left in a folder, read once a start.

    Attributes:
      workdir: the folder.
      record: what config.json holds; None as long as there is no checkpoint: such a folder holds
        nothing that could be mixed up, and belongs to nobody.
    """

    workdir: Workdir
    record: Record | None = None


def previous(workdir: Workdir) -> Previous:
    """Returns what earlier starts left in a folder, once the parts that they used are registered.

    Says which files are run for that, and which settings are left out.

    Raises:
      CheckpointError: if config.json cannot be read, or a part cannot be had.
    """
    record = recorded(workdir) if has_checkpoint(workdir) else None
    if record:
        for note in record.notes:
            console.say_once(note)
        import_parts(record.parts, str(workdir.config), console.say_once)
    return Previous(workdir, record)


def check_compatible(before: Previous, config: Config, own: Mapping[str, str] = _NONE) -> list[str]:
    """Checks that a folder belongs to this model and data set, or to none yet.

    Args:
      before: what earlier starts left in the folder.
      config: of this start.
      own: what objects the caller of this start gave, as `record_start` takes them.

    Returns:
      'path: old → new' of the settings that differ and may.

    Raises:
      CheckpointError: naming the settings and objects that differ and may not.
    """
    record = before.record
    if record is None:
        return []
    if missing := [f"{kind} ({name})" for kind, name in record.own.items() if kind not in own]:
        raise CheckpointError(
            f"--workdir={before.workdir.path}: this run has objects that its program gave: "
            f"{', '.join(missing)}. Start it from that program: inception_jax.train(config, "
            "workdir, …) with the same objects"
        )
    refused, allowed = configs.changes(record.config, config)
    refused += [
        f"{kind}: {old or 'that of the settings'} → {name}, an object of the program's"
        for kind, name in own.items()
        if (old := record.own.get(kind)) != name
    ]
    if refused:
        raise _other_run(
            before.workdir,
            refused,
            "Give --workdir alone to use the run's own settings, or another --workdir",
        )
    return allowed


def recall(
    before: Previous,
    config: Config,
    experiment: Mapping[str, Any],
    given: Collection[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Changes settings to what earlier starts of the run overrode and this one leaves out.

    So the command that resumes or evaluates a run need not repeat them. Only where both took the
    same experiment: the same file, or one of the same settings.

    Args:
      before: what earlier starts left.
      config: of this start; changed in place.
      experiment: where it is from, as `cli.experiment` says it.
      given: paths of the settings that this start overrides itself.
      log: takes a line that names what is changed, and those on the record itself.

    Returns:
      Where the settings are from now, as `experiment`.
    """
    own = dict(experiment["own"])
    if before.record is None:
        return {**experiment, "own": own}
    old, origin = before.record.config, before.record.experiment
    if not origin:
        return {**experiment, "own": own}
    recalled: list[str] = []
    same_file = _resolved(origin["file"]) == _resolved(experiment["file"])
    chosen = tuple(path for path in configs.OPEN if configs.is_open(config, path))
    if same_file or _as_written(old, origin, chosen) == _as_written(config, experiment, chosen):
        for path in origin["own"]:
            value, here = configs.get(old, path), configs.get(config, path)
            if path not in given and value != here:
                configs.put(config, path, value)
                own[path] = configs.plain(here)
                recalled.append(f"config.{path} = {value!r}")
    if recalled:
        log(f"not given, so as the run was started: {', '.join(recalled)}")
    return {**experiment, "own": own}


def _resolved(file: str) -> pathlib.Path:
    return paths.local(file, file).resolve()


def _as_written(
    config: Config, experiment: Mapping[str, Any], chosen: tuple[str, ...]
) -> dict[str, Any]:
    """Returns all settings as the experiment itself has them, by path, but for those left open."""
    values = {path: configs.plain(configs.get(config, path)) for path, _, _ in configs.leaves()}
    values |= dict(experiment["own"])
    return {path: value for path, value in values.items() if path not in chosen}


def with_recorded(before: Previous, config: Config) -> Config:
    """Returns the settings, with what they leave open as it was when the folder's run began."""
    if before.record is None:
        return config
    old = before.record.config
    return configs.fill_open(config, {path: configs.get(old, path) for path in configs.OPEN})


def dataset_identity(dataset: Dataset) -> dict[str, Any]:
    """Returns what must stay the same for a resumed run to see the same examples and classes."""
    return {
        "name": dataset.name,
        "version": dataset.version,
        "classes": dataset.num_classes,
        "training examples": len(dataset.train),
        f"{dataset.eval_split} examples": len(dataset.evaluation),
        _NAMES: list(dataset.class_names),
        "bit depth": dataset.bit_depth,
    }


def dataset_record(dataset: Dataset) -> dict[str, Any]:
    """Returns what config.json says of a data set: its identity, and what else a reader needs."""
    record = dataset_identity(dataset)
    if (found := dataset.trained_on) is not None:
        record["evaluated and trained on"] = dataclasses.asdict(found)
    # Every float32 is a double too, so the text gives back the same bits.
    return record | {"mean": dataset.mean.tolist(), "std": dataset.std.tolist()}


def check_dataset(before: Previous, dataset: Mapping[str, Any]) -> None:
    """Checks that a folder's run was trained on these examples.

    Two sources may have the same name and other contents: other counts, or classes of other names
    or in another order, whose labels the network would mix up.

    Args:
      before: what earlier starts left in the folder.
      dataset: of this start, as `dataset_identity` gives it.

    Raises:
      CheckpointError: naming what differs.
    """
    if before.record is None:
        return
    # Where there is no file of 16 bits a channel, it does not matter what was taken for theirs.
    implied = dataset.get("bit depth") and configs.unrecorded_bit_depth(dataset["name"])
    old: dict[str, Any] = {"bit depth": implied, **before.record.dataset}
    differing = [
        f"data set's {key}: {old.get(key)!r} → {value!r}"
        for key, value in dataset.items()
        if key != _NAMES and old.get(key) != value
    ]
    # Older versions did not record them.
    if _NAMES in old and (changes := class_changes(old[_NAMES], dataset[_NAMES])):
        differing.append(f"data set's {_NAMES}: {changes}")
    if differing:
        raise _other_run(
            before.workdir,
            differing,
            "Use the data set that it was trained on, or another --workdir",
        )


def _other_run(workdir: Workdir, differing: list[str], remedy: str) -> CheckpointError:
    lines = "\n  ".join(differing)
    return CheckpointError(
        f"--workdir={workdir.path}: belongs to another run; what differs:\n  {lines}\n{remedy}"
    )


def record_start(
    before: Previous,
    config: Config,
    *,
    step: int,
    changed: Sequence[str],
    dataset: Mapping[str, Any],
    experiment: Mapping[str, Any] | None = None,
    own: Mapping[str, str] = _NONE,
) -> None:
    """Writes config.json at the start of a process.

    Args:
      before: what earlier starts left in the folder of the run.
      config: of this start.
      step: finished steps at this start.
      changed: what `check_compatible` returned.
      dataset: what the examples are, as `dataset_record` gives it.
      experiment: where the settings are from; None: not known.
      own: the names of objects that a program gave in place of what the settings name: of a
        "model", an "optimizer" or a "dataset".
    """
    changes = list(before.record.changes) if before.record else []
    if changed:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        changes.append({"step": step, "date": now, "settings": list(changed)})
    values = configs.to_dict(config)
    # To prepare changed data again is asked for once: no later start may do so unasked.
    values["data"]["on_change"] = configs.Data().on_change
    record = {
        "changes": changes,
        "config": values,
        "experiment": experiment,
        "parts": used_parts(config),
        "own": dict(own),
        "dataset": dataset,
        "environment": environment.environment(),
    }
    atomic.write_json(before.workdir.config, record)
