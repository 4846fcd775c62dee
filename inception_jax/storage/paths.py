"""Paths as users type them, and as libraries can handle them.

`user_path` is the only place where the text of a flag, setting or argument becomes a path: a
`pathlib.Path`, or an `epath.Path` for `gs://bucket/path`. Shells do not expand `~` after `=`, so it
is expanded here, once. Other URLs are rejected, because pathlib would treat `s3://bucket/run` as a
folder `s3:` in the current directory.
"""

import importlib.util
import os
import pathlib
import re
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from inception_jax.errors import UserError

# A place where files are stored. Both kinds have the operations of pathlib.PurePosixPath.
if TYPE_CHECKING:
    from etils import epath

    Path: TypeAlias = pathlib.Path | epath.Path
else:
    # epath is imported only for paths in buckets, which need optional libraries.
    Path = pathlib.Path | pathlib.PurePosixPath

# pathlib turns gs:// into gs:/, which is also a common typo.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_BUCKET = re.compile(r"gs://[a-z0-9][a-z0-9._-]{1,220}[a-z0-9](/|$)")
# Libraries treat these as patterns or separators.
_UNUSABLE_IN_BUCKETS = re.compile(r"[\[\]*?#\\\x00-\x1f]|/\.\.?(/|$)")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")
# Characters that no library treats specially: Orbax looks for files by patterns ([, ? and *),
# TensorStore reads \ as / and requires UTF-8, etils reads gs:/ as a bucket.
_PLAIN_PATH = re.compile(r"[\w./ =,+-]*")
_GCS_LIBRARIES = ("gcsfs", "google.cloud.storage")


def find_problem(typed: str, *, local_only: bool = False) -> str:
    """Returns why a text is not the path of a file or folder; '' if it is.

    Args:
      typed: the text.
      local_only: whether `gs://` is a problem too.
    """
    if "\0" in typed:
        return "must not contain a NUL character"
    literal = f"For a local path with this name, write ./{typed}"
    if _WINDOWS.match(typed):
        return f"is a Windows path; use a path on this system. {literal}"
    if typed.startswith("gs://") and not local_only:
        return _find_bucket_problem(typed)
    if url := _URL.match(typed):
        scheme = url[1].lower()
        if scheme == "file":
            return "is a URL; use the path alone, without file:"
        if scheme == "gs" and not local_only:
            return f"must be written as gs://{typed[4:].lstrip('/')}. {literal}"
        allowed = "a local path" if local_only else "a local path or gs://BUCKET/PATH"
        return f"is a URL ({url[1]}:); must be {allowed}. Copy the data from there first. {literal}"
    if re.match(r"~(/|$)", typed) and os.path.expanduser(typed) == typed:
        return "the home folder is unknown; set HOME, or use a path without ~"
    return ""


def _find_bucket_problem(typed: str) -> str:
    if not _BUCKET.match(typed):
        return (
            "must be gs://BUCKET/PATH, where BUCKET has 3 or more lowercase letters, digits, '-', "
            "'_' and '.'"
        )
    if unusable := _UNUSABLE_IN_BUCKETS.search(typed.removeprefix("gs:/")):
        return f"must not contain {unusable[0]!r}; use letters, digits, '.', '-' and '_'"
    if not all(map(_is_installed, _GCS_LIBRARIES)):
        return (
            "paths in buckets need optional libraries; install them with pip install "
            "'inception-jax[gcs]', or in a clone with pip install -e '.[gcs]'"
        )
    return ""


def _is_installed(library: str) -> bool:
    try:
        return importlib.util.find_spec(library) is not None
    except (ModuleNotFoundError, ValueError):  # Without the package above it; blocked by a caller.
        return False


def user_path(typed: "str | os.PathLike[str]", what: str) -> Path:
    """Returns the path that a user typed, local or in a bucket.

    In a local one, `~` and `~user` are expanded. Call only once for a text, because the result may
    start with a `~` that is part of a name.

    Args:
      typed: text of a flag, setting or argument.
      what: the text as the user gave it, for messages: "--workdir=gs://b" or
        "config.data.source = 'gs://b'".

    Raises:
      UserError: if it is another URL or a Windows path, the home folder for `~` is unknown, or the
        libraries for buckets are not installed.
    """
    text = os.fspath(typed)
    if reason := find_problem(text):
        raise UserError(f"{what}: {reason}")
    # As in a shell, ~name stays as it is if there is no such user.
    return from_text(os.path.expanduser(text))


def from_text(text: str) -> Path:
    """Returns the path with this text, which `str` gives back; neither expands nor checks it."""
    if text.startswith("gs://"):
        from etils import epath

        return epath.Path(text)
    return pathlib.Path(text)


def local_path(typed: "str | os.PathLike[str]", what: str) -> pathlib.Path:
    """Returns the path that a user typed if it is local; as `user_path` otherwise.

    Raises:
      UserError: as `user_path`; also if the path is in a bucket.
    """
    text = os.fspath(typed)
    if reason := find_problem(text, local_only=True):
        raise UserError(f"{what}: {reason}")
    return pathlib.Path(os.path.expanduser(text))


def user_cache() -> pathlib.Path:
    """Returns the user's folder for this program's caches; it need not exist.

    Raises:
      RuntimeError: if the home directory is unknown.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says to ignore relative paths.
    if not cache.is_absolute():
        cache = pathlib.Path.home() / ".cache"
    return cache / "inception_jax"


def is_local(path: Path) -> TypeGuard[pathlib.Path]:
    """Whether a path is local, and not in a bucket."""
    return isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """Returns the path without symbolic links; a path in a bucket is returned as it is."""
    return path.resolve() if is_local(path) else path


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
