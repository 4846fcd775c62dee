"""Reads CIFAR-10 in each of the formats in which it is distributed.

The official Python version consists of pickled dictionaries:

    cifar-10-batches-py/data_batch_1 … data_batch_5    10,000 training images each
    cifar-10-batches-py/test_batch                     10,000 test images
    cifar-10-batches-py/batches.meta                   the names of the classes

Loading a pickle can run arbitrary code, so these are loaded by an unpickler that accepts only NumPy
arrays of plain numbers. Two other formats contain the same pixels in a known order, and so the same
examples:

    data_batch_1.bin … test_batch.bin                  the binary version: label, pixels; label, …
    train/CLASS/NUMBER_CLASS.png, test/…               as fast.ai has it; CLASS/ may be missing

Each format may be in any subfolder of a folder, a zip archive or a tar archive.
"""

import functools
import io
import itertools
import pickle
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from inception_jax.datasets import decode
from inception_jax.datasets.builders import folders
from inception_jax.datasets.sources import opening
from inception_jax.datasets.sources.files import Source
from inception_jax.errors import DataError, join_truncated

FOLDER = "cifar-10-batches-py"
NUM_CLASSES = 10
# Images per batch file. Each class has a tenth of every split exactly, of every file on average.
IMAGES_PER_FILE = 10_000
BATCH_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_META = "batches.meta"
# The class names in label order.
_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
_PNG_PATH = re.compile(r"(?:.*/)?(train|test)/(?:[^/]+/)?([0-9]{1,6})_(\w+)\.png", re.IGNORECASE)
# Images to be used with 'image_folder' instead: one folder per class.
_CLASS_FOLDER_PATH = re.compile(
    rf"(?:.*/)?(train|test)/({'|'.join(_NAMES)})/[^/]+\.(png|jpe?g)", re.IGNORECASE
)
# A batch file has 31 MB; much larger files are rejected without reading them.
_MAX_BYTES = 100_000_000
# Images decoded per task of a thread: about 5 ms of work.
_CHUNK_SIZE = 64

# Pixels, uint8 [N, 3072] (all red, all green, all blue), and labels of each split.
Splits = dict[str, tuple[np.ndarray, list[int]]]


def read(source: Source) -> tuple[list[str], Splits]:
    """Returns the class names and the images of each split, from any of the three formats.

    Raises:
      DataError: if a file is missing or damaged, or the source is another format or data set.
    """
    batches = list(itertools.chain.from_iterable(BATCH_FILES.values()))
    if _enter_folder_with(source, batches):
        return _read_pickled(source)
    if _enter_folder_with(source, [f"{batch}.bin" for batch in batches]):
        return _read_binary(source)
    pngs = {file: match for file in source.sizes if (match := _PNG_PATH.fullmatch(file))}
    if pngs:
        return _NAMES, _read_pngs(source, pngs)
    raise DataError(f"{source.path}: {_other_form(source)}")


def _enter_folder_with(source: Source, names: Sequence[str]) -> bool:
    """Enters the folder with most of the named files; returns False if there is none."""
    matches = [file for file in source.sizes if file.split("/")[-1] in names]
    roots = [file.removesuffix(file.split("/")[-1]) for file in matches]
    if roots:
        source.enter(max(sorted(set(roots), key=len), key=roots.count))
    return bool(roots)


def _other_form(source: Source) -> str:
    """Describes a source that is none of the three formats, with a remedy."""
    files = list(source.sizes)
    names = {file.split("/")[-1] for file in files}
    official = (
        "Get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, or leave "
        "config.data.source empty to download it"
    )
    if "data_batch_1.mat" in names:
        return f"the MATLAB version of CIFAR-10, which is not supported. {official}"
    if {"fine_label_names.txt", "train.bin"} <= names or any("cifar-100" in f for f in files):
        return f"CIFAR-100, not CIFAR-10. {official}"
    if "trainLabels.csv" in names:
        return (
            "the Kaggle competition version of CIFAR-10, whose test images are unlabeled and "
            f"mixed with 290,000 others, so there is nothing to evaluate on. {official}"
        )
    classed = [match for match in map(_CLASS_FOLDER_PATH.fullmatch, files) if match]
    if classed:
        why = (
            "their names lack the official image numbers, which determine the order"
            if classed[0][3].lower() == "png"
            else "they are JPEGs, which do not preserve the original pixels"
        )
        return (
            f"contains images in class folders, but {why}. Set config.data.name=image_folder to "
            f"use them as they are. {official}"
        )
    contents = join_truncated(sorted({file.split("/")[0] for file in files}))
    return (
        "not CIFAR-10: data_batch_1 not found (contents: "
        f"{contents or 'none'}).{opening.mention_archives(files)} {official}"
    )


