"""Append-only files, such as metrics.jsonl and TensorBoard's events."""

import os
import pathlib


class AppendOnlyFile:
    """A file to which complete records are appended, each written to the system immediately.

    Appended records survive a kill of the process, and after `sync` also a crash of the machine.

    Args:
      path: the file; created if missing.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        # Unbuffered, so that a full disk fails in the write and not in a later close.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by close)
        self._size = self._file.tell()
        self._is_torn = False

    def append(self, record: bytes) -> None:
        """Appends a record completely; the next call removes what a failed one left.

        Raises:
          OSError: if it cannot be written completely, or the file has been removed.
        """
        self._check_exists()
        if self._is_torn:
            self._file.truncate(self._size)
        self._is_torn = True
        rest = record
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(record)
        self._is_torn = False

    def sync(self) -> None:
        """Flushes everything appended to disk (fsync).

        Raises:
          OSError: if that fails, or the file has been removed.
        """
        self._check_exists()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file and removes a partially written record."""
        with self._file:
            if self._is_torn:
                self._file.truncate(self._size)

    def _check_exists(self) -> None:
        # Writes to a removed file succeed, but the data is lost.
        if not self._path.exists():
            raise FileNotFoundError("removed while the run was writing to it")
