"""Locks that let one process of several prepare or download data while the others wait."""

import contextlib
import fcntl
import pathlib
import stat
import tempfile
from collections.abc import Callable, Iterator

import filelock

from inception_jax.errors import DataError

Log = Callable[[str], None]


@contextlib.contextmanager
def locked(path: pathlib.Path, *, doing: str, setting: str, log: Log) -> Iterator[None]:
    """Holds a lock that is released when the process ends, however it ends.

    Args:
      path: the lock's file.
      doing: what its holder does, such as "preparing this data set".
      setting: the setting that selects the folder.
      log: called with one line of text.

    Raises:
      DataError: if the folder is not writable.
    """
    _check_writable(path.parent, setting)
    lock = _lock(path, log=log)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"waiting for another process that is {doing} ({lock.lock_file})")
        lock.acquire()
    except PermissionError as error:
        raise DataError(
            f"{setting}: {path} belongs to another user and is not writable. Remove it while no "
            f"process is {doing}, or use your own directory"
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
                "killed while it has the lock, remove this file"
            )
            return filelock.SoftFileLock(lock_file)
    # Anyone who may create files in the folder may hold the lock, regardless of this user's umask.
    return filelock.FileLock(path, mode=stat.S_IMODE(path.parent.stat().st_mode) & 0o666)


def _check_writable(directory: pathlib.Path, setting: str) -> None:
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
            f"{setting}: cannot write to {directory} ({error}). Use a directory you can write to"
        ) from error
