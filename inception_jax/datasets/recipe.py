"""Which data set, with which settings, kept where; and how that differs from what was prepared."""

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
    """Returns where prepared data are kept: `directory`, or TFDS's default if it is ''.

    Raises:
      UserError: if it is no local path or cannot be used, or the default has no home to be in.
    """
    what = f"config.data.directory = {directory!r}"
    if not directory:
        default = os.environ.get("TFDS_DATA_DIR", "")
        directory = default or "~/tensorflow_datasets"
        what += f" (TFDS_DATA_DIR={default})" if default else f" ({directory})"
    path = paths.local(directory, what)
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
    """What was prepared: from which source, with which digest and settings, of which classes.

    `code` is of the function that returned the examples; '': there was none.
    """

    path: str
    digest: str
    settings: Mapping[str, Any]
    class_names: Sequence[str]
    code: str = ""


class Change(NamedTuple):
    """How source and settings differ from what was prepared, and what can be done about it."""

    what: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A data set as the settings ask for it.

    Attributes:
      part: its entry in the registry.
      data: the settings.
      directory: of all prepared data.
      name, version: of the folders of what is prepared.
      log: takes one line of text.
    """

    part: DatasetPart
    data: config.Data
    directory: pathlib.Path
    name: str
    version: str
    log: Log

    @classmethod
    def from_config(cls, data: config.Data, log: Log) -> "Recipe":
        """Returns what some settings ask for.

        Raises:
          UserError: if a setting does not fit the data set.
        """
        part = registry.DATASETS.get(data.name)
        # The other rules are those of new runs, and for `config.validate`.
        if problem := part.source_problem(data):
            raise ConfigError(problem)
        directory = data_directory(data.directory)
        locate = part.locate
        name, version = locate(data, directory, log) if locate else (part.name, part.version)
        return cls(part, data, directory, name, version, log)

    @property
    def cache_root(self) -> pathlib.Path:
        """The folder of what is made ready of all data sets."""
        return self.directory / _CACHES

    @property
    def cache_dir(self) -> pathlib.Path:
        """The folder of what is made ready of this one."""
        data = self.data
        name = f"{self.name}-{self.version}-{data.image_size}px"
        name += "-records" if data.storage == "records" else ""
        return self.cache_root / (f"{name}-{data.bit_depth}bit" if data.bit_depth else name)

    @property
    def prepared_paths(self) -> str:
        """The folders that hold what is prepared of it, for an error's remedy."""
        return f"{self.directory / self.name} and {self.cache_root / self.name}-*"

    @property
    def source(self) -> pathlib.Path | None:
        """Where the original files are, or None where they are downloaded or there are none."""
        if not self.data.source:
            return None
        return paths.local(self.data.source, f"config.data.source = {self.data.source!r}")

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The values of those settings that it alone takes, by name, as JSON gives them back."""
        settings = {name: getattr(self.data, name) for name in self.part.takes}
        if self.part.options or not self.part.is_builder:
            options = registry.with_defaults(self.part, self.data.options)
            settings["options"] = json.loads(json.dumps(options))
        return settings

    @functools.cached_property
    def code(self) -> str:
        """A digest of the function that returns the examples; '': there is none, or no text of it.

        Comments and the form of the text do not count, nor does what the function calls.
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
        """Returns what a source holds now.

        Raises:
          DataError: if there is none at `path`, or it is something else.
        """
        if self.part.contents is None:
            return files.Contents((files.fingerprint(path),))
        contents: files.Contents = self.part.contents(path, self.settings)
        return contents

    def check(self, prepared: Prepared, where: pathlib.Path) -> None:
        """Raises DataError if source and settings are not what was prepared."""
        if change := self.change(prepared, where):
            raise DataError(
                f"{change.what}. {change.remedy}, set config.data.directory to another directory, "
                "or set config.data.on_change=prepare to prepare it again"
            )

    def is_outdated(self, prepared: Prepared, where: pathlib.Path) -> bool:
        """Whether what was prepared is to be prepared again."""
        return self.data.on_change == "prepare" and self.change(prepared, where) is not None

    def change(self, prepared: Prepared, where: pathlib.Path) -> Change | None:
        """Returns how source and settings differ from what was prepared; None if they do not."""
        # Settings that older versions did not have decide on what the source holds, below.
        for name, value in prepared.settings.items():
            if (now := self.settings.get(name)) != value:
                return Change(
                    f"config.data.{name} = {now!r}: {where} was prepared with {value!r}",
                    f"Set config.data.{name}={value}",
                )
        if self.code and prepared.code and self.code != prepared.code:
            return Change(
                f"{self.part.place}: the code of {self.name!r} has changed since it prepared "
                f"{where}",
                "Restore the code",
            )
        path = self.source
        if self.part.content_is_canonical or path is None:
            return None
        path = path.absolute()
        # Removing the original once it is prepared is no mistake. A path may lead into an archive.
        is_there = path.exists() or any(above.is_file() for above in path.parents)
        if not is_there and str(path) == prepared.path:
            return None
        current = self.contents(path)
        if prepared.digest not in current.digests:
            then = " at that time" if str(path) == prepared.path else ""
            # A folder's digest has the times of its files in place of their content.
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
    """Returns how the names of classes, or their order, differ; '' if they do not.

    Args:
      before, after: the names in the order of the labels.
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
