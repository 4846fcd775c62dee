"""The files of Tiny ImageNet's official layout, in a zip archive or in a folder.

    wnids.txt                          one class id (WordNet id) a line
    words.txt                          class id, tab, names separated by commas
    train/<wnid>/images/<file>.JPEG    training images
    train/<wnid>/<wnid>_boxes.txt      file, x0, y0, x1, y1 of each, separated by tabs
    val/images/<file>.JPEG             validation images
    val/val_annotations.txt            file, wnid, x0, y0, x1, y1 of each
    test/images/<file>.JPEG            test images, whose classes are not published

`index` reads the text files and checks that what they list is there, all of it, and nothing else:
a download that was cut short or a folder that was half copied is found before any work is done.
"""

import collections
import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from inception_jax.datasets.files import FolderSource, Source, ZipSource
from inception_jax.errors import DataError

FOLDER = "tiny-imagenet-200"
NO_BOX = (-1, -1, -1, -1)
Box = tuple[int, int, int, int]


class Entry(NamedTuple):
    """One image: its path below the layout's root, class id ('' if unknown) and box (or NO_BOX)."""

    file: str
    wnid: str
    box: Box


@dataclasses.dataclass(frozen=True)
class Index:
    """What a source holds.

    Attributes:
      wnids: the class ids, sorted; a label is an index into them.
      class_names: a readable, unique name for each.
      splits: the images of 'train', 'validation' and, if there are any, 'test'.
    """

    wnids: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: dict[str, list[Entry]]


def _foreign(path: pathlib.Path, names: list[str]) -> DataError:
    found = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    return DataError(
        f"{path}: not Tiny ImageNet, for it has no wnids.txt (found: {found or 'nothing'}). Give "
        f"the {FOLDER}.zip, or the folder {FOLDER} that was extracted from it."
    )


def _root(path: pathlib.Path, names: Sequence[str]) -> str:
    """Returns the folder inside an archive that holds wnids.txt: '' or 'folder/'."""
    roots = [name.removesuffix("wnids.txt") for name in names if name.endswith("wnids.txt")]
    roots = [root for root in roots if not root or root.endswith("/")]
    if not roots:
        raise _foreign(path, sorted({name.split("/")[0] for name in names}))
    return min(roots, key=len)


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a zip archive or a folder in the official layout.

    Raises:
      DataError: if it does not exist, is not a whole zip archive, or is something else.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        inner = path / FOLDER
        root = path if (path / "wnids.txt").exists() or not inner.is_dir() else inner
        if not (root / "wnids.txt").exists():
            raise _foreign(path, sorted(os.listdir(root)))
        return FolderSource(path, root)
    if not path.exists():
        raise DataError(
            f"config.data.source = {str(path)!r}: there is no such file or folder. Give the "
            f"{FOLDER}.zip or the extracted folder, or leave it empty for the official download."
        )
    return ZipSource(path, root=functools.partial(_root, path))


def _lines(source: Source, file: str) -> list[list[str]]:
    """Returns a text file's lines, split at tabs, without empty ones."""
    try:
        text = source.read(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{source.path}: {file} is not a text file ({error}).") from error
    return [line.split("\t") for line in text.splitlines() if line.strip()]


def _box(fields: list[str], where: str) -> Box:
    try:
        x0, y0, x1, y1 = map(int, fields)
    except ValueError as error:
        raise DataError(
            f"{where}: four whole numbers x0, y0, x1, y1 belong at the line's end, but it has "
            f"{fields}."
        ) from error
    return x0, y0, x1, y1


def _compare(source: Source, where: str, *, listed: set[str], present: set[str]) -> None:
    """Raises DataError if the images that a text file lists are not those that are there."""
    if missing := sorted(listed - present):
        raise DataError(
            f"{source.path}: {len(missing)} of the {len(listed):,} images that {where} lists are "
            f"missing, such as {missing[0]}. Get the archive again, or copy the folder whole."
        )
    if extra := sorted(present - listed):
        raise DataError(
            f"{source.path}: {where} does not list {len(extra)} of the images that are there, such "
            f"as {extra[0]}. Get the archive again, or mend that file."
        )


def _train(source: Source, wnids: tuple[str, ...], images: dict[str, set[str]]) -> list[Entry]:
    entries = []
    for wnid in wnids:
        where = f"train/{wnid}/{wnid}_boxes.txt"
        folder = f"train/{wnid}/images/"
        boxes = {
            folder + line[0]: _box(line[1:], f"{source.path}: {where}")
            for line in _lines(source, where)
        }
        _compare(source, where, listed=set(boxes), present=images.pop(folder, set()))
        entries += [Entry(file, wnid, box) for file, box in sorted(boxes.items())]
    return entries


def _validation(source: Source, wnids: tuple[str, ...], images: dict[str, set[str]]) -> list[Entry]:
    where, folder = "val/val_annotations.txt", "val/images/"
    known = set(wnids)
    entries = []
    for line in _lines(source, where):
        wnid = line[1] if len(line) > 1 else ""
        if wnid not in known:
            raise DataError(
                f"{source.path}: {where} gives {line[0]} the class {wnid!r}, which wnids.txt does "
                "not list. Use the two files of one archive."
            )
        entries.append(Entry(folder + line[0], wnid, _box(line[2:], f"{source.path}: {where}")))
    listed = {entry.file for entry in entries}
    _compare(source, where, listed=listed, present=images.pop(folder, set()))
    return sorted(entries)


def _class_names(source: Source, wnids: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the first name of each class, with the class id added where two are the same."""
    words = {line[0]: line[1] for line in _lines(source, "words.txt") if len(line) > 1}
    if missing := [wnid for wnid in wnids if wnid not in words]:
        raise DataError(
            f"{source.path}: words.txt has no name for {len(missing)} classes of wnids.txt, such "
            f"as {missing[0]}. Use the two files of one archive."
        )
    first = [words[wnid].split(",")[0].strip() for wnid in wnids]
    uses = collections.Counter(first)
    return tuple(
        f"{name} ({wnid})" if uses[name] > 1 else name
        for name, wnid in zip(first, wnids, strict=True)
    )


def index(source: Source) -> Index:
    """Returns what a source holds, once it is found to be whole and consistent.

    Raises:
      DataError: if a file is missing, or one is there that should not be.
    """
    images: dict[str, set[str]] = collections.defaultdict(set)
    for file in source.sizes:
        if file.lower().endswith((".jpeg", ".jpg")):
            images[file.rpartition("/")[0] + "/"].add(file)
    wnids = tuple(sorted(line[0].strip() for line in _lines(source, "wnids.txt")))
    if not wnids or len(set(wnids)) != len(wnids):
        raise DataError(
            f"{source.path}: wnids.txt must list at least one class id, and none twice."
        )
    splits = {
        "train": _train(source, wnids, images),
        "validation": _validation(source, wnids, images),
    }
    if test := images.pop("test/images/", None):
        splits["test"] = [Entry(file, "", NO_BOX) for file in sorted(test)]
    if images:
        folder = min(images)
        raise DataError(
            f"{source.path}: {folder} holds images, but wnids.txt lists no such class. Use the "
            "files of one archive."
        )
    return Index(wnids, _class_names(source, wnids), splits)
