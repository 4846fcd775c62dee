"""Access to settings by dotted path: their types, values, and suggestions for unknown names."""

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
    """Returns the value types of the settings that are mappings, by dotted path."""
    return {
        path: typing.get_args(hint)[1]
        for path, hint, _ in leaves()
        if typing.get_origin(hint) is dict
    }


def is_mapping(path: str) -> bool:
    """Whether the setting at a dotted path is a mapping."""
    return path in _mappings()


def entry_group(path: str) -> Any:
    """Returns the dataclass of a mapping's values, or None if they are plain values."""
    kind = _mappings().get(path)
    return kind if dataclasses.is_dataclass(kind) else None


def entry_type(path: str) -> Any:
    """Returns the type of a setting inside a mapping's group, or None for any other path."""
    mapping, entry = mapping_of(path)
    kind, inside = entry_group(mapping), entry.partition(".")[2]
    return (
        next((hint for known, hint, _ in leaves(kind) if known == inside), None) if kind else None
    )


def entries(config: Config) -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yields (dotted path, type, field) of every leaf of the groups inside mappings."""
    for path in _mappings():
        if isinstance(mapping := get(config, path), dict):
            for name, group in mapping.items():
                if dataclasses.is_dataclass(group):
                    yield from leaves(type(group), f"{path}.{name}.")


def mapping_of(path: str) -> tuple[str, str]:
    """Splits the path of a mapping's entry into the mapping's path and the entry's.

    Returns:
      ("model.options", "depth") for "model.options.depth"; ("", "") if it is not such a path.
    """
    for known in _mappings():
        if path.startswith(f"{known}."):
            return known, path.removeprefix(f"{known}.")
    return "", ""


def get(config: Any, path: str) -> Any:
    """Returns the value of the setting, or of the mapping's entry, at a dotted path."""
    for part in path.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


def put(config: Config, path: str, value: Any) -> None:
    """Sets the setting at a dotted path.

    Lists and dictionaries, as JSON stores tuples and groups, are converted back. A group inside a
    mapping is created when its first setting is set.

    Raises:
      ConfigError: if the mapping of an entry does not exist.
    """
    mapping, entry = mapping_of(path)
    if kind := entry_group(mapping):
        get(config, mapping).setdefault(entry.partition(".")[0], kind())
    parent, _, name = path.rpartition(".")
    try:
        group = get(config, parent) if parent else config
    except (KeyError, AttributeError) as error:
        raise ConfigError(f"config.{path}: there is no mapping config.{parent}") from error
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
    """Returns a value with its lists converted to tuples, including those inside a mapping."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(entry) for name, entry in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, tuple | list) else value


def plain(value: Any) -> Any:
    """Returns a value as JSON stores it: tuples as lists, groups as dictionaries."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {name: plain(entry) for name, entry in value.items()}
    return [plain(entry) for entry in value] if isinstance(value, tuple | list) else value


def is_open(config: Config, path: str) -> bool:
    """Whether a setting is left open, to be chosen by the size of the data or by the hardware."""
    may_be_open = config.train.auto_size is True or path == "model.dtype"
    return may_be_open and path in OPEN and get(config, path) == OPEN[path]


def fill_open(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a configuration whose open settings are filled from values by dotted path."""
    filled = copy.deepcopy(config)
    for path, value in values.items():
        if is_open(config, path):
            put(filled, path, value)
    return filled


def check_path(path: str, *, prefix: str = "", value: str = "") -> None:
    """Checks that a dotted path names a setting.

    Args:
      path: the dotted path.
      prefix, value: for the suggestion, as in `did_you_mean`.

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
    raise ConfigError(unknown_field(path, prefix=prefix, value=value))


def unknown_field(path: str, *, prefix: str = "", value: str = "") -> str:
    """Returns the message for a setting that does not exist, with a suggestion."""
    hint = did_you_mean(path, prefix, value)
    return f"config.{path}: no such setting.{hint} See --help for all settings"


def did_you_mean(path: str, prefix: str = "", value: str = "") -> str:
    """Returns ' Did you mean X?' for the name or path of a setting that does not exist, or ''.

    It knows the names of settings in older versions and in other trainers.

    Args:
      path: what was given, with or without a group.
      prefix: put before the setting's path.
      value: what the user gave it, if known.
    """
    path = path.lower().replace("-", "_")
    group, _, name = path.rpartition(".")
    known = [known_path for known_path, _, _ in leaves()]
    same_name = [p for p in known if p.rpartition(".")[2] == name]
    # A last part alone may also be that of a setting of today: --flip is augment.flip.
    is_old = bool(group) or not same_name
    if is_old and (renamed := other_names.new_name(path)):
        return f" It was renamed; use {prefix}{other_names.with_value(renamed, value)}."
    same_group = [p for p in same_name if group and p.startswith(f"{group.partition('.')[0]}.")]
    if not same_group and name in other_names.ANSWER_TO:
        return f" {other_names.ANSWER_TO[name]}."
    meant = [*same_group, *filter(None, [other_names.SETTING_OF.get(name)]), *same_name]
    if not meant:
        return nearest(path, known, prefix)
    return f" Did you mean {prefix}{other_names.with_value(meant[0], value)}?"


def matches(value: Any, hint: Any) -> bool:
    """Whether a value has a field's declared type; an int counts as a float."""
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
    """Returns the name of a setting's type for messages."""
    if typing.get_origin(hint) is dict:
        kind = typing.get_args(hint)[1]
        return f"a mapping of names to {'values' if kind is Any else kind.__name__}"
    return str(hint) if typing.get_args(hint) else hint.__name__
