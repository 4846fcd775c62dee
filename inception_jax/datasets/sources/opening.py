"""Opens a data set's source, whatever it is: a folder, a zip or tar archive."""

import pathlib
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterable

from inception_jax.datasets.sources.files import FolderSource, Source
from inception_jax.datasets.sources.tar_source import TarSource, decompressor
from inception_jax.datasets.sources.zip_source import ZipSource
from inception_jax.errors import DataError

_UNPACK = "unpack it and use the folder"
# What other files begin with, what they are, and what to do with them.
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
# As much as the first header of a tar archive has.
_HEADER = 512


def open_path(
    path: pathlib.Path,
    *,
    is_hidden: Callable[[str], bool],
    encoding: str = "",
    scratch: pathlib.Path | None = None,
) -> Source:
    """Opens a folder or an archive, whose kind its content tells.

    Args:
      path: what was given, which exists.
      hidden: whether a file or folder, by its path, is none of the source's.
      encoding: of an archive's names where it does not say it; '': not known.
      scratch: where a compressed tar archive may be unpacked to a temporary file; None: where the
        system has such files.

    Raises:
      DataError: if it is damaged, cannot be read, or is neither a folder nor such an archive.
    """
    if path.is_dir():
        return FolderSource(path, is_hidden=is_hidden)
    if _is_zip(path):
        return ZipSource(path, is_hidden=is_hidden, encoding=encoding)
    return TarSource(path, is_hidden=is_hidden, encoding=encoding, scratch=scratch)


def _is_zip(path: pathlib.Path) -> bool:
    """Tells a zip archive from a tar archive.

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
    # A zip archive may follow a program that unpacks it; old tar archives are known by a checksum.
    if zipfile.is_zipfile(path):
        return True
    if tarfile.is_tarfile(path):
        return False
    raise DataError(
        f"{path}: neither a zip nor a tar archive ({path.stat().st_size:,} bytes, beginning with "
        f"{begin[:8]!r}), or damaged. Use a folder, a zip archive or a tar archive"
    )


def mention_archives(files: Iterable[str]) -> str:
    """Returns a sentence that names the archives among some files, or ''."""
    archives = sorted((file for file in files if file.lower().endswith(_ARCHIVES)), key=len)
    if not archives:
        return ""
    named = ", ".join(archives[:_MAX_NAMED]) + (", …" if len(archives) > _MAX_NAMED else "")
    return (
        f" It contains archives, which are not searched: {named}. Use one of them as the "
        "source, or unpack them."
    )
