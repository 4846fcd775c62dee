"""Parallel copies of files between a local folder and a folder of a bucket.

Files are copied in chunks by several threads. Downloaded chunks are compared with their checksums
as they arrive, and repeated if they differ. A transfer that was interrupted, even by a kill, is
resumed by calling it again: a download continues with the chunks that are not on disk, an upload
with those that are not in the bucket.

A large file is uploaded in parts, objects below `.parts/`, which the service then joins to the
object of the file's name.
"""

import contextlib
import errno
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import xxhash

from inception_jax.storage import buckets

if TYPE_CHECKING:
    from etils import epath

CHUNK_BYTES = 32 << 20
# Each holds two copies of a chunk in memory. The client library keeps up to 10 connections open.
_THREADS = 8
# How often a chunk is requested that arrives damaged.
_ATTEMPTS = 4
_MAX_COMPOSED = 32
PARTS = ".parts/"
ARRIVALS = ".arrivals/"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
# Called with numbers of bytes that were copied, or that need not be copied.
OnBytes = Callable[[int], None]
# Typed this way because type checkers do not accept arrays as buffers before Python 3.12.
_digest: Callable[[Any], str] = xxhash.xxh3_64_hexdigest


class FileFacts(NamedTuple):
    """What identifies the contents of a file.

    Attributes:
      size: bytes.
      crc32c: of the whole file, hexadecimal; '': unknown.
      chunks: XXH3 (64 bits, hexadecimal) of each chunk of `chunk_bytes`; empty: unknown.
      chunk_bytes: size of all chunks but the last.
    """

    size: int
    crc32c: str = ""
    chunks: tuple[str, ...] = ()
    chunk_bytes: int = 0


class DamagedError(buckets.BucketError):
    """An object is missing, or differs from its checksums."""


def describe(path: pathlib.Path) -> FileFacts:
    """Returns size and checksums of a local file."""
    import google_crc32c

    size, crc, chunks = 0, 0, []
    with path.open("rb") as file:
        while data := file.read(CHUNK_BYTES):
            size += len(data)
            crc = google_crc32c.extend(crc, data)
            chunks.append(_digest(data))
    return FileFacts(size, f"{crc:08x}", tuple(chunks), CHUNK_BYTES)


def is_copy(path: pathlib.Path, facts: FileFacts) -> bool:
    """Returns whether a local file has the contents of `facts`; reads it if the size is right."""
    try:
        if path.stat().st_size != facts.size:
            return False
    except (FileNotFoundError, NotADirectoryError):
        return False
    if not facts.chunks:
        return facts.crc32c in ("", describe(path).crc32c)
    return all(
        _is_on_disk(path, start, end, facts.chunks[number])
        for number, start, end in _ranges(facts, facts.chunk_bytes)
    )


def download(
    remote: "epath.Path",
    folder: pathlib.Path,
    files: Mapping[str, FileFacts],
    *,
    on_bytes: OnBytes = lambda count: None,
) -> None:
    """Copies files of a bucket to a local folder; keeps what an earlier call has left there.

    On an error or a kill, files are incomplete, though of the right size.

    Args:
      remote: the folder in the bucket.
      folder: the local folder; created if missing.
      files: what to copy, by path in both folders.
      on_bytes: called with numbers of bytes.

    Raises:
      DamagedError: if an object is missing, or repeatedly differs from its checksums.
      BucketError: if the bucket cannot be read.
    """
    count = _counter(on_bytes)
    arrivals = folder / ARRIVALS

    def copy(chunk: tuple[_ChunkedFile, int, int, int]) -> None:
        chunked, number, start, end = chunk
        chunked.copy(number, start, end)
        count(end - start)

    remaining = list(files)
    for _ in range(_ATTEMPTS):
        chunked = [
            _ChunkedFile(remote / name, folder / name, files[name], arrivals / name)
            for name in remaining
        ]
        _run(copy, [chunk for each in chunked for chunk in each.chunks()])
        intact = _run(_ChunkedFile.finish, chunked)
        remaining = [
            name for name, is_intact in zip(remaining, intact, strict=True) if not is_intact
        ]
        shutil.rmtree(arrivals, ignore_errors=True)
        if not remaining:
            return
    raise DamagedError(
        f"{remote / remaining[0]}: differs from the checksum that the service stores with it, in "
        f"each of {_ATTEMPTS} downloads"
    )


