"""Reads the layout of Tiny ImageNet, official or rearranged, from a folder or an archive.

    wnids.txt                          one class id (WordNet id) per line
    words.txt                          class id, tab, names separated by commas
    train/<wnid>/images/<file>.JPEG    training images
    train/<wnid>/<wnid>_boxes.txt      file, x0, y0, x1, y1 of each, separated by tabs
    val/images/<file>.JPEG             validation images
    val/val_annotations.txt            file, wnid, x0, y0, x1, y1 of each
    test/images/<file>.JPEG            test images, whose classes are not published

Layouts produced by common scripts are supported too. Validation images may be in class folders
(val/<wnid>/images/ or val/<wnid>/), with or without val_annotations.txt; `images` folders may be
missing everywhere; of the text files only val_annotations.txt is required, and only if it alone
defines the classes; and everything may be in any subfolder of the source. Images are named by their
path in the official layout, so all variants give identical prepared data.

`index` reads the text files and checks that exactly the listed images exist, so that truncated
downloads and incomplete copies are detected before any work is done.
"""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from inception_jax.datasets.builders import folders
from inception_jax.datasets.sources import opening
from inception_jax.datasets.sources.files import Contents, Source
from inception_jax.errors import DataError, join_truncated

FOLDER = "tiny-imagenet-200"
_WNIDS, _WORDS, _ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
# Parts of a source that are read and included in its digest.
_PARTS = (_WNIDS, _WORDS, "train/", "val/", "test/")
# Identifies the root without wnids.txt: a class's training folder.
_CLASS_FOLDER = re.compile(r"(?:(.*)/)?train/n\d{8}/")
_CLASS_ID = re.compile(r"n\d{8}")
NO_BOX = (-1, -1, -1, -1)
BoundingBox = tuple[int, int, int, int]


class IndexedImage(NamedTuple):
    """One image.

    Attributes:
      file: its path in the official layout.
      wnid: its class id; '' if unknown.
      box: the object's bounding box, or NO_BOX.
      path: its path in the source.
    """

    file: str
    wnid: str
    box: BoundingBox
    path: str


@dataclasses.dataclass(frozen=True)
class Index:
    """The contents of a source.

    Attributes:
      wnids: the class ids, sorted; a label is an index into them.
      class_names: a readable, unique name for each class.
      splits: the images of 'train', 'validation' and, if present, 'test'.
      remarks: relevant deviations from the official archive, one line each.
    """

    wnids: tuple[str, ...]
    class_names: tuple[str, ...]
    splits: dict[str, list[IndexedImage]]
    remarks: tuple[str, ...] = ()


def _find_root(source: Source) -> str:
    """Returns the folder of a source that contains wnids.txt or train/: '' or ending in '/'.

    Chooses the outermost of several, as in an archive that contains a copy of itself.
    """
    roots = {
        file.removesuffix(_WNIDS) for file in source.sizes if f"/{file}".endswith(f"/{_WNIDS}")
    }
    if not roots:
        matches = map(_CLASS_FOLDER.match, source.sizes)
        roots = {f"{match[1]}/" if match[1] else "" for match in matches if match}
    if not roots:
        names = sorted({file.split("/")[0] for file in source.sizes})
        raise DataError(
            f"{source.path}: not Tiny ImageNet: neither {_WNIDS} nor a train/ folder with class "
            "ids, such as n01443537, was found (contents: "
            f"{join_truncated(names) or 'none'}).{opening.mention_archives(source.sizes)} "
            f"Set config.data.source to {FOLDER}.zip or the extracted folder {FOLDER}; for other "
            "images, set config.data.name=image_folder"
        )
    return min(roots, key=lambda root: (root.count("/"), root))


