"""The layout of a user's own pictures: a folder for each class, in a folder or in a zip archive.

    ROOT/train/CLASS/**    training images; the folder may be called training, too
    ROOT/val/CLASS/**      images to evaluate on: val, validation, valid, test or testing
    ROOT/test/**           a second such folder becomes the split 'test', which may have no classes

or, if nothing is split yet, one folder of which a share of each class is held out:

    ROOT/CLASS/**

Folders inside a class are searched. Files that systems leave behind (`.DS_Store`, `Thumbs.db`,
whatever begins with a dot) are no files of the source. Everything else below a class is taken for
an image, whatever its name; whether it is one, image_folder.py finds out.
"""

import dataclasses
import hashlib
import os
import pathlib
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from PIL import Image

from inception_jax.datasets.files import FolderSource, Source, ZipSource
from inception_jax.errors import DataError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_TRAIN_FOLDERS = ("train", "training")
_VALIDATION_FOLDERS = ("val", "validation", "valid")
_TEST_FOLDERS = ("test", "testing")
_LEFT_BEHIND = ("thumbs.db", "desktop.ini", "__macosx")
_EXPECTED = "Expected: one folder of pictures for each class, or train/ and val/ with such folders."
# Unicode's categories of control characters, line breaks and paragraph breaks.
_BREAKS = ("Cc", "Zl", "Zp")
# How many things an error names.
_NAMED = 10


class Entry(NamedTuple):
    """One image: its path below the source's root, and its class ('' if unknown)."""

    file: str
    label: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """What lies where.

    Attributes:
      splits: the files of each split that has a folder of its own.
      classes: the names of the training split's class folders, sorted; some may hold no file.
      divided: whether there is a folder to evaluate on, or a share has to be held out.
      root: what the paths of the training files begin with before their class's folder: '' or
        ending in '/'.
    """

    splits: dict[str, list[Entry]]
    classes: tuple[str, ...]
    divided: bool
    root: str


def hidden(file: str) -> bool:
    """Whether a path is that of a file which systems, not users, put beside pictures."""
    parts = file.split("/")
    return any(part.startswith(".") or part.lower() in _LEFT_BEHIND for part in parts)


def named_as_picture(file: str) -> bool:
    """Whether a path ends as those of a format do that can be decoded (.jpg, .png, .webp, …)."""
    # The first call imports all of PIL's formats (0.1 s).
    formats = Image.registered_extensions()
    return formats.get(os.path.splitext(file)[1].lower()) in Image.OPEN


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a folder of pictures, or a zip archive of one.

    Raises:
      DataError: if it does not exist, is something else, or holds nothing.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise DataError(
            f"config.data.source = {str(path)!r}: there is no such folder. Give the folder that "
            "holds one folder of pictures for each class, or a zip archive of it."
        )
    source: Source
    if path.is_dir():
        source = FolderSource(path, path, hidden=hidden)
    else:
        source = ZipSource(path, hidden=hidden)
    if not source.sizes:
        source.close()
        raise DataError(f"{path}: holds no file. {_EXPECTED}")
    return source


# The paths of files, and of folders with a '/' at their end, by the first folder of each path; ''
# has the files that lie in none.
_Tree = dict[str, list[str]]


def layout(source: Source) -> Layout:
    """Finds classes and splits by the names of the folders; it reads no file.

    Raises:
      DataError: if there are no classes, only one, or pictures that belong to none; or if the
        folder to evaluate on has a class that is not trained.
    """
    start, tree = _enter([*source.sizes, *source.folders])
    where = f"{source.path}/{start}".removesuffix("/")
    folders = _split_folders(tree, where)
    if not folders:
        training = _entries(start, tree, where)
        return Layout({TRAIN: training}, _classes(tree, where), divided=False, root=start)
    splits, classes = {}, _classes(_below(tree, folders[TRAIN]), f"{where}/{folders[TRAIN]}")
    for split, folder in folders.items():
        below, inside = _below(tree, folder), f"{start}{folder}/"
        if split == TEST and not _has_folders(below):
            splits[split] = [Entry(inside + file, "") for file in below.get("", ())]
        else:
            splits[split] = _entries(inside, below, f"{where}/{folder}")
    for split, entries in splits.items():
        if foreign := sorted({entry.label for entry in entries} - {*classes, ""}):
            raise DataError(
                f"{where}/{folders[split]}: {quoted(foreign)}: no such class in "
                f"{folders[TRAIN]}/. Each class needs pictures to train on: add them, or move "
                "the folder away."
            )
    root = f"{start}{folders[TRAIN]}/"
    return Layout(splits, classes, divided=VALIDATION in splits, root=root)


def _by_folder(paths: Iterable[str]) -> _Tree:
    tree: _Tree = {}
    for path in sorted(paths):
        tree.setdefault(path.split("/")[0] if "/" in path else "", []).append(path)
    return tree


def _below(tree: _Tree, folder: str) -> _Tree:
    """Returns what is in one of the folders."""
    inner = (path.split("/", 1)[1] for path in tree[folder])
    return _by_folder(path for path in inner if path)


def _has_folders(tree: _Tree) -> bool:
    return bool(tree.keys() - {""})


def _enter(paths: Sequence[str]) -> tuple[str, _Tree]:
    """Goes into a folder as long as it is the only one, as an archive's outermost is.

    Of a training folder it goes into no other: what lies there are classes, if only one.

    Returns:
      The path of the folder that holds more, '' or ending in '/', and what is below it.
    """
    start, tree = "", _by_folder(paths)
    while not _loose_pictures(tree) and len(folders := [f for f in tree if f]) == 1:
        inner = _below(tree, folders[0])
        if not _has_folders(inner):
            break  # Pictures and no folder: this one is a class.
        start, tree = f"{start}{folders[0]}/", inner
        if folders[0].lower() in _TRAIN_FOLDERS:
            break
    return start, tree


