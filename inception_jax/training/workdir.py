"""The folder of a run: whose it is, and what was changed when it was resumed.

`config.json` holds the resolved configuration, what the data set was, the environment, and the
settings that later starts changed. A folder is used by one model on one data set; a start that
would mix two is refused.
"""

import dataclasses
import datetime
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Collection, Mapping
from typing import Any

from inception_jax import config as configs
from inception_jax.config import Config, Duration, Record
from inception_jax.datasets.dataset import class_changes
from inception_jax.errors import CheckpointError, ConfigError, UserError
from inception_jax.runtime import environment, hosts
from inception_jax.storage import atomic, paths

# What the record of a data set calls them.
_NAMES = "class names"


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths in a run's folder."""

    path: pathlib.Path

    @property
    def config(self) -> pathlib.Path:
        """The record of the run's settings."""
        return self.path / "config.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def result(self) -> pathlib.Path:
        """The last evaluation."""
        return self.path / "result.json"


def write_json(path: pathlib.Path, values: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all.

    Raises:
      UserError: if it cannot be written.
    """
    with atomic.replacing(path) as temporary, temporary.open("w") as file:
        json.dump(values, file, indent=2)
        file.write("\n")


def needed(workdir: Workdir | None) -> Workdir:
    """Returns the folder that training needs.

    Raises:
      UserError: if there is none.
    """
    if workdir is None:
        raise UserError(
            "--mode=train needs --workdir=DIR; to start from a file of weights, give it as "
            "--config.init.weights=FILE instead of --weights"
        )
    return workdir


def check_writable(workdir: Workdir, *, flag: str = "workdir", own: bool = True) -> None:
    """Makes the folder and checks that files can be written in it.

    Args:
      workdir: the folder.
      flag: that named it, for the message.
      own: whether all in it is to be this program's, as of a run.

    Raises:
      UserError: if they cannot.
    """
    probe = workdir.path / f".probe.{os.getpid()}"
    try:
        if own:
            atomic.make_output_folder(workdir.path)
        workdir.path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--{flag}={workdir.path}: cannot be written to: {error.strerror}. "
            "Give a folder on a disk with room that you may write to"
        ) from error


def check_shared(workdir: Workdir) -> None:
    """Checks that all processes of a run see the same folder; nothing to do for one alone.

    Raises:
      UserError: in all of them, naming those that do not.
    """
    if not hosts.several():
        return
    own = workdir.path / f".probe.{secrets.token_hex(8)}"
    own.touch()
    try:
        # A name that no process has asked for before, as network file systems remember answers.
        written = workdir.path / hosts.gather("folder", own.name)[0]
        what = f"--workdir={workdir.path} holds what process 0 wrote there"
        hosts.agree("shared folder", lambda: {what: written.exists()})
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


def recorded_settings(workdir: Workdir | None) -> Config | None:
    """Returns the settings of the run that has a checkpoint in a folder; None if there is none.

    Raises:
      CheckpointError: if its record cannot be read.
    """
    record = recorded(workdir) if workdir and has_checkpoint(workdir) else None
    return None if record is None else record.config


def recorded_run(workdir: Workdir) -> Record:
    """Returns what a folder's config.json holds, the names of the classes among it.

    Raises:
      CheckpointError: if there is no run, its record cannot be read, or an older version wrote it.
    """
    record = recorded(workdir)
    if record is None:
        raise CheckpointError(f"--workdir={workdir.path}: there is no run here (no config.json)")
    if _NAMES not in record.dataset:
        raise CheckpointError(
            f"{workdir.config}: an older version wrote it, without the names of the classes. Start "
            "the training's command once more: it adds them, and ends at once where it is finished"
        )
    return record


def has_checkpoint(workdir: Workdir) -> bool:
    """Whether a finished checkpoint is in the folder. Orbax gives it its plain name at the end."""
    return workdir.checkpoints.is_dir() and any(
        child.name.isdecimal() for child in workdir.checkpoints.iterdir()
    )


def check_owner(workdir: Workdir, config: Config) -> list[str]:
    """Checks that a folder belongs to this model and data set, or to none yet.

    A folder without a checkpoint holds nothing that could be mixed up: it belongs to nobody.

    Returns:
      'path: old → new' of the settings that differ and may.

    Raises:
      CheckpointError: naming the settings that differ and may not.
    """
    before = recorded_settings(workdir)
    if before is None:
        return []
    refused, allowed = configs.changes(before, config)
    if refused:
        raise _other_run(
            workdir,
            refused,
            "Give --workdir alone to use the run's own settings, or another --workdir",
        )
    return allowed


def recall(
    workdir: Workdir | None,
    config: Config,
    experiment: Mapping[str, Any],
    given: Collection[str],
    log: Callable[[str], None],
) -> dict[str, Any]:
    """Changes settings to what earlier starts of the run overrode and this one leaves out.

    So the command that resumes or evaluates a run need not repeat them. Only where both took the
    same experiment: the same file, or one of the same settings.

    Args:
      workdir: of the run; None: there is none.
      config: of this start; changed in place.
      experiment: where it is from, as `cli.experiment` says it.
      given: paths of the settings that this start overrides itself.
      log: takes a line that names what is changed, and those on the record itself.

    Returns:
      Where the settings are from now, as `experiment`.

    Raises:
      CheckpointError: if the run's record cannot be read.
    """
    record = recorded(workdir) if workdir and has_checkpoint(workdir) else None
    before = record.experiment if record else None
    for note in record.notes if record else ():
        log(note)
    own = dict(experiment["own"])
    lengths = _given_lengths(config, given) if record else ()
    for path, _, _ in configs.leaves():
        # The unit that is given takes the place of the one that the run had.
        if path.startswith(lengths) and path not in given and (here := configs.get(config, path)):
            configs.put(config, path, type(here)(0))
            own.setdefault(path, here)
    recalled: list[str] = []
    if record and before:
        old = record.config
        same_file = _resolved(before["file"]) == _resolved(experiment["file"])
        chosen = tuple(path for path in configs.OPEN if configs.is_open(config, path))
        written = [_as_written(old, before, chosen), _as_written(config, experiment, chosen)]
        if same_file or written[0] == written[1]:
            for path in before["own"]:
                value, here = configs.get(old, path), configs.get(config, path)
                if path not in given and not path.startswith(lengths) and value != here:
                    configs.put(config, path, value)
                    own[path] = configs.plain(here)
                    recalled.append(f"config.{path} = {value!r}")
    if recalled:
        log(f"not given, so as the run was started: {', '.join(recalled)}")
    return {**experiment, "own": own}


def _given_lengths(config: Config, given: Collection[str]) -> tuple[str, ...]:
    """Returns what the paths begin with of the durations for which a unit is given."""
    groups = {path.rpartition(".")[0] for path in given if configs.get(config, path)} - {""}
    return tuple(f"{path}." for path in groups if isinstance(configs.get(config, path), Duration))


def _resolved(file: str) -> pathlib.Path:
    return paths.local(file, file).resolve()


def _as_written(
    config: Config, experiment: Mapping[str, Any], chosen: tuple[str, ...]
) -> dict[str, Any]:
    """Returns all settings as the experiment itself has them, by path, but for those left open."""
    values = {path: configs.plain(configs.get(config, path)) for path, _, _ in configs.leaves()}
    values |= dict(experiment["own"])
    # train.length is a group, of which the leaves are train.length.epochs and others.
    return {
        path: value
        for path, value in values.items()
        if not f"{path}.".startswith(tuple(f"{open}." for open in chosen))
    }


def with_recorded(workdir: Workdir, config: Config) -> Config:
    """Returns the settings, with what they leave open as it was when the folder's run began.

    Raises:
      CheckpointError: if config.json cannot be read.
    """
    before = recorded_settings(workdir)
    if before is None:
        return config
    return configs.fill_open(config, {p: configs.get(before, p) for p in configs.OPEN})


def check_dataset(workdir: Workdir, dataset: dict[str, Any]) -> None:
    """Checks that a folder's run was trained on these examples.

    Two sources may have the same name and other contents: other counts, or classes of other names
    or in another order, whose labels the network would mix up.

    Raises:
      CheckpointError: naming what differs.
    """
    record = recorded(workdir) if has_checkpoint(workdir) else None
    before = dict(record.dataset) if record else dataset
    # Where there is no file of 16 bits a channel, it does not matter what was taken for theirs.
    implied = dataset.get("bit depth") and configs.unrecorded_bit_depth(dataset["name"])
    before = {"bit depth": implied} | before
    differing = [
        f"data set's {key}: {before.get(key)!r} → {value!r}"
        for key, value in dataset.items()
        if key != _NAMES and before.get(key) != value
    ]
    # Older versions did not record them.
    if _NAMES in before and (changes := class_changes(before[_NAMES], dataset[_NAMES])):
        differing.append(f"data set's {_NAMES}: {changes}")
    if differing:
        raise _other_run(
            workdir,
            differing,
            "Use the data set that it was trained on, or another --workdir",
        )


def _other_run(workdir: Workdir, differing: list[str], remedy: str) -> CheckpointError:
    lines = "\n  ".join(differing)
    return CheckpointError(
        f"--workdir={workdir.path}: belongs to another run; what differs:\n  {lines}\n{remedy}"
    )


def record_start(
    workdir: Workdir,
    config: Config,
    *,
    step: int,
    changed: list[str],
    dataset: dict[str, Any],
    experiment: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json at the start of a process.

    Args:
      workdir: of the run.
      config: of this start.
      step: finished steps at this start.
      changed: what `check_owner` returned.
      dataset: what the examples are.
      experiment: where the settings are from; None: not known.
    """
    record = recorded(workdir) if has_checkpoint(workdir) else None
    changes = list(record.changes) if record else []
    if changed:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        changes.append({"step": step, "date": now, "settings": changed})
    values = configs.to_dict(config)
    # To prepare changed data again is asked for once: no later start may do so unasked.
    values["data"]["on_change"] = configs.Data().on_change
    written = {
        "changes": changes,
        "config": values,
        "experiment": experiment,
        "dataset": dataset,
        "environment": environment.environment(),
    }
    write_json(workdir.config, written)