class _ChunkedFile:
    """A file whose chunks are copied from a bucket, with the checksums of those that are on disk.

    If the checksums are not known beforehand, those of arrived chunks are appended to a file, which
    identifies them if the download is resumed.

    Args:
      remote: the object.
      path: the local file; created with its final size, without allocating blocks.
      facts: size and checksums.
      arrivals: path of the file of checksums.
    """

    def __init__(
        self, remote: "epath.Path", path: pathlib.Path, facts: FileFacts, arrivals: pathlib.Path
    ) -> None:
        self._remote, self._path, self._facts = remote, path, facts
        self._expected = dict(enumerate(facts.chunks))
        self._arrivals: pathlib.Path | None = None
        if not facts.chunks:
            # Another version of the object has another file.
            self._arrivals = arrivals.with_name(f"{arrivals.name}.{facts.crc32c}")
            self._arrivals.parent.mkdir(parents=True, exist_ok=True)
            self._expected = _read_arrivals(self._arrivals)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(facts.size)

    def chunks(self) -> "list[tuple[_ChunkedFile, int, int, int]]":
        """Returns this file with number, start and end of each chunk."""
        chunk_bytes = self._facts.chunk_bytes or CHUNK_BYTES
        return [(self, *each) for each in _ranges(self._facts, chunk_bytes)]

    def copy(self, number: int, start: int, end: int) -> None:
        """Copies the chunk that is at bytes [start, end), unless it is on disk."""
        expected = self._expected.get(number)
        if expected and _is_on_disk(self._path, start, end, expected):
            return
        data = self._fetch(number, start, end)
        with _opened(self._path, os.O_WRONLY) as descriptor:
            written = 0
            while written < len(data):
                written += os.pwrite(descriptor, data[written:], start + written)
        if self._arrivals:
            with self._arrivals.open("a") as file:
                file.write(f"{number} {_digest(data)}\n")

    def finish(self) -> bool:
        """Flushes the file to disk; returns whether it is intact, as far as not checked before."""
        if not self._facts.chunks and not is_copy(self._path, self._facts):
            return False
        with self._path.open("rb") as file:
            os.fsync(file.fileno())
        return True

    def _fetch(self, number: int, start: int, end: int) -> bytes:
        for _ in range(_ATTEMPTS):
            try:
                data = buckets.read_bytes(self._remote, start, end)
            except FileNotFoundError as error:
                raise DamagedError(f"{self._remote}: is missing") from error
            if len(data) == end - start and (
                not self._facts.chunks or _digest(data) == self._facts.chunks[number]
            ):
                return data
        raise DamagedError(
            f"{self._remote}: bytes {start:,} to {end:,} differ from their checksum, in each of "
            f"{_ATTEMPTS} downloads"
        )


def _read_arrivals(path: pathlib.Path) -> dict[int, str]:
    """Returns the checksums of chunks that have arrived; a kill may have cut the last line."""
    if not path.exists():
        return {}
    fields = [line.split() for line in path.read_text().splitlines()]
    return {int(each[0]): each[1] for each in fields if len(each) == 2 and each[0].isdecimal()}


def _is_on_disk(path: pathlib.Path, start: int, end: int, digest: str) -> bool:
    """Returns whether bytes [start, end) of a file have the checksum `digest`."""
    with _opened(path, os.O_RDONLY) as descriptor:
        try:
            # A file system that cannot tell returns `start`.
            if os.lseek(descriptor, start, os.SEEK_DATA) >= end:
                return False
        except OSError as error:
            if error.errno == errno.ENXIO:  # No data up to the end of the file.
                return False
        return _digest(_read(descriptor, start, end)) == digest


def _read(descriptor: int, start: int, end: int) -> bytes:
    """Returns bytes [start, end) of a file; a single read returns at most 2 GiB."""
    pieces = []
    while start < end and (piece := os.pread(descriptor, end - start, start)):
        pieces.append(piece)
        start += len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


