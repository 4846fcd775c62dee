"""Copies of folders of a bucket on this host's disk.

Training reads local files only. So each host copies the folders that it needs from the bucket, and
the host that prepares a data set uploads them. For a folder DATA, the bucket contains::

    DATA/…               its files
    DATA.manifest.json   size and checksums of each, written last; without it, the folder counts as
                         complete if it contains the file that preparing it writes last, for example
                         because TFDS or a person put it there

and the host's disk::

    DATA/…               the same files; a download appears there only once it is complete
    DATA.download/…      an unfinished download, which the next one continues
    DATA.copied.json     the version of the bucket's folder that DATA was equal to, and the size and
                         time of each file then: a start compares these, and reads no file
    DATA.copying.lock    lets the processes of a host share one copy
"""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from inception_jax.console import Progress
from inception_jax.datasets import locks
from inception_jax.errors import DataError
from inception_jax.storage import buckets, paths, transfers
from inception_jax.storage.space import check_space
from inception_jax.storage.transfers import FileFacts

if TYPE_CHECKING:
    from etils import epath

_FORMAT = 1
_CACHE_SETTING = "config.data.cache"
# How often a download starts over because another host replaces the folder meanwhile.
_REPLACEMENTS = 5

Log = Callable[[str], None]
Wanted = Callable[[str], bool]


def everything(name: str) -> bool:
    """Selects all files of a folder."""
    return True


def cache_folder(cache: str) -> pathlib.Path:
    """Returns the local folder of all copies.

    Args:
      cache: as `config.data.cache`.

    Raises:
      UserError: if it is not a usable local path, or there is no home directory for the default.
    """
    if cache:
        return paths.local_path(cache, f"{_CACHE_SETTING} = {cache!r}")
    try:
        return paths.user_cache() / "data"
    except RuntimeError as error:
        raise DataError(
            f"{_CACHE_SETTING} = '': the home folder is unknown; set it to a local folder"
        ) from error


def below(folder: pathlib.Path, path: "epath.Path") -> pathlib.Path:
    """Returns the path of a copy: bucket and path of the original, below `folder`."""
    return folder / str(path).removeprefix("gs://")


