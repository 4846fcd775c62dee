"""CIFAR-10 as a TFDS dataset: 10 classes of 32 × 32 pixels, from the official Python version.

    cifar-10-batches-py/data_batch_1 … data_batch_5    10,000 training images each
    cifar-10-batches-py/test_batch                     10,000 test images
    cifar-10-batches-py/batches.meta                   the names of the classes

Each file is a pickled dictionary. Since a pickle can run any code when it is loaded, these are
loaded by an unpickler that knows NumPy arrays of plain numbers, and nothing else.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", University of Toronto,
2009.
"""

import hashlib
import io
import itertools
import pathlib
import pickle
import tarfile
import zlib
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from inception_jax.datasets import builder, download, images, registry
from inception_jax.errors import DataError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
BYTES = 170_498_071
FOLDER = "cifar-10-batches-py"

CLASSES = 10
# Images in each batch file, and of each class in it on average; the whole split has exactly that.
PER_FILE = 10_000
_FILES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
_META = "batches.meta"
# A batch file is 31 MB; nothing that claims to be much more is read.
_MOST_BYTES = 100_000_000
# Images that one thread encodes at a time: some 5 ms of work.
_PIECE = 64
_CITATION = """@techreport{krizhevsky2009learning,
  title = {Learning Multiple Layers of Features from Tiny Images},
  author = {Krizhevsky, Alex},
  institution = {University of Toronto},
  year = {2009},
}"""


class Example(NamedTuple):
    """One image: its split, its number in the order of the files, pixels and label."""

    split: str
    number: int
    pixels: np.ndarray
    label: int


