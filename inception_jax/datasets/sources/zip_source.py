"""Reads a data set's source from a zip archive."""

import bz2
import copy
import lzma
import pathlib
import stat
import struct
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection

from inception_jax.datasets.sources import member_names
from inception_jax.datasets.sources.files import MAX_BYTES, Source
from inception_jax.errors import DataError

# Methods that zipfile supports.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
# Names of other methods, by their number in the zip format.
_OTHER_METHODS = {
    1: "Shrink",
    6: "Implode",
    9: "Deflate64 (which Windows Explorer uses for large archives)",
    20: "Zstandard",
    93: "Zstandard",
    95: "XZ",
    98: "PPMd",
}
_UNPACK = "Unpack it with 7-Zip or the program that created it, and use the folder"
# Flags of a member, and creator systems that are DOS or Windows.
_ENCRYPTED, _UTF8 = 1 << 0, 1 << 11
_WINDOWS = (0, 10, 11, 14)  # FAT, NTFS (two numbers) and VFAT.
_UNICODE_PATH = 0x7075
# The end record, followed by a comment of at most 64 KiB.
_END, _END_SIZE = b"PK\x05\x06", 22
# zipfile returns everything that a read of LZMA data unpacks to at once, so read little at a time.
_LZMA_READ_SIZE = 4096


class ZipSource(Source):
    """Reads a zip archive in place.

    Args:
      path: the archive.
      is_hidden: returns whether to skip a file, by path.
      encoding: of names that are not declared as UTF-8; '': unknown.

    Raises:
      DataError: if it is not a complete zip archive, or of an unsupported type.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        is_hidden: Callable[[str], bool] = lambda file: False,
        encoding: str = "",
    ) -> None:
        super().__init__(path)
        self._lock = threading.Lock()
        _check_parts(path)
        try:
            self._zip = zipfile.ZipFile(path)
        # UnicodeDecodeError: a name is not valid in its declared encoding.
        except (zipfile.BadZipFile, OSError, UnicodeDecodeError) as error:
            if path.suffix[1:].isdigit():
                remedy = (
                    f"It may be one of several parts; join them with 'cat {path.stem}.* > "
                    "whole.zip'"
                )
            else:
                remedy = "It may be truncated; download or copy it again"
            raise DataError(
                f"{path}: not a complete zip archive ({path.stat().st_size:,} bytes; {error}). "
                f"{remedy}"
            ) from error
        try:
            self._list(is_hidden, encoding)
        except BaseException:
            self.close()
            raise

    def _list(self, is_hidden: Callable[[str], bool], encoding: str) -> None:
        infos = self._zip.infolist()
        raws = [_raw_name(info) for info in infos]
        names = member_names.decode(raws, encoding, self.path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        for name, raw, info in zip(names, raws, infos, strict=True):
            if not name:
                continue
            if is_hidden(name):
                self.hidden.append(name)
                continue
            self.names_depend_on_encoding |= member_names.is_undeclared(raw)
            if name.endswith("/"):
                self.folders.append(name)
                continue
            other = self._members.get(name)
            if other and (other.CRC, other.file_size) != (info.CRC, info.file_size):
                raise DataError(
                    f"{self.path}: contains two different files named {name!r}. Unpack it, keep "
                    "the right one, and use the folder"
                )
            self._members[name] = info
        _check_methods(self._members.values(), self.path)
        self.links = [file for file, info in self._members.items() if _is_link(info)]
        self.sizes = {file: info.file_size for file, info in self._members.items()}

    def _read(self, path: str) -> bytes:
        info = self._members[path]
        if _is_link(info):
            problem = "a link, which is not followed; create the archive with zip without -y"
            raise DataError(f"{self.path}: {path} is {problem}") from zipfile.BadZipFile(problem)
        try:
            # One thread at a time: Python 3.12.1 skips a member's extra field from the current file
            # position, so concurrent threads would get each other's bytes.
            if info.compress_type == zipfile.ZIP_BZIP2:
                return self._read_bzip2(info)
            with self._lock, self._zip.open(info) as member:
                # Limited to the declared size: reading to the end would unpack any excess data.
                if info.compress_type != zipfile.ZIP_LZMA:
                    return member.read(info.file_size)
                return b"".join(iter(lambda: member.read(_LZMA_READ_SIZE), b""))
        except (
            zipfile.BadZipFile,
            zlib.error,
            lzma.LZMAError,
            struct.error,
            EOFError,
            OSError,
            RuntimeError,
            ValueError,
        ) as error:
            raise DataError(
                f"{self.path}: {path} is damaged ({error}). Download or copy the archive again"
            ) from error

    def _read_bzip2(self, info: zipfile.ZipInfo) -> bytes:
        """Returns a member's content; unlike zipfile, unpacks no more than its declared size.

        bzip2 data can unpack to a million times their size.
        """
        packed = copy.copy(info)
        packed.compress_type, packed.file_size = zipfile.ZIP_STORED, info.compress_size
        del packed.CRC  # It is the checksum of the unpacked data.
        with self._lock, self._zip.open(packed) as member:
            data = member.read(min(info.compress_size, MAX_BYTES))
        decompressor = bz2.BZ2Decompressor()
        content = decompressor.decompress(data, info.file_size)
        while len(content) < info.file_size and not decompressor.needs_input:
            content += decompressor.decompress(b"", info.file_size - len(content))
        if zlib.crc32(content) != info.CRC:
            raise zipfile.BadZipFile("bad CRC-32")
        return content

    def _stat(self, path: str) -> tuple[int, ...]:
        """Returns a member's size and its CRC-32 in the archive."""
        return self._members[path].file_size, self._members[path].CRC

    def close(self) -> None:
        """Closes the archive."""
        self._zip.close()