def open_source(path: str | os.PathLike[str], *, scratch: pathlib.Path | None = None) -> Source:
    """Opens an archive or a folder that contains Tiny ImageNet, or a part of it, at any depth.

    Args:
      path: of the archive or folder.
      scratch: as for `opening.open_path`.

    Raises:
      DataError: if it does not exist, is damaged, or has another layout.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise DataError(
            f"config.data.source = {str(path)!r}: no such file or folder; set it to {FOLDER}.zip "
            "or the extracted folder"
        )
    source = opening.open_path(path, is_hidden=folders.is_hidden, scratch=scratch)
    try:
        source.enter(_find_root(source))
    except DataError:
        source.close()
        raise
    return source


def contents(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Contents:
    """Returns what identifies the files of a source, without reading any.

    Args:
      path: as for `open_source`.
      settings: unused.

    Raises:
      DataError: as `open_source` does.
    """
    with open_source(path) as source:
        # Revision 56edb8b and earlier also included files next to the layout.
        return Contents((fingerprint(source), source.fingerprint()))


def fingerprint(source: Source) -> str:
    """Returns a digest of the files that are part of the layout."""
    return source.fingerprint(file for file in source.sizes if file.startswith(_PARTS))


def _read_table(source: Source, file: str) -> list[list[str]]:
    """Returns the non-empty lines of a text file, split at tabs."""
    try:
        text = source.read(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{source.path}: {file} is not a UTF-8 text file ({error}). Download the archive again"
        ) from error
    return [line.split("\t") for line in text.splitlines() if line.strip()]


def _parse_box(fields: list[str], where: str) -> BoundingBox:
    try:
        x0, y0, x1, y1 = map(int, fields)
    except ValueError as error:
        raise DataError(
            f"{where}: a line ends in {fields}; must be four integers x0, y0, x1, y1. Download "
            "the archive again"
        ) from error
    return x0, y0, x1, y1


def _check_same_images(
    source: Source, where: str, *, listed: set[str], present: set[str], optional: bool = False
) -> None:
    """Raises DataError if the images listed in a text file differ from those present."""
    remedy = f", or remove {where} to use the images without it" if optional else ""
    if missing := sorted(listed - present):
        raise DataError(
            f"{source.path}: {len(missing):,} of the {len(listed):,} images listed in {where} are "
            f"missing, such as {missing[0]}. Download the archive again, or copy the complete "
            f"folder{remedy}"
        )
    if extra := sorted(present - listed):
        raise DataError(
            f"{source.path}: {len(extra):,} images are not listed in {where}, such as {extra[0]}. "
            f"Download the archive again, or fix that file{remedy}"
        )


@dataclasses.dataclass(frozen=True)
class _SourceImage:
    """An image in the source: its path there, and its class folder ('': none)."""

    path: str
    wnid: str


def _official_path(folder: str, name: str) -> str:
    """Returns an image's path in the official layout, in which all names end in .JPEG."""
    return f"{folder}/images/{os.path.splitext(name)[0]}.JPEG"


def _images(source: Source, split: str) -> dict[str, _SourceImage]:
    """Returns a split's images by their official paths.

    Raises:
      DataError: if an image is in an unexpected place, or two would have the same path.
    """
    named_images: list[tuple[str, _SourceImage]] = []
    for file in sorted(source.sizes):
        if not file.startswith(f"{split}/"):
            continue
        if not file.lower().endswith((".jpeg", ".jpg")):
            if folders.has_image_extension(file):
                raise DataError(
                    f"{source.path}: {file}: names of images in Tiny ImageNet's layout must end in "
                    ".JPEG, .jpeg or .jpg. Convert it, or move it away"
                )
            continue
        *inner, name = file.split("/")[1:]
        below = inner[:-1] if inner[-1:] == ["images"] else inner
        if len(below) > 1 or (split == "train" and not below) or (split == "test" and below):
            where = "images/" if split == "test" else "<class id>/images/"
            raise DataError(
                f"{source.path}: unexpected image {file}; images in {split}/ must be in {where}. "
                "Move it away, or download the archive again"
            )
        named_images.append((name, _SourceImage(file, below[0] if below else "")))
    # Custom images may have equal names in several classes; then the class is part of the path.
    classed = {(name, image.wnid) for name, image in named_images if image.wnid}
    by_class = split == "train" or len({name for name, _ in classed}) < len(classed)
    images: dict[str, _SourceImage] = {}
    for name, image in named_images:
        folder = f"{split}/{image.wnid}" if by_class and image.wnid else split
        official = _official_path(folder, name)
        other = images.get(official)
        if other and source.sizes[other.path] != source.sizes[image.path]:
            raise DataError(
                f"{source.path}: {other.path} and {image.path} are different images with the same "
                "name. Remove the wrong one"
            )
        # Sorted by copying: the image is both in its class folder and in val/images/.
        if not other or image.wnid:
            images[official] = image
    return images


