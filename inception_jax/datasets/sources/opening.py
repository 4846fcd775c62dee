"""Opens a data set's source: a folder, a zip archive or a tar archive."""

import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable

from inception_jax.datasets.sources.files import FolderSource, Source
from inception_jax.datasets.sources.tar_source import TarSource, decompressor
from inception_jax.datasets.sources.zip_source import ZipSource
from inception_jax.errors import DataError, join_truncated

_UNPACK = "unpack it and use the folder"
# First bytes, description and remedy of unsupported files.
_UNSUPPORTED = (
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "compressed with Zstandard", f"{_UNPACK}, or decompress it with unzstd"),
    (b"\x04\x22\x4d\x18", "compressed with LZ4", f"{_UNPACK}, or decompress it with unlz4"),
    (b"LZIP", "compressed with lzip", f"{_UNPACK}, or decompress it with lzip -d"),
    (b"\x1f\x9d", "compressed with compress", f"{_UNPACK}, or decompress it with uncompress"),
    (b"PK\x07\x08", "the first of several parts of a zip archive", "join them with zip -s 0"),
    (b"PAR1", "a Parquet file", "use image files, one folder per class"),
    (b"\x89HDF", "an HDF5 file", "use image files, one folder per class"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file with git lfs pull"),
)
_WEB_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<head")
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
_MAX_NAMED = 5
# Size of a tar header.
_HEADER = 512


def open_path(
    path: pathlib.Path,
    *,
    is_hidden: Callable[[str], bool],
    encoding: str = "",
    scratch: pathlib.Path | None = None,
) -> Source:
    """Opens a folder or an archive, detecting the type by content.

    Args:
      path: an existing path.
      is_hidden: returns whether to skip a file or folder, by path.
      encoding: of names whose encoding the archive does not declare; '': unknown.
      scratch: folder for the temporary file of a compressed tar archive; None: the system's
        default.

    Raises:
      DataError: if it is damaged, unreadable, or of another type.
    """
    if path.is_dir():
        return FolderSource(path, is_hidden=is_hidden)
    if _is_zip(path):
        return ZipSource(path, is_hidden=is_hidden, encoding=encoding)
    return TarSource(path, is_hidden=is_hidden, encoding=encoding, scratch=scratch)


def _is_zip(path: pathlib.Path) -> bool:
    """Returns whether a file is a zip (True) or tar (False) archive.

    Raises:
      DataError: if it is neither.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: is a device or a pipe; use a folder or an archive")
        with path.open("rb") as file:
            begin = file.read(_HEADER)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). Check its permissions"
        ) from error
    if begin.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return True
    if decompressor(path) or begin[257:262] == b"ustar":
        return False
    for magic, what, remedy in _UNSUPPORTED:
        if begin.startswith(magic):
            raise DataError(f"{path}: is {what}, which is not supported; {remedy}")
    if begin.lstrip().lower().startswith(_WEB_PAGE):
        raise DataError(
            f"{path}: is a web page, saved instead of the archive. Download the archive itself, "
            "which may require a login"
        )
    # A zip archive may follow a self-extractor; old tar archives are recognized by a checksum.
    if zipfile.is_zipfile(path):
        return True
    if tarfile.is_tarfile(path):
        return False
    raise DataError(
        f"{path}: neither a zip nor a tar archive ({path.stat().st_size:,} bytes, beginning with "
        f"{begin[:8]!r}), or damaged. Use a folder, a zip archive or a tar archive"
    )


def mention_archives(files: Iterable[str]) -> str:
    """Returns a sentence that lists the archives among `files`, or ''."""
    archives = sorted((file for file in files if file.lower().endswith(_ARCHIVES)), key=len)
    if not archives:
        return ""
    return (
        " It contains archives, which are not searched: "
        f"{join_truncated(archives, _MAX_NAMED)}. Use one of them as the source, or unpack them."
    )