class FolderCopy:
    """A folder in a bucket, and its copy on this host's disk.

    Args:
      remote: the folder in the bucket.
      local: its copy.
      complete_files: names of files of which one is in every complete folder; empty: any file
        will do.
      log: called with one line of text.

    Attributes:
      remote, local: as above.
    """

    def __init__(
        self,
        remote: "epath.Path",
        local: pathlib.Path,
        *,
        complete_files: Collection[str] = (),
        log: Log,
    ) -> None:
        self.remote, self.local = remote, local
        self._complete_files, self._log = complete_files, log
        self._manifest = remote.parent / f"{remote.name}.manifest.json"
        self._record = local.with_name(f"{local.name}.copied.json")

    def version(self) -> str:
        """Returns text that identifies the contents of the bucket's folder; '': there are none.

        Raises:
          BucketError: if the bucket cannot be read.
        """
        return self._find().version

    def fetch(self, wanted: Wanted = everything, *, verify: bool = False) -> str:
        """Makes the local copy equal to the bucket's folder.

        If the bucket no longer has the folder, its copy is removed; files that were never there,
        such as those of an interrupted upload, are kept.

        Args:
          wanted: selects the files that are needed; others may be missing.
          verify: whether to read all local files, instead of comparing sizes and times.

        Returns:
          The version of the bucket's folder; '': there is none.

        Raises:
          BucketError: if the bucket cannot be read, or an object is missing or damaged.
          DataError: if the disk is full, or the folder is not writable.
        """
        found = self._find()
        if not found.version and not self._record.exists():
            return ""
        if found.version and not verify and self._is_current(found.version, wanted):
            return found.version
        with self._locked():
            for _ in range(_REPLACEMENTS):
                found = self._find()
                if not found.version:
                    self._remove_copy()
                    return ""
                # Another process may have downloaded it in the meantime.
                if not verify and self._is_current(found.version, wanted):
                    return found.version
                try:
                    self._download(found, wanted)
                except transfers.DamagedError as error:
                    if self.version() == found.version:
                        raise self._damaged_error(error) from error
                else:
                    return found.version
        raise buckets.BucketError(
            f"{self.remote}: changed during each of {_REPLACEMENTS} downloads. Wait until no other "
            "process writes to this folder"
        )

    def upload(self, check: Callable[[], None]) -> None:
        """Makes the bucket's folder equal to the local one, unless it is known to be.

        Requires that no other process writes there. Until the upload is complete, other hosts see
        no folder.

        Args:
          check: raises an error if another process may write there; called before the folder is
            marked as incomplete and as complete.

        Raises:
          BucketError: if the bucket cannot be written.
        """
        if self._is_current(self.version(), everything):
            return
        check()
        self.discard()
        files = sorted(path for path in self.local.rglob("*") if path.is_file())
        names = [path.relative_to(self.local).as_posix() for path in files]
        label = f"uploading {self.remote}"
        total = sum(path.stat().st_size for path in files)
        with Progress(label, total, unit="bytes", log=self._log) as progress:
            facts = transfers.upload(
                self.local, self.remote, names, last=self._complete_files, on_bytes=progress.update
            )
        manifest = {
            "format": _FORMAT,
            "chunk_bytes": transfers.CHUNK_BYTES,
            "files": {
                name: {"size": each.size, "xxh3": each.chunks} for name, each in facts.items()
            },
        }
        data = json.dumps(manifest).encode()
        generation = buckets.write_bytes(self._manifest, data, check=check)
        self._write_record(_manifest_version(generation), names, names)

    def discard(self) -> None:
        """Marks the bucket's folder as incomplete.

        Raises:
          BucketError: if the bucket cannot be written.
        """
        buckets.delete(self._manifest)
        for name in self._complete_files:
            buckets.delete(self.remote / name)

    def _find(self) -> "_Found":
        """Returns the state of the bucket's folder."""
        if stat := buckets.stat(self._manifest):
            return _Found(_manifest_version(stat.generation))
        listed = _list_files(self.remote)
        is_complete = not self._complete_files or any(
            pathlib.PurePosixPath(name).name in self._complete_files for name in listed
        )
        if not listed or not is_complete:
            return _Found("")
        return _Found(f"files {_digest(listed)}", listed)

    def _read_manifest(self) -> dict[str, FileFacts]:
        try:
            manifest = json.loads(buckets.read_bytes(self._manifest))
            chunk_bytes = manifest["chunk_bytes"]
            return {
                name: FileFacts(each["size"], chunks=tuple(each["xxh3"]), chunk_bytes=chunk_bytes)
                for name, each in manifest["files"].items()
            }
        except FileNotFoundError as error:
            raise transfers.DamagedError(f"{self._manifest}: is missing") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise transfers.DamagedError(f"{self._manifest}: is not a valid manifest") from error

    def _damaged_error(self, error: Exception) -> buckets.BucketError:
        return buckets.BucketError(
            f"{error}. Restore {self.remote} from a backup, or remove it and {self._manifest.name} "
            "to prepare the data set again"
        )

    def _download(self, found: "_Found", wanted: Wanted) -> None:
        files = self._read_manifest() if found.files is None else found.files
        buckets.check_names(self.remote, files)
        staging = self.local.with_name(f"{self.local.name}.download")
        kept = [name for name in files if transfers.is_copy(self.local / name, files[name])]
        missing = {
            name: facts for name, facts in files.items() if wanted(name) and name not in kept
        }
        staging.mkdir(parents=True, exist_ok=True)
        for path in [path for path in staging.rglob("*") if path.is_file()]:
            # Left by the download of another version.
            name = path.relative_to(staging).as_posix()
            if name not in missing and not name.startswith(transfers.ARRIVALS):
                path.unlink()
        self._check_space(staging, missing)
        total = sum(facts.size for facts in missing.values())
        label = f"downloading {self.remote}"
        with _translate_disk_errors(staging):
            if total:
                with Progress(label, total, unit="bytes", log=self._log) as progress:
                    transfers.download(self.remote, staging, missing, on_bytes=progress.update)
            else:
                transfers.download(self.remote, staging, missing)
            for name in kept:
                _link(self.local / name, staging / name)
            _replace(staging, self.local)
            self._write_record(found.version, list(files), [*kept, *missing])

    def _check_space(self, staging: pathlib.Path, missing: Mapping[str, FileFacts]) -> None:
        used = sum(512 * path.stat().st_blocks for path in staging.rglob("*") if path.is_file())
        check_space(
            staging,
            sum(facts.size for facts in missing.values()) - used,
            f"a copy of {self.remote} ({_CACHE_SETTING})",
            error=DataError,
        )

    def _is_current(self, version: str, wanted: Wanted) -> bool:
        """Whether the wanted local files are those of a version, by their sizes and times."""
        record = self._read_record()
        if not version or record.get("version") != version:
            return False
        files = record["files"]
        return all(name in files for name in filter(wanted, record["names"])) and all(
            _size_and_time(self.local / name) == tuple(files[name]) for name in files
        )

    def _read_record(self) -> dict[str, Any]:
        try:
            record = json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) and record.get("format") == _FORMAT else {}

    def _write_record(self, version: str, names: Collection[str], local: Collection[str]) -> None:
        record = {
            "format": _FORMAT,
            "version": version,
            "names": list(names),
            "files": {name: _size_and_time(self.local / name) for name in local},
        }
        temporary = self._record.with_name(f".{self._record.name}.{os.getpid()}")
        temporary.write_text(json.dumps(record), encoding="utf-8")
        temporary.replace(self._record)

    def _remove_copy(self) -> None:
        """Removes the local files if they were copied, and are not newer ones to be uploaded."""
        if self._is_current(self._read_record().get("version", ""), lambda name: False):
            self._log(f"{self.remote}: no longer exists; removing its copy {self.local}")
            shutil.rmtree(self.local, ignore_errors=True)
        self._record.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock = self.local.with_name(f"{self.local.name}.copying.lock")
        with locks.locked(
            lock, doing="downloading these files", setting=_CACHE_SETTING, log=self._log
        ):
            yield