def _train(source: Source, remarks: list[str]) -> dict[str, list[IndexedImage]]:
    """Returns the training images of each non-empty class."""
    by_class: dict[str, dict[str, str]] = {}
    for official, image in _images(source, "train").items():
        by_class.setdefault(image.wnid, {})[official] = image.path
    unboxed = 0
    entries = {}
    for wnid, paths in sorted(by_class.items()):
        where = f"train/{wnid}/{wnid}_boxes.txt"
        boxes = dict.fromkeys(paths, NO_BOX)
        if where in source.sizes:
            boxes = {
                _official_path(f"train/{wnid}", line[0]): _parse_box(
                    line[1:], f"{source.path}: {where}"
                )
                for line in _read_table(source, where)
            }
            _check_same_images(source, where, listed=set(boxes), present=set(paths), optional=True)
        else:
            unboxed += 1
        entries[wnid] = [
            IndexedImage(file, wnid, boxes[file], paths[file]) for file in sorted(paths)
        ]
    if unboxed:
        remarks.append(f"{unboxed:,} classes have no bounding-box file; none is needed")
    return entries


def _validation(
    source: Source, trained: Iterable[str], remarks: list[str]
) -> tuple[list[IndexedImage], set[str]]:
    """Returns the validation images of the trained classes, and the ids of other classes."""
    trained = set(trained)
    images = _images(source, "val")
    listed = _annotations(source)
    loose = [image for image in images.values() if not image.wnid]
    if loose and _ANNOTATIONS not in source.sizes:
        raise DataError(
            f"{source.path}: {_ANNOTATIONS} is missing, and {len(loose):,} images in val/ are not "
            "in class folders, so their classes are unknown. Download the archive again, or copy "
            "the complete folder"
        )
    for file, image in images.items():
        if image.wnid and not (image.wnid in trained or _CLASS_ID.fullmatch(image.wnid)):
            raise DataError(
                f"{source.path}: {image.path} is in a folder whose name is not a class id. Move "
                "it away, or download the archive again"
            )
        if image.wnid and file in listed and listed[file][0] != image.wnid:
            raise DataError(
                f"{source.path}: {image.path} is listed in {_ANNOTATIONS} as class "
                f"{listed[file][0]}, which contradicts its folder. Download the archive again, or "
                f"remove {_ANNOTATIONS} if the folders are right"
            )
    if _ANNOTATIONS in source.sizes:
        # Images of classes that are not trained may be missing too.
        wanted = {file for file, (wnid, _) in listed.items() if wnid in trained or file in images}
        _check_same_images(source, _ANNOTATIONS, listed=wanted, present=set(images))
    else:
        remarks.append(f"{_ANNOTATIONS} is missing; using the folders in val/ as classes")
    entries = []
    for file, image in images.items():
        wnid, box = listed.get(file, (image.wnid, NO_BOX))
        entries.append(IndexedImage(file, wnid, box, image.path))
    others = {wnid for wnid, _ in listed.values()} | {entry.wnid for entry in entries}
    return sorted(entry for entry in entries if entry.wnid in trained), others - trained


