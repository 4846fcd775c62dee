"""Describes a configured data set and detects how it differs from prepared data."""

import ast
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from inception_jax import config, registry
from inception_jax.datasets.builders import folders
from inception_jax.datasets.sources import files
from inception_jax.errors import ConfigError, DataError
from inception_jax.registry import DatasetPart
from inception_jax.storage import paths

_CACHES = "inception_jax"

Log = Callable[[str], None]


def data_directory(directory: str) -> pathlib.Path:
    """Returns the directory of prepared data: `directory`, or TFDS's default if it is ''.

    Raises:
      UserError: if it is not a usable local path, or there is no home directory for the default.
    """
    what = f"config.data.directory = {directory!r}"
    if not directory:
        default = os.environ.get("TFDS_DATA_DIR", "")
        directory = default or "~/tensorflow_datasets"
        what += f" (TFDS_DATA_DIR={default})" if default else f" ({directory})"
    path = paths.local_path(directory, what)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what}: the path is not valid UTF-8, which the library that writes the records "
            "requires. Rename the folder, or use another"
        ) from error
    return path


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Source path, digest, settings and class names of prepared data.

    `code` is a digest of the function that returned the examples; '': none.
    """

    path: str
    digest: str
    settings: Mapping[str, Any]
    class_names: Sequence[str]
    code: str = ""


class Change(NamedTuple):
    """How source or settings differ from the prepared data, and a remedy."""

    what: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A data set as selected by the settings.

    Attributes:
      part: its registry entry.
      data: the settings in config.data.
      directory: of all prepared data.
      name, version: used in the folder names of prepared data.
      log: called with one line of text.
    """

    part: DatasetPart
    data: config.Data
    directory: pathlib.Path
    name: str
    version: str
    log: Log

    @classmethod
    def from_config(cls, data: config.Data, log: Log) -> "Recipe":
        """Returns the data set selected by the settings.

        Raises:
          UserError: if a setting does not apply to the data set.
        """
        part = registry.DATASETS.get(data.name)
        # Other rules apply to new runs and are checked by `config.validate`.
        if problem := part.source_problem(data):
            raise ConfigError(problem)
        directory = data_directory(data.directory)
        locate = part.locate
        name, version = locate(data, directory, log) if locate else (part.name, part.version)
        return cls(part, data, directory, name, version, log)

    @property
    def cache_root(self) -> pathlib.Path:
        """The folder of all caches."""
        return self.directory / _CACHES

    @property
    def cache_dir(self) -> pathlib.Path:
        """The folder of this data set's cache."""
        data = self.data
        name = f"{self.name}-{self.version}-{data.image_size}px"
        name += "-records" if data.storage == "records" else ""
        return self.cache_root / (f"{name}-{data.bit_depth}bit" if data.bit_depth else name)

    @property
    def prepared_paths(self) -> str:
        """The folders of its prepared data, for remedies in errors."""
        return f"{self.directory / self.name} and {self.cache_root / self.name}-*"

    @property
    def source(self) -> pathlib.Path | None:
        """The path of the original files; None if they are downloaded or there are none."""
        if not self.data.source:
            return None
        return paths.local_path(self.data.source, f"config.data.source = {self.data.source!r}")

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The values of the settings specific to this data set, by name, as read back from JSON."""
        settings = {name: getattr(self.data, name) for name in self.part.extra_settings}
        if self.part.options or not self.part.is_builder:
            options = registry.options_with_defaults(self.part, self.data.options)
            settings["options"] = json.loads(json.dumps(options))
        return settings

    @functools.cached_property
    def code(self) -> str:
        """A digest of the function that returns the examples; '': none, or no source code.

        Ignores comments, formatting and the functions that it calls.
        """
        if self.part.is_builder:
            return ""
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(self.part.build)))
        except (OSError, TypeError, SyntaxError):
            return ""
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []
        text = f"{ast.unparse(tree)}\n{list(self.part.class_names)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def contents(self, path: pathlib.Path) -> files.Contents:
        """Returns the current identity of a source.

        Raises:
          DataError: if `path` does not exist or has another layout.
        """
        if self.part.contents is None:
            return files.Contents((files.fingerprint(path),))
        contents: files.Contents = self.part.contents(path, self.settings)
        return contents

    def check(self, prepared: Prepared, where: pathlib.Path) -> None:
        """Raises DataError if source or settings differ from the prepared data."""
        if change := self.change(prepared, where):
            raise DataError(
                f"{change.what}. {change.remedy}, set config.data.directory to another directory, "
                "or set config.data.on_change=prepare to prepare it again"
            )

    def is_outdated(self, prepared: Prepared, where: pathlib.Path) -> bool:
        """Returns whether the data set must be prepared again."""
        return self.data.on_change == "prepare" and self.change(prepared, where) is not None

    def change(self, prepared: Prepared, where: pathlib.Path) -> Change | None:
        """Returns how source or settings differ from the prepared data; None if they do not."""
        # Settings unknown to older versions affect the contents of the source, checked below.
        for name, value in prepared.settings.items():
            if (now := self.settings.get(name)) != value:
                return Change(
                    f"config.data.{name} = {now!r}: {where} was prepared with {value!r}",
                    f"Set config.data.{name}={value}",
                )
        if self.code and prepared.code and self.code != prepared.code:
            return Change(
                f"{self.part.location}: the code of {self.name!r} has changed since it prepared "
                f"{where}",
                "Restore the code",
            )
        path = self.source
        if self.part.content_is_canonical or path is None:
            return None
        path = path.absolute()
        # The source may be removed once it is prepared. A path may lead into an archive.
        is_there = path.exists() or any(above.is_file() for above in path.parents)
        if not is_there and str(path) == prepared.path:
            return None
        current = self.contents(path)
        if prepared.digest not in current.digests:
            then = " at that time" if str(path) == prepared.path else ""
            # A folder's digest depends on the modification times of its files, not on their
            # content.
            copied = ", or copied without its timestamps" if path.is_dir() else ""
            what = f"from other content, {prepared.path or 'without a source'}{then}{copied}"
        elif current.class_names is None or tuple(current.class_names) == tuple(
            prepared.class_names
        ):
            return None
        else:
            changes = class_changes(prepared.class_names, current.class_names)
            what = (
                "with different class folders: a folder without images was added or removed, or "
                f"an older version chose the classes differently ({changes})"
            )
        return Change(
            f"config.data.source = {self.data.source!r}: {where} was prepared {what}",
            "Leave config.data.source empty to use what is prepared",
        )


def class_changes(before: Sequence[str], after: Sequence[str]) -> str:
    """Describes how class names or their order differ; '' if they do not.

    Args:
      before, after: the names in label order.
    """
    if tuple(before) == tuple(after):
        return ""
    counts = f"{len(before):,} classes → {len(after):,}, " if len(before) != len(after) else ""
    if sorted(before) == sorted(after):
        what = "the same names in a different order"
    else:
        gone, new = (sorted(set(a) - set(b)) for a, b in ((before, after), (after, before)))
        parts = [(gone, "without"), (new, "with")]
        what = ", ".join(
            f"{word} {folders.quote_and_join(names, 3)}" for names, word in parts if names
        )
    pairs = itertools.zip_longest(before, after)
    label, (old, now) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"{counts}{what}; the first difference is class {label}: {old!r} → {now!r}"
