"""The names of an archive's members, as the paths that they mean.

An archive holds names as bytes. Formats and programs differ in how they say which encoding those
are in, if they say it at all, and in what parts a path's folders.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

from inception_jax.errors import DataError

# What systems in use write names in that say nothing of their encoding.
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
    """A name as an archive has it.

    Attributes:
      data: its bytes.
      is_utf8: whether the archive says that these are UTF-8.
      from_windows: whether a program on DOS or Windows says that it wrote it.
    """

    data: bytes
    is_utf8: bool = False
    from_windows: bool = False


def is_undeclared(raw: RawName) -> bool:
    """Whether a name's encoding matters, and the archive does not say which it is."""
    return not raw.is_utf8 and not raw.data.isascii()


def decode(raws: Sequence[RawName], encoding: str, where: object) -> list[str]:
    """Returns the paths, parted by '/'.

    Names of undeclared encoding are UTF-8 if all of an archive's are valid as that, as macOS writes
    them. Bytes that are not are kept as the file system's functions keep them (surrogateescape),
    which `is_undecodable` finds. Backslashes part folders, as old programs on Windows write them,
    in names from there and in archives without any '/'.

    Args:
      raws: the names of all members.
      encoding: of names whose encoding the archive does not declare; '': not known.
      where: what an error calls the archive.

    Raises:
      DataError: if a name is not in the encoding that was given or declared.
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
    return list(map(_drop_dots, names))


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
        given = (
            "the archive declares"
            if encoding == "utf-8"
            else ("config.data.archive_encoding declares")
        )
        raise DataError(
            f"{where}: the name {data!r} is not encoded in {encoding}, as {given}. "
            f"{_possible_names(data)}Set config.data.archive_encoding to the encoding of the "
            "system that created the archive, or unpack it and use the folder"
        ) from error


def _drop_dots(name: str) -> str:
    """Drops the '.' of paths such as './cat/1.jpg'; '..' stays, for others to refuse."""
    return "/".join(part for part in name.split("/") if part != ".")


def is_undecodable(text: str) -> bool:
    """Whether some of a name's bytes could not be decoded."""
    return any("\udc80" <= character <= "\udcff" for character in text)


def undecodable_folder_error(names: Sequence[str], where: object) -> DataError | None:
    """Returns the error for folders, which name classes, that can be read in several ways."""
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
    """Returns a sentence with what a name may be: those encodings in which it is all letters."""
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