@contextlib.contextmanager
def _opened(path: pathlib.Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _ranges(facts: FileFacts, chunk_bytes: int) -> list[tuple[int, int, int]]:
    """Returns number, start and end of each chunk of a file."""
    starts = range(0, facts.size, chunk_bytes) if facts.size else ()
    return [
        (number, start, min(start + chunk_bytes, facts.size)) for number, start in enumerate(starts)
    ]


def upload(
    folder: pathlib.Path,
    remote: "epath.Path",
    names: Sequence[str],
    *,
    last: Collection[str] = (),
    on_bytes: OnBytes = lambda count: None,
) -> dict[str, FileFacts]:
    """Makes a folder of a bucket an exact copy of files of a local one; deletes other objects.

    Objects that are already equal are not uploaded again.

    Args:
      folder: the local folder, whose files do not change during the upload.
      remote: the folder in the bucket, used for these files only.
      names: paths of the files below both folders.
      last: those of them that mark the folder as complete: written after all others.
      on_bytes: called with numbers of bytes.

    Returns:
      Size and checksums of the files, by path.

    Raises:
      BucketError: if the bucket cannot be written.
    """
    count = _counter(on_bytes)
    existing = buckets.list_files(remote)
    facts = dict(zip(names, _run(lambda name: describe(folder / name), names), strict=True))
    outdated = [name for name in names if not _is_object(existing.get(name), facts[name])]
    count(sum(each.size for each in facts.values()) - sum(facts[name].size for name in outdated))
    stale = [name for name in existing if name not in facts]

    def write(piece: tuple[str, int, int, str]) -> None:
        name, start, end, target = piece
        with _opened(folder / name, os.O_RDONLY) as descriptor:
            data = _read(descriptor, start, end)
        if not _is_object(existing.get(target), FileFacts(end - start, _crc32c(data))):
            buckets.write_bytes(remote / target, data)
        count(end - start)

    for group in ([n for n in outdated if n not in last], [n for n in outdated if n in last]):
        pieces = {name: _pieces(name, facts[name]) for name in group}
        _run(write, [piece for each in pieces.values() for piece in each])
        for name, parts in pieces.items():
            if len(parts) > 1:
                targets = [target for _, _, _, target in parts]
                stale += targets + _join(remote, name, targets, facts[name])
    _run(lambda name: buckets.delete(remote / name), sorted(set(stale)))
    return facts


def _pieces(name: str, facts: FileFacts) -> list[tuple[str, int, int, str]]:
    """Returns name, start, end and object of each piece that a file is uploaded in."""
    ranges = _ranges(facts, facts.chunk_bytes)
    if len(ranges) < 2:
        return [(name, 0, facts.size, name)]
    return [(name, start, end, f"{PARTS}{name}/{number:06d}") for number, start, end in ranges]


def _join(remote: "epath.Path", name: str, parts: list[str], facts: FileFacts) -> list[str]:
    """Joins the parts of an object; returns the names of temporary objects that it created.

    Objects are never joined in place, because a repeated request would append twice.
    """
    temporary: list[str] = []
    while len(parts) > _MAX_COMPOSED:
        groups = [parts[n : n + _MAX_COMPOSED] for n in range(0, len(parts), _MAX_COMPOSED)]
        parts = [f"{group[0]}+{len(group)}" for group in groups]
        for target, group in zip(parts, groups, strict=True):
            buckets.compose(remote / target, [remote / part for part in group])
        temporary += parts
    stat = buckets.compose(remote / name, [remote / part for part in parts])
    if not _is_object(stat, facts):
        buckets.delete(remote / name)
        raise DamagedError(
            f"{remote / name}: differs from the uploaded file, so it was deleted. Rerun the command"
        )
    return temporary


def _is_object(stat: buckets.Stat | None, facts: FileFacts) -> bool:
    return stat is not None and (stat.size, stat.crc32c) == (facts.size, facts.crc32c)


def _crc32c(data: bytes) -> str:
    import google_crc32c

    return f"{google_crc32c.value(data):08x}"


def _counter(on_bytes: OnBytes) -> OnBytes:
    """Returns `on_bytes`, called by one thread at a time."""
    lock = threading.Lock()

    def count(number: int) -> None:
        with lock:
            on_bytes(number)

    return count


def _run(work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """Returns `work` of each item, computed in threads; the first error cancels the rest."""
    with futures.ThreadPoolExecutor(_THREADS, "transfer") as threads:
        pending = [threads.submit(work, item) for item in items]
        try:
            for future in futures.as_completed(pending):
                future.result()
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in pending]
