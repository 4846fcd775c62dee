"""The files of a data set's source by their path, in an archive or in a folder alike."""

import abc
import hashlib
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import NamedTuple

from inception_jax.errors import DataError

# The most that is read of one file: no picture and no list has as much, and a small archive could
# otherwise unpack to more than the memory holds.
MAX_BYTES = 256 << 20


class Contents(NamedTuple):
    """What tells the content of a source from others.

    Attributes:
      digests: of `Source.fingerprint`; the first is recorded of what is prepared from it, the
        others are what older versions recorded.
      class_names: in the order of the labels; None: the digests are enough.
    """

    digests: Sequence[str]
    class_names: Sequence[str] | None = None


def fingerprint(path: pathlib.Path) -> str:
    """Returns a digest of any file or folder, by names, sizes and times, without reading it.

    Raises:
      DataError: if there is nothing at `path`.
    """
    if path.is_dir():
        with FolderSource(path) as source:
            return source.fingerprint()
    if not path.exists():
        raise DataError(f"config.data.source = {str(path)!r}: no such file or folder")
    return hashlib.sha256(repr(_size_and_time(path)).encode()).hexdigest()


class Source(abc.ABC):
    """Files by their path below a root, parted by '/'.

    Attributes:
      path: the archive or folder, as it was given.
      sizes: bytes of each file.
      folders: the folders that are listed by themselves, ending in '/'; those that hold nothing
        are among them.
      hidden: the files, and the folders ending in '/', that were left out by their names; what
        lies in such a folder is not listed.
      names_depend_on_encoding: whether there are names whose encoding an archive does not declare.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self.folders: list[str] = []
        self.hidden: list[str] = []
        self.names_depend_on_encoding = False
        # What `path` has above the paths of files, '' or ending in '/'.
        self._root = ""

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def enter(self, root: str) -> None:
        """Makes a folder below, '' or a path ending in '/', the root; files elsewhere are left."""
        self._root += root
        self.sizes = {
            file.removeprefix(root): size
            for file, size in self.sizes.items()
            if file.startswith(root)
        }
        self.folders, self.hidden = (
            [path.removeprefix(root) for path in paths if path.startswith(root) and path != root]
            for paths in (self.folders, self.hidden)
        )

    def read(self, file: str) -> bytes:
        """Returns a file's content; safe in threads.

        Raises:
          DataError: if it is missing, damaged or larger than any picture.
        """
        if file not in self.sizes:
            raise DataError(
                f"{self.path}: {file} is missing. Download the archive again, or copy the "
                "complete folder"
            )
        if self.sizes[file] > MAX_BYTES:
            raise DataError(
                f"{self.path}: {file} has {self.sizes[file]:,} bytes; a file can have at most "
                f"{MAX_BYTES:,}. Remove it, or make it smaller"
            )
        return self._read(self._root + file)

    def fingerprint(self, files: Iterable[str] | None = None) -> str:
        """Returns a digest by which other content is noticed, without reading the files.

        It is of what the system or the archive says of them. So a folder's is another once its
        files are copied without their times, and the same if one is replaced by another of its
        name, size and time; and that of a folder is never that of its archive.

        Args:
          files: those that count; None: all.
        """
        counted = self.sizes if files is None else files
        facts = sorted((file, *self._stat(self._root + file)) for file in counted)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @abc.abstractmethod
    def _read(self, path: str) -> bytes:
        """Returns the content of a file, by its path in the archive or folder that was given."""

    @abc.abstractmethod
    def _stat(self, path: str) -> tuple[int, ...]:
        """Returns what changes with a file's content and is known without reading it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases what is open."""


class FolderSource(Source):
    """All files below a folder; links to folders are followed.

    Args:
      path: the folder.
      hidden: whether a file or folder, by its path, is none of the source's.

    Raises:
      DataError: if a folder below cannot be read.
    """

    def __init__(
        self, path: pathlib.Path, *, is_hidden: Callable[[str], bool] = lambda file: False
    ) -> None:
        super().__init__(path)
        self._times: dict[str, int] = {}
        for folder, inner, names in os.walk(path, onerror=_raise_unreadable, followlinks=True):
            below = os.path.relpath(folder, path).replace(os.sep, "/")
            start = "" if below == "." else f"{below}/"
            self.hidden += [f"{start}{name}/" for name in inner if is_hidden(f"{start}{name}/")]
            self.hidden += [start + name for name in names if is_hidden(start + name)]
            inner[:] = [
                name
                for name in inner
                if not is_hidden(f"{start}{name}/")
                and not _is_link_cycle(path, os.path.join(folder, name))
            ]
            self.folders += [f"{start}{name}/" for name in inner]
            for file in (start + name for name in names):
                if not is_hidden(file):
                    self.sizes[file], self._times[file] = _size_and_time(path / file)

    def _read(self, path: str) -> bytes:
        file = self.path / path
        try:
            if not stat.S_ISREG(file.stat().st_mode):
                problem = "a device or a pipe, not a file"
                raise DataError(f"{file}: is {problem}. Remove it") from OSError(problem)
            return file.read_bytes()
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error}). Check its permissions") from error

    def _stat(self, path: str) -> tuple[int, ...]:
        """Returns a file's size and time of change."""
        return self.sizes[path.removeprefix(self._root)], self._times[path]

    def close(self) -> None:
        """Does nothing: files are open only while they are read."""


def _raise_unreadable(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):
        return  # Removed meanwhile, as a run that trains below the folder removes old checkpoints.
    raise DataError(f"{error.filename}: cannot be read ({error}). Check its permissions") from error


def _is_link_cycle(root: pathlib.Path, folder: str) -> bool:
    """Whether a folder is a link to one that it lies in, or was reached through.

    Such a one would be walked for ever.
    """
    if not os.path.islink(folder):
        return False
    target, above = os.path.realpath(folder), pathlib.Path(folder).parent
    walked = [above, *(each for each in above.parents if each.is_relative_to(root))]
    return any(pathlib.Path(os.path.realpath(each)).is_relative_to(target) for each in walked)


def _size_and_time(path: pathlib.Path) -> tuple[int, int]:
    """Returns a file's size in bytes and its time of change in ns; 0 and 0 for a dead link."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
