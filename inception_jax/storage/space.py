"""Checks of free disk space, and detection of disk errors."""

import errno
import os
import pathlib
import shutil

from inception_jax.errors import UserError, WriteError

_DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def check_space(
    path: pathlib.Path, needed_bytes: int, what: str, *, error: type[UserError] = WriteError
) -> None:
    """Checks that a disk has enough free space for a write.

    Args:
      path: an existing folder on that disk.
      needed_bytes: maximum size of the write.
      what: what is written, for the message: "a checkpoint".
      error: the exception to raise.

    Raises:
      UserError: an `error`, with the bytes needed and free.
    """
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise error(
            f"{path}: {what} needs up to {_format_bytes(needed_bytes)}, but only "
            f"{_format_bytes(free)} is free. Free disk space, or use a folder on another disk"
        )


def disk_failure(error: BaseException | None) -> str:
    """Returns the system's message of the disk failure that an error reports; '' if none.

    Libraries report a full disk with various exception types, so this checks the text.

    >>> disk_failure(ValueError("UNKNOWN: No space left on device [x=1]"))
    'No space left on device'
    """
    return next((text for text in map(os.strerror, _DISK_ERRNOS) if text in str(error)), "")


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
