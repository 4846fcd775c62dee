"""Writes a data set's records and its cache, and uploads them if they belong in a bucket."""

import contextlib
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from inception_jax import registry
from inception_jax.datasets import cache
from inception_jax.datasets.recipe import Recipe
from inception_jax.errors import DataError, UserError
from inception_jax.storage import buckets, lease
from inception_jax.storage.space import check_space, disk_failure


class Found(NamedTuple):
    """Prepared data on this host's disk.

    Attributes:
      info: description of the cache; None: there is none, or it is unusable.
      problem: why it is unusable.
      version: of the bucket's folder that it is a copy of; '': there is none, or it is local.
    """

    info: cache.Info | None
    problem: str
    version: str


def find(recipe: Recipe) -> Found:
    """Returns the prepared data, copied from the bucket if they belong in one.

    Raises:
      BucketError: if the bucket cannot be read.
      DataError: if the disk is full.
    """
    if recipe.cache_copy is None:
        return Found(*cache.read_info(recipe.cache_dir), "")
    for verify in (False, True):
        version = recipe.cache_copy.fetch(verify=verify)
        if version and recipe.data.storage == "records":
            recipe.fetch_records()
        info, problem = cache.read_info(recipe.cache_dir)
        if info or not version:
            break
    return Found(info, problem, version)


def upload(recipe: Recipe, check: Callable[[], None]) -> None:
    """Copies prepared data to the bucket, if they belong in one and it does not have them.

    Args:
      recipe: settings and registry entry of the data set.
      check: called before data in the bucket change or become valid; as for `FolderCopy.upload`.

    Raises:
      BucketError: if the bucket cannot be written.
    """
    if recipe.cache_copy is None:
        return
    # Data sets that TFDS prepared come from the bucket.
    if recipe.records_copy and not recipe.part.locate:
        recipe.records_copy.upload(check)
    recipe.cache_copy.upload(check)


@contextlib.contextmanager
def sole_writer(recipe: Recipe, found: Found) -> Iterator[Callable[[], None] | None]:
    """Excludes other hosts from preparing the data set in a bucket during the block.

    Yields:
      A function that raises an error if another host has taken over; None: another host has
      prepared the data set in the meantime.

    Raises:
      BucketError: if the bucket cannot be written.
    """
    copy = recipe.cache_copy
    if copy is None or recipe.remote is None:
        yield lambda: None
        return

    def is_replaced() -> bool:
        return copy.version() != found.version

    path = recipe.original(recipe.cache_root) / f"{recipe.name}-{recipe.version}.lock"
    with lease.lease(
        path,
        recipe.log,
        what=f"config.data.directory = {str(recipe.remote)!r}",
        doing="preparing this data set",
        wait=True,
        unneeded=is_replaced,
    ) as check:
        yield None if is_replaced() else check