def _raw_name(info: zipfile.ZipInfo) -> member_names.RawName:
    """Returns a member's name, preferring the UTF-8 name in an extra field."""
    from_windows = info.create_system in _WINDOWS
    if info.flag_bits & _UTF8:
        return member_names.RawName(info.orig_filename.encode(), True, from_windows)
    # zipfile decodes names that are not declared as UTF-8 with cp437, which is lossless.
    data = info.orig_filename.encode("cp437")
    extra = info.extra
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<HH", extra)
        # Version, CRC-32 of the original name, UTF-8 name.
        if kind == _UNICODE_PATH and extra[4:9] == b"\x01" + struct.pack("<L", zlib.crc32(data)):
            return member_names.RawName(extra[9 : 4 + length], True, from_windows)
        extra = extra[4 + length :]
    return member_names.RawName(data, False, from_windows)


def _is_link(info: zipfile.ZipInfo) -> bool:
    return info.create_system == 3 and stat.S_ISLNK(info.external_attr >> 16)


def _check_methods(members: Collection[zipfile.ZipInfo], path: pathlib.Path) -> None:
    """Raises one DataError for the archive if members use unsupported methods."""
    problems: Counter[str] = Counter()
    for info in members:
        method = info.compress_type
        if info.flag_bits & _ENCRYPTED:
            problems["encrypted with a password"] += 1
        elif method not in _METHODS:
            name = _OTHER_METHODS.get(method, f"method {method}")
            problems[f"compressed with {name}"] += 1
    if problems:
        described = " and ".join(f"{count:,} are {what}" for what, count in problems.items())
        raise DataError(
            f"{path}: of its {len(members):,} files, {described}, which is not supported. {_UNPACK}"
        )


def _check_parts(path: pathlib.Path) -> None:
    """Raises DataError if an archive is one of several parts."""
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _END_SIZE - 0xFFFF, 0))
        tail = file.read()
    place = tail.rfind(_END)
    if place < 0 or len(tail) < place + _END_SIZE:
        return
    # 0xffff: the number is in another record, which zipfile handles.
    (number,) = struct.unpack_from("<H", tail, place + 4)
    if number not in (0, 0xFFFF):
        raise DataError(
            f"{path}: the last of {number + 1} parts of one archive (.z01, .z02, …). Join them "
            f"with 'zip -s 0 {path.name} --out whole.zip', or unpack them with 7-Zip and use the "
            "folder"
        )
