"""Reads a data set's source from a tar archive, compressed or not."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import pathlib
import shutil
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any, cast

from inception_jax.datasets.sources import member_names
from inception_jax.datasets.sources.files import Source
from inception_jax.errors import DataError
from inception_jax.storage.space import check_space

# By the first bytes of a compressed file.
_DECOMPRESSORS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
}
# Maximum size of a member's name or comment: a header may declare any length, and tarfile would
# load all of it.
_MAX_HEADER_BYTES = 1 << 20
_BLOCK = 512
_CHUNK_SIZE = 1 << 20
# Raised by the decompressors and tarfile for damaged or truncated files.
_READ_ERRORS = (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)


class TarSource(Source):
    """Reads a tar archive in place; unpacks a compressed one to a temporary file.

    Listing reads only headers, but a compressed archive must be decompressed completely for that.
    The temporary file is written when the first member is read. It has no name, so it is removed
    when the process ends, however it ends.

    Args:
      path: the archive.
      is_hidden: returns whether to skip a file, by path.
      encoding: of names that are not declared as UTF-8; '': unknown.
      scratch: folder for the temporary file; None: the system's default.

    Raises:
      DataError: if it is not a complete tar archive.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        is_hidden: Callable[[str], bool] = lambda file: False,
        encoding: str = "",
        scratch: pathlib.Path | None = None,
    ) -> None:
        super().__init__(path)
        # `path` may be changed later to a path inside the archive.
        self._archive, self._scratch = path, scratch
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        # Size of the decompressed archive, bytes.
        self._uncompressed_size = 0
        try:
            self._decompress = decompressor(path)
            with self._decompress(path, "rb") if self._decompress else path.open("rb") as file:
                members = list(self._iter_members(file))
        except _READ_ERRORS as error:
            raise DataError(
                f"{path}: not a complete tar archive ({path.stat().st_size:,} bytes; {error}). It "
                "may be truncated; download or copy it again"
            ) from error
        raws = [_raw_name(member) for member in members]
        names = member_names.decode(raws, encoding, path)
        # The last of several members with the same name is used, as in tar itself.
        self._members: dict[str, tarfile.TarInfo] = {}
        for name, raw, member in zip(names, raws, members, strict=True):
            if not name:
                continue
            if is_hidden(name):
                self.hidden.append(f"{name.rstrip('/')}/" if member.isdir() else name)
                continue
            self.names_depend_on_encoding |= member_names.is_undeclared(raw)
            if member.isdir():
                self.folders.append(f"{name.rstrip('/')}/")
            else:
                self._members[name] = member
        by_name = {member.name: member for member in members if member.isreg()}
        for name, member in self._members.items():
            # A hard link is a second name of a file in the archive.
            if member.islnk() and member.linkname in by_name:
                self._members[name] = by_name[member.linkname]
        self.links = [
            name for name, member in self._members.items() if member.issym() or member.islnk()
        ]
        self.sizes = {
            file: member.size if member.isreg() else 0 for file, member in self._members.items()
        }

    def _iter_members(self, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
        """Yields the members; reads to the end to detect truncated files."""
        bounded = cast(IO[bytes], _BoundedReader(file))
        with tarfile.open(
            fileobj=bounded, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as archive:
            for member in archive:
                # Python 3.12.1 would go back and read the same members forever.
                if member.size < 0:
                    raise tarfile.ReadError(f"a member has {member.size:,} bytes")
                yield member
            end = archive.offset
        file.seek(end)
        # tarfile treats anything that is not a header, even missing data, as the end.
        if (last := file.read(_BLOCK)) != bytes(_BLOCK):
            raise tarfile.ReadError(
                "a member's header is damaged" if last else "the end is missing"
            )
        # The checksum of the compressed file is at its end.
        self._uncompressed_size = end + _BLOCK
        while chunk := file.read(_CHUNK_SIZE):
            self._uncompressed_size += len(chunk)
            if chunk.strip(b"\0"):
                raise tarfile.ReadError(
                    "data follow its end, as with several archives in one file: join them with "
                    "tar --concatenate, or unpack it with tar --ignore-zeros"
                )

    def _read(self, path: str) -> bytes:
        member = self._members[path]
        if problem := _read_problem(member):
            raise DataError(f"{self.path}: {path} is {problem}") from tarfile.TarError(problem)
        with self._lock:
            if self._file is None:
                self._file = self._open_uncompressed()
        data = os.pread(self._file.fileno(), member.size, member.offset_data)
        if len(data) != member.size:
            raise DataError(f"{self.path}: {path} is truncated. Download or copy the archive again")
        return data

    def _open_uncompressed(self) -> IO[bytes]:
        """Opens the archive itself, or a temporary file with its decompressed content."""
        if not self._decompress:
            return self._archive.open("rb")
        folder = self._scratch or pathlib.Path(tempfile.gettempdir())
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, self._uncompressed_size, f"unpacking {self.path}", error=DataError)
        with contextlib.ExitStack() as stack:
            target = stack.enter_context(tempfile.TemporaryFile(dir=folder))
            with self._decompress(self._archive, "rb") as source:
                shutil.copyfileobj(source, target, _CHUNK_SIZE)
            target.flush()
            stack.pop_all()
        return target

    def _stat(self, path: str) -> tuple[int, ...]:
        """Returns a member's size and modification time in s; tar has no content checksums."""
        return self._members[path].size, int(self._members[path].mtime)

    def close(self) -> None:
        """Closes the archive and removes the temporary file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def decompressor(path: pathlib.Path) -> Callable[..., Any] | None:
    """Returns a function that opens a compressed file; None if it is not compressed."""
    with path.open("rb") as file:
        begin = file.read(8)
    openers = (opener for magic, opener in _DECOMPRESSORS.items() if begin.startswith(magic))
    return next(openers, None)


class _BoundedReader(io.RawIOBase):
    """Wraps a file and refuses to read large headers.

    Newer Pythons (3.14.10) read a header in chunks. tarfile reads the blocks between headers one by
    one, so consecutive larger reads belong to one header.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._header_bytes = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Moves to an offset in the file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Returns the offset in the file."""
        return self._file.tell()

    def read(self, size: int = -1, /) -> bytes:
        """Reads from the file; raises ReadError in a header of more than `_MAX_HEADER_BYTES`."""
        self._header_bytes = self._header_bytes + size if size > _BLOCK else 0
        if size < 0:
            raise tarfile.ReadError(f"a member's header has {size:,} bytes")
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a member's header has more than {_MAX_HEADER_BYTES:,} bytes")
        return self._file.read(size)


def _raw_name(member: tarfile.TarInfo) -> member_names.RawName:
    data = member.name.encode("utf-8", "surrogateescape")
    # pax headers are UTF-8; other formats do not declare an encoding.
    return member_names.RawName(data, is_utf8="path" in member.pax_headers)


def _read_problem(member: tarfile.TarInfo) -> str:
    """Returns why a member cannot be read, with a remedy, or ''."""
    if member.issym() or member.islnk():
        return (
            f"a link to {member.linkname!r}, which is not followed; create the archive with 'tar "
            "--dereference --hard-dereference'"
        )
    if member.issparse():
        return "stored as a sparse file; create the archive without 'tar --sparse'"
    return "" if member.isreg() else "a device or a pipe, not a file; remove it"
