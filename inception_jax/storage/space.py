"""Room on disks: what a write needs, and how a library says that there was none."""

import errno
import os
import pathlib
import shutil

from inception_jax.errors import UserError, WriteError

_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


def check_space(
    path: pathlib.Path, needed_bytes: int, what: str, *, error: type[UserError] = WriteError
) -> None:
    """Checks that a disk has room for what is about to be written.

    Args:
      path: a folder that exists on that disk.
      needed_bytes: how much it takes at most.
      what: is to be written, as it begins a sentence: "a checkpoint".
      error: what to raise.

    Raises:
      UserError: an `error`, with the bytes needed and free.
    """
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise error(
            f"{path}: {what} needs up to {_in_words(needed_bytes)}, but only {_in_words(free)} is "
            "free. Free disk space, or use a folder on another disk"
        )


def disk_failure(error: BaseException | None) -> str:
    """Returns which failure of a disk an error tells of, in the system's words, or ''.

    Libraries report a full disk in several types of error, so the text decides.
    """
    return next((text for text in map(os.strerror, _FAILURES) if text in str(error)), "")


def _in_words(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
