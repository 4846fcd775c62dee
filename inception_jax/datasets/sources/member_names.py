"""Decodes the names of an archive's members to paths.

Archives store names as bytes. Formats and programs differ in whether and how they declare the
encoding, and in the path separator.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from inception_jax.errors import DataError

# Encodings that systems use for names without a declared encoding.
_LEGACY_ENCODINGS = (
    "cp437",
    "cp850",
    "cp1252",
    "cp866",
    "cp1251",
    "gbk",
    "big5",
    "shift_jis",
    "euc_kr",
)


class RawName(NamedTuple):
    """A name as stored in an archive.

    Attributes:
      data: the bytes of the name.
      is_utf8: whether the archive declares it as UTF-8.
      from_windows: whether it was written on DOS or Windows, according to the archive.
    """

    data: bytes
    is_utf8: bool = False
    from_windows: bool = False


def is_undeclared(raw: RawName) -> bool:
    """Returns whether a name is not ASCII and has no declared encoding."""
    return not raw.is_utf8 and not raw.data.isascii()


def decode(raws: Sequence[RawName], encoding: str, where: object) -> list[str]:
    """Returns the paths of all members, separated by '/'.

    Names of undeclared encoding are decoded as UTF-8 (as written by macOS) if all of them are
    valid. Otherwise invalid bytes are kept as surrogates (surrogateescape), which `is_undecodable`
    detects. Backslashes are separators, as written by old Windows programs, in names from Windows
    and in archives without any '/'.

    Args:
      raws: the names of all members.
      encoding: of names whose encoding the archive does not declare; '': unknown.
      where: the archive, for errors.

    Raises:
      DataError: if a name is not valid in the specified or declared encoding.
    """
    undeclared = [raw.data for raw in raws if is_undeclared(raw)]
    if encoding:
        names = [
            _decode_strict(raw.data, "utf-8" if raw.is_utf8 else encoding, where) for raw in raws
        ]
    elif _is_utf8(b"\n".join(undeclared)):
        names = [_decode_strict(raw.data, "utf-8", where) for raw in raws]
    else:
        names = [raw.data.decode("utf-8", "surrogateescape") for raw in raws]
    any_slash = any("/" in name for name in names)
    names = [
        name.replace("\\", "/") if not any_slash or (raw.from_windows and "/" not in name) else name
        for raw, name in zip(raws, names, strict=True)
    ]
    if all(name.startswith("/") for name in names):
        names = [name.lstrip("/") for name in names]
    return list(map(_normalize, names))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decode_strict(data: bytes, encoding: str, where: object) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        given = "the archive" if encoding == "utf-8" else "config.data.archive_encoding"
        raise DataError(
            f"{where}: the name {data!r} is not encoded in {encoding}, as {given} declares. "
            f"{_possible_names(data)}Set config.data.archive_encoding to the encoding of the "
            "system that created the archive, or unpack it and use the folder"
        ) from error


def _normalize(name: str) -> str:
    """Removes what unpacking ignores: the '.' of './cat/1.jpg', and repeated slashes.

    Keeps '..' and a leading slash, which are handled elsewhere, and the final slash of folders.
    """
    parts = [part for part in name.split("/") if part != "."]
    inner = [part for part in parts[1:-1] if part]
    return "/".join([*parts[:1], *inner, *parts[1:][-1:]])


def is_undecodable(text: str) -> bool:
    """Returns whether some bytes of a name could not be decoded."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def undecodable_folders(names: Sequence[str], where: object) -> DataError | None:
    """Returns an error if folder names (classes) could not be decoded, else None."""
    folders = sorted({name.rpartition("/")[0] for name in names})
    doubtful = [folder for folder in folders if is_undecodable(folder)]
    if not doubtful:
        return None
    data = os.fsencode(doubtful[0])
    return DataError(
        f"{where}: the archive does not declare the encoding of its names, and {len(doubtful):,} "
        f"of its folders, such as {data!r}, are not UTF-8. {_possible_names(data)}Set "
        "config.data.archive_encoding, or unpack the archive and use the folder"
    )


def _possible_names(data: bytes) -> str:
    """Returns a sentence with possible readings of a name: encodings that give only letters."""
    texts: dict[str, list[str]] = {}
    for encoding in _LEGACY_ENCODINGS:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        if all(character.isascii() or character.isalpha() for character in text):
            texts.setdefault(text, []).append(encoding)
    ways = [f"{text!r} ({', '.join(encodings)})" for text, encodings in texts.items()]
    return f"It may be {' or '.join(ways)}. " if ways else ""
