"""The reference of all settings, for --help, --print_config and docs/configuration.md.

Everything is generated from the metadata that `schema` declares. The page is written by

    python -m inception_jax.config.reference > docs/configuration.md
"""

import dataclasses
import shlex
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from inception_jax.config import durations
from inception_jax.config.fields import entry_group, get, is_mapping, leaves
from inception_jax.config.schema import Config

DURATIONS = f"""\
Durations are strings: an amount and a unit, such as
{durations.EXAMPLE}. An epoch is one pass over the training split, a step
is one optimizer update, and an example is one training example seen."""

_BOUNDS = (("low", "≥"), ("above", ">"), ("high", "≤"), ("below", "<"))


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting as the reference shows it.

    Attributes:
      path: dotted; for settings inside a mapping, NAME is a placeholder.
      default: its value if not set.
      kind: its type, in words.
      allowed: unit, range or choices, in words; '' = no restriction.
      meaning: a description.
      resumable: whether it may change when a run is resumed.
    """

    path: str
    default: Any
    kind: str
    allowed: str
    meaning: str
    resumable: bool


def settings() -> Iterator[tuple[str, str, list[Setting]]]:
    """Yields (group, meaning, settings) of every group in order; '' is the group of the top."""
    hints = typing.get_type_hints(Config)
    default, top = Config(), []
    groups: list[tuple[str, str, list[Setting]]] = []
    for field in dataclasses.fields(Config):
        kind = entry_group(field.name) or hints[field.name]
        meaning = field.metadata["help"]
        if is_mapping(field.name):
            inner = leaves(kind, f"{field.name}.NAME.")
            blank = {field.name: {"NAME": kind()}}
            groups.append((field.name, meaning, [_setting(*each, blank) for each in inner]))
        elif dataclasses.is_dataclass(kind):
            inner = leaves(typing.cast(type, kind), f"{field.name}.")
            groups.append((field.name, meaning, [_setting(*each, default) for each in inner]))
        else:
            top.append(_setting(field.name, kind, field, default))
    yield "", "the run as a whole", top
    yield from groups


def _setting(path: str, hint: Any, field: dataclasses.Field, config: Any) -> Setting:
    metadata = field.metadata
    return Setting(
        path,
        get(config, path),
        _kind(hint, metadata),
        _allowed(metadata),
        metadata["help"],
        metadata["resumable"],
    )


def _kind(hint: Any, metadata: Mapping[str, Any]) -> str:
    """Returns the type of a setting in words."""
    if typing.get_origin(hint) is dict:
        return "mapping"
    if typing.get_origin(hint) is tuple:
        return f"tuple of {_kind(typing.get_args(hint)[0], metadata)}s"
    if metadata["duration"]:
        return "duration"
    if metadata["path"]:
        return "path"
    return {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}[hint.__name__]


def _allowed(metadata: Mapping[str, Any]) -> str:
    """Returns unit and range of a setting, or its choices, in words; '' if anything goes."""
    if kind := metadata["registry"]:
        return f"a registered {kind}; an unknown name lists them"
    if metadata["choices"]:
        return ", ".join(map(str, metadata["choices"]))
    bounds = [
        f"{sign} {metadata[bound]:.10g}" for bound, sign in _BOUNDS if metadata[bound] is not None
    ]
    return ", ".join([*([metadata["unit"]] if metadata["unit"] else []), *bounds])


def flag(path: str, value: Any) -> str:
    """Returns the flag that gives a setting a value, quoted for a shell if necessary."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    text = str(value)
    return f"--config.{path}={text if text.isidentifier() else shlex.quote(text) if text else ''}"


def help_text(config: Config, *, is_default: bool = True) -> str:
    """Returns every setting with its value and meaning, as --help shows them.

    Args:
      config: the values.
      is_default: whether they are the defaults; otherwise defaults that differ are shown too.
    """
    lines = [DURATIONS]
    for group, meaning, members in settings():
        lines += ["", f"{group or 'general'}: {meaning}"]
        for each in members:
            value = each.default if ".NAME." in each.path else get(config, each.path)
            shown = flag(each.path, value)
            if is_mapping(each.path) and not value:
                shown = f"--config.{each.path}.NAME=VALUE"
            if not is_default and value != each.default:
                shown += f"   (default: {each.default!r})"
            allowed = f" [{each.allowed}]" if each.allowed else ""
            lines += [
                f"  {shown}",
                textwrap.indent(textwrap.fill(each.meaning + allowed, 90), " " * 6),
            ]
    return "\n".join(lines)


def listing(config: Config, origins: Mapping[str, str]) -> str:
    """Returns the value of every setting and where it comes from, a line each.

    Args:
      config: the values that a run will use.
      origins: where values that are not the default come from, by dotted path.
    """
    rows = []
    for path, _, _ in leaves():
        value, origin = get(config, path), origins.get(path, "default")
        members = value.items() if isinstance(value, dict) else [("", value)]
        for name, member in members:
            full = f"{path}.{name}".rstrip(".")
            if dataclasses.is_dataclass(member):
                inner = leaves(typing.cast(type, type(member)), f"{full}.")
                rows += [(flag(each, get(config, each)), origin) for each, _, _ in inner]
            else:
                rows.append((flag(full, member), origin))
    width = max(len(shown) for shown, _ in rows)
    return "\n".join(f"{shown:{width}}  # {origin}" for shown, origin in rows)


def page() -> str:
    """Returns docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "<!-- Generated by `make docs` from inception_jax/config/schema.py. Do not edit. -->",
        "",
        "Set these in an experiment file (`config.train.batch_size = 256`) or on the command line",
        "(`--config.train.batch_size=256`). `python -m inception_jax.main --help` prints the same",
        "reference, `--help --config FILE` the values of an experiment beside the defaults, and",
        "`--print_config` the values that a run would use and where each comes from.",
        "",
        DURATIONS,
        "",
        "Settings marked with * must stay the same when a run is resumed.",
    ]
    for group, meaning, members in settings():
        lines += ["", f"## {group or 'General'}", "", f"{meaning[:1].upper()}{meaning[1:]}.", ""]
        lines += [
            "| setting | default | type | allowed | meaning |",
            "| --- | --- | --- | --- | --- |",
        ]
        for each in members:
            mark = "" if each.resumable else " *"
            default = f"`{each.default!r}`".replace("|", "\\|")
            meaning = each.meaning.replace("|", "\\|")
            lines.append(
                f"| `{each.path}`{mark} | {default} | {each.kind} | {each.allowed} | {meaning} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
