"""A lock that allows one training process per workdir.

Of a local workdir, the operating system releases the lock however the process ends. Of a workdir in
a bucket, it is a lease, which expires if the process is killed.
"""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

from inception_jax.errors import UserError
from inception_jax.storage import paths
from inception_jax.storage.lease import lease
from inception_jax.storage.workdir import LOCK_FILE

# Errors if another process has the lock. File systems without locks, such as NFS without its lock
# service, return various other ones.
_HELD_ERRNOS = (errno.EAGAIN, errno.EACCES)

_DOING = "training in this folder"
_REMEDY = "Wait for it to finish, stop it, or use another --workdir"


@contextlib.contextmanager
def lock_workdir(location: paths.Path, log: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Locks a workdir during the block, so that no other process trains in it.

    A local one is locked by flock on a file that is never removed; a killed process leaves an
    unlocked file. On NFS, locks work across hosts from version 4 on. If the file system does not
    support locks, that is logged, and training continues without one.

    Args:
      location: the workdir, local or in a bucket; created if missing.
      log: called with a line if locks are not supported; otherwise as for `lease`.

    Yields:
      A function to call before each write, which raises an error if the lock was lost, as for
      `lease`. A local lock cannot be lost.

    Raises:
      UserError: if another process has the lock, with its process ID and host.
    """
    if not paths.is_local(location):
        what = f"--workdir={location}"
        with lease(location / LOCK_FILE, log, what=what, doing=_DOING, remedy=_REMEDY) as check:
            yield check
        return
    location.mkdir(parents=True, exist_ok=True)
    # Opened for appending, because a process that does not get the lock reads who has it.
    with (location / LOCK_FILE).open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ERRNOS:
                raise UserError(
                    f"--workdir={location}: another process is {_DOING} ({_holder(location)}). "
                    f"{_REMEDY}"
                ) from error
            log(
                f"{location}: this file system does not support locks ({error.strerror}); make "
                "sure that no other process trains in this folder"
            )
        # Not essential if the disk is full.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield lambda: None


def _holder(folder: pathlib.Path) -> str:
    return (folder / LOCK_FILE).read_text(encoding="utf-8").strip() or "just started"
