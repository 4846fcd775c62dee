"""Configurations as dictionaries and JSON, and how two of them differ."""

import dataclasses
import json
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from inception_jax.config.fields import check_path, get, leaves, plain, put
from inception_jax.config.schema import Config
from inception_jax.errors import ConfigError


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the configuration that `to_dict` (and a pass through JSON) gave `values`.

    Raises:
      ConfigError: if a field is unknown.
    """
    config = Config()
    for path, value in flatten(values, stop={known for known, _, _ in leaves()}).items():
        check_path(path)
        put(config, path, value)
    return config


def unrecorded_bit_depth(data_name: str) -> int:
    """Returns the bit depth of what older versions prepared or trained, which recorded none.

    They took all 16 bits for used. Only image_folder can have such files; for others 0 stands.
    """
    return 16 if data_name == "image_folder" else 0


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run's config.json holds.

    Attributes:
      config: the settings.
      experiment: where they are from; None: not known.
      dataset: what the examples are.
      changes: of settings, when the run was resumed.
      environment: of the last start.
      parts: those that the settings name and that are not the package's own: kind, name and file.
      own: the names of objects that a program gave in place of what the settings name, by kind.
      notes: what of the settings is left out, a line for the log each.
    """

    config: Config
    experiment: Mapping[str, Any] | None
    dataset: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    parts: Sequence[Mapping[str, str]]
    own: Mapping[str, str]
    notes: Sequence[str] = ()


def read_record(path: pathlib.Path) -> Record:
    """Returns what a run's config.json holds.

    Raises:
      FileNotFoundError: if it is not there.
      ConfigError: if it cannot be read as the record of a run.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Record(
            config=from_dict(values["config"]),
            experiment=values.get("experiment"),
            dataset=values.get("dataset") or {},
            changes=values.get("changes") or [],
            environment=values.get("environment") or {},
            parts=values.get("parts") or [],
            own=values.get("own") or {},
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"{path}: cannot be read as the record of a run: {error}. Was it written by another "
            "version? Restore it from a backup, or use a new --workdir"
        ) from error


def flatten(
    values: Mapping[str, Any], prefix: str = "", *, stop: Collection[str] = ()
) -> dict[str, Any]:
    """Returns nested dictionaries as one, keyed by dotted path.

    Args:
      values: nested dictionaries.
      prefix: of their paths.
      stop: paths whose values are kept as they are, dictionaries or not.
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in stop:
            flat |= flatten(value, f"{prefix}{key}.", stop=stop)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shared(config: Config) -> dict[str, Any]:
    """Returns what the processes of a run must have in common, by the settings' full names."""
    return {
        f"config.{path}": plain(get(config, path))
        for path, _, field in leaves()
        if not field.metadata["per_host"]
    }


def _values(config: Config, path: str) -> dict[str, Any]:
    """Returns a setting's value by its path; of a mapping each entry's by its own."""
    value = get(config, path)
    if not isinstance(value, dict):
        return {path: value}
    return {f"{path}.{name}": entry for name, entry in value.items()}


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Returns what differs between the configuration of a workdir and a new one.

    Returns:
      (refused, allowed): 'path: old → new' of the fields that a resumed run may not change, and of
      those that it may.
    """
    refused: list[str] = []
    allowed: list[str] = []
    for path, _, field in leaves():
        before, after = _values(old, path), _values(new, path)
        kind = allowed if field.metadata["resumable"] else refused
        kind += [
            f"config.{each}: {before.get(each)!r} → {after.get(each)!r}"
            for each in dict.fromkeys([*before, *after])
            if before.get(each) != after.get(each)
        ]
    # The average is part of the state: it can neither be added to a run nor taken away.
    if bool(old.train.ema) != bool(new.train.ema):
        refused.append(f"config.train.ema: {old.train.ema} → {new.train.ema}")
    return refused, allowed
