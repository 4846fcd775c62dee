"""Paths as users type them, and as libraries can handle them.

`local_path` is the only place where the text of a flag, setting or argument becomes a path. Shells
do not expand `~` after `=`, so it is expanded here, once. URLs are rejected, because pathlib would
treat `gs://bucket/run` as a folder `gs:` in the current directory.
"""

import os
import pathlib
import re

from inception_jax.errors import UserError

# pathlib turns gs:// into gs:/, which is also a common typo.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# Characters that no library treats specially: Orbax looks for files by patterns ([, ? and *),
# TensorStore reads \ as / and requires UTF-8, etils reads gs:/ as a bucket.
_PLAIN_PATH = re.compile(r"[\w./ =,+-]*")


def find_problem(typed: str) -> str:
    """Returns why a text is not the path of a local file or folder; '' if it is."""
    if "\0" in typed:
        return "must not contain a NUL character"
    literal = f"For a local path with this name, write ./{typed}"
    if _WINDOWS.match(typed):
        return f"is a Windows path; use a path on this system. {literal}"
    if url := _URL.match(typed):
        if url[1].lower() == "file":
            return "is a URL; use the path alone, without file:"
        return (
            f"is a URL ({url[1]}:); only local paths are supported. Copy the data from its bucket "
            f"or other remote storage, or mount it. {literal}"
        )
    if re.match(r"~(/|$)", typed) and os.path.expanduser(typed) == typed:
        return "the home folder is unknown; set HOME, or use a path without ~"
    return ""


def local_path(typed: str | os.PathLike[str], what: str) -> pathlib.Path:
    """Returns the path that a user typed, with `~` and `~user` expanded.

    Call only once for a text, because the result may start with a `~` that is part of a name.

    Args:
      typed: text of a flag, setting or argument.
      what: the text as the user gave it, for messages: "--workdir=gs://b" or
        "config.data.source = 'gs://b'".

    Raises:
      UserError: if it is a URL or a Windows path, or the home folder for `~` is unknown.
    """
    text = os.fspath(typed)
    if reason := find_problem(text):
        raise UserError(f"{what}: {reason}")
    # As in a shell, ~name stays as it is if there is no such user.
    return pathlib.Path(os.path.expanduser(text))


class PlainPath:
    """A folder under a path that every library handles literally; valid until closed.

    This is its absolute path if that has only letters, digits and a few harmless characters.
    Otherwise it is the path of an open file descriptor below /proc (Linux), which can be used like
    the folder itself.

    Args:
      folder: an existing folder.

    Attributes:
      path: absolute path of the same folder.

    Raises:
      UserError: if the path has other characters, and the system has no /proc.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._descriptor: int | None = None
        self.path = folder.absolute()
        if _PLAIN_PATH.fullmatch(str(self.path)):
            return
        self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self.path = pathlib.Path(f"/proc/self/fd/{self._descriptor}")
        if not self.path.is_dir():
            self.close()
            raise UserError(
                f"{folder}: on this system, checkpoints cannot be written to a path with these "
                "characters; use letters, digits, '.', '-' and '_' only"
            )

    def close(self) -> None:
        """Closes the descriptor; `path` must no longer be used."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()
