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
from collections.abc import Mapping
from typing import Any

from inception_jax import atomic, hosts
from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import CheckpointError, ConfigError, UserError
from inception_jax.telemetry import summary


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


def check_writable(workdir: Workdir, *, flag: str = "workdir") -> None:
    """Makes the folder and checks that files can be written in it.

    Args:
      workdir: the folder.
      flag: that named it, for the message.

    Raises:
      UserError: if they cannot.
    """
    probe = workdir.path / f".probe.{os.getpid()}"
    try:
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


def recorded(workdir: Workdir) -> dict[str, Any] | None:
    """Returns what config.json holds, or None in a new folder.

    Raises:
      CheckpointError: if the file cannot be read as that.
    """
    try:
        values = json.loads(workdir.config.read_text())
        configs.from_dict(values["config"])
        return values
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(
            f"{workdir.config}: cannot be read as the record of a run: {error}. "
            "Was it written by another version? Give another --workdir"
        ) from error


def recorded_run(workdir: Workdir) -> tuple[Config, dict[str, Any]]:
    """Returns the settings of a folder's run, and what it says of its data set.

    Raises:
      CheckpointError: if there is no run, its record cannot be read, or an older version wrote it.
    """
    record = recorded(workdir)
    if record is None:
        raise CheckpointError(f"--workdir={workdir.path}: there is no run here (no config.json)")
    dataset = record["dataset"]
    if "class names" not in dataset:
        raise CheckpointError(
            f"{workdir.config}: an older version wrote it, without the names of the classes. Start "
            "the training's command once more: it adds them, and ends at once where it is finished"
        )
    return configs.from_dict(record["config"]), dataset


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
    record = recorded(workdir) if has_checkpoint(workdir) else None
    if record is None:
        return []
    refused, allowed = configs.changes(configs.from_dict(record["config"]), config)
    if refused:
        raise CheckpointError(_other_run(workdir, refused))
    return allowed


def with_recorded(workdir: Workdir, config: Config) -> Config:
    """Returns the settings, with what they leave open as it was when the folder's run began.

    Raises:
      CheckpointError: if config.json cannot be read.
    """
    record = recorded(workdir) if has_checkpoint(workdir) else None
    if record is None:
        return config
    before = configs.from_dict(record["config"])
    return configs.fill_open(config, {p: configs.get(before, p) for p in configs.OPEN})


def check_dataset(workdir: Workdir, dataset: dict[str, Any]) -> None:
    """Checks that a folder's run was trained on these examples.

    Two sources may have the same name and other contents.

    Raises:
      CheckpointError: naming what differs.
    """
    record = recorded(workdir) if has_checkpoint(workdir) else None
    before = record["dataset"] if record else dataset
    if differing := [
        f"data set's {key}: {before.get(key)!r} → {value!r}"
        for key, value in dataset.items()
        if before.get(key) != value
    ]:
        raise CheckpointError(_other_run(workdir, differing))


def _other_run(workdir: Workdir, differing: list[str]) -> str:
    lines = "\n  ".join(differing)
    return (
        f"--workdir={workdir.path}: belongs to another run; what differs:\n  {lines}\n"
        "Give the settings it was started with, or another --workdir"
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
    record = (recorded(workdir) if has_checkpoint(workdir) else None) or {"changes": []}
    if changed:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record["changes"].append({"step": step, "date": now, "settings": changed})
    record |= {
        "config": configs.to_dict(config),
        "experiment": experiment,
        "dataset": dataset,
        "environment": summary.environment(),
    }
    write_json(workdir.config, record)
