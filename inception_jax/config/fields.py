"""Walks the fields of a configuration: paths, types, values, and help."""

import copy
import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from inception_jax.config import other_names
from inception_jax.config.schema import OPEN, Config
from inception_jax.errors import ConfigError, nearest


def leaves(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yields (dotted path, type, field) of every leaf setting, in order."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], path + ".")
        else:
            yield path, hints[field.name], field


@functools.cache
def _mappings() -> dict[str, Any]:
    """Returns the types of what the settings map names to that are mappings, by their paths."""
    return {
        path: typing.get_args(hint)[1]
        for path, hint, _ in leaves()
        if typing.get_origin(hint) is dict
    }


def is_mapping(path: str) -> bool:
    """Whether the setting at a dotted path is a mapping of names to values."""
    return path in _mappings()


def entry_group(path: str) -> Any:
    """Returns the class of the groups that the setting at a dotted path maps names to, or None."""
    kind = _mappings().get(path)
    return kind if dataclasses.is_dataclass(kind) else None


def entry_type(path: str) -> Any:
    """Returns the type of a setting inside a group of a mapping; None for any other path."""
    mapping, entry = mapping_of(path)
    kind, inside = entry_group(mapping), entry.partition(".")[2]
    return (
        next((hint for known, hint, _ in leaves(kind) if known == inside), None) if kind else None
    )


def entries(config: Config) -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yields (dotted path, type, field) of every leaf inside a mapping of names to groups."""
    for path in _mappings():
        if isinstance(found := get(config, path), dict):
            for name, entry in found.items():
                if dataclasses.is_dataclass(entry):
                    yield from leaves(type(entry), f"{path}.{name}.")


def mapping_of(path: str) -> tuple[str, str]:
    """Returns the setting that is a mapping and has an entry of this path, and the entry's path.

    Returns:
      ("model.options", "depth") for "model.options.depth"; ("", "") where there is none.
    """
    for known in _mappings():
        if path.startswith(f"{known}."):
            return known, path.removeprefix(f"{known}.")
    return "", ""


def get(config: Any, path: str) -> Any:
    """Returns the setting at a dotted path, or an entry of one that is a mapping."""
    for part in path.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


def put(config: Config, path: str, value: Any) -> None:
    """Changes the setting at a dotted path.

    Lists and dictionaries, which JSON makes of tuples and groups, become those again. A group in a
    mapping is made where one of its settings is the first to be given.
    """
    mapping, entry = mapping_of(path)
    if kind := entry_group(mapping):
        get(config, mapping).setdefault(entry.partition(".")[0], kind())
    parent, _, name = path.rpartition(".")
    group = get(config, parent) if parent else config
    if isinstance(value, Mapping) and (kind or entry_group(path)):
        if not kind:
            setattr(group, name, {})
        for inside, each in value.items():
            put(config, f"{path}.{inside}", each)
        return
    if isinstance(group, dict):
        group[name] = _with_tuples(value)
    else:
        setattr(group, name, _with_tuples(value))


def _with_tuples(value: Any) -> Any:
    """Returns a value with tuples in place of lists, inside a mapping too."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(entry) for name, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, tuple | list) else value


def plain(value: Any) -> Any:
    """Returns a setting's value as JSON gives it back: tuples as lists, groups as dictionaries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def is_open(config: Config, path: str) -> bool:
    """Whether a setting is left to be chosen by the size of the data, or by the hardware."""
    asked = config.train.auto_size is True or path == "model.dtype"
    return asked and path in OPEN and get(config, path) == OPEN[path]


def fill_open(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a configuration with what it leaves open taken from values by dotted path."""
    filled = copy.deepcopy(config)
    for path, value in values.items():
        if is_open(config, path):
            group, _, name = path.rpartition(".")
            setattr(get(filled, group), name, copy.copy(value))
    return filled


def check_path(path: str) -> None:
    """Checks that a dotted path names a setting.

    Raises:
      ConfigError: with a suggestion, if it does not.
    """
    paths = {known for known, _, _ in leaves()}
    mapping, entry = mapping_of(path)
    if kind := entry_group(mapping):
        name, _, inside = entry.partition(".")
        inner_paths = [known for known, _, _ in leaves(kind)]
        if inside in inner_paths:
            return
        hint = nearest(inside, inner_paths) if inside else ""
        raise ConfigError(
            f"config.{path}: no such setting.{hint} config.{mapping}.{name} has "
            f"{', '.join(inner_paths)}"
        )
    if path in paths or entry:
        return
    if inner := [known for known in paths if known.startswith(f"{path}.")]:
        some = ", ".join(sorted(inner))
        raise ConfigError(f"config.{path}: is a group of settings; give one of {some}")
    raise ConfigError(unknown_field(path))


def unknown_field(path: str) -> str:
    """Returns the message for a setting that does not exist, with a suggestion."""
    return f"config.{path}: no such setting.{did_you_mean(path)} See --help for all settings"


def did_you_mean(path: str, prefix: str = "") -> str:
    """Returns ' Did you mean X?' for the name or path of a setting that does not exist, or ''.

    It knows the names of settings in older versions and in other trainers.

    Args:
      path: what was given, with or without a group.
      prefix: put before the setting's path.
    """
    path = path.lower().replace("-", "_")
    if renamed := other_names.new_name(path, prefix):
        return f" It is now {renamed}."
    group, _, name = path.rpartition(".")
    known = [known_path for known_path, _, _ in leaves()]
    same_name = [p for p in known if p.rpartition(".")[2] == name]
    same_group = [p for p in same_name if group and p.startswith(f"{group.partition('.')[0]}.")]
    if not same_group and name in other_names.ANSWER_TO:
        return f" {other_names.ANSWER_TO[name]}."
    meant = [*same_group, *filter(None, [other_names.SETTING_OF.get(name)]), *same_name]
    return f" Did you mean {prefix}{meant[0]}?" if meant else nearest(path, known, prefix)


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's declared type; an int passes for a float."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(matches(v, typing.get_args(hint)[0]) for v in value)
    if typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        return isinstance(value, dict) and all(
            isinstance(name, str) and (kind is Any or isinstance(each, kind))
            for name, each in value.items()
        )
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """Returns the name of a setting's type, for messages."""
    if typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        return f"a mapping of names to {'values' if kind is Any else kind.__name__}"
    return str(hint) if typing.get_args(hint) else hint.__name__
