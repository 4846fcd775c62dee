"""Paths as users type them, and as libraries can take them.

`local` is the one place where the text of a flag, a setting or an argument becomes a path. A shell
expands no `~` behind `=`, so it is expanded here, once. A URL is refused: pathlib would take
`gs://bucket/run` for a folder named `gs:` below the current one.
"""

import os
import pathlib
import re

from inception_jax.errors import UserError

# pathlib makes gs:/ of gs://, and so does a hand that slips.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# What no library takes for more than a letter of a name: Orbax looks for files by patterns ([, ?
# and *), TensorStore has \ for / and wants UTF-8, etils has gs:/ for a bucket.
_PLAIN = re.compile(r"[\w./ =,+-]*")


def problem(typed: str) -> str:
    """Returns why a text cannot be taken for the path of a local file or folder, or ''."""
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


def local(typed: str | os.PathLike[str], what: str) -> pathlib.Path:
    """Returns the path that a user typed, with `~` and `~user` expanded.

    To be called once for a text: what it returns may begin with a `~` that is part of a name.

    Args:
      typed: the text, of a flag, a setting or an argument.
      what: it is, as it was given: "--workdir=gs://b" or "config.data.source = 'gs://b'".

    Raises:
      UserError: if it is a URL, or there is no home folder to put in the place of `~`.
    """
    text = os.fspath(typed)
    if reason := problem(text):
        raise UserError(f"{what}: {reason}")
    # As a shell does, the ~name of no user is left as it is.
    return pathlib.Path(os.path.expanduser(text))


class Plain:
    """A folder under a name that every library takes as it is; open until it is closed.

    That is its absolute path where this has nothing but letters, digits and the like. Otherwise it
    is that of an open descriptor, which Linux lists below /proc: there the folder can be used as
    under its own name.

    Args:
      folder: that is there.

    Attributes:
      path: absolute; the same folder.

    Raises:
      UserError: if the folder's name is not plain, and the system has no such list.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        self._descriptor: int | None = None
        self.path = folder.absolute()
        if _PLAIN.fullmatch(str(self.path)):
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
        """Closes the descriptor; to be called once nothing uses `path` any more."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __del__(self) -> None:
        self.close()
