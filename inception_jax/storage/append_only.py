"""Files that grow by whole records, such as metrics.jsonl and TensorBoard's events."""

import os
import pathlib


class AppendOnlyFile:
    """A file that grows by whole records, each handed to the operating system at once.

    What was appended outlives a kill of the process; after `sync`, a crash of the machine too.

    Args:
      path: the file; made if it is missing.
      retry_on_error: whether `append` keeps what cannot be written, for the next call; only `sync`
        then raises what still fails.
    """

    def __init__(self, path: pathlib.Path, *, retry_on_error: bool = False) -> None:
        self._path = path
        self._retry_on_error = retry_on_error
        # What is still to be written; it may begin inside a record of which a part is in the file.
        self._pending = b""
        # Unbuffered, so that a write that fails (disk full) fails here and not in a later close.
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115  (closed by close)

    def append(self, record: bytes) -> None:
        """Writes a record.

        Raises:
          OSError: if it cannot be written whole, or the file has been removed.
        """
        self._pending += record
        try:
            self._write_pending()
        except OSError:
            if not self._retry_on_error:
                raise

    def _write_pending(self) -> None:
        # Writing to a removed file succeeds, and everything written is lost.
        if not self._path.exists():
            raise FileNotFoundError("the file was removed while the run was writing to it")
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]

    def sync(self) -> None:
        """Returns when everything appended is on the disk.

        Raises:
          OSError: if it cannot be written whole, or the file has been removed.
        """
        self._write_pending()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
