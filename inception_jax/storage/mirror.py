"""A local folder whose files are kept in a folder of a bucket.

Objects in buckets cannot be appended to, and are slow to write. So files of a run are written in a
local folder, and the changed ones are uploaded from time to time. The bucket is the truth: a
process starts with what it contains, and the local folder disappears with the process.
"""

import contextlib
import pathlib
import tempfile
import threading
from collections.abc import Callable, Collection
from concurrent import futures
from typing import TYPE_CHECKING

from inception_jax.storage import buckets

if TYPE_CHECKING:
    from etils import epath

_PARALLEL_REQUESTS = 8

Log = Callable[[str], None]


class Mirror:
    """A temporary local folder with the files of a folder in a bucket.

    Args:
      remote: the folder in the bucket.
      exclude: names of files and folders in it that are not copied. Files whose names start with a
        dot, such as unfinished ones, are not copied either.

    Attributes:
      path: the local folder, empty at first.
    """

    def __init__(self, remote: "epath.Path", exclude: Collection[str] = ()) -> None:
        self._remote, self._exclude = remote, frozenset(exclude)
        self._parent = tempfile.TemporaryDirectory(
            prefix="inception_jax-", ignore_cleanup_errors=True
        )
        # Some files show the name of their folder.
        self.path = pathlib.Path(self._parent.name, remote.name or "run")
        self.path.mkdir()
        self._uploaded: dict[str, tuple[int, int]] = {}
        self._upload_lock = threading.Lock()
        self._background = futures.ThreadPoolExecutor(1, "mirror")
        self._scheduled = futures.Future[None]()
        self._scheduled.set_result(None)

    def download(self, names: Collection[str] = ()) -> None:
        """Copies files of the bucket's folder to the local one.

        Args:
          names: the files to copy, if they exist; empty: all.

        Raises:
          BucketError: if the bucket cannot be read.
        """

        def read(name: str) -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return buckets.read_bytes(self._remote / name)
            return None

        if not names:
            names = [name for name in buckets.list_files(self._remote) if self._is_included(name)]
        with futures.ThreadPoolExecutor(_PARALLEL_REQUESTS) as threads:
            for name, data in zip(names, threads.map(read, names), strict=True):
                if data is None:
                    continue
                file = self.path / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                self._uploaded[name] = _version(file)

    def upload(self) -> None:
        """Copies new and changed local files to the bucket.

        Raises:
          BucketError: if a file cannot be uploaded; others may have been.
        """
        with self._upload_lock, futures.ThreadPoolExecutor(_PARALLEL_REQUESTS) as threads:
            list(threads.map(self._upload_file, self._changed_files()))

    def upload_soon(self, log: Log) -> None:
        """Starts `upload` in the background, unless one is running.

        Args:
          log: called with a line if it fails; the next upload repeats it.
        """
        if self._scheduled.done():
            self._scheduled = self._background.submit(self._upload_or_log, log)

    def _upload_or_log(self, log: Log) -> None:
        try:
            self.upload()
        except buckets.BucketError as error:
            log(f"{error}\nTraining continues; the next report or save uploads these files, too")

    def _changed_files(self) -> list[tuple[str, tuple[int, int]]]:
        files = {
            path.relative_to(self.path).as_posix(): path
            for path in self.path.rglob("*")
            if path.is_file()
        }
        versions = {name: _version(path) for name, path in files.items() if self._is_included(name)}
        return [each for each in versions.items() if self._uploaded.get(each[0]) != each[1]]

    def _upload_file(self, file: tuple[str, tuple[int, int]]) -> None:
        name, version = file
        # In memory, because metrics may be appended during the upload.
        buckets.write_bytes(self._remote / name, (self.path / name).read_bytes())
        self._uploaded[name] = version

    def _is_included(self, name: str) -> bool:
        parts = pathlib.PurePosixPath(name).parts
        return parts[0] not in self._exclude and not any(part.startswith(".") for part in parts)


def _version(file: pathlib.Path) -> tuple[int, int]:
    """Returns size in bytes and time of modification in nanoseconds."""
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns
