"""Detection of corrupt checkpoints by checksums; corrupt ones are set aside.

A checkpoint has a manifest with the size and checksum of each file. On disk this is its SHA-256 (as
`sha256sum` prints it); checking a 50 MB checkpoint takes about 0.05 s (docs/notes/reliability.md).
In a bucket it is its MD5, which the service computes: checking takes a listing and no download. A
manifest stays valid when a checkpoint is copied from one to the other. For a checkpoint without a
manifest, written by an older version, only missing parts can be detected.

A checkpoint on disk exists once it has its final name. In a bucket, where folders cannot be
renamed, it exists while it has the file `COMMITTED`: that is written last and deleted first.
"""

import contextlib
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent import futures
from typing import TYPE_CHECKING, Any, Protocol

from inception_jax.errors import CheckpointError, WriteError, join_truncated
from inception_jax.storage import buckets, paths

if TYPE_CHECKING:
    from etils import epath

MANIFEST = "manifest.json"
FORMAT = 1
ARRAYS = ("model", "training")
ITEMS = (*ARRAYS, "progress")
COMMITTED = "commit_success.txt"
_MAX_LISTED = 3
_PARALLEL_REQUESTS = 8
_PART_BYTES = 2**26

Log = Callable[[str], None]


class _Folder(Protocol):
    """Read access to the files of a folder, by their relative paths.

    Attributes:
      algorithm: the checksum for new manifests: "sha256" or "md5".
    """

    algorithm: str

    def names(self) -> set[str]:
        """Returns all files, at any depth."""

    def read(self, name: str) -> bytes:
        """Returns the contents of a file, or raises a FileNotFoundError."""

    def size(self, name: str) -> int:
        """Returns the size of a file in bytes, or raises a FileNotFoundError."""

    def checksum(self, name: str, algorithm: str) -> str:
        """Returns a checksum of a file in hexadecimal."""


class _LocalFolder:
    algorithm = "sha256"

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path

    def names(self) -> set[str]:
        files = (path for path in self._path.rglob("*") if path.is_file())
        return {path.relative_to(self._path).as_posix() for path in files}

    def read(self, name: str) -> bytes:
        return (self._path / name).read_bytes()

    def size(self, name: str) -> int:
        return (self._path / name).stat().st_size

    def checksum(self, name: str, algorithm: str) -> str:
        with (self._path / name).open("rb") as file:
            return hashlib.file_digest(file, lambda: _new_hash(algorithm)).hexdigest()


class _BucketFolder:
    """A folder as listed when this object is created."""

    algorithm = "md5"

    def __init__(self, path: "epath.Path") -> None:
        self._path = path
        self.listed = buckets.list_files(path)

    def names(self) -> set[str]:
        return {name for name in self.listed if not name.endswith("/")}

    def read(self, name: str) -> bytes:
        return buckets.read_bytes(self._path / name)

    def size(self, name: str) -> int:
        if name not in self.listed:
            raise FileNotFoundError(name)
        return self.listed[name].size

    def checksum(self, name: str, algorithm: str) -> str:
        # The service does not know the MD5 of an object that was composed of several.
        if algorithm == "md5" and self.listed[name].md5:
            return self.listed[name].md5
        digest, size = _new_hash(algorithm), self.size(name)
        if size <= _PART_BYTES:
            # What arrives damaged is requested again, which is possible for whole objects only.
            digest.update(self.read(name))
            return digest.hexdigest()
        for start in range(0, size, _PART_BYTES):
            end = min(start + _PART_BYTES, size)
            digest.update(buckets.read_bytes(self._path / name, start, end))
        return digest.hexdigest()


def _new_hash(algorithm: str) -> "hashlib._Hash":
    return hashlib.new(algorithm, usedforsecurity=False)


def _open(folder: paths.Path) -> _Folder:
    return _LocalFolder(folder) if paths.is_local(folder) else _BucketFolder(folder)