def _annotations(source: Source) -> dict[str, tuple[str, BoundingBox]]:
    """Returns class and box of each listed validation image, by its official path."""
    if _ANNOTATIONS not in source.sizes:
        return {}
    listed = {}
    for line in _read_table(source, _ANNOTATIONS):
        wnid = line[1] if len(line) > 1 else ""
        if not _CLASS_ID.fullmatch(wnid):
            raise DataError(
                f"{source.path}: {_ANNOTATIONS} lists {line[0]} as class {wnid!r}; must be a "
                "class id such as n01443537. Download the archive again, or fix that file"
            )
        box = _parse_box(line[2:], f"{source.path}: {_ANNOTATIONS}") if line[2:] else NO_BOX
        listed[_official_path("val", line[0])] = wnid, box
    return listed


def _class_names(source: Source, wnids: tuple[str, ...], remarks: list[str]) -> tuple[str, ...]:
    """Returns the first name of each class, with the class id appended if ambiguous."""
    if _WORDS not in source.sizes:
        remarks.append(f"{_WORDS} is missing; using the class ids as names")
        return wnids
    words = {line[0]: line[1] for line in _read_table(source, _WORDS) if len(line) > 1}
    if missing := [wnid for wnid in wnids if wnid not in words]:
        raise DataError(
            f"{source.path}: {_WORDS} has no name for {len(missing)} classes, such as "
            f"{missing[0]}. Use files from one archive, or remove {_WORDS}"
        )
    first = [words[wnid].split(",")[0].strip() for wnid in wnids]
    uses = collections.Counter(first)
    return tuple(
        f"{name} ({wnid})" if uses[name] > 1 else name
        for name, wnid in zip(first, wnids, strict=True)
    )


def index(source: Source) -> Index:
    """Returns the contents of a source after checking that it is complete and consistent.

    Skips classes without training images and notes them in `Index.remarks`.

    Raises:
      DataError: if a file is missing or unexpected.
    """
    remarks: list[str] = []
    if ignored := source.hidden:
        remarks.append(
            f"ignored {len(ignored):,} system and editor files and folders: "
            f"{join_truncated([folders.escape_for_display(path) for path in ignored])}"
        )
    training = _train(source, remarks)
    listed = _listed_wnids(source, remarks)
    if foreign := sorted(set(training) - (listed or set(training))):
        raise DataError(
            f"{source.path}: train/{foreign[0]} contains images, but {_WNIDS} does not list that "
            f"class. Use files from one archive, or remove {_WNIDS} to use all folders in train/"
        )
    if not training:
        raise DataError(
            f"{source.path}: train/ contains no JPEG images. Download the archive again, or copy "
            "the complete folder; for images in other formats, set config.data.name=image_folder"
        )
    validation, others = _validation(source, training, remarks)
    if not validation:
        raise DataError(
            f"{source.path}: val/ contains no images of the classes in train/, so there is "
            "nothing to evaluate on. Download the archive again, or copy the complete folder"
        )
    if untrained := others | (listed - set(training)):
        remarks.append(
            f"{len(untrained):,} classes have no training images, such as {min(untrained)}; "
            "skipping them and their validation images"
        )
    splits = {
        "train": [entry for entries in training.values() for entry in entries],
        "validation": validation,
    }
    if test := _images(source, "test"):
        splits["test"] = [
            IndexedImage(file, "", NO_BOX, image.path) for file, image in test.items()
        ]
        splits["test"].sort()
    else:
        remarks.append("test/ contains no images; the split is skipped")
    wnids = tuple(training)
    return Index(wnids, _class_names(source, wnids, remarks), splits, tuple(remarks))


def _listed_wnids(source: Source, remarks: list[str]) -> set[str]:
    """Returns the class ids listed in wnids.txt; empty if there is no such file."""
    if _WNIDS not in source.sizes:
        remarks.append(f"{_WNIDS} is missing; using the folders in train/ as classes")
        return set()
    wnids = [line[0].strip() for line in _read_table(source, _WNIDS)]
    if not wnids or len(set(wnids)) != len(wnids):
        raise DataError(
            f"{source.path}: {_WNIDS} must list at least one class id, each only "
            "once. Download the archive again"
        )
    return set(wnids)
