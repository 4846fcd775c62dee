"""Writes a data set's records and its cache: one process, the others waiting for it."""

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
    """Makes the cache, and the TFDS dataset before it if there is none; returns its description.

    The lock is held: what others left unfinished here is nobody's.
    """
    folder = recipe.cache_dir
    partial = folder.with_name(folder.name + ".partial")
    # TFDS's name for a folder it has not finished is 'incomplete.XXXXXX_1.0.0'.
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
    """Returns what prepares a data set, and reads its records; imports TFDS."""
    part, data = recipe.part, recipe.data
    # TFDS expands ~, too, and takes gs:/ for a bucket; below / both are letters of a name.
    directory, source = recipe.directory.absolute(), str(recipe.source or "")
    if part.is_builder:
        make = part.build(registry.fill(part, data))
        arguments = {name: getattr(data, name) for name in part.takes}
    else:
        from inception_jax.datasets.builders import from_function

        make, arguments = from_function.make_class(part), {"recipe": recipe}
    return make(source=source, log=recipe.log, data_dir=directory, **arguments)


def _prepared_builder(recipe: Recipe) -> Any:
    """Returns the builder of a TFDS dataset that is on disk, written now if it was not there."""
    builder = make_builder(recipe)
    if builder.is_prepared() and (missing := builder.missing_files()):
        with contextlib.closing(builder):
            # What is left is not removed where there is nothing to make it from.
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
        # As TFDS calls a folder that it has not finished: the next start removes it.
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
    """Holds a lock that ends with the process, however that ends."""
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
    """Returns the system's lock on a file or, where the file system has none, the file as a lock.

    Such are NFS without its lock service and Lustre without the option flock.
    """
    with tempfile.TemporaryFile(dir=path.parent) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = path.with_name(f"{path.name}.held")
            log(
                f"{path.parent}: this file system does not support locks ({error.strerror}); "
                f"using the file {held.name} as a lock. If a process on another host is killed "
                "while preparing the data set, remove this file"
            )
            return filelock.SoftFileLock(held)
    # Whoever may make files beside it may hold it, whatever this user's umask is.
    return filelock.FileLock(path, mode=stat.S_IMODE(path.parent.stat().st_mode) & 0o666)


def _check_writable(directory: pathlib.Path) -> None:
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            # A group that shares the folder above shares this one, whatever the umask is.
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
    """Turns a disk that fills up or fails into a DataError."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reason = disk_failure(error)
        # What may not be read is somebody else's file, as of a function that returns examples.
        if not reason or isinstance(error, PermissionError):
            raise
        raise DataError(
            f"config.data.directory: cannot write to {directory}: {reason}. Free disk space, or "
            "use another directory, and rerun the command; partial files are cleaned up "
            "automatically"
        ) from error
