"""The files of a data set's source by their path, in a zip archive or in a folder alike."""

import abc
import hashlib
import os
import pathlib
import stat
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import NamedTuple

from inception_jax.errors import DataError

# The most that is read of one file: no picture and no list has as much, and a small archive could
# otherwise unpack to more than the memory holds.
MOST_BYTES = 256 << 20


class Contents(NamedTuple):
    """What tells the content of a source from others.

    Attributes:
      digests: of `Source.fingerprint`; the first is recorded of what is prepared from it, the
        others are what older versions recorded.
      class_names: in the order of the labels; None: the digests are enough.
    """

    digests: Sequence[str]
    class_names: Sequence[str] | None = None


class Source(abc.ABC):
    """Files by their path below a root, parted by '/'.

    Attributes:
      path: the archive or folder, as it was given.
      sizes: bytes of each file.
      folders: the folders that are listed by themselves, ending in '/'; those that hold nothing
        are among them.
      hidden: the files, and the folders ending in '/', that were left out by their names; what
        lies in such a folder is not listed.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self.sizes: dict[str, int] = {}
        self.folders: list[str] = []
        self.hidden: list[str] = []

    def __enter__(self) -> "Source":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @abc.abstractmethod
    def read(self, file: str) -> bytes:
        """Returns a file's content; safe in threads.

        Raises:
          DataError: if it is missing or damaged.
        """

    def fingerprint(self, files: Iterable[str] | None = None) -> str:
        """Returns a digest by which other content is noticed, without reading the files.

        It is of what the system or the archive says of them. So a folder's is another once its
        files are copied without their times, and the same if one is replaced by another of its
        name, size and time; and that of a folder is never that of its archive.

        Args:
          files: those that count; None: all.
        """
        facts = sorted(map(self._facts, self.sizes if files is None else files))
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @abc.abstractmethod
    def _facts(self, file: str) -> tuple[str, int, int]:
        """Returns a file's path and size, and what tells its content from others of that size."""

    @abc.abstractmethod
    def close(self) -> None:
        """Releases what is open."""

    def _check_size(self, file: str) -> None:
        if self.sizes[file] > MOST_BYTES:
            raise DataError(
                f"{self.path}: {file} has {self.sizes[file]:,} bytes; at most {MOST_BYTES:,} are "
                "read of one file. Remove it, or make it smaller."
            )

    def _missing(self, file: str) -> DataError:
        return DataError(
            f"{self.path}: {file} is missing. Get the archive again, or copy the folder whole."
        )


class ZipSource(Source):
    """A zip archive, read in place.

    Args:
      path: the archive.
      root: from the names of all members, the start that the files' paths leave out ('' or ending
        in '/'); members elsewhere are no files of the source.
      hidden: whether a file, by its path, is none of the source's.

    Raises:
      DataError: if it is not a whole zip archive.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        root: Callable[[Sequence[str]], str] = lambda names: "",
        hidden: Callable[[str], bool] = lambda file: False,
    ) -> None:
        super().__init__(path)
        self._lock = threading.Lock()
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(
                f"{path}: not a whole zip archive ({path.stat().st_size:,} bytes; {error}). It may "
                "be cut short: download or copy it again."
            ) from error
        start = root([info.filename for info in self._zip.infolist()])
        members = {
            info.filename.removeprefix(start): info
            for info in self._zip.infolist()
            if info.filename.startswith(start)
        }
        self.hidden = [file for file in members if hidden(file)]
        for file in self.hidden:
            del members[file]
        self.folders = [file for file, info in members.items() if info.is_dir()]
        self._members = {file: info for file, info in members.items() if not info.is_dir()}
        self.sizes = {file: info.file_size for file, info in self._members.items()}

    def read(self, file: str) -> bytes:
        """Returns a member's content."""
        if file not in self._members:
            raise self._missing(file)
        self._check_size(file)
        try:
            # One thread at a time: Python 3.12.1 skips a member's extra field from wherever the
            # file stands, so that several threads get each other's bytes.
            with self._lock, self._zip.open(self._members[file]) as member:
                # No more than the archive says it is: a read to the end would unpack what follows.
                return member.read(self.sizes[file])
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
            raise DataError(
                f"{self.path}: {file} is damaged ({error}). Download or copy the archive again."
            ) from error

    def _facts(self, file: str) -> tuple[str, int, int]:
        """Returns a member's path and size, and the archive's own checksum of it."""
        return file, self._members[file].file_size, self._members[file].CRC

    def close(self) -> None:
        """Closes the archive."""
        self._zip.close()


class FolderSource(Source):
    """All files below a folder; links to folders are followed.

    Args:
      path: the folder that was given.
      root: the folder below it that paths start from.
      hidden: whether a file or folder, by its path, is none of the source's.

    Raises:
      DataError: if a folder below cannot be read.
    """

    def __init__(
        self,
        path: pathlib.Path,
        root: pathlib.Path,
        *,
        hidden: Callable[[str], bool] = lambda file: False,
    ) -> None:
        super().__init__(path)
        self._root = root
        self._times: dict[str, int] = {}
        for folder, inner, names in os.walk(root, onerror=_refuse, followlinks=True):
            below = os.path.relpath(folder, root).replace(os.sep, "/")
            start = "" if below == "." else f"{below}/"
            self.hidden += [f"{start}{name}/" for name in inner if hidden(start + name)]
            self.hidden += [start + name for name in names if hidden(start + name)]
            inner[:] = [
                name
                for name in inner
                if not hidden(start + name) and not _leads_back(os.path.join(folder, name))
            ]
            self.folders += [f"{start}{name}/" for name in inner]
            for file in (start + name for name in names):
                if not hidden(file):
                    self.sizes[file], self._times[file] = _size_and_time(root / file)

    def read(self, file: str) -> bytes:
        """Returns a file's content."""
        path = self._root / file
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise DataError(f"{path}: is a device or a pipe, no file. Remove it.")
            if file in self.sizes:
                self._check_size(file)
            return path.read_bytes()
        except FileNotFoundError as error:
            raise self._missing(file) from error
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error}).") from error

    def _facts(self, file: str) -> tuple[str, int, int]:
        """Returns a file's path, size and time of change."""
        return file, self.sizes[file], self._times[file]

    def close(self) -> None:
        """Does nothing: files are open only while they are read."""


def _refuse(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):
        return  # Removed meanwhile, as a run that trains below the folder removes old checkpoints.
    raise DataError(f"{error.filename}: cannot be read ({error}).") from error


def _leads_back(folder: str) -> bool:
    """Whether a folder is a link to one that it lies in, which would be walked for ever."""
    if not os.path.islink(folder):
        return False
    inside, target = os.path.realpath(os.path.dirname(folder)), os.path.realpath(folder)
    return os.path.commonpath([inside, target]) == target


def _size_and_time(path: pathlib.Path) -> tuple[int, int]:
    """Returns a file's size in bytes and its time of change in ns; 0 and 0 for a dead link."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
