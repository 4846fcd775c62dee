"""Detects classes and splits from folder names, in a folder or an archive of images.

    ROOT/train/CLASS/**    training images
    ROOT/val/CLASS/**      validation images
    ROOT/test/**           the split 'test' if there is also a val folder; may lack classes
    ROOT/pred/**           images without classes, for predictions

or, without splits, one folder per class, of which a fraction is held out for evaluation:

    ROOT/CLASS/**

Split folders are recognized by words in their names: seg_train, training_set, TestImages and
val2017 are splits if they contain the same class folders. Ambiguous folders are refused with an
error that explains both interpretations; `config.data.layout` and the path of the source resolve
it.

Folders inside a class are searched recursively. Files of operating systems, network shares and
editors, this program's output, notes and logs are ignored. Any other file below a class counts as
an image, whatever its name; image_folder.py checks whether it is one.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from inception_jax.datasets.sources import file_types, member_names, opening
from inception_jax.datasets.sources.files import Contents, Source
from inception_jax.errors import DataError, join_truncated
from inception_jax.storage import atomic

TRAIN, VALIDATION, TEST, UNLABELED = "train", "validation", "test", "unlabeled"
_EVALUATION = "evaluation"
# Words in a folder's name that identify its split.
_SPLIT_WORDS = {
    TRAIN: ("train", "training", "trainval"),
    VALIDATION: ("val", "valid", "validation", "dev"),
    TEST: ("test", "testing"),
    # Whichever of validation and test has no other folder.
    _EVALUATION: ("eval", "evaluation", "holdout"),
    UNLABELED: ("pred", "predict", "prediction", "predictions", "unlabeled", "unlabelled"),
}
# Words without meaning that accompany them: training_set, TestImages, valdata.
_FILLERS = ("set", "sets", "data", "dataset", "images", "image", "imgs", "img", "pictures", "split")
# Names of folders that are often the only folder inside a split and contain its classes.
_CONTAINERS = (*_FILLERS, "photos", "jpg", "jpeg", "png", "unknown")
_EXPECTED = "Expected one folder of images per class, or train/ and val/ with such folders"
_AS_CLASSES = "config.data.layout=classes"

# Lower-case names of system files next to images. Names that begin with a dot are ignored too.
_SYSTEM_FILES = {
    # Windows.
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "autorun.inf"),
    *("system volume information", "$recycle.bin"),
    # macOS, its shares, and the same name as displayed by other systems.
    *("__macosx", "icon\r", "icon\uf00d", "network trash folder", "temporary items"),
    "thevolumesettingsfolder",
    # Linux, Android, NAS systems and their shares.
    *("lost+found", "lost.dir", "@eadir", "@tmp", "@sharebin", "#recycle", "#snapshot"),
    *("~snapshot", "@recycle", "@recently-snapshot"),
    # Viewers, version control and programming tools.
    *("picasa.ini", "zbthumbnail.info", "descript.ion", "captureone", "_svn", "__pycache__"),
}
# Backups and locks of editors, companion files of network shares, unfinished downloads.
_TEMPORARY = re.compile(
    r"~\$.+|#.+#|.+~|.+@syno\w+|.+[:_]zone\.identifier|.+:(encryptable|afp_\w+|com\.[\w.]+)"
    r"|.+\.(bak|orig|rej|swp|tmp|temp|part|partial|filepart|aria2|crdownload|opdownload|download|!ut)",
    re.IGNORECASE,
)
# Folders of file system checks, old tar programs, and Lightroom's previews.
_SYSTEM_FOLDERS = re.compile(r"found\.\d{3}|paxheaders(\.\d+)?|.+\.lrdata", re.IGNORECASE)
# Names that systems give to copies of a folder: "cats - Copy", "cats copy 2", "cats (1)", "Copy of
# cats".
_COPY = re.compile(
    r"copy of (?P<after>.+)|(?P<before>.+?)( - copy( \(\d+\))?| copy( \d+)?| ?\(\d+\))",
    re.IGNORECASE,
)
# Contents of a workdir other than text files (training/workdir.py defines the names).
_RUN_OUTPUTS = (
    "checkpoints",
    "plots",
    "tensorboard",
    "report.html",
    "predictions.npz",
    "find_lr.png",
)
# Unfinished data sets of TFDS, and unfinished caches of this program.
_UNFINISHED = re.compile(r"incomplete\.\w+_\d+\.\d+\.\d+|.+px.*\.partial")
# Unicode categories of control characters, line separators and paragraph separators.
_CONTROL_CATEGORIES = ("Cc", "Zl", "Zp")
# Maximum number of names in an error.
_MAX_NAMED = 10


class LabeledFile(NamedTuple):
    """An image file: its path below the source's root, and its class ('' if unknown)."""

    file: str
    label: str