class _Found(NamedTuple):
    """State of a folder in a bucket: its version, '' if it does not exist, and its files.

    `files` is None if the manifest describes them.
    """

    version: str
    files: dict[str, FileFacts] | None = None


def _list_files(folder: "epath.Path") -> dict[str, FileFacts]:
    # Consoles create objects named like folders.
    return {
        name: _facts(stat)
        for name, stat in buckets.list_files(folder).items()
        if not name.endswith("/") and not name.startswith(transfers.PARTS)
    }


def _facts(stat: buckets.Stat) -> FileFacts:
    return FileFacts(stat.size, stat.crc32c)


def _digest(files: Mapping[str, FileFacts]) -> str:
    """Returns a digest of the names, sizes and checksums of files in a bucket."""
    facts = sorted((name, each.size, each.crc32c) for name, each in files.items())
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _manifest_version(generation: int) -> str:
    return f"manifest {generation}"


def _size_and_time(path: pathlib.Path) -> tuple[int, int]:
    try:
        facts = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return -1, 0
    return facts.st_size, facts.st_mtime_ns


def _link(file: pathlib.Path, copy: pathlib.Path) -> None:
    """Makes a file available under a second name, if possible without copying it."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)
    try:
        os.link(file, copy)
    except OSError:  # Not supported by the file system.
        shutil.copy2(file, copy)


def _replace(new: pathlib.Path, folder: pathlib.Path) -> None:
    """Renames a folder to `folder`, removing an earlier one."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _translate_disk_errors(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{_CACHE_SETTING}: cannot write to {folder}: {error.strerror or error}. Free disk "
            "space, or use another folder, and rerun the command, which continues the download"
        ) from error


class SourceCopy(FolderCopy):
    """A source in a bucket (`config.data.source`), and its copy on this host's disk.

    Args:
      path: a file or folder in the bucket, or a path that leads into an archive there.
      cache: the folder of all copies.
      names: the files that the source consists of, if `path` is one of them or their folder; empty:
        it is what is at `path`.
      log: called with one line of text.

    Attributes:
      path: path of the copy; of several files, that of their folder.

    Raises:
      BucketError: if the bucket cannot be read.
    """

    def __init__(
        self, path: "epath.Path", cache: pathlib.Path, *, names: Collection[str] = (), log: Log
    ) -> None:
        file = path if path.name in names else _find_file(path)
        remote = file.parent if file else path
        self._names = tuple(names)
        local = self.path = below(cache / "sources", remote)
        if file and not names:
            self._names = (file.name,)
            # A file has a folder of its own, because that is what is copied.
            local = below(cache / "sources", file)
            self.path = local / file.name / path.relative_to(file)
        super().__init__(remote, local, log=log)

    def objects(self) -> str:
        """Returns a digest of the names, sizes and checksums of its objects; '': there are none.

        Raises:
          BucketError: if the bucket cannot be read.
        """
        return self.version().removeprefix("files ")

    def missing(self) -> list[str]:
        """Returns the names of the files of the source that the bucket does not have.

        Raises:
          BucketError: if the bucket cannot be read.
        """
        files = self._find().files or {}
        return [name for name in self._names if name not in files]

    def _find(self) -> "_Found":
        if self._names:
            stats = {name: buckets.stat(self.remote / name) for name in self._names}
            files = {name: _facts(stat) for name, stat in stats.items() if stat}
        else:
            files = _list_files(self.remote)
        return _Found(f"files {_digest(files)}" if files else "", files)

    def _damaged_error(self, error: Exception) -> buckets.BucketError:
        return buckets.BucketError(f"{error}. Upload the file again")

    def _remove_copy(self) -> None:
        """Keeps the files, because the source may be removed once it is prepared."""


def _find_file(path: "epath.Path") -> "epath.Path | None":
    """Returns the file at a path, or the archive that the path leads into; None: a folder."""
    candidates = [each for each in (path, *path.parents) if str(each).count("/") > 2]
    if candidates and buckets.stat(path):
        return path
    if buckets.list_files(path):
        return None
    return next((each for each in candidates[1:] if buckets.stat(each)), None)
