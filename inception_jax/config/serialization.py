"""Converts configurations to and from dictionaries and JSON, and compares them."""

import copy
import dataclasses
import json
import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from inception_jax.config import durations
from inception_jax.config.fields import get, leaves, matches, plain, put, type_name
from inception_jax.config.other_names import RENAMED
from inception_jax.config.schema import Config
from inception_jax.errors import ConfigError
from inception_jax.storage import access, paths


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries that can be stored as JSON."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the configuration from the output of `to_dict`, stored as JSON or not.

    Raises:
      ConfigError: if a setting is unknown.
    """
    config, notes = read_settings(values)
    if notes:
        raise ConfigError("\n".join(notes))
    return config


def read_settings(values: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """Returns settings recorded by this or another version; only their types are checked.

    Rules may have changed since, so a new run must `validate` them.

    Args:
      values: the output of that version's `to_dict`, or settings by dotted path; missing settings
        have their default.

    Returns:
      The settings, and a log line for each one that is ignored: settings that this version does not
      have, and settings of the wrong type that affect neither the network nor the examples.

    Raises:
      ConfigError: if a setting that affects the network or the examples has the wrong type.
    """
    config, default, notes = Config(), Config(), list[str]()
    known = {path: (hint, field) for path, hint, field in leaves()}
    for path, value in flatten(_with_new_names(values, notes), stop=known).items():
        if any(each.startswith(f"{path}.") for each in known):
            raise ConfigError(f"config.{path} = {value!r}: must be a group of settings")
        if path not in known:
            notes.append(
                f"config.{path} = {value!r}: ignored, because this version has no such setting"
            )
            continue
        hint, field = known[path]
        put(config, path, _without_unknown(path, value, hint, notes))
        if matches(get(config, path), hint):
            continue
        problem = f"config.{path} = {value!r}: must be of type {type_name(hint)}"
        if not field.metadata["resumable"]:
            raise ConfigError(problem)
        put(config, path, get(default, path))
        notes.append(f"{problem}; the default is used, {get(default, path)!r}")
    return config, notes


def _without_unknown(path: str, value: Any, hint: Any, notes: list[str]) -> Any:
    """Returns a value; if it is a mapping of groups, without settings unknown to this version."""
    kind = (typing.get_args(hint) or (None, None))[-1]
    if not (isinstance(value, Mapping) and dataclasses.is_dataclass(kind)):
        return value
    hints = {inside: hint for inside, hint, _ in leaves(typing.cast(type, kind))}
    groups: dict[str, dict[str, Any]] = {}
    for name, group in value.items():
        groups[name] = {}
        for inside, each in flatten(group if isinstance(group, Mapping) else {"": group}).items():
            if inside in hints and matches(each, hints[inside]):
                groups[name][inside] = each
            else:
                notes.append(
                    f"config.{path}.{name}.{inside} = {each!r}: ignored, because this version has "
                    "no such setting, or it has another type"
                )
    return groups


def _with_new_names(values: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """Returns nested settings under today's names, and notes settings present under both names."""
    updated: dict[str, Any] = {}
    for path, value in values.items():
        group, name = _group_of(updated, path)
        group[name] = copy.deepcopy(value)
    for pattern, renamed in RENAMED.items():
        for old, path in _matching(updated, pattern, renamed.path):
            group, name = _group_of(updated, old)
            if name not in group:
                continue
            value = group.pop(name)
            moved = renamed.convert(value, group) if renamed.convert else value
            if not path:
                continue
            group, name = _group_of(updated, path)
            # Under two names, the one with an empty value gives way.
            if "" not in (moved, group.get(name, "")):
                notes.append(f"config.{old} = {value!r}: ignored, because config.{path} is set too")
            elif moved != "" or name not in group:
                group[name] = moved
    return updated


def _matching(values: dict[str, Any], old: str, new: str) -> list[tuple[str, str]]:
    """Returns an old and a new path, once for each name that '*' matches in both."""
    if "*" not in old:
        return [(old, new)]
    group, name = _group_of(values, old.partition(".*")[0])
    names = group.get(name)
    return [(old.replace("*", each), new.replace("*", each)) for each in names or ()]


