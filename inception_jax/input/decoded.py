"""The decoded cache: every image of a data set as memory-mapped uint8 pixels.

Decoding a 64 × 64 JPEG takes 100 µs, gathering one from mapped memory 1 µs; so images are decoded
once, and a training step never waits for a decoder. `prepare` makes the cache from a standard TFDS
dataset, and makes that from the original files.

The cache is a folder, `<directory>/inception_jax/<name>-<version>-<size>px/`:

    info.json              what follows, with the size of each file
    <split>_images.npy     uint8 [N, size, size, 3]
    <split>_labels.npy     int32 [N], −1 where the class is unknown
    <split>_names.txt      a file name a line

Examples lie in the order of the TFDS records, a fixed hash of their file names: shuffled, and the
same wherever the data set is prepared. A folder appears under its name only when it is whole.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import filelock
import numpy as np

from inception_jax import config
from inception_jax.datasets import archive, images, registry
from inception_jax.datasets.progress import Progress
from inception_jax.datasets.registry import DatasetSpec
from inception_jax.errors import ConfigError, DataError

# Rises when the files' layout or the way of decoding changes; older caches are then made again.
FORMAT = 1
_CACHES = "inception_jax"
# Images that one thread decodes at a time: some 10 ms of work.
_PIECE = 64
# What TFDS keeps of an example besides its image, and what it takes in its index: bytes, a bound.
_RECORD_OVERHEAD = 512
_NAME_BYTES = 128

Log = Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedSplit:
    """The examples of one split.

    Attributes:
      images: uint8 [N, H, W, 3], mapped from disk, read-only.
      labels: int32 [N]; −1: unknown.
      names_path: the text file behind `names`.
    """

    images: np.ndarray
    labels: np.ndarray
    names_path: pathlib.Path

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The original file name of each example; read at first use."""
        return tuple(self.names_path.read_text(encoding="utf-8").removesuffix("\n").split("\n"))


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedDataset:
    """A data set ready for training.

    Attributes:
      name, version: as in the registry.
      image_size: height and width of the images, pixels.
      class_names: in the order of the labels.
      mean, std: float32 [3], of each channel over all pixels of the training split, in units of
        pixel value / 255.
      splits: all splits by name.
      train_split, eval_split: the names of the two that training and evaluation use.
    """

    name: str
    version: str
    image_size: int
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    splits: dict[str, DecodedSplit]
    train_split: str
    eval_split: str

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def train(self) -> DecodedSplit:
        """The split to train on."""
        return self.splits[self.train_split]

    @property
    def evaluation(self) -> DecodedSplit:
        """The split to evaluate on."""
        return self.splits[self.eval_split]