def _split_folders(tree: _Tree, where: str) -> dict[str, str]:
    """Returns the folder of each split by the split's name; none if the folders are classes."""
    folders = [folder for folder in tree if folder]
    found = {
        split: [folder for folder in folders if folder.lower() in names]
        for split, names in (
            (TRAIN, _TRAIN_FOLDERS),
            (VALIDATION, _VALIDATION_FOLDERS),
            (TEST, _TEST_FOLDERS),
        )
    }
    others = sorted(set(folders) - {folder for several in found.values() for folder in several})
    if not found[TRAIN]:
        if folders and not others:
            raise DataError(f"{where}: has {quoted(folders)}, but no train folder. {_EXPECTED}")
        _check_classes(tree, others, found[VALIDATION] + found[TEST], where)
        return {}
    if not (found[VALIDATION] or found[TEST]) and not _has_folders(_below(tree, found[TRAIN][0])):
        return {}  # A class of that name.
    for split, several in found.items():
        if len(several) > 1:
            raise DataError(
                f"{where}: {quoted(several)}: which of them is the {split} split? Keep one."
            )
    if others:
        raise DataError(
            f"{where}: {quoted(others)} beside {found[TRAIN][0]!r}: is it a class or a split? Keep "
            "class folders inside the splits' folders, and move other folders away."
        )
    chosen = {split: several[0] for split, several in found.items() if several}
    if VALIDATION not in chosen and TEST in chosen and _has_folders(_below(tree, chosen[TEST])):
        # What has classes and was not trained on is what an evaluation needs.
        chosen[VALIDATION] = chosen.pop(TEST)
    return chosen


def _check_classes(tree: _Tree, others: Sequence[str], doubtful: Sequence[str], where: str) -> None:
    """Raises DataError if a class that is called like a split has folders of the other classes."""
    classes = set(map(class_name, others))
    for folder in doubtful:
        if classes & {class_name(inner) for inner in _below(tree, folder) if inner}:
            raise DataError(
                f"{where}: {folder!r} has folders of the same names as those beside it: is it a "
                "split? Put the classes to train on into train/."
            )


def _entries(start: str, tree: _Tree, where: str) -> list[Entry]:
    """Returns the files of class folders; `start` is what their paths begin with."""
    if pictures := _loose_pictures(tree):
        raise DataError(
            f"{where}: {len(pictures):,} pictures lie in no class folder, such as "
            f"{shown(pictures[0])}. {_EXPECTED}"
        )
    return [
        Entry(start + file, class_name(folder))
        for folder in tree
        if folder
        for file in tree[folder]
        if not file.endswith("/")
    ]


def _loose_pictures(tree: _Tree) -> list[str]:
    """Returns the files in no folder that are pictures by their name; others may lie there."""
    return [file for file in tree.get("", ()) if named_as_picture(file)]


def _classes(tree: _Tree, where: str) -> tuple[str, ...]:
    classes = tuple(sorted({class_name(folder) for folder in tree if folder}))
    if not classes:
        raise DataError(f"{where}: has no class folders. {_EXPECTED}")
    if len(classes) == 1:
        raise DataError(
            f"{where}: has the class {classes[0]!r} alone, so there is nothing to tell apart. "
            f"{_EXPECTED}"
        )
    return classes


def class_name(folder: str) -> str:
    """Returns a folder's name as a class name.

    Names that look the same, apart from spaces around them, are one class: systems write letters
    with accents in two ways, which can differ between two folders of one source.
    """
    return unicodedata.normalize("NFC", shown(folder)).strip() or "(blank)"


def shown(file: str) -> str:
    """Returns a path as text of one line: what is not UTF-8 and what breaks lines is escaped."""
    text = file.encode("utf-8", "backslashreplace").decode()
    return "".join(_escaped(c) if unicodedata.category(c) in _BREAKS else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def hold_out(
    entries: Sequence[Entry], share: float, *, root: str = ""
) -> tuple[list[Entry], list[Entry]]:
    """Divides images into those to train on and those to evaluate on.

    Of each class the images with the smallest SHA-256 of their path below `root` are held out,
    `share` of them rounded, but at least one, and never all: a class of one image keeps it for
    training. So a folder and its archive, in which the folder itself may be the outermost one, are
    divided alike, however a system writes letters with accents.

    Args:
      entries: images of known class.
      share: more than 0, less than 1.
      root: what their paths begin with, as of `Layout`.

    Returns:
      (training, evaluation), each in the order of `entries`.
    """
    by_class: dict[str, list[Entry]] = {}
    for entry in entries:
        by_class.setdefault(entry.label, []).append(entry)
    held: set[Entry] = set()
    for members in by_class.values():
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held.update(sorted(members, key=lambda entry: _rank(entry, root))[:count])
    training = [entry for entry in entries if entry not in held]
    return training, [entry for entry in entries if entry in held]


def _rank(entry: Entry, root: str) -> tuple[bytes, str]:
    path = unicodedata.normalize("NFC", entry.file.removeprefix(root))
    # Two files may differ in how an accent is written alone.
    return hashlib.sha256(os.fsencode(path)).digest(), entry.file


def listed(texts: Sequence[str]) -> str:
    """Returns up to ten texts, and how many more there are."""
    more = f" and {len(texts) - _NAMED:,} more" if len(texts) > _NAMED else ""
    return ", ".join(texts[:_NAMED]) + more


def quoted(names: Sequence[str]) -> str:
    """Returns up to ten names in quotes, and how many more there are."""
    return listed([repr(name) for name in names])
