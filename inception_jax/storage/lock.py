"""A lock that allows one training process per workdir, released however the process ends."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

from inception_jax.errors import UserError
from inception_jax.storage.workdir import LOCK_FILE

# Errors if another process has the lock. File systems without locks, such as NFS without its lock
# service, return various other ones.
_HELD_ERRNOS = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def lock_workdir(folder: pathlib.Path, log: Callable[[str], None]) -> Iterator[None]:
    """Locks a workdir during the block, so that no other process trains in it.

    Uses flock on a file that is never removed; a killed process leaves an unlocked file. On NFS,
    locks work across hosts from version 4 on. If the file system does not support locks, that is
    logged, and training continues without one.

    Args:
      folder: the workdir; created if missing.
      log: called with a line if locks are not supported.

    Raises:
      UserError: if another process has the lock, with its process ID and host.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened for appending, because a process that does not get the lock reads who has it.
    with (folder / LOCK_FILE).open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD_ERRNOS:
                raise UserError(
                    f"--workdir={folder}: another process is training in this folder "
                    f"({_holder(folder)}). Wait for it to finish, stop it, or use another --workdir"
                ) from error
            log(
                f"{folder}: this file system does not support locks ({error.strerror}); make sure "
                "that no other process trains in this folder"
            )
        # Not essential if the disk is full.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _holder(folder: pathlib.Path) -> str:
    return (folder / LOCK_FILE).read_text(encoding="utf-8").strip() or "just started"
