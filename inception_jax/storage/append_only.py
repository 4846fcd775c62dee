"""Files that grow by whole records, such as metrics.jsonl and TensorBoard's events."""

import os
import pathlib


class AppendOnlyFile:
    """A file that grows by whole records, each handed to the operating system at once.

    What was appended outlives a kill of the process; after `sync`, a crash of the machine too.

    Args:
      path: the file; made if it is missing.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        # Unbuffered, so that a write that fails (disk full) fails here and not in a later close.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by close)
        self._size = self._file.tell()
        self._is_torn = False

    def append(self, record: bytes) -> None:
        """Writes a record whole; where that fails, nothing of it stays for the next call.

        Raises:
          OSError: if it cannot be written whole, or the file has been removed.
        """
        self._check_there()
        if self._is_torn:
            self._file.truncate(self._size)
        self._is_torn = True
        rest = record
        while rest:
            rest = rest[self._file.write(rest) :]
        self._size += len(record)
        self._is_torn = False

    def sync(self) -> None:
        """Returns when everything appended is on the disk.

        Raises:
          OSError: if that fails, or the file has been removed.
        """
        self._check_there()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; without a record that could not be written whole."""
        with self._file:
            if self._is_torn:
                self._file.truncate(self._size)

    def _check_there(self) -> None:
        # Writing to a removed file succeeds, and everything written is lost.
        if not self._path.exists():
            raise FileNotFoundError("removed while the run was writing to it")