@dataclasses.dataclass(frozen=True)
class Layout:
    """The detected classes and splits of a source.

    Attributes:
      splits: the files of each split that has its own folder.
      classes: names of the training split's class folders, sorted; some may contain no files.
      has_validation: whether there is a validation folder; if not, images are held out.
      root: prefix of the training files' paths before the class folder, '' or ending in '/'.
      folders: the folder of each split; empty if there are no split folders.
      program_files: files, and folders ending in '/', written by this program.
      ignored: these and all other paths that do not belong to the data set.
      imageless_folders: folders next to the class folders that contain only notes and the like.
      broken_links: links where class or split folders are expected, which cannot be followed.
    """

    splits: dict[str, list[LabeledFile]]
    classes: tuple[str, ...]
    has_validation: bool
    root: str
    folders: dict[str, str] = dataclasses.field(default_factory=dict)
    program_files: Collection[str] = ()
    ignored: Sequence[str] = ()
    imageless_folders: Sequence[str] = ()
    broken_links: Sequence[str] = ()

    @property
    def files(self) -> list[str]:
        """The paths of all splits' files."""
        return [entry.file for entries in self.splits.values() for entry in entries]


def is_hidden(file: str) -> bool:
    """Returns whether a path belongs to a system, editor or temporary file.

    Args:
      file: a path; folders end in '/'.
    """
    parts = file.split("/")
    return bool(_TEMPORARY.fullmatch(parts[-1])) or any(
        part.startswith(".")
        or part.lower() in _SYSTEM_FILES
        or bool(_SYSTEM_FOLDERS.fullmatch(part))
        for part in parts
    )


def has_image_extension(file: str) -> bool:
    """Returns whether a path has the extension of a decodable format (.jpg, .png, .webp, …)."""
    # The first call imports all PIL formats (0.1 s).
    formats = Image.registered_extensions()
    image_format = formats.get(os.path.splitext(file)[1].lower())
    return image_format in Image.OPEN and image_format not in (
        "BUFR",
        "EPS",
        "GRIB",
        "HDF5",
        "MPEG",
        "WMF",
    )


def open_source(
    path: str | os.PathLike[str], *, encoding: str = "", scratch: pathlib.Path | None = None
) -> Source:
    """Opens a folder of images, an archive of one, or a folder inside an archive.

    Args:
      path: of the folder or archive; may continue into the archive.
      encoding: of names whose encoding the archive does not declare; '': unknown.
      scratch: as for `opening.open_path`.

    Raises:
      DataError: if it does not exist, is of another type, or is empty; or if folder names of an
        archive are ambiguous.
    """
    path = pathlib.Path(path)
    archive = next((above for above in path.parents if above.is_file()), path)
    if not archive.exists():
        raise DataError(
            f"config.data.source = {str(path)!r}: no such file or folder; set it to a folder that "
            "contains one folder of images per class, or to a zip or tar archive of it"
        )
    source = opening.open_path(archive, is_hidden=is_hidden, encoding=encoding, scratch=scratch)
    if archive != path:
        source.enter(f"{path.relative_to(archive).as_posix()}/")
        # Used in messages.
        source.path = path
    problem = None if source.sizes else DataError(f"{path}: contains no files. {_EXPECTED}")
    if source.names_depend_on_encoding:
        problem = problem or member_names.undecodable_folders(
            [*source.sizes, *source.folders], path
        )
    if problem:
        source.close()
        raise problem
    return source