def build(recipe: Recipe) -> cache.Info:
    """Writes the cache, and first the TFDS data set if missing; returns the cache's description.

    Requires the lock, so that unfinished files of other processes can be removed.
    """
    folder = recipe.cache_dir
    partial = folder.with_name(folder.name + ".partial")
    # TFDS names an unfinished folder 'incomplete.XXXXXX_1.0.0'.
    unfinished = (recipe.directory / recipe.name).glob(f"incomplete.*_{recipe.version}")
    for leftover in (partial, *unfinished):
        shutil.rmtree(leftover, ignore_errors=True)
    builder = _prepared_builder(recipe)
    where = recipe.original(pathlib.Path(builder.data_dir))
    recipe.check(cache.prepared_from_builder(builder), where)
    count = sum(split.num_examples for split in builder.info.splits.values())
    _check_space(recipe, count * cache.example_bytes(recipe.data))
    partial.mkdir(parents=True)
    try:
        info = cache.write(recipe, builder, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    recipe.log(f"{recipe.name}: ready in {folder}")
    return info


def _check_space(recipe: Recipe, needed: int) -> None:
    what = f"preparing this data set ({recipe.folder_setting})"
    check_space(recipe.directory, needed, what, error=DataError)


def make_builder(recipe: Recipe) -> Any:
    """Returns the builder that prepares a data set and reads its records; imports TFDS."""
    part, data = recipe.part, recipe.data
    # TFDS expands ~ too, and treats gs:/ as a bucket; in an absolute path both are plain names.
    directory = recipe.directory.absolute()
    if part.is_builder:
        make = part.build(registry.settings_with_defaults(part, data))
        arguments = {name: getattr(data, name) for name in part.extra_settings}
    else:
        from inception_jax.datasets.builders import from_function

        make, arguments = from_function.make_class(part), {"recipe": recipe}
    if recipe.source_copy:
        objects = recipe.source_copy.objects()
        arguments["original"] = {"source": str(recipe.source), "source_objects": objects}
    source = str(recipe.local_source or "")
    return make(source=source, log=recipe.log, data_dir=directory, **arguments)


def _prepared_builder(recipe: Recipe) -> Any:
    """Returns the builder of a prepared TFDS data set, writing the data set if necessary."""
    recipe.fetch_records()
    builder = make_builder(recipe)
    if builder.is_prepared() and (missing := builder.missing_files()):
        with contextlib.closing(builder), recipe.showing_source():
            # Opens the source first, so that remaining files are not removed without a replacement.
            _open(recipe, builder)
        recipe.log(f"{missing[0]}: is missing; rebuilding {builder.data_dir}")
        shutil.rmtree(builder.data_dir)
        builder = make_builder(recipe)
    place, aside = pathlib.Path(builder.data_dir), None
    if (
        builder.is_prepared()
        and recipe.data.on_change == "prepare"
        and (change := recipe.change(cache.prepared_from_builder(builder), recipe.original(place)))
    ):
        recipe.log(f"{change.what}; preparing it again")
        # Named like an unfinished TFDS folder, so the next start removes it.
        aside = place.with_name(f"incomplete.old_{recipe.version}")
        os.replace(place, aside)
        builder = make_builder(recipe)
    if not builder.is_prepared():
        try:
            with contextlib.closing(builder), recipe.showing_source():
                _open(recipe, builder)
                count = sum(map(len, builder.splits().values()))
                records = builder.source_bytes() + count * cache.RECORD_OVERHEAD
                _check_space(recipe, records + count * cache.example_bytes(recipe.data))
                builder.prepare()
        except BaseException:
            if aside:
                os.replace(aside, place)
            raise
    if aside:
        _remove_caches(recipe)
        shutil.rmtree(aside)
    return builder


def _open(recipe: Recipe, builder: Any) -> None:
    """Opens the source, copied from a bucket if it is there."""
    recipe.fetch_source()
    builder.open()


def _remove_caches(recipe: Recipe) -> None:
    """Removes all caches of a data set, because its records have changed."""
    name = re.compile(re.escape(f"{recipe.name}-{recipe.version}-") + r"\d+px[^/]*")
    for path in recipe.cache_root.iterdir():
        if path.is_dir() and name.fullmatch(path.name):
            shutil.rmtree(path)
    if recipe.remote is None:
        return
    remote = recipe.remote / recipe.cache_root.name
    files = [file for file in buckets.list_files(remote) if name.match(file)]
    # Without its manifest, a folder does not count.
    for file in sorted(files, key=lambda file: not file.endswith(".manifest.json")):
        buckets.delete(remote / file)


@contextlib.contextmanager
def translate_disk_errors(recipe: Recipe) -> Iterator[None]:
    """Converts errors of a full or failing disk to DataError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = disk_failure(error)
        # A PermissionError concerns another file, such as one read by a registered function.
        if not reason or isinstance(error, PermissionError):
            raise
        raise DataError(
            f"{recipe.folder_setting}: cannot write to {recipe.directory}: {reason}. Free disk "
            "space, or use another directory, and rerun the command; partial files are cleaned up "
            "automatically"
        ) from error