def _group_of(values: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    """Returns the dictionary that contains the value at a dotted path, and its key there."""
    *groups, name = path.split(".")
    for group in groups:
        inner = values.setdefault(group, {})
        values = inner if isinstance(inner, dict) else {}
    return values, name


def unrecorded_bit_depth(data_name: str) -> int:
    """Returns the bit depth of data that older versions prepared or used without recording it.

    Those of image_folder assumed that all 16 bits are used; the others scaled each 16-bit image by
    its own largest value, which is 0.
    """
    return 16 if data_name == "image_folder" else 0


@dataclasses.dataclass(frozen=True)
class Record:
    """The contents of a run's config.json.

    Attributes:
      config: the settings, under today's names.
      experiment: the file they come from ("file"), and the file's own values of settings that the
        command line overrode ("own"), by today's paths; None = unknown.
      dataset: the data set's identity and statistics.
      changes: the changes of settings on resume.
      environment: software and hardware of the last start.
      parts: kind, name and file of the custom parts that the settings name.
      own: names of the objects that a program passed instead of naming a part, by kind.
      notes: a log line for each setting that is ignored.
    """

    config: Config
    experiment: Mapping[str, Any] | None
    dataset: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]
    environment: Mapping[str, Any]
    parts: Sequence[Mapping[str, str]] = ()
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)
    notes: Sequence[str] = ()


def read_record(path: paths.Path, shown: paths.Path | None = None) -> Record:
    """Returns the contents of a run's config.json, written by any version since 0.1.0.

    Args:
      path: the file.
      shown: its path for messages, if that is another one.

    Raises:
      BucketError: if it is in a bucket that cannot be read.
      FileNotFoundError: if the file does not exist.
      ConfigError: if it is not a valid record of a run.
    """
    shown = shown or path
    try:
        values = json.loads(access.read_bytes(path))
        config, notes = read_settings(values["config"])
        return Record(
            config=config,
            experiment=_experiment(values, config),
            dataset=values.get("dataset") or {},
            changes=values.get("changes") or [],
            environment=values.get("environment") or {},
            parts=values.get("parts") or [],
            own=values.get("own") or {},
            notes=[f"{shown}: {note}" for note in notes],
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise ConfigError(
            f"{shown}: not a valid record of a run: {error}. Restore it from a backup, or use a "
            "new --workdir"
        ) from error


def _experiment(values: Mapping[str, Any], config: Config) -> dict[str, Any] | None:
    """Returns where recorded settings come from, with the file's own values by today's paths."""
    recorded = values.get("experiment")
    if not recorded:
        return None
    own = copy.deepcopy(values["config"])
    for path, value in recorded["own"].items():
        group, name = _group_of(own, path)
        group[name] = value
    before, _ = read_settings(own)
    pairs = ((path, plain(get(before, path)), plain(get(config, path))) for path, _, _ in leaves())
    return {"file": recorded["file"], "own": {path: own for path, own, now in pairs if own != now}}


def flatten(
    values: Mapping[str, Any], prefix: str = "", *, stop: Collection[str] = ()
) -> dict[str, Any]:
    """Flattens nested dictionaries into one, keyed by dotted path.

    Args:
      values: nested dictionaries.
      prefix: put before each path.
      stop: paths whose values are not flattened further.

    >>> flatten({"train": {"batch_size": 128}, "seed": 0})
    {'train.batch_size': 128, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and f"{prefix}{key}" not in stop:
            flat |= flatten(value, f"{prefix}{key}.", stop=stop)
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shared(config: Config) -> dict[str, Any]:
    """Returns the settings that must be equal in all processes of a run, by their full names."""
    return {
        f"config.{path}": plain(get(config, path))
        for path, _, field in leaves()
        if not field.metadata["per_host"]
    }


def _values(config: Config, path: str) -> dict[str, Any]:
    """Returns a setting's value by path; for a mapping, each entry's value by its own path."""
    value = get(config, path)
    if not isinstance(value, dict):
        return {path: value}
    return {f"{path}.{name}": entry for name, entry in value.items()}


def _same(before: Any, after: Any, is_duration: bool) -> bool:
    """Whether two values of a setting are the same; durations may be written differently."""
    if is_duration and isinstance(before, str) and isinstance(after, str):
        return durations.same(before, after)
    return bool(plain(before) == plain(after))


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Returns how the configuration of a workdir differs from a new one.

    Returns:
      (refused, allowed): 'path: old → new' for settings that must not change on resume, and for
      those that may.
    """
    refused: list[str] = []
    allowed: list[str] = []
    for path, _, field in leaves():
        before, after = _values(old, path), _values(new, path)
        kind = allowed if field.metadata["resumable"] else refused
        kind += [
            f"config.{each}: {before.get(each)!r} → {after.get(each)!r}"
            for each in dict.fromkeys([*before, *after])
            if not _same(before.get(each), after.get(each), field.metadata["duration"])
        ]
    # An average is part of the state, so it can be neither added to a run nor removed.
    if old.train.keeps_average != new.train.keeps_average:
        refused.append(f"config.train.ema: {old.train.ema!r} → {new.train.ema!r}")
    return refused, allowed
