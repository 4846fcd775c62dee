"""Writes a data set's records and its cache, in one process while others wait."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Iterator
from typing import Any

import filelock

from inception_jax import registry
from inception_jax.datasets import cache
from inception_jax.datasets.recipe import Log, Recipe
from inception_jax.errors import DataError
from inception_jax.storage.space import check_space, disk_failure


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
    recipe.check(cache.prepared_from_builder(builder), pathlib.Path(builder.data_dir))
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
    what = "preparing this data set (config.data.directory)"
    check_space(recipe.directory, needed, what, error=DataError)


def make_builder(recipe: Recipe) -> Any:
    """Returns the builder that prepares a data set and reads its records; imports TFDS."""
    part, data = recipe.part, recipe.data
    # TFDS expands ~ too, and treats gs:/ as a bucket; in an absolute path both are plain names.
    directory, source = recipe.directory.absolute(), str(recipe.source or "")
    if part.is_builder:
        make = part.build(registry.settings_with_defaults(part, data))
        arguments = {name: getattr(data, name) for name in part.extra_settings}
    else:
        from inception_jax.datasets.builders import from_function

        make, arguments = from_function.make_class(part), {"recipe": recipe}
    return make(source=source, log=recipe.log, data_dir=directory, **arguments)


def _prepared_builder(recipe: Recipe) -> Any:
    """Returns the builder of a prepared TFDS data set, writing the data set if necessary."""
    builder = make_builder(recipe)
    if builder.is_prepared() and (missing := builder.missing_files()):
        with contextlib.closing(builder):
            # Opens the source first, so that remaining files are not removed without a replacement.
            builder.open()
        recipe.log(f"{missing[0]}: is missing; rebuilding {builder.data_dir}")
        shutil.rmtree(builder.data_dir)
        builder = make_builder(recipe)
    place, aside = pathlib.Path(builder.data_dir), None
    if (
        builder.is_prepared()
        and recipe.data.on_change == "prepare"
        and (change := recipe.change(cache.prepared_from_builder(builder), place))
    ):
        recipe.log(f"{change.what}; preparing it again")
        # Named like an unfinished TFDS folder, so the next start removes it.
        aside = place.with_name(f"incomplete.old_{recipe.version}")
        os.replace(place, aside)
        builder = make_builder(recipe)
    if not builder.is_prepared():
        try:
            with contextlib.closing(builder):
                builder.open()
                count = sum(map(len, builder.splits().values()))
                records = builder.source_bytes() + count * cache.RECORD_OVERHEAD
                _check_space(recipe, records + count * cache.example_bytes(recipe.data))
                builder.prepare()
        except BaseException:
            if aside:
                os.replace(aside, place)
            raise
    if aside:
        for old in recipe.cache_root.glob(f"{recipe.name}-{recipe.version}-*px*"):
            shutil.rmtree(old)
        shutil.rmtree(aside)
    return builder


@contextlib.contextmanager
def locked(path: pathlib.Path, *, log: Log) -> Iterator[None]:
    """Holds a lock that is released when the process ends, however it ends."""
    _check_writable(path.parent)
    lock = _lock(path, log=log)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"waiting for another process that is preparing this data set ({lock.lock_file})")
        lock.acquire()
    except PermissionError as error:
        raise DataError(
            f"config.data.directory: {path} belongs to another user and is not writable. Remove "
            "it while no process is preparing the data set, or use your own directory"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _lock(path: pathlib.Path, *, log: Log) -> filelock.BaseFileLock:
    """Returns an OS lock on a file, or a lock file if the file system does not support locks.

    Examples of the latter: NFS without a lock service, and Lustre without the option flock.
    """
    with tempfile.TemporaryFile(dir=path.parent) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock_file = path.with_name(f"{path.name}.held")
            log(
                f"{path.parent}: this file system does not support locks ({error.strerror}); "
                f"using the file {lock_file.name} as a lock. If a process on another host is "
                "killed while preparing the data set, remove this file"
            )
            return filelock.SoftFileLock(lock_file)
    # Anyone who may create files in the folder may hold the lock, regardless of this user's umask.
    return filelock.FileLock(path, mode=stat.S_IMODE(path.parent.stat().st_mode) & 0o666)


def _check_writable(directory: pathlib.Path) -> None:
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            # A group that shares the parent folder shares this one, regardless of the umask.
            with contextlib.suppress(PermissionError):
                directory.chmod(stat.S_IMODE(directory.parent.stat().st_mode))
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise DataError(
            f"config.data.directory: cannot write to {directory} ({error}). Use a directory you "
            "can write to"
        ) from error


@contextlib.contextmanager
def translate_disk_errors(directory: pathlib.Path) -> Iterator[None]:
    """Converts errors of a full or failing disk to DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = disk_failure(error)
        # A PermissionError concerns another file, such as one read by a registered function.
        if not reason or isinstance(error, PermissionError):
            raise
        raise DataError(
            f"config.data.directory: cannot write to {directory}: {reason}. Free disk space, or "
            "use another directory, and rerun the command; partial files are cleaned up "
            "automatically"
        ) from error