def contents(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> Contents:
    """Returns what identifies the images of a source, without reading any file.

    Args:
      path: as for `open_source`.
      settings: from config.data, including layout and archive_encoding.

    Raises:
      DataError: as `open_source` and `layout` do.
    """
    with open_source(path, encoding=settings["archive_encoding"]) as source:
        detected = layout(source, settings["layout"])
        # Revision 56edb8b and earlier also included files next to the images.
        others = _excluding(source.sizes, detected.program_files)
        digests = (source.fingerprint(detected.files), source.fingerprint(others))
        return Contents(digests, detected.classes)


# Paths of files, and of folders with a trailing '/', by their first folder; '' has the files that
# are in no folder.
_Tree = dict[str, list[str]]


def layout(source: Source, mode: str = "auto") -> Layout:
    """Detects classes and splits from folder names, without reading any file.

    Args:
      source: the files to search.
      mode: as config.data.layout.

    Raises:
      DataError: if there are fewer than two classes or images outside of class folders; if an
        evaluation folder has a class without training images; or if the layout is ambiguous.
    """
    program_files = _program_files(source)
    paths = _excluding([*source.sizes, *source.folders], program_files)
    sidecars = {path for path in paths if file_types.is_sidecar(path)}
    kept = [path for path in paths if path not in sidecars]
    # Empty folders are kept: each is a class whose images are missing.
    without_images = _folders_above([*program_files, *sidecars]) - _folders_above(
        path for path in kept if not path.endswith("/")
    )
    kept = [path for path in kept if path not in without_images]
    ignored = sorted([*_excluding(source.hidden, program_files), *program_files, *sidecars])
    start, tree = _enter(kept)
    # Files next to the class or split folders; none has an image extension, or an error follows.
    ignored = sorted([*ignored, *(start + file for file in tree.get("", ()))])
    where = f"{source.path}/{start}".removesuffix("/")
    split_folders = {} if mode == "classes" else _split_folders(tree, where)
    if not split_folders:
        if mode != "classes":
            _check_classes(tree, where)
        training = _class_files(start, tree, where)
        classes = _classes(tree, where, ignored)
        return Layout(
            {TRAIN: training},
            classes,
            False,
            start,
            program_files=program_files,
            ignored=ignored,
            imageless_folders=_child_folders(start, without_images & _folders_above(sidecars)),
            broken_links=_broken_links(source, [start]),
        )
    below = {split: _enter_split(folder, tree) for split, folder in split_folders.items()}
    folders = {split: inner for split, (inner, _) in below.items()}
    classes = _classes(below[TRAIN][1], f"{where}/{folders[TRAIN]}", ignored)
    splits = {}
    for split, (folder, inside) in below.items():
        if split in (TEST, UNLABELED) and not _has_folders(inside):
            splits[split] = [
                LabeledFile(f"{start}{folder}/{file}", "") for file in inside.get("", ())
            ]
        else:
            splits[split] = _class_files(f"{start}{folder}/", inside, f"{where}/{folder}")
    for split, entries in splits.items():
        if foreign := sorted({entry.label for entry in entries} - {*classes, ""}):
            cased = {name.casefold(): name for name in classes}
            if other := cased.get(foreign[0].casefold()):
                raise DataError(
                    f"{where}/{folders[split]}: class folder {foreign[0]!r} is named {other!r} in "
                    f"{folders[TRAIN]}/. Use the same upper and lower case in all splits"
                )
            if f"{start}{split_folders[split]}/val_annotations.txt" in source.sizes:
                raise DataError(
                    f"{where}: has the official layout of Tiny ImageNet, whose validation images "
                    "are not in class folders. Set config.data.name=tiny_imagenet, or "
                    "tiny_imagenet_subset for a part of it"
                )
            raise DataError(
                f"{where}/{folders[split]}: {quote_and_join(foreign)}: not found in "
                f"{folders[TRAIN]}/. Each class needs training images; add them, or move the "
                "folder away"
            )
    root = f"{start}{folders[TRAIN]}/"
    return Layout(
        splits,
        classes,
        VALIDATION in splits,
        root,
        folders,
        program_files,
        ignored,
        imageless_folders=_child_folders(root, without_images & _folders_above(sidecars)),
        broken_links=_broken_links(
            source, [start, *(f"{start}{folder}/" for folder in folders.values())]
        ),
    )


def _broken_links(source: Source, parents: Collection[str]) -> list[str]:
    """Returns the links directly in some folders that cannot be followed and may name a class."""
    return [
        link
        for link in source.links
        if link[: link.rfind("/") + 1] in parents
        and not has_image_extension(link)
        and not file_types.is_sidecar(link)
    ]


def _program_files(source: Source) -> set[str]:
    """Returns files, and folders ending in '/', that this program wrote, judged by contents."""
    inside: dict[str, set[str]] = {}
    for path in (*source.sizes, *source.folders, *source.hidden):
        folder, _, name = path.removesuffix("/").rpartition("/")
        # Archives may omit entries for non-empty folders.
        while name and name not in (names := inside.setdefault(folder, set())):
            names.add(name)
            folder, _, name = folder.rpartition("/")
    program_files: set[str] = set()
    for folder, names in sorted(inside.items()):
        # The source itself contains the user's images, whatever else it contains.
        if (
            folder
            and _excluding([f"{folder}/"], program_files)
            and _is_program_folder(folder, names)
        ):
            program_files.add(f"{folder}/")
        elif {"config.json", "checkpoints"} <= names or names & {"run.lock", "metrics.jsonl"}:
            start = f"{folder}/" if folder else ""
            outputs = [start + name for name in names.intersection(_RUN_OUTPUTS)]
            program_files |= {f"{path}/" if path in inside else path for path in outputs}
    return program_files


def _is_program_folder(folder: str, names: Collection[str]) -> bool:
    """Returns whether a folder, by path and contents, was written by this or another tool."""
    name = folder.rpartition("/")[2]
    return (
        bool({atomic.MARKER, "CACHEDIR.TAG", "pyvenv.cfg"} & set(names))
        or {"dataset_info.json", "features.json"} <= set(names)
        or ("info.json" in names and any(file.endswith("_labels.npy") for file in names))
        or (name == "inception_jax" and any(file.endswith(".lock") for file in names))
        or (name == "downloads" and "extracted" in names)
        or (name == "CVS" and {"Entries", "Repository"} <= set(names))
        or bool(_UNFINISHED.fullmatch(name))
    )


def _excluding(paths: Iterable[str], excluded: Collection[str]) -> list[str]:
    """Returns `paths` without the excluded files and folders, and without their contents."""
    folders = tuple(path for path in excluded if path.endswith("/"))
    return [path for path in paths if path not in excluded and not path.startswith(folders)]


def _folders_above(paths: Iterable[str]) -> set[str]:
    """Returns all ancestor folders of the paths, each ending in '/'."""
    folders: set[str] = set()
    for path in paths:
        folder = path.removesuffix("/").rpartition("/")[0]
        while folder and f"{folder}/" not in folders:
            folders.add(f"{folder}/")
            folder = folder.rpartition("/")[0]
    return folders


def _child_folders(start: str, folders: Iterable[str]) -> list[str]:
    """Returns the names of those folders that are directly inside the folder `start`."""
    names = [path.removeprefix(start)[:-1] for path in folders if path.startswith(start)]
    return sorted(name for name in names if "/" not in name)


def _by_folder(paths: Iterable[str]) -> _Tree:
    tree: _Tree = {}
    for path in sorted(paths):
        tree.setdefault(path.split("/")[0] if "/" in path else "", []).append(path)
    return tree


def _contents_of(tree: _Tree, folder: str) -> _Tree:
    """Returns the contents of one folder."""
    inner = (path.split("/", 1)[1] for path in tree[folder])
    return _by_folder(path for path in inner if path)


def _has_folders(tree: _Tree) -> bool:
    return bool(tree.keys() - {""})


def _enter(paths: Sequence[str]) -> tuple[str, _Tree]:
    """Descends while there is only one folder, such as an archive's outermost folder.

    Does not descend below a training folder: its folders are classes, even if there is only one.

    Returns:
      The path of the folder that was reached, '' or ending in '/', and its contents.
    """
    start, tree = "", _by_folder(paths)
    while not _loose_images(tree) and len(folders := [f for f in tree if f]) == 1:
        inner = _contents_of(tree, folders[0])
        if not _has_folders(inner):
            break  # Images but no folders: this folder is a class.
        if _kind(folders[0]) == TRAIN and not _stem(folders[0]):
            folder, inner = _enter_split(folders[0], tree)
            return f"{start}{folder}/", inner
        start, tree = f"{start}{folders[0]}/", inner
    return start, tree


def _enter_split(folder: str, tree: _Tree) -> tuple[str, _Tree]:
    """Enters a split folder, then any repeated or meaningless folder names: train/train/.

    Returns:
      The path of the folder that contains the classes, and its contents.
    """
    path, name, below = folder, folder, _contents_of(tree, folder)
    while not _loose_images(below) and len(folders := [f for f in below if f]) == 1:
        inner = _contents_of(below, folders[0])
        same = folders[0].lower() == name.lower() or _kind(folders[0]) == _kind(name) != ""
        deeper = _has_folders(inner) or _kind(folder) in (TEST, UNLABELED)
        if not deeper or not (same or folders[0].lower() in _CONTAINERS):
            break
        path, below = f"{path}/{folders[0]}", inner
    return path, below


def _words_in(folder: str) -> list[str]:
    """Returns the lower-case words of a folder name: Seg_Train2 gives seg, train."""
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", class_name(folder))
    return re.findall(r"[^\W\d_]+", name.lower())


def _kind_of_word(word: str) -> str:
    for kind, known in _SPLIT_WORDS.items():
        if any(word in (first, *(first + end for end in _FILLERS)) for first in known):
            return kind
    return ""


def _kind(folder: str) -> str:
    """Returns the split that a folder name indicates; '' if none or several."""
    kinds = {kind for word in _words_in(folder) if (kind := _kind_of_word(word))}
    if UNLABELED in kinds:
        return UNLABELED
    return kinds.pop() if len(kinds) == 1 else ""


def _stem(folder: str) -> str:
    """Returns a folder name without split words: cats_train gives cats, train_set gives ''."""
    words = _words_in(folder)
    return " ".join(w for w in words if not _kind_of_word(w) and w not in _FILLERS)


def _split_folders(tree: _Tree, where: str) -> dict[str, str]:
    """Returns each split's folder by split name; empty if the folders are classes."""
    kinds = {folder: _kind(folder) for folder in tree if folder}
    others = sorted(folder for folder, kind in kinds.items() if not kind)
    if TRAIN not in kinds.values():
        if kinds and not others:
            raise DataError(
                f"{where}: contains {quote_and_join(list(kinds))} but no train folder. "
                f"{_EXPECTED}. If these folders are classes, set {_AS_CLASSES}"
            )
        _check_split_named_class(tree, where)
        return {}
    _check_pairs(kinds, where)
    if not _are_splits(tree, kinds, others):
        return {}
    several: dict[str, list[str]] = {}
    for folder, kind in kinds.items():
        if kind:
            several.setdefault(kind, []).append(folder)
    if _EVALUATION in several:
        split = next((split for split in (VALIDATION, TEST) if split not in several), VALIDATION)
        several[split] = [*several.get(split, ()), *several.pop(_EVALUATION)]
    for split, folders in several.items():
        if len(folders) > 1:
            raise DataError(
                f"{where}: {quote_and_join(folders)}: several folders for the {split} split. Keep "
                f"one and move the others away; if they are classes, set {_AS_CLASSES}"
            )
    if others:
        raise _unexpected_folders(tree, others, several[TRAIN][0], where)
    chosen = {split: folders[0] for split, folders in several.items()}
    if VALIDATION not in chosen and TEST in chosen:
        _, inside = _enter_split(chosen[TEST], tree)
        if _has_folders(inside):
            # Labeled images that are not trained on are used for validation.
            chosen[VALIDATION] = chosen.pop(TEST)
    if UNLABELED in chosen and TEST not in chosen:
        chosen[TEST] = chosen.pop(UNLABELED)
    return {split: chosen[split] for split in _SPLIT_WORDS if split in chosen}


def _are_splits(tree: _Tree, kinds: dict[str, str], others: Sequence[str]) -> bool:
    """Returns whether folders, at least one named like a training split, are splits."""
    training = [folder for folder, kind in kinds.items() if kind == TRAIN]
    plain = [folder for folder, kind in kinds.items() if kind and not _stem(folder)]
    if any(folder in plain for folder in training):
        # A class may have that name too.
        return len(plain) > 1 or any(
            _has_folders(_contents_of(tree, folder)) for folder in training if folder in plain
        )
    if not others and len(set(kinds.values())) > 1:
        return True
    classes = {name for folder in training for name in _class_names_in(folder, tree)}
    return any(
        classes & _class_names_in(folder, tree)
        for folder, kind in kinds.items()
        if kind not in ("", TRAIN)
    )


def _class_names_in(folder: str, tree: _Tree) -> set[str]:
    """Returns the names of the folders inside a folder, as class names."""
    _, inside = _enter_split(folder, tree)
    return {class_name(inner) for inner in inside if inner}


def _unexpected_folders(tree: _Tree, others: Sequence[str], train: str, where: str) -> DataError:
    message = (
        f"{where}: {quote_and_join(others)} next to {train!r}: unclear whether a class or a split."
    )
    for folder in others:
        if any(_kind(inner) == TRAIN for inner in _contents_of(tree, folder) if inner):
            return DataError(
                f"{message} {folder!r} contains its own train folder, like a copy of the data "
                f"set. Set config.data.source={where}/{folder} to use that, or move the folder "
                "away"
            )
    return DataError(
        f"{message} Put class folders inside the split folders and move other folders away; if "
        f"all of them are classes, set {_AS_CLASSES}"
    )


def _check_pairs(kinds: dict[str, str], where: str) -> None:
    """Raises DataError if classes are split by folder name: cats_train, cats_test, …."""
    by_stem: dict[str, set[str]] = {}
    for folder, kind in kinds.items():
        if kind and _stem(folder):
            by_stem.setdefault(_stem(folder), set()).add(kind)
    pairs = [stem for stem, splits in by_stem.items() if TRAIN in splits and len(splits) > 1]
    if len(pairs) > 1:
        raise DataError(
            f"{where}: {quote_and_join(sorted(kinds))}: unclear whether these are classes, or "
            f"splits of the classes {quote_and_join(pairs)}. For classes, set {_AS_CLASSES}; for "
            f"splits, move them to train/{pairs[0]}, val/{pairs[0]} and so on"
        )


def _check_split_named_class(tree: _Tree, where: str) -> None:
    """Raises DataError if a class named like a split contains folders of the other classes."""
    folders = {folder: class_name(folder) for folder in tree if folder}
    for folder, name in folders.items():
        if _kind(folder) and (set(folders.values()) - {name}) & _class_names_in(folder, tree):
            raise DataError(
                f"{where}: {folder!r} contains folders with the same names as the folders next to "
                "it. If it is a split, move the training classes into train/; if it is a class, "
                f"set {_AS_CLASSES}"
            )


def _check_classes(tree: _Tree, where: str) -> None:
    """Raises DataError if class folders contain each other's classes, or share inner folders."""
    names = {folder: class_name(folder) for folder in tree if folder}
    known = set(names.values())
    for name in known:
        if (copy := _COPY.fullmatch(name)) and (of := copy["after"] or copy["before"]) in known:
            raise DataError(
                f"{where}: {name!r} looks like a copy of {of!r}, next to it. Move it away; if it "
                f"is a separate class, set {_AS_CLASSES}"
            )
    for folder, name in names.items():
        inner = sorted({path.rpartition("/")[0] for path in tree[folder]})
        inner_names = {part for path in inner for part in map(class_name, path.split("/")[1:])}
        if repeated := sorted((known & inner_names) - {name}):
            place = next(path for path in inner if class_name(path.split("/")[-1]) in repeated)
            raise DataError(
                f"{where}: {folder!r} looks like a copy of the folders next to it: it also "
                f"contains {quote_and_join(repeated)}. Move it away, or set "
                f"config.data.source={where}/{place.rpartition('/')[0]} to use only the copy; if "
                f"it is a separate class, set {_AS_CLASSES}"
            )
    inside = {folder: _class_names_in(folder, tree) for folder in names}
    deep = [folder for folder in names if len(inside[folder]) > 1]
    for one, two in itertools.combinations(deep, 2):
        if len(shared := sorted(inside[one] & inside[two])) > 1:
            raise _ambiguous_layout(sorted(names), one, two, shared, where)


def _ambiguous_layout(
    folders: Sequence[str], one: str, two: str, shared: Sequence[str], where: str
) -> DataError:
    """Returns the error for folders that are either classes or versions of the same classes."""
    if any(_kind(name) == TRAIN for name in shared):
        other = (
            f"or each class is split inside into {quote_and_join(shared)}; if so, make the splits "
            f"the outer folders, as in {shared[0]}/{one}"
        )
    else:
        other = (
            f"or they are versions of one data set with the classes {quote_and_join(shared)}; if "
            f"so, use one of them, such as config.data.source={where}/{one}"
        )
    return DataError(
        f"{where}: {one!r} and {two!r} contain folders with the same names. Either "
        f"{quote_and_join(folders)} are the classes and the folders inside do not matter; if so, "
        f"set {_AS_CLASSES}. {other[0].upper()}{other[1:]}"
    )


def _class_files(start: str, tree: _Tree, where: str) -> list[LabeledFile]:
    """Returns the files of class folders; `start` is prepended to their paths."""
    if loose := _loose_images(tree):
        raise DataError(
            f"{where}: {len(loose):,} images are not in a class folder, such as "
            f"{escape_for_display(loose[0])}. {_EXPECTED}"
        )
    return [
        LabeledFile(start + file, label)
        for folder in tree
        if folder
        for label in [class_name(folder)]
        for file in tree[folder]
        if not file.endswith("/")
    ]


def _loose_images(tree: _Tree) -> list[str]:
    """Returns the files outside of folders that have an image extension."""
    return [file for file in tree.get("", ()) if has_image_extension(file)]


def _classes(tree: _Tree, where: str, ignored: Sequence[str]) -> tuple[str, ...]:
    classes = tuple(sorted({class_name(folder) for folder in tree if folder}))
    if not classes:
        without = (
            f" Ignored: {join_truncated([escape_for_display(path) for path in ignored])}."
            if ignored
            else ""
        )
        inside = opening.mention_archives(tree.get("", ()))
        raise DataError(f"{where}: contains no class folders.{inside}{without} {_EXPECTED}")
    if len(classes) == 1:
        raise DataError(
            f"{where}: contains only one class, {classes[0]!r}; at least two are required. "
            f"{_EXPECTED}"
        )
    return classes


def class_name(folder: str) -> str:
    """Returns a folder name as a class name.

    Names that look the same, apart from surrounding spaces, are one class: systems encode accented
    letters in two ways, which can differ between two folders of one source.
    """
    return unicodedata.normalize("NFC", escape_for_display(folder)).strip() or "(blank)"


def escape_for_display(file: str) -> str:
    r"""Returns a path as one line, with invalid UTF-8 and control characters escaped.

    >>> print(escape_for_display("cat\n1.jpg"))
    cat\n1.jpg
    """
    text = file.encode("utf-8", "backslashreplace").decode()
    return "".join(
        _escaped(c) if unicodedata.category(c) in _CONTROL_CATEGORIES else c for c in text
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def hold_out(
    entries: Sequence[LabeledFile], fraction: float, *, root: str = ""
) -> tuple[list[LabeledFile], list[LabeledFile]]:
    """Splits images into training and held-out ones.

    Of each class, holds out the images with the smallest SHA-256 of their path below `root`:
    `fraction` of them, rounded, but at least one and never all (a class with one image keeps it for
    training). So a folder and an archive of it, with or without an outermost folder, are split
    identically, however the system encodes accented letters.

    Args:
      entries: images with known classes.
      fraction: between 0 and 1, exclusive.
      root: prefix of their paths, as in `Layout`.

    Returns:
      (training, held-out) images, each in the order of `entries`.
    """
    by_class: dict[str, list[LabeledFile]] = {}
    for entry in entries:
        by_class.setdefault(entry.label, []).append(entry)
    held: set[LabeledFile] = set()
    for members in by_class.values():
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held.update(sorted(members, key=lambda entry: _holdout_rank(entry, root))[:count])
    training = [entry for entry in entries if entry not in held]
    return training, [entry for entry in entries if entry in held]


def _holdout_rank(entry: LabeledFile, root: str) -> tuple[bytes, str]:
    path = unicodedata.normalize("NFC", entry.file.removeprefix(root))
    # Two paths may differ only in how an accent is encoded.
    return hashlib.sha256(os.fsencode(path)).digest(), entry.file


def quote_and_join(names: Sequence[str], limit: int = _MAX_NAMED) -> str:
    """Joins up to `limit` names in quotes, as `join_truncated` does."""
    return join_truncated([repr(name) for name in names], limit)