def _read_pickled(source: Source) -> tuple[list[str], Splits]:
    wanted = [_META, *itertools.chain.from_iterable(BATCH_FILES.values())]
    contents = _read_files(source, wanted, "Python version")
    names = _class_names(contents.pop(_META), f"{source.path}: {_META}")
    return names, {
        split: _concatenate(
            [_parse_pickle(contents.pop(file), f"{source.path}: {file}") for file in files]
        )
        for split, files in BATCH_FILES.items()
    }


def _read_binary(source: Source) -> tuple[list[str], Splits]:
    wanted = {split: [f"{file}.bin" for file in files] for split, files in BATCH_FILES.items()}
    contents = _read_files(
        source, [*itertools.chain.from_iterable(wanted.values())], "binary version"
    )
    return _NAMES, {
        split: _concatenate(
            [_parse_binary(contents.pop(file), f"{source.path}: {file}") for file in files]
        )
        for split, files in wanted.items()
    }


def _read_files(source: Source, wanted: Sequence[str], what: str) -> dict[str, bytes]:
    """Returns the contents of the wanted files by name.

    Raises:
      DataError: if a file is missing, too large or damaged.
    """
    for file in source.sizes.keys() & set(wanted):
        if source.sizes[file] > _MAX_BYTES:
            raise DataError(
                f"{source.path}: {file} has {source.sizes[file]:,} bytes; CIFAR-10's has 31 MB. "
                "Download the archive again"
            )
    if missing := [file for file in sorted(wanted) if file not in source.sizes]:
        raise DataError(
            f"{source.path}: incomplete CIFAR-10 {what}: missing {', '.join(missing)}. Set "
            f"config.data.source to cifar-10-python.tar.gz or the extracted folder {FOLDER}"
        )
    return {file: source.read(file) for file in wanted}


def _concatenate(parts: Sequence[tuple[np.ndarray, list[int]]]) -> tuple[np.ndarray, list[int]]:
    labels = list(itertools.chain.from_iterable(labels for _, labels in parts))
    return np.concatenate([pixels for pixels, _ in parts]), labels


def _damaged(where: str, problem: str) -> DataError:
    return DataError(f"{where}: {problem}. Download the archive again")


