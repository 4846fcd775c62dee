"""A local folder whose files are kept in a folder of a bucket.

Objects in buckets cannot be appended to, and are slow to write. So files of a run are written in a
local folder, and the changed ones are uploaded from time to time. The bucket is the truth: a
process starts with what it contains, and the local folder disappears with the process, unless it
has something that could not be uploaded.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Collection, Iterator
from concurrent import futures
from typing import IO, TYPE_CHECKING

from inception_jax.errors import WriteError
from inception_jax.storage import buckets

if TYPE_CHECKING:
    from etils import epath

_PARALLEL_REQUESTS = 8
# Cloud Storage accepts about one write per second of the same object.
_PAUSE_SECONDS = 5.0
# After an error, which may be that the bucket cannot be reached.
_LAST_TRY_SECONDS = 20.0
_PREFIX = "inception_jax-run-"
_LOCK_FILE = ".lock"

Log = Callable[[str], None]


class Mirror:
    """A temporary local folder with the files of a folder in a bucket.

    Args:
      remote: the folder in the bucket.
      exclude: names of files and folders in it, at any depth, that are not copied. Those whose
        names start with a dot, such as unfinished files, are not copied either.
      last: names of files that are uploaded after all others, and not in the background.

    Attributes:
      path: the local folder, empty at first.
    """

    def __init__(
        self,
        remote: "epath.Path",
        *,
        exclude: Collection[str] = (),
        last: Collection[str] = (),
    ) -> None:
        self._remote, self._exclude, self._last = remote, frozenset(exclude), frozenset(last)
        folder, lock = _make_temporary_folder()
        self._delete_later = weakref.finalize(self, _delete, folder, lock)
        # Some files show the name of their folder.
        self.path = folder / (remote.name or "run")
        self.path.mkdir()
        # Version and generation of each file as downloaded or uploaded.
        self._versions: dict[str, tuple[int, int, int]] = {}
        self._generations: dict[str, int] = {}
        self._upload_lock = threading.Lock()
        self._background: _BackgroundUploads | None = None
        self._check: Callable[[], None] = lambda: None

    def download(self, names: Collection[str] = ()) -> None:
        """Copies files of the bucket's folder to the local one.

        Args:
          names: the files to copy, if they exist; empty: all, and local files that the bucket does
            not have are deleted.

        Raises:
          BucketError: if the bucket cannot be read.
        """

        def read(name: str) -> bytes | None:
            with contextlib.suppress(FileNotFoundError):
                return buckets.read_bytes(self._remote / name)
            return None

        generations = dict.fromkeys(names, 0)
        if not names:
            stats = buckets.list_files(self._remote)
            generations = {
                name: stat.generation for name, stat in stats.items() if self._is_included(name)
            }
            buckets.check_names(self._remote, generations)
            for name in self._local_files().keys() - generations.keys():
                (self.path / name).unlink()
        changed = [
            name
            for name, generation in generations.items()
            if not generation or self._generations.get(name) != generation
        ]
        with futures.ThreadPoolExecutor(_PARALLEL_REQUESTS) as threads:
            for name, data in zip(changed, threads.map(read, changed), strict=True):
                if data is None:
                    continue
                file = self.path / name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                self._versions[name], self._generations[name] = _version(file), generations[name]

    def upload(self) -> None:
        """Copies new and changed local files to the bucket.

        Raises:
          BucketError: if a file cannot be uploaded; others may have been.
          RunError: if the lock of the block of `uploading` was lost; nothing more is uploaded.
        """
        self._upload_except(frozenset())

    def _upload_except(self, names: frozenset[str]) -> None:
        # The check of the block that started this upload: it may end while the upload is retried.
        check = self._check
        with self._upload_lock:
            for name, version in self._changed_files().items():
                if name in names:
                    continue
                # In memory, because metrics may be appended during the upload.
                try:
                    data = (self.path / name).read_bytes()
                except FileNotFoundError:
                    continue  # A custom writer deleted it since it was listed.
                self._generations[name] = buckets.write_bytes(
                    self._remote / name, data, check=check
                )
                self._versions[name] = version

    @contextlib.contextmanager
    def uploading(self, check: Callable[[], None], log: Log) -> Iterator[None]:
        """Uploads changed files in the background during the block, and all at its end.

        If that is impossible, the local folder is kept.

        Args:
          check: called before each attempt to upload; raises an error if another process may write.
          log: called with a line if an upload in the background fails, or after an error if the
            last one does.

        Raises:
          WriteError: if the last upload fails.
        """
        self._check = check
        upload = functools.partial(self._upload_except, self._last)
        self._background = _BackgroundUploads(upload, self._remote, log)
        try:
            yield
        except BaseException:
            self._background.stop()
            if not self._upload_within(_LAST_TRY_SECONDS):
                log(f"{self._remote}: {self._keep()}")
            raise
        finally:
            self._background.stop()
            self._background = None
        try:
            self.upload()
        except buckets.BucketError as error:
            raise WriteError(f"{error}. {self._keep()}") from error

    def check_lock(self) -> None:
        """Raises an error if another process may write; only in a block of `uploading`."""
        if self._background:
            self._check()

    def upload_soon(self) -> None:
        """Starts an upload in the background; does nothing outside a block of `uploading`.

        Raises:
          Exception: if an earlier one failed for another reason than the bucket.
        """
        if self._background:
            self._background.start()

    def _upload_within(self, seconds: float) -> bool:
        """Uploads changed files in limited time, and returns whether that succeeded."""

        def upload() -> None:
            with contextlib.suppress(Exception), buckets.time_limit(seconds):
                self.upload()

        # Another thread, because it may have to wait for an upload that does not end.
        thread = threading.Thread(target=upload, name="last upload", daemon=True)
        thread.start()
        thread.join(seconds)
        return not thread.is_alive() and not self._changed_files()

    def _keep(self) -> str:
        """Keeps the local folder when the process ends, and returns a sentence about that."""
        if detached := self._delete_later.detach():
            folder, lock = detached[2]
            (folder / _LOCK_FILE).unlink(missing_ok=True)  # Marks a folder that may be deleted.
            lock.close()
        return (
            f"The newest metrics and other small files were not uploaded; they are in {self.path}"
        )

    def _local_files(self) -> dict[str, pathlib.Path]:
        files = (path for path in self.path.rglob("*") if path.is_file())
        named = {path.relative_to(self.path).as_posix(): path for path in files}
        return {name: path for name, path in named.items() if self._is_included(name)}

    def _changed_files(self) -> dict[str, tuple[int, int, int]]:
        files = self._local_files()
        names = sorted(files, key=lambda name: (name in self._last, name))
        versions = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                versions[name] = _version(files[name])
        return {n: version for n, version in versions.items() if self._versions.get(n) != version}

    def _is_included(self, name: str) -> bool:
        if name.endswith("/"):
            return False  # Stands for an empty folder; the Cloud console creates such objects.
        parts = pathlib.PurePosixPath(name).parts
        return not any(part in self._exclude or part.startswith(".") for part in parts)


class _BackgroundUploads:
    """A thread that uploads when asked, and does not keep the process from exiting.

    Args:
      upload: the function to call.
      remote: where it uploads to, for messages.
      log: called with a line when an outage of the bucket begins or ends.
    """

    def __init__(self, upload: Callable[[], None], remote: "epath.Path", log: Log) -> None:
        self._upload, self._remote, self._log = upload, remote, log
        self._wanted, self._stopped = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="uploads", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Starts an upload soon.

        Raises:
          Exception: an earlier failure for another reason than the bucket.
        """
        if self._failure:
            raise self._failure
        self._wanted.set()

    def stop(self) -> None:
        """Ends the thread, after an upload that has begun."""
        self._stopped.set()
        self._wanted.set()

    def _run(self) -> None:
        is_failing = False
        while self._wanted.wait() and not self._stopped.is_set():
            self._wanted.clear()
            try:
                self._upload()
                if is_failing:
                    self._log(f"{self._remote}: reachable again; all files are uploaded")
                is_failing = False
            except buckets.BucketError as error:
                if not is_failing:
                    self._log(f"{error}\nTraining continues; later uploads include these files")
                is_failing = True
            except Exception as error:
                self._failure = error
                return
            self._stopped.wait(_PAUSE_SECONDS)


def _make_temporary_folder() -> tuple[pathlib.Path, IO[bytes]]:
    """Returns a new folder and its locked file; deletes the folders that killed processes left."""
    parent = pathlib.Path(tempfile.gettempdir())
    for left in parent.glob(f"{_PREFIX}*"):
        # Of another user, or kept because of a failed upload.
        with contextlib.suppress(OSError), (left / _LOCK_FILE).open("rb+") as other:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    # Renamed once it is locked, so that no other process deletes it before.
    new = pathlib.Path(tempfile.mkdtemp(prefix="inception_jax-new-"))
    lock = (new / _LOCK_FILE).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = new.with_name(_PREFIX + new.name.rpartition("-")[2])
    os.rename(new, folder)
    return folder, lock


def _delete(folder: pathlib.Path, lock: IO[bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.close()


def _version(file: pathlib.Path) -> tuple[int, int, int]:
    """Returns size in bytes, time of modification in nanoseconds, and inode."""
    facts = file.stat()
    return facts.st_size, facts.st_mtime_ns, facts.st_ino