def write_manifest(folder: paths.Path, exclude: Collection[str] = ()) -> None:
    """Writes the manifest of a folder and flushes it to disk.

    Args:
      folder: a folder whose files no longer change.
      exclude: relative paths of files to omit.

    Raises:
      OSError: if a file cannot be read, or the manifest cannot be written.
      BucketError: likewise, in a bucket.
    """
    opened = _open(folder)
    files = {
        name: {
            "size": opened.size(name),
            opened.algorithm: opened.checksum(name, opened.algorithm),
        }
        for name in sorted(opened.names().difference(exclude, [MANIFEST]))
    }
    data = json.dumps({"format": FORMAT, "files": files}, indent=1).encode()
    if not paths.is_local(folder):
        buckets.write_bytes(folder / MANIFEST, data)
        return
    with (folder / MANIFEST).open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def verify(folder: paths.Path) -> list[str] | None:
    """Checks the files of a folder against its manifest, ignoring files that it does not list.

    Returns:
      A description of each corrupt file, with the actual and expected state; empty: all files are
      intact; None: there is no manifest.

    Raises:
      BucketError: if the folder is in a bucket that cannot be read.
    """
    return _verify(_open(folder))


def _verify(folder: _Folder) -> list[str] | None:
    try:
        listed = json.loads(folder.read(MANIFEST))["files"]
        return [
            f"{name} {difference}"
            for name, expected in listed.items()
            if (difference := _difference(folder, name, expected))
        ]
    except FileNotFoundError:
        return None
    except OSError as error:
        return [f"{MANIFEST} cannot be read ({error.strerror})"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{MANIFEST} is not a valid manifest"]


def _difference(folder: _Folder, name: str, expected: dict[str, Any]) -> str:
    """Returns how a file differs from its manifest entry; '' if it does not."""
    algorithm = "sha256" if "sha256" in expected else "md5"
    size, checksum = expected["size"], expected[algorithm]
    try:
        actual_size = folder.size(name)
        if actual_size != size:
            return f"has {actual_size:,} bytes instead of {size:,}"
        if folder.checksum(name, algorithm) != checksum:
            return f"has changed ({'SHA-256' if algorithm == 'sha256' else 'MD5'} mismatch)"
        return ""
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def list_steps(directory: paths.Path) -> list[int]:
    """Returns the steps of the checkpoints in a folder, ascending; [] if it does not exist.

    Raises:
      BucketError: if the folder is in a bucket that cannot be read.
    """
    if not paths.is_local(directory):
        folders = _step_folders(directory)
        return sorted(step for step, names in folders.items() if COMMITTED in names)
    children = directory.iterdir() if directory.is_dir() else ()
    return sorted(int(each.name) for each in children if each.name.isdecimal() and each.is_dir())


def _step_folders(directory: "epath.Path") -> dict[int, set[str]]:
    """Returns the files of all folders in a bucket that are named by a step."""
    folders: dict[int, set[str]] = {}
    for path in buckets.list_files(directory):
        step, _, name = path.partition("/")
        if name and step.isdecimal() and step == str(int(step)):
            folders.setdefault(int(step), set()).add(name)
    return folders


def delete_unfinished(directory: "epath.Path") -> None:
    """Deletes what killed saves and deletions left in a bucket's folder of checkpoints.

    Raises:
      BucketError: if it cannot be deleted.
    """
    for step, names in _step_folders(directory).items():
        if COMMITTED not in names:
            _delete_files(directory / str(step), names)


def delete_checkpoint(folder: "epath.Path") -> None:
    """Deletes a checkpoint in a bucket, so that a kill leaves no part that looks like a whole one.

    Raises:
      BucketError: if it cannot be deleted.
    """
    _delete_files(folder, buckets.list_files(folder))


def _delete_files(folder: "epath.Path", names: Iterable[str]) -> None:
    buckets.delete(folder / COMMITTED)
    _in_parallel(buckets.delete, [folder / name for name in names if name != COMMITTED])


def _in_parallel(action: Callable[..., None], *arguments: Iterable["epath.Path"]) -> None:
    with futures.ThreadPoolExecutor(_PARALLEL_REQUESTS) as threads:
        list(threads.map(action, *arguments))


def unmerged_items(checkpoint: paths.Path) -> list[str]:
    """Returns the items of a checkpoint whose arrays are not merged into one database."""
    return _unmerged_items(_open(checkpoint))


def _unmerged_items(checkpoint: _Folder) -> list[str]:
    names = checkpoint.names()
    return [
        item
        for item in ARRAYS
        if any(name.startswith(f"{item}/ocdbt.process_") for name in names)
        and f"{item}/manifest.ocdbt" not in names
    ]


def find_corruption(checkpoint: paths.Path) -> str:
    """Returns what is corrupt in a checkpoint; '' if nothing is known to be.

    Raises:
      BucketError: if it is in a bucket that cannot be read.
    """
    folder = _open(checkpoint)
    problems = _verify(folder)
    if problems == [] and _unmerged_items(folder):
        problems = [
            "its arrays are not merged, because an older version wrote it to a path with "
            "brackets; rerun the training command to merge them"
        ]
    if problems is None:
        present = {name.partition("/")[0] for name in folder.names()}
        problems = [f"{item} is missing" for item in ITEMS if item not in present]
    return join_truncated(problems, _MAX_LISTED)


def quarantine_corrupt(directory: paths.Path, log: Log) -> None:
    """Renames the corrupt checkpoints of a folder, so that training can save their steps again.

    Orbax refuses to save a step that it lists, and overwrites the folder of one that it does not.
    And a corrupt checkpoint that counted among the most recent ones to keep would displace an
    intact one. Nothing is deleted.

    Args:
      directory: folder of the checkpoints; need not exist.
      log: called with a line about each corrupt checkpoint.

    Raises:
      CheckpointError: if no checkpoint is intact; then nothing is renamed.
      BucketError: if the folder is in a bucket that cannot be read or written.
    """
    steps = list_steps(directory)
    corrupt = {step: text for step in steps if (text := find_corruption(directory / str(step)))}
    intact = [step for step in steps if step not in corrupt]
    if corrupt and not intact:
        lines = "\n  ".join(f"{step}: {text}" for step, text in corrupt.items())
        raise CheckpointError(
            f"{directory}: no checkpoint is intact; nothing was changed:\n  {lines}\n"
            "Restore one from a backup, or use a new --workdir"
        )
    for step, text in corrupt.items():
        folder = directory / str(step)
        aside = _set_aside(folder)
        log(
            f"{folder}: corrupt checkpoint: {text}. Renamed it to {aside}; the newest intact "
            f"checkpoint is of step {max(intact)}"
        )


def _set_aside(folder: paths.Path) -> str:
    """Renames a folder to the first free of <name>.damaged, <name>.damaged-2, …; returns the name.

    In a bucket its files are copied, without downloading them, and then deleted. After a kill it is
    still corrupt or no longer a checkpoint, and the next call completes the same copy.
    """
    first = folder.with_name(f"{folder.name}.damaged")
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    candidates = itertools.chain([first], others)
    if paths.is_local(folder):
        aside = next(each for each in candidates if not each.exists())
        folder.rename(aside)
        return aside.name
    files = _contents(folder)
    aside = next(each for each in candidates if _contents(each).items() <= files.items())
    _in_parallel(buckets.copy, [folder / name for name in files], [aside / name for name in files])
    _delete_files(folder, files)
    return aside.name


def _contents(folder: "epath.Path") -> dict[str, tuple[int, str]]:
    """Returns size and MD5 of each file below a folder in a bucket."""
    return {name: (stat.size, stat.md5) for name, stat in buckets.list_files(folder).items()}


@contextlib.contextmanager
def log_write_errors(continue_on_error: bool, log: Log) -> Iterator[None]:
    """Logs a `WriteError` raised in the block.

    Args:
      continue_on_error: log the error and continue; otherwise it is raised.
      log: called with the message.
    """
    try:
        yield
    except WriteError as error:
        if not continue_on_error:
            raise
        log(f"{error}\nTraining continues (config.checkpoint.on_write_error = 'continue')")