class Cifar10(builder.ImageBuilder):
    """The whole of CIFAR-10: 50,000 training and 10,000 test images.

    Features: image (PNG), label, file_name ('train_00000.png', the index in the order of the files,
    by which other programs count, too).

    Every source of the right counts is taken for CIFAR-10, and what was prepared from one serves
    for another; an archive that is not the official one is noted in the log, a folder is not.
    """

    VERSION = tfds.core.Version(registry.get("cifar10").version)

    _path: pathlib.Path
    _names: list[str]
    _splits: dict[str, tuple[np.ndarray, list[int]]]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="10 classes at 32 x 32 pixels: 50,000 training and 10,000 test images.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(),
                    "file_name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            citation=_CITATION,
            metadata=tfds.core.MetadataDict(),
        )

    def open(self) -> None:
        """Reads all files (184 MB of pixels) and checks that they are CIFAR-10's."""
        self._path = self._locate()
        contents = _read(self._path)
        self._names = _class_names(contents.pop(_META), f"{self._path}: {_META}")
        self._splits = {}
        for split, files in _FILES.items():
            parts = [_batch(contents.pop(file), f"{self._path}: {file}") for file in files]
            labels = list(itertools.chain.from_iterable(labels for _, labels in parts))
            self._check_counts(split, labels, len(files) * PER_FILE // CLASSES)
            self._splits[split] = np.concatenate([pixels for pixels, _ in parts]), labels
        if self._path.is_file() and not _is_official(self._path):
            self.log(
                f"{self._path}: not the official archive (MD5 {MD5}), though its files and counts "
                "are CIFAR-10's; it is used as it is"
            )

    def _locate(self) -> pathlib.Path:
        if not self.source:
            target = pathlib.Path(self.data_dir_root, "downloads", "cifar-10-python.tar.gz")
            return download.fetch(URL, target, size=BYTES, md5=MD5, log=self.log)
        path = pathlib.Path(self.source)
        if not path.exists():
            raise DataError(
                f"config.data.source = {self.source!r}: there is no such file or folder. Give the "
                f"cifar-10-python.tar.gz or the folder {FOLDER} that was extracted from it, or "
                "leave it empty for the official download."
            )
        return path

    def _check_counts(self, split: str, labels: Sequence[int], expected: int) -> None:
        counts = np.bincount(labels, minlength=CLASSES)
        if (counts != expected).any():
            raise DataError(
                f"{self._path}: not the whole of CIFAR-10, for its {split} split has "
                f"{', '.join(f'{count:,}' for count in counts)} images of the classes 0 to 9 "
                f"(expected {expected:,} each). Get the archive again."
            )

    def splits(self) -> dict[str, Sequence[Example]]:
        """Returns the images of each split."""
        return {
            split: [
                Example(split, index, row, label)
                for index, (row, label) in enumerate(zip(pixels, labels, strict=True))
            ]
            for split, (pixels, labels) in self._splits.items()
        }

    def label_facts(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the class names of batches.meta, and the source."""
        return self._names, {"source": str(self._path.absolute())}

    def source_bytes(self) -> int:
        """Returns the size of all pixels, which PNG does not exceed by more than some bytes."""
        return sum(pixels.nbytes + 200 * len(labels) for pixels, labels in self._splits.values())

    def examples(self, items: Sequence[Example]) -> Generator[builder.KeyedExample, None, None]:
        """Yields the images as PNG files, encoded in threads."""
        pieces = images.pieces(items, _PIECE)
        encoded = itertools.chain.from_iterable(images.threaded_map(_encode, pieces))
        for item, data in zip(items, encoded, strict=True):
            name = f"{item.split}_{item.number:05d}.png"
            yield name, {"image": data, "label": item.label, "file_name": name}


def _is_official(path: pathlib.Path) -> bool:
    if path.stat().st_size != BYTES:
        return False
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
    return digest.hexdigest() == MD5


def _encode(items: Sequence[Example]) -> list[bytes]:
    return [_png(item.pixels.reshape(3, 32, 32).transpose(1, 2, 0)) for item in items]


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _read(path: pathlib.Path) -> dict[str, bytes]:
    """Returns the content of each of the files, from a folder or an archive.

    Raises:
      DataError: if one is missing, or the archive is damaged.
    """
    wanted = {_META, *itertools.chain.from_iterable(_FILES.values())}
    try:
        contents = dict(_folder_files(path, wanted) if path.is_dir() else _tar_files(path, wanted))
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read to its end ({error}). It may be cut short, or be something "
            "else than cifar-10-python.tar.gz: download or copy it again."
        ) from error
    if missing := sorted(wanted - set(contents)):
        raise DataError(
            f"{path}: not CIFAR-10's Python version, for it has no {', '.join(missing)}. Give the "
            f"cifar-10-python.tar.gz, or the folder {FOLDER} that was extracted from it."
        )
    return contents


def _folder_files(path: pathlib.Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    inner = path / FOLDER
    root = inner if inner.is_dir() else path
    for name in sorted(wanted):
        if (root / name).is_file():
            yield name, (root / name).read_bytes()


def _tar_files(path: pathlib.Path, wanted: set[str]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path, "r:*") as archive:
        for member in archive:
            name = pathlib.PurePosixPath(member.name).name
            file = archive.extractfile(member) if name in wanted and member.isfile() else None
            if file is None:
                continue
            if member.size > _MOST_BYTES:
                raise DataError(f"{path}: {name} has {member.size:,} bytes; CIFAR-10's has 31 MB.")
            yield name, file.read()


def _frombytes(text: str, encoding: str) -> bytes:
    """Returns bytes that Python 3 wrote as text, since old pickle protocols have no bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in the encoding {encoding!r}")
    return text.encode("latin1")


def _allowed() -> dict[tuple[str, str], Any]:
    """Returns what a pickled array refers to, by module and name, under NumPy 1 and 2."""
    array = np.empty(0)
    parts: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _frombytes,
    }
    for core in ("numpy.core", "numpy._core"):
        # Private functions of NumPy; these are public ways to them.
        parts[f"{core}.multiarray", "_reconstruct"] = array.__reduce__()[0]
        parts[f"{core}.multiarray", "scalar"] = np.uint8(0).__reduce__()[0]
        parts[f"{core}.numeric", "_frombuffer"] = array.__reduce_ex__(5)[0]
    return parts


class _Unpickler(pickle.Unpickler):
    """Loads numbers, texts, lists, dictionaries and NumPy arrays; anything else is refused."""

    _parts = _allowed()

    def find_class(self, module: str, name: str) -> Any:
        """Returns what a pickle may call."""
        if (module, name) not in self._parts:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no data need")
        return self._parts[module, name]


def unpickle(data: bytes, where: str) -> dict[str, Any]:
    """Loads a pickled dictionary that holds nothing but data.

    Args:
      data: the pickle, of any protocol, written by Python 2 or 3.
      where: what an error calls it.

    Returns:
      The dictionary, its keys as str; texts written by Python 2 are bytes.

    Raises:
      DataError: if it is damaged, holds anything else, or is no dictionary.
    """
    try:
        content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    # Damaged data make the unpickler, and NumPy under it, raise nearly anything.
    except Exception as error:
        raise DataError(
            f"{where}: not a pickle of plain data ({type(error).__name__}: {error}). It is damaged "
            "or is not CIFAR-10's: get the archive again."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{where}: holds a {type(content).__name__}; expected a dictionary.")
    return {_text(key): value for key, value in content.items()}


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def _class_names(data: bytes, where: str) -> list[str]:
    names = unpickle(data, where).get("label_names")
    if not isinstance(names, list) or len({*map(_text, names)}) != CLASSES:
        raise DataError(f"{where}: 'label_names' must list {CLASSES} different names: {names!r}.")
    return [_text(name) for name in names]


def _batch(data: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Returns a file's pixels, uint8 [N, 3072] (all red, all green, all blue), and its labels."""
    batch = unpickle(data, where)
    pixels, labels = batch.get("data"), batch.get("labels")
    shape = (PER_FILE, 3 * 32 * 32)
    if not isinstance(pixels, np.ndarray) or (pixels.dtype, pixels.shape) != (np.uint8, shape):
        raise DataError(f"{where}: 'data' must be bytes of shape {shape}.")
    if not isinstance(labels, list) or len(labels) != PER_FILE:
        raise DataError(f"{where}: 'labels' must list {PER_FILE:,} numbers.")
    if not all(isinstance(label, int) and 0 <= label < CLASSES for label in labels):
        raise DataError(f"{where}: 'labels' must be whole numbers from 0 to {CLASSES - 1}.")
    return pixels, labels