def _parse_binary(data: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Returns pixels and labels of a file of the binary version."""
    size = 1 + 3 * 32 * 32
    if len(data) != IMAGES_PER_FILE * size:
        expected = f"{IMAGES_PER_FILE * size:,} ({IMAGES_PER_FILE:,} images)"
        raise _damaged(where, f"has {len(data):,} bytes; must have {expected}")
    records = np.frombuffer(data, np.uint8).reshape(IMAGES_PER_FILE, size)
    if records[:, 0].max() >= NUM_CLASSES:
        raise _damaged(where, f"contains labels above {NUM_CLASSES - 1}")
    return records[:, 1:], records[:, 0].tolist()


def _read_pngs(source: Source, pngs: dict[str, re.Match[str]]) -> Splits:
    """Returns the images of the PNG format, in the order of their numbers."""
    splits: Splits = {}
    for split, batches in BATCH_FILES.items():
        numbered = {int(m[2]): file for file, m in pngs.items() if m[1].lower() == split}
        count = len(batches) * IMAGES_PER_FILE
        of_split = sum(m[1].lower() == split for m in pngs.values())
        if of_split != count or set(numbered) != set(range(count)):
            raise DataError(
                f"{source.path}: incomplete CIFAR-10: its {split} folder has {of_split:,} images "
                f"(expected {count:,}, numbered 0 to {count - 1:,}). Download the archive again, "
                "or set config.data.name=image_folder to use these images"
            )
        files = [numbered[number] for number in range(count)]
        names = [pngs[file][3].lower() for file in files]
        if foreign := sorted(set(names) - set(_NAMES)):
            raise DataError(
                f"{source.path}: {folders.quote_and_join(foreign)}: not CIFAR-10 classes. "
                "Download the archive again, or set config.data.name=image_folder to use these "
                "images"
            )
        pixels = np.empty((count, 3 * 32 * 32), np.uint8)
        images = decode.threaded_map(functools.partial(_read_png, source), files, _CHUNK_SIZE)
        for row, image in zip(pixels, images, strict=True):
            row[:] = image.transpose(2, 0, 1).ravel()
        splits[split] = pixels, [_NAMES.index(name) for name in names]
    return splits


def _read_png(source: Source, file: str) -> np.ndarray:
    """Returns the pixels of a PNG file, uint8 [32, 32, 3]."""
    data, where = source.read(file), f"{source.path}: {file}"
    decode.verify(data, where)
    with Image.open(io.BytesIO(data)) as image:
        if image.size != (32, 32) or image.mode != "RGB":
            actual = f"{image.width} x {image.height} pixels in mode {image.mode}"
            raise _damaged(where, f"has {actual}; must be 32 x 32 in RGB")
        return np.asarray(image)


def _encode_latin1(text: str, encoding: str) -> bytes:
    """Restores bytes that Python 3 pickled as text because old protocols lack a bytes type."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _allowed_globals() -> dict[tuple[str, str], Any]:
    """Returns the objects that pickled arrays refer to, by module and name, for NumPy 1 and 2."""
    array = np.empty(0)
    parts: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _encode_latin1,
    }
    for core in ("numpy.core", "numpy._core"):
        # Private NumPy functions, obtained through public APIs.
        parts[f"{core}.multiarray", "_reconstruct"] = array.__reduce__()[0]
        parts[f"{core}.multiarray", "scalar"] = np.uint8(0).__reduce__()[0]
        parts[f"{core}.numeric", "_frombuffer"] = array.__reduce_ex__(5)[0]
    return parts


class _Unpickler(pickle.Unpickler):
    """Loads numbers, strings, lists, dictionaries and NumPy arrays, and refuses anything else."""

    _allowed = _allowed_globals()

    def find_class(self, module: str, name: str) -> Any:
        """Returns an allowed object, or raises UnpicklingError."""
        if (module, name) not in self._allowed:
            raise pickle.UnpicklingError(f"refers to {module}.{name}, which plain data never do")
        return self._allowed[module, name]


def unpickle(data: bytes, where: str) -> dict[str, Any]:
    """Loads a pickled dictionary of plain data.

    Args:
      data: a pickle of any protocol, written by Python 2 or 3.
      where: names the file in errors.

    Returns:
      The dictionary with str keys; strings written by Python 2 are bytes.

    Raises:
      DataError: if it is damaged, contains anything else, or is not a dictionary.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    # Damaged data make the unpickler and NumPy raise nearly any exception.
    except Exception as error:
        problem = f"not a pickle of plain data ({type(error).__name__}: {error})"
        raise _damaged(where, f"{problem}; it is damaged or not from CIFAR-10") from error
    if not isinstance(content, dict):
        raise _damaged(where, f"contains a {type(content).__name__}; must be a dictionary")
    return {_to_str(key): value for key, value in content.items()}


def _to_str(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _class_names(data: bytes, where: str) -> list[str]:
    names = unpickle(data, where).get("label_names")
    if not isinstance(names, list) or len({*map(_to_str, names)}) != NUM_CLASSES:
        raise _damaged(where, f"label_names = {names!r}: must list {NUM_CLASSES} distinct names")
    return [_to_str(name) for name in names]


def _parse_pickle(data: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Returns pixels, uint8 [N, 3072], and labels of a file of the Python version."""
    batch = unpickle(data, where)
    pixels, labels = batch.get("data"), batch.get("labels")
    shape = (IMAGES_PER_FILE, 3 * 32 * 32)
    if not isinstance(pixels, np.ndarray) or (pixels.dtype, pixels.shape) != (np.uint8, shape):
        raise _damaged(where, f"'data' must be a uint8 array of shape {shape}")
    if not isinstance(labels, list) or len(labels) != IMAGES_PER_FILE:
        raise _damaged(where, f"'labels' must list {IMAGES_PER_FILE:,} numbers")
    if not all(isinstance(label, int) and 0 <= label < NUM_CLASSES for label in labels):
        raise _damaged(where, f"'labels' must be integers from 0 to {NUM_CLASSES - 1}")
    return pixels, labels
