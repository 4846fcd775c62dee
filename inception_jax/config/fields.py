"""Walks the fields of a configuration: paths, types, values, and help."""

import copy
import dataclasses
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


def is_mapping(path: str) -> bool:
    """Whether the setting at a dotted path is a mapping of names to values."""
    return any(known == path and typing.get_origin(hint) is dict for known, hint, _ in leaves())


def mapping_of(path: str) -> tuple[str, str]:
    """Returns the setting that is a mapping and has an entry of this path, and the entry's path.

    Returns:
      ("model.options", "depth") for "model.options.depth"; ("", "") where there is none.
    """
    for known, hint, _ in leaves():
        if typing.get_origin(hint) is dict and path.startswith(f"{known}."):
            return known, path.removeprefix(f"{known}.")
    return "", ""


def get(config: Any, path: str) -> Any:
    """Returns the setting at a dotted path, or an entry of one that is a mapping."""
    for part in path.split("."):
        config = config[part] if isinstance(config, Mapping) else getattr(config, part)
    return config


def put(config: Config, path: str, value: Any) -> None:
    """Changes the setting at a dotted path; a list, which JSON makes of a tuple, becomes one."""
    parent, _, name = path.rpartition(".")
    value = tuple(value) if isinstance(value, list) else value
    group = get(config, parent) if parent else config
    if isinstance(group, dict):
        group[name] = value
    else:
        setattr(group, name, value)


def plain(value: Any) -> Any:
    """Returns a setting's value as JSON gives it back: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


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
    """Checks that a dotted path is a setting's.

    Raises:
      ConfigError: with what may be meant, if it is not.
    """
    paths = {known for known, _, _ in leaves()}
    if path in paths or mapping_of(path)[1]:
        return
    if inner := [known for known in paths if known.startswith(f"{path}.")]:
        some = ", ".join(sorted(inner))
        raise ConfigError(f"config.{path}: is a group of settings; give one of {some}")
    raise ConfigError(unknown_field(path))


def unknown_field(path: str) -> str:
    """Returns the message for a setting that does not exist, with the one that may be meant."""
    return (
        f"config.{path}: there is no such setting.{did_you_mean(path)} See --help for all of them"
    )


def did_you_mean(path: str, prefix: str = "") -> str:
    """Returns ' Did you mean X?' for a setting's name or path that does not exist, or ''.

    It knows what other trainers call the settings.

    Args:
      path: what was given, with or without a group.
      prefix: what to put before the setting's path.
    """
    path = path.lower().replace("-", "_")
    group, _, name = path.rpartition(".")
    known = [known_path for known_path, _, _ in leaves()]
    same_name = [p for p in known if p.rpartition(".")[2] == name]
    same_group = [p for p in same_name if group and p.startswith(f"{group.partition('.')[0]}.")]
    if not same_group and name in other_names.ANSWER_TO:
        return f" {other_names.ANSWER_TO[name]}."
    meant = [*same_group, *filter(None, [other_names.SETTING_OF.get(name)]), *same_name]
    return f" Did you mean {prefix + meant[0]!r}?" if meant else nearest(path, known, prefix)


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's declared type; an int passes for a float."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(matches(v, typing.get_args(hint)[0]) for v in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """Returns the name of a setting's type, for messages."""
    if typing.get_origin(hint) is dict:
        return "a mapping of names to values"
    return str(hint) if typing.get_args(hint) else hint.__name__


def describe(config: Config) -> str:
    """Returns every setting with its value and meaning, a line each, for --help and logs."""
    lines = []
    for path, _, field in leaves():
        choices = field.metadata["choices"]
        allowed = f" [{', '.join(map(str, choices))}]" if choices else ""
        if kind := field.metadata["registry"]:
            # Finding them would import what registers them.
            allowed = f" [a registered {kind}; an unknown name is answered with all of them]"
        lines.append(
            f"  --config.{path}={get(config, path)!r}\n      {field.metadata['help']}{allowed}"
        )
    return "\n".join(lines)