def data_directory(directory: str) -> pathlib.Path:
    """Returns where prepared data are kept: `directory`, or TFDS's default if it is ''."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return pathlib.Path(directory or default).expanduser()


def prepare(data: config.Data, *, log: Log = print) -> DecodedDataset:
    """Opens a data set, after preparing it if this has not been done.

    Several processes may call this at once: one prepares, the others wait for it.

    Args:
      data: which data set, from where, kept where, at what size.
      log: takes one line of text about what goes on.

    Returns:
      The data set, its images mapped from disk.

    Raises:
      ConfigError: if a source is given for a data set that takes none.
      DataError: if the source is missing or damaged, or the disk is full or read-only.
    """
    spec = registry.get(data.name)
    if data.source and not spec.takes_source:
        raise ConfigError(
            f"config.data.source = {data.source!r}: {spec.name!r} needs no source; leave it empty."
        )
    directory = data_directory(data.directory)
    cache = directory / _CACHES / f"{spec.name}-{spec.version}-{data.image_size}px"
    info, _ = _read_info(cache)
    if info is None:
        with _locked(directory / _CACHES / f"{spec.name}-{spec.version}.lock", log=log):
            # Another process may have prepared it while this one waited.
            info, problem = _read_info(cache)
            if info is None:
                if problem:
                    log(f"{cache}: {problem}; it is made again")
                info = _build(spec, data.source, cache, size=data.image_size, log=log)
    _check_source(spec, data.source, info["source"], where=cache)
    return _open(spec, cache, info)


def _read_info(cache: pathlib.Path) -> tuple[dict[str, Any] | None, str]:
    """Returns the cache's description, or None and what is wrong with it ('' if there is none)."""
    try:
        info = json.loads((cache / "info.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, "info.json is missing" if cache.exists() else ""
    except ValueError as error:
        return None, f"info.json is damaged ({error})"
    if info.get("format") != FORMAT:
        return None, f"its format is {info.get('format')}, not {FORMAT}"
    for file, size in info["files"].items():
        found = (cache / file).stat().st_size if (cache / file).exists() else 0
        if found != size:
            return None, f"{file} has {found:,} bytes instead of {size:,}"
    return info, ""


def _open(spec: DatasetSpec, cache: pathlib.Path, info: dict[str, Any]) -> DecodedDataset:
    splits = {
        split: DecodedSplit(
            images=np.load(cache / f"{split}_images.npy", mmap_mode="r"),
            labels=np.load(cache / f"{split}_labels.npy"),
            names_path=cache / f"{split}_names.txt",
        )
        for split in info["splits"]
    }
    return DecodedDataset(
        name=info["name"],
        version=info["version"],
        image_size=info["image_size"],
        class_names=tuple(info["class_names"]),
        mean=np.array(info["mean"], np.float32),
        std=np.array(info["std"], np.float32),
        splits=splits,
        train_split=spec.train_split,
        eval_split=spec.eval_split,
    )


def _check_source(
    spec: DatasetSpec, source: str, prepared: dict[str, str], *, where: pathlib.Path
) -> None:
    """Raises DataError if `source` does not hold what was prepared, where that can differ."""
    if spec.fixed_content or not source:
        return
    path = pathlib.Path(source).expanduser().absolute()
    # Removing the original once it is prepared is no mistake.
    if not path.exists() and str(path) == prepared["path"]:
        return
    with archive.open_source(path) as files:
        if files.fingerprint() == prepared["digest"]:
            return
    raise DataError(
        f"config.data.source = {source!r}: {where} was prepared from other content, "
        f"{prepared['path']}. Give another config.data.directory, or leave config.data.source "
        f"empty to use what is prepared, or remove what is prepared of {spec.name!r} there."
    )


@contextlib.contextmanager
def _locked(path: pathlib.Path, *, log: Log) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends."""
    _check_writable(path.parent)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"waiting for the other process that prepares this data set ({path})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_writable(directory: pathlib.Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise DataError(
            f"config.data.directory: cannot write to {directory} ({error}). Give a directory of "
            "your own."
        ) from error


def _check_space(directory: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DataError(
            f"config.data.directory: preparing this data set needs {needed / 1e9:.2f} GB in "
            f"{directory}, which has {free / 1e9:.2f} GB free. Free some space, or give another "
            "directory."
        )


def _build(
    spec: DatasetSpec, source: str, cache: pathlib.Path, *, size: int, log: Log
) -> dict[str, Any]:
    """Makes the cache, and the TFDS dataset before it if there is none; returns its description.

    The lock is held: what others left unfinished here is nobody's.
    """
    directory = cache.parent.parent
    partial = cache.with_name(cache.name + ".partial")
    # TFDS's name for a folder it has not finished is 'incomplete.XXXXXX_1.0.0'.
    for leftover in (partial, *(directory / spec.name).glob(f"incomplete.*_{spec.version}")):
        shutil.rmtree(leftover, ignore_errors=True)
    builder = _prepared_builder(spec, source, directory, size=size, log=log)
    _check_source(spec, source, _source_of(builder), where=pathlib.Path(builder.data_dir))
    count = sum(split.num_examples for split in builder.info.splits.values())
    _check_space(directory, count * _decoded_bytes(size))
    partial.mkdir(parents=True)
    try:
        info = _write_cache(builder, spec, partial, size=size, log=log)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(cache, ignore_errors=True)
    os.replace(partial, cache)
    log(f"{spec.name}: ready in {cache}")
    return info


def _prepared_builder(
    spec: DatasetSpec, source: str, directory: pathlib.Path, *, size: int, log: Log
) -> Any:
    """Returns the builder of a TFDS dataset that is on disk, written now if it was not there."""
    new = functools.partial(spec.builder_class(), source=source, log=log, data_dir=directory)
    builder = new()
    if builder.is_prepared() and (missing := builder.missing_files()):
        log(f"{missing[0]}: is missing; {builder.data_dir} is made again")
        shutil.rmtree(builder.data_dir)
        builder = new()
    if not builder.is_prepared():
        with contextlib.closing(builder):
            builder.open()
            count = sum(map(len, builder.splits().values()))
            records = builder.source_bytes() + count * _RECORD_OVERHEAD
            _check_space(directory, records + count * _decoded_bytes(size))
            builder.prepare()
    return builder


def _decoded_bytes(size: int) -> int:
    """Returns what one example takes in the cache, a bound."""
    return 3 * size * size + np.dtype(np.int32).itemsize + _NAME_BYTES


def _source_of(builder: Any) -> dict[str, str]:
    metadata = builder.info.metadata
    return {"path": metadata.get("source", ""), "digest": metadata.get("source_digest", "")}


def _write_cache(
    builder: Any, spec: DatasetSpec, folder: pathlib.Path, *, size: int, log: Log
) -> dict[str, Any]:
    """Writes all splits and, last, info.json, to `folder`; returns what is in info.json."""
    statistics = {
        split: _write_split(builder, split, folder, size=size, log=log)
        for split in builder.info.splits
    }
    mean, std = statistics[spec.train_split]
    info = {
        "format": FORMAT,
        "name": spec.name,
        "version": spec.version,
        "image_size": size,
        "class_names": builder.info.features["label"].names,
        "mean": mean.tolist(),
        "std": std.tolist(),
        "splits": {split: facts.num_examples for split, facts in builder.info.splits.items()},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "source": _source_of(builder),
    }
    with _synced(folder / "info.json") as file:
        file.write(json.dumps(info, indent=2).encode())
    return info


def _write_split(
    builder: Any, split: str, folder: pathlib.Path, *, size: int, log: Log
) -> tuple[np.ndarray, np.ndarray]:
    """Decodes one split; returns its mean and standard deviation, float64 [3]."""
    records = builder.records(split)
    count = len(records)
    pieces = (range(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE))
    decode = functools.partial(_decode_piece, records, size)
    labels, names = [], []
    total, squares = np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    with (
        _synced(folder / f"{split}_images.npy") as file,
        Progress(f"{builder.name}: decoding {split}", count, log=log) as progress,
    ):
        # Plain writes, not a mapped file: its dirty pages would count as this process's memory.
        _write_header(file, (count, size, size, 3))
        for piece in images.threaded_map(decode, pieces):
            file.write(piece.pixels)
            labels += piece.labels
            names += piece.names
            total += piece.total
            squares += piece.squares
            progress.update(len(piece.labels))
    with _synced(folder / f"{split}_labels.npy") as file:
        np.save(file, np.array(labels, np.int32))
    with _synced(folder / f"{split}_names.txt") as file:
        file.write("".join(f"{name}\n" for name in names).encode())
    pixels = count * size * size
    mean = total / pixels
    return mean / 255, np.sqrt(squares / pixels - mean**2) / 255


def _write_header(file: Any, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some decoded examples; `total` and `squares` are uint64 [3] sums over their pixels."""

    pixels: np.ndarray
    labels: list[int]
    names: list[str]
    total: np.ndarray
    squares: np.ndarray


def _decode_piece(records: Any, size: int, indices: range) -> _Piece:
    examples = records.__getitems__(list(indices))
    names = [example["file_name"].decode() for example in examples]
    pixels = np.stack(
        [
            images.decode(example["image"], size, name)
            for example, name in zip(examples, names, strict=True)
        ]
    )
    channels = [pixels[..., channel] for channel in range(3)]
    return _Piece(
        pixels=pixels,
        labels=[int(example["label"]) for example in examples],
        names=names,
        total=np.array([c.sum(dtype=np.uint64) for c in channels]),
        # The square of a byte fits 16 bits, so integer sums are exact.
        squares=np.array([np.square(c, dtype=np.uint16).sum(dtype=np.uint64) for c in channels]),
    )


@contextlib.contextmanager
def _synced(path: pathlib.Path) -> Iterator[Any]:
    """Opens a file for writing, and sees it safely on disk at the end."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
