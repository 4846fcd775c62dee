"""Uniform access to the files of a source, a folder or an archive, by path."""

import abc
import hashlib
import os
import pathlib
import stat
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from inception_jax.errors import DataError

# Maximum size of a file: larger than any image or list. Without it, a small archive could unpack to
# more than fits into memory.
MAX_BYTES = 256 << 20


class Contents(NamedTuple):
    """Identifies the content of a source.

    Attributes:
      digests: from `Source.fingerprint`; the first is recorded with the prepared data, the others
        are those that older versions recorded.
      class_names: in label order; None: the digests are sufficient.
    """

    digests: Sequence[str]
    class_names: Sequence[str] | None = None


def fingerprint(path: pathlib.Path) -> str:
    """Returns a digest of the names, sizes and times of a file or folder, without reading it.

    Raises:
      DataError: if `path` does not exist.
    """
    if path.is_dir():
        with FolderSource(path) as source:
            return source.fingerprint()
    if not path.exists():
        raise DataError(f"config.data.source = {str(path)!r}: no such file or folder")
    return hashlib.sha256(repr(_size_and_time(path)).encode()).hexdigest()


class Source(abc.ABC):
    """Files by their path below a root, separated by '/'.

    Attributes:
      path: the archive or folder, as specified.
      sizes: size of each file, bytes.
      folders: paths of folders that have their own entry, ending in '/', including empty ones.
      hidden: files, and folders ending in '/', skipped because of their names; the contents of such
        folders are not listed.
      links: those of `sizes` that are links and cannot be followed, maybe to a folder.
      names_depend_on_encoding: whether an archive has names without a declared encoding.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self.folders: list[str] = []
        self.hidden: list[str] = []
        self.links: list[str] = []
        self.names_depend_on_encoding = False
        # Prefix of the files' paths below `path`, '' or ending in '/'.
        self._root = ""

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, root: str) -> None:
        """Makes a subfolder ('' or ending in '/') the root; files elsewhere are dropped."""
        self._root += root
        self.sizes = {
            file.removeprefix(root): size
            for file, size in self.sizes.items()
            if file.startswith(root)
        }
        self.folders, self.hidden, self.links = (
            [path.removeprefix(root) for path in paths if path.startswith(root) and path != root]
            for paths in (self.folders, self.hidden, self.links)
        )

    def read(self, file: str) -> bytes:
        """Returns a file's content; thread-safe.

        Raises:
          DataError: if it is missing, damaged or larger than `MAX_BYTES`.
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
        """Returns a digest that changes with the content, without reading the files.

        It is computed from metadata of the file system or the archive. So a folder's digest changes
        if its files are copied without their timestamps, and does not change if a file is replaced
        by one of equal name, size and time; and the digests of a folder and its archive always
        differ.

        Args:
          files: the files to include; None: all.
        """
        counted = self.sizes if files is None else files
        facts = sorted((file, *self._stat(self._root + file)) for file in counted)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @abc.abstractmethod
    def _read(self, path: str) -> bytes:
        """Returns the content of a file, by its path in the archive or folder."""

    @abc.abstractmethod
    def _stat(self, path: str) -> tuple[int, ...]:
        """Returns metadata that change with a file's content, without reading it."""

    @abc.abstractmethod
    def close(self) -> None:
        """Closes open files."""


class FolderSource(Source):
    """Reads the files below a folder; follows links to folders.

    Args:
      path: the folder.
      is_hidden: returns whether to skip a file or folder, by path.

    Raises:
      DataError: if a subfolder cannot be read.
    """

    def __init__(
        self, path: pathlib.Path, *, is_hidden: Callable[[str], bool] = lambda file: False
    ) -> None:
        super().__init__(path)
        self._times: dict[str, int] = {}
        for folder, subfolders, names in os.walk(path, onerror=_raise_unreadable, followlinks=True):
            below = os.path.relpath(folder, path).replace(os.sep, "/")
            start = "" if below == "." else f"{below}/"
            self.hidden += [
                f"{start}{name}/" for name in subfolders if is_hidden(f"{start}{name}/")
            ]
            self.hidden += [start + name for name in names if is_hidden(start + name)]
            subfolders[:] = [
                name
                for name in subfolders
                if not is_hidden(f"{start}{name}/")
                and not _is_link_cycle(path, os.path.join(folder, name))
            ]
            self.folders += [f"{start}{name}/" for name in subfolders]
            for file in (start + name for name in names):
                if not is_hidden(file):
                    self.sizes[file], self._times[file] = _size_and_time(path / file)
                    # Without a time, it may be a broken link.
                    if not self._times[file] and not os.path.exists(path / file):
                        self.links.append(file)

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
        """Returns a file's size and modification time."""
        return self.sizes[path.removeprefix(self._root)], self._times[path]

    def close(self) -> None:
        """Does nothing: files are open only while being read."""


def _raise_unreadable(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):
        return  # Removed in the meantime, such as an old checkpoint of a run below this folder.
    raise DataError(f"{error.filename}: cannot be read ({error}). Check its permissions") from error


def _is_link_cycle(root: pathlib.Path, folder: str) -> bool:
    """Returns whether a folder is a link to a folder that contains it or that led to it.

    Following it would never end.
    """
    if not os.path.islink(folder):
        return False
    target, above = os.path.realpath(folder), pathlib.Path(folder).parent
    walked = [above, *(each for each in above.parents if each.is_relative_to(root))]
    return any(pathlib.Path(os.path.realpath(each)).is_relative_to(target) for each in walked)


def _size_and_time(path: pathlib.Path) -> tuple[int, int]:
    """Returns a file's size in bytes and modification time in ns; 0 and 0 for a broken link."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
