"""One trainer a folder: a lock that ends with its process, however that ends."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
from collections.abc import Callable, Iterator

from inception_jax.errors import UserError

NAME = "run.lock"
# What file systems answer where another process holds it; those that have no locks, such as NFS
# without its lock service, answer all kinds of things.
_HELD = (errno.EAGAIN, errno.EACCES)


@contextlib.contextmanager
def lock_workdir(folder: pathlib.Path, log: Callable[[str], None]) -> Iterator[None]:
    """Holds a folder for this process, so that no other trains in it.

    The lock is the system's (flock), on a file that stays: a killed process leaves a file that
    nobody holds. Locks reach across hosts on NFS from version 4 on; where a file system has none,
    that is said, and the run goes on without.

    Args:
      folder: of the run; made if it is missing.
      log: takes one line of text.

    Raises:
      UserError: if another process holds it, naming that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Opened for appending: who holds the lock is to be read by those who do not get it.
    with (folder / NAME).open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise UserError(
                    f"--workdir={folder}: another process is training in this folder "
                    f"({_holder(folder)}). Wait for it to finish, stop it, or use another --workdir"
                ) from error
            log(
                f"{folder}: this file system does not support locks ({error.strerror}); make sure "
                "that no other process trains in this folder"
            )
        # A full disk need not take it.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def _holder(folder: pathlib.Path) -> str:
    return (folder / NAME).read_text(encoding="utf-8").strip() or "just started"
