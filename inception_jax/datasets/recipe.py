"""Describes a configured data set and detects how it differs from prepared data."""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from inception_jax import config, registry
from inception_jax.datasets import copies
from inception_jax.datasets.builders import folders, tfds_folders
from inception_jax.datasets.sources import files
from inception_jax.errors import ConfigError, DataError
from inception_jax.registry import DatasetPart
from inception_jax.storage import paths

if TYPE_CHECKING:
    from etils import epath

_CACHES = "inception_jax"

Log = Callable[[str], None]


class Location(NamedTuple):
    """The directory of prepared data: a local folder, and its original in a bucket, if any."""

    local: pathlib.Path
    remote: "epath.Path | None" = None


def data_location(directory: str, cache: str = "") -> Location:
    """Returns the directory of prepared data: `directory`, or TFDS's default if it is ''.

    Args:
      directory: as `config.data.directory`.
      cache: as `config.data.cache`.

    Raises:
      UserError: if one of them is not a usable path, or there is no home directory for a default.
    """
    what = f"config.data.directory = {directory!r}"
    if not directory:
        default = os.environ.get("TFDS_DATA_DIR", "")
        directory = default or "~/tensorflow_datasets"
        what += f" (TFDS_DATA_DIR={default})" if default else f" ({directory})"
    path = paths.user_path(directory, what)
    location = Location(path)
    if not paths.is_local(path):
        what = f"config.data.cache = {cache!r}"
        location = Location(copies.below(copies.cache_folder(cache) / "prepared", path), path)
    elif cache:
        copies.cache_folder(cache)  # Reports a wrong setting before it is used.
    try:
        str(location.local.absolute()).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what}: the path is not valid UTF-8, which the library that writes the records "
            "requires. Rename the folder, or use another"
        ) from error
    return location


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Source path, digest, settings and class names of prepared data.

    `code` is a digest of the function that returned the examples; '': none. `objects` is a digest
    of the source's objects in a bucket; '': it was local.
    """

    path: str
    digest: str
    settings: Mapping[str, Any]
    class_names: Sequence[str]
    code: str = ""
    objects: str = ""


def _is_metadata(name: str) -> bool:
    """Whether a file describes records of TFDS, and contains none."""
    return name.endswith((".json", ".txt"))


@contextlib.contextmanager
def _showing(path: pathlib.Path, instead: paths.Path) -> Iterator[None]:
    """Replaces a path in messages of errors."""
    try:
        yield
    except (ConfigError, DataError) as error:
        error.args = (str(error).replace(str(path), str(instead)),)
        raise


class _FStringsAsTuples(ast.NodeTransformer):
    """Replaces f-strings, whose quotes Python 3.11 and 3.12 unparse differently, by tuples."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.Tuple:
        """Returns the parts of an f-string."""
        self.generic_visit(node)
        # Python 3.12 adds empty parts.
        values = [each for each in node.values if getattr(each, "value", None) != ""]
        return ast.Tuple(values, ast.Load())

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.Tuple:
        """Returns expression, conversion and format of a replacement field."""
        self.generic_visit(node)
        parts = [node.value, ast.Constant(node.conversion), node.format_spec or ast.Constant("")]
        return ast.Tuple(parts, ast.Load())


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
      directory: local folder of all prepared data.
      remote: the folder in a bucket that `directory` is a copy of; None: there is none.
      name, version: used in the folder names of prepared data.
      log: called with one line of text.
    """

    part: DatasetPart
    data: config.Data
    directory: pathlib.Path
    remote: "epath.Path | None"
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
        directory, remote = data_location(data.directory, data.cache)
        recipe = cls(part, data, directory, remote, part.name, part.version, log)
        if part.locate:
            recipe.fetch_records(metadata_only=True)
            with _showing(directory, remote or directory):
                name, version = part.locate(data, directory, log)
            recipe = dataclasses.replace(recipe, name=name, version=version)
        return recipe

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
    def folder_setting(self) -> str:
        """The setting that selects the local folder, for messages."""
        return "config.data.cache" if self.remote else "config.data.directory"

    @property
    def prepared_paths(self) -> str:
        """The folders of what this program prepared, for remedies in errors."""
        directory = self.remote or self.directory
        caches = f"{directory / _CACHES / self.name}-*"
        return caches if self.part.locate else f"{directory / self.name} and {caches}"

    def original(self, path: pathlib.Path) -> paths.Path:
        """Returns what a path below `directory` is a copy of; the path itself if it is not."""
        return self.remote / path.relative_to(self.directory) if self.remote else path

    @property
    def source(self) -> "paths.Path | None":
        """The path of the original files; None if they are downloaded or there are none."""
        if not self.data.source:
            return None
        return paths.user_path(self.data.source, f"config.data.source = {self.data.source!r}")

    @functools.cached_property
    def source_copy(self) -> copies.SourceCopy | None:
        """The local copy of a source in a bucket; None: the source is local, or there is none.

        Raises:
          BucketError: if the bucket cannot be read.
        """
        if self.source is None or paths.is_local(self.source):
            return None
        folder = copies.cache_folder(self.data.cache)
        return copies.SourceCopy(self.source, folder, names=self.part.source_files, log=self.log)

    @property
    def local_source(self) -> pathlib.Path | None:
        """The local path of the original files; of a source in a bucket, see `fetch_source`."""
        if self.source_copy:
            return self.source_copy.path
        return self.source

    def fetch_source(self) -> None:
        """Copies a source in a bucket to `local_source`.

        Raises:
          BucketError: if the bucket cannot be read.
          DataError: if there is no such source, a part of it is missing, or the disk is full.
        """
        if not (copy := self.source_copy):
            return
        what = f"config.data.source = {self.data.source!r}"
        if missing := copy.missing():
            raise DataError(
                f"{what}: {' and '.join(missing)} not found in {copy.remote}. Upload all files of "
                "the source to one folder, and set config.data.source to it"
            )
        if not copy.fetch():
            raise DataError(f"{what}: no such file or folder in the bucket")
        self.log(f"{self.source}: using the copy {copy.local}, which may be removed afterwards")

    @functools.cached_property
    def cache_copy(self) -> copies.FolderCopy | None:
        """This data set's cache as a copy of a folder in a bucket; None: it is local."""
        return self._copy(self.cache_dir, ["info.json"])

    @functools.cached_property
    def records_copy(self) -> copies.FolderCopy | None:
        """The records as a copy of a folder in a bucket; None: they are local.

        Of a data set that TFDS has prepared, this has all configurations and versions.
        """
        name = f"{self.name}/{self.version}"
        if self.part.locate:
            name = tfds_folders.top_folder(self.data.tfds)
        return self._copy(self.directory / name, ["dataset_info.json"])

    def fetch_records(self, *, metadata_only: bool = False) -> None:
        """Copies the records from a bucket, or only the files that describe them.

        Raises:
          BucketError: if the bucket cannot be read.
          DataError: if the disk is full.
        """
        copy = self.records_copy
        if copy is None:
            return
        if metadata_only:
            copy.fetch(_is_metadata)
        elif not self.part.locate:
            copy.fetch()
        else:
            folder = tfds_folders.find(self.data.tfds, self.directory, lambda line: None).folder
            below = folder.relative_to(copy.local).as_posix()
            copy.fetch(lambda name: _is_metadata(name) or name.startswith(f"{below}/"))

    def _copy(
        self, folder: pathlib.Path, complete_files: Sequence[str]
    ) -> copies.FolderCopy | None:
        if self.remote is None:
            return None
        remote = self.remote / folder.relative_to(self.directory).as_posix()
        return copies.FolderCopy(remote, folder, complete_files=complete_files, log=self.log)

    def showing_source(self) -> contextlib.AbstractContextManager[None]:
        """Shows the original source in errors, instead of its copy."""
        copy = self.source_copy
        return _showing(copy.local, copy.remote) if copy else contextlib.nullcontext()

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """The values of the settings specific to this data set, by name, as read back from JSON."""
        settings = {name: getattr(self.data, name) for name in self.part.extra_settings}
        if self.part.options or not self.part.is_builder:
            options = registry.options_with_defaults(self.part, self.data.options)
            try:
                settings["options"] = json.loads(json.dumps(options))
            except TypeError as error:
                raise ConfigError(
                    f"{self.part.location}: the options of the data set {self.name!r} must be "
                    f"numbers, strings, lists or mappings, as they are stored: {error}"
                ) from error
        return settings

    @property
    def code(self) -> str:
        """A digest of the function that returns the examples; '': none, or no source code.

        Ignores comments, formatting and the functions that it calls.
        """
        return self._code_digests[0]

    @functools.cached_property
    def _code_digests(self) -> tuple[str, str]:
        """The digest of the function's code, and that of older versions of this program."""
        if self.part.is_builder:
            return "", ""
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(self.part.build)))
        except (OSError, TypeError, SyntaxError):
            return "", ""
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                node.decorator_list = []

        def digest() -> str:
            text = f"{ast.unparse(tree)}\n{list(self.part.class_names)}"
            return hashlib.sha256(text.encode()).hexdigest()[:16]

        old = digest()
        tree = _FStringsAsTuples().visit(tree)
        return digest(), old

    def contents(self, path: pathlib.Path) -> files.Contents:
        """Returns the current identity of a source.

        Raises:
          DataError: if `path` does not exist or has another layout.
        """
        if self.part.contents is None:
            return files.Contents((files.fingerprint(path),))
        contents: files.Contents = self.part.contents(path, self.settings)
        return contents

    def check(self, prepared: Prepared, where: paths.Path) -> None:
        """Raises DataError if source or settings differ from the prepared data."""
        if change := self.change(prepared, where):
            # The directory is also where TFDS's builds are looked for.
            elsewhere = (
                "" if self.part.locate else " set config.data.directory to another directory,"
            )
            raise DataError(
                f"{change.what}. {change.remedy},{elsewhere} or set config.data.on_change=prepare "
                "to prepare it again"
            )

    def is_outdated(self, prepared: Prepared, where: paths.Path) -> bool:
        """Returns whether the data set must be prepared again."""
        return self.data.on_change == "prepare" and self.change(prepared, where) is not None

    def change(self, prepared: Prepared, where: paths.Path) -> Change | None:
        """Returns how source or settings differ from the prepared data; None if they do not."""
        # Settings unknown to older versions affect the contents of the source, checked below.
        for name, value in prepared.settings.items():
            if (now := self.settings.get(name)) != value:
                return Change(
                    f"config.data.{name} = {now!r}: {where} was prepared with {value!r}",
                    f"Set config.data.{name}={value}",
                )
        if self.code and prepared.code and prepared.code not in self._code_digests:
            return Change(
                f"{self.part.location}: the code of {self.name!r} has changed since it prepared "
                f"{where}",
                "Restore the code",
            )
        if self.part.locate and prepared.digest:
            build = tfds_folders.find(self.data.tfds, self.directory, lambda line: None).folder
            if prepared.digest != tfds_folders.fingerprint(build):
                return Change(
                    f"config.data.tfds = {self.data.tfds!r}: {where} was prepared from another "
                    f"build of {self.original(build)}",
                    "Restore that build",
                )
        path = self.source
        if self.part.content_is_canonical or path is None:
            return None
        if not paths.is_local(path):
            return self._change_in_bucket(prepared, where)
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
        return self._source_change(where, what)

    def _change_in_bucket(self, prepared: Prepared, where: paths.Path) -> Change | None:
        """Returns how a source in a bucket differs, from names and checksums of its objects."""
        assert self.source_copy is not None
        objects = self.source_copy.objects()
        # The source may be removed once it is prepared.
        if objects == prepared.objects or (not objects and str(self.source) == prepared.path):
            return None
        if not objects:
            return self._source_change(where, f"from {prepared.path}, and this does not exist")
        if not prepared.objects:
            what = f"from {prepared.path or 'no source'}, which may have other content"
            return self._source_change(where, what)
        then = " at that time" if str(self.source) == prepared.path else ""
        return self._source_change(where, f"from other content, {prepared.path}{then}")

    def _source_change(self, where: paths.Path, what: str) -> Change:
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
