"""The folder in which a data set is made ready for training, once, from its TFDS records.

With
`config.data.storage` "decoded" the folder holds every image as uint8 pixels: decoding a 64 × 64
JPEG takes 35 µs or more, reading its pixels 3 µs, so a training step never waits for a decoder.
With "records" it holds no pixels, only what a first pass over all records found, and images are
decoded from the TFDS records as they are needed: for data sets too large to be kept decoded. That
pass decodes every image too, to measure mean and standard deviation, unless the registry has them.

The folder is `<directory>/inception_jax/<name>-<version>-<size>px/`, or `…px-records/`; where
`config.data.bit_depth` is set, its name ends in `-<bit depth>bit`::

    info.json              what follows, with the size of each file, and the training pixels' mean
                           and standard deviation, measured or published, and the bit depth of
                           image files with 16 bits a channel
    <split>_images.npy     uint8 [N, size, size, 3]; not with "records"
    <split>_digests.npy    uint64 [N], checksums of the images, or of files that are not decoded
    <split>_labels.npy     int32 [N], −1 where the class is unknown
    <split>_names.txt      a file name a line

Examples lie in the order of the TFDS records, a fixed hash of their file names: shuffled, and the
same wherever the data set is prepared. A folder appears under its name only when it is whole.

info.json has checksums of itself and of the small files, which are compared when the folder is
opened: a damaged one is made again. Images are compared as they are read, records by their reader.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from inception_jax import config
from inception_jax.console import Progress
from inception_jax.datasets import decode, digests, splits
from inception_jax.datasets.builders import folders
from inception_jax.datasets.recipe import Prepared, Recipe
from inception_jax.datasets.splits import DecodedSplit, RecordSplit, Split
from inception_jax.errors import DataError

# Rises when the files' layout or the way of decoding changes; older caches are then made again.
FORMAT = 1
_IMAGES, _DIGESTS = "_images.npy", "_digests.npy"
# Images that one thread decodes at a time: some 10 ms of work.
_PIECE = 64
# Records that it reads at a time for that: a user's photos may have 10 MB each.
_READ = 8
# What TFDS keeps of an example besides its image, and what it takes in its index: bytes, a bound.
RECORD_OVERHEAD = 512
_NAME_BYTES = 128

if TYPE_CHECKING:
    # It imports TFDS, which opening decoded images does without.
    from inception_jax.datasets.records import Example, Records

# What info.json holds.
Info = dict[str, Any]


def read_info(cache: pathlib.Path) -> tuple[Info | None, str]:
    """Returns the cache's description, or None and what is wrong with it ('' if there is none)."""
    try:
        info = json.loads((cache / "info.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, "info.json is missing" if cache.exists() else ""
    except ValueError as error:
        return None, f"info.json is damaged ({error})"
    if not isinstance(info, dict):
        return None, "info.json is damaged"
    if info.get("format") != FORMAT:
        return None, f"its format is {info.get('format')}, not {FORMAT}"
    # Caches of older versions have no checksums.
    if info.get("sha256 of this", "") not in ("", _digest(info)):
        return None, "info.json is damaged (its checksum is another)"
    for file, size in info["files"].items():
        found = (cache / file).stat().st_size if (cache / file).exists() else 0
        if found != size:
            return None, f"{file} has {found:,} bytes instead of {size:,}"
    for file, digest in info.get("sha256", {}).items():
        if _file_digest(cache / file) != digest:
            return None, f"{file} is damaged (its checksum is another)"
    return info, ""


def _digest(info: Info) -> str:
    """Returns the SHA-256 of a cache's description, but for this itself."""
    rest = {key: value for key, value in info.items() if key != "sha256 of this"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_split(data: config.Data, cache: pathlib.Path, info: Info, split: str) -> Split:
    """Returns a split of a cache, its images still on disk."""
    labels = np.load(cache / f"{split}_labels.npy")
    names_path = cache / f"{split}_names.txt"
    # Caches of older versions have none.
    digests_path = cache / file if (file := f"{split}{_DIGESTS}") in info["files"] else None
    if data.storage == "decoded":
        known = None if digests_path is None else np.load(digests_path)
        return DecodedSplit(labels, data.image_size, names_path, cache / f"{split}{_IMAGES}", known)
    # Imports TFDS (0.3 s).
    from inception_jax.datasets.records import Fields, Records

    files = [pathlib.Path(os.path.normpath(cache / file)) for file in info["records"][split]]
    return RecordSplit(
        labels,
        data.image_size,
        names_path,
        Records(files, Fields(**info.get("fields", {}))),
        data.workers or len(os.sched_getaffinity(0)),
        bit_depth=bit_depth(data.name, info),
        digests_path=digests_path,
    )


def bit_depth(name: str, facts: Mapping[str, Any]) -> int:
    """Returns the bit depth that a cache's or a TFDS dataset's description has, or implies."""
    return facts.get("bit_depth", config.unrecorded_bit_depth(name))


def prepared(info: Info) -> Prepared:
    """Returns what a cache was prepared from."""
    source = info["source"]
    names = info["class_names"]
    return Prepared(
        source["path"], source["digest"], _settings(source), names, source.get("code", "")
    )


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that data were prepared with, under today's names."""
    found = facts.get("settings", {})
    return {
        config.current_path(f"data.{name}").removeprefix("data."): value
        for name, value in found.items()
    }


def prepared_by(builder: Any) -> Prepared:
    """Returns what the records of a builder were prepared from."""
    facts = builder.facts
    return Prepared(
        path=facts.get("source", ""),
        digest=facts.get("source_digest", ""),
        settings=_settings(facts),
        class_names=builder.class_names,
        code=facts.get("code", ""),
    )


def check_colors(recipe: Recipe, std: Sequence[float], *, where: pathlib.Path) -> None:
    """Raises DataError if there is nothing to see in the training images."""
    if not any(std):
        raise DataError(
            f"{where}: all training images together show a single color, such as black: there is "
            "nothing to learn. Replace the images, unless an older version prepared them, which "
            "took 16-bit files of small values for black; then remove "
            f"{recipe.all_of_it}, to prepare them again"
        )


def example_bytes(data: config.Data) -> int:
    """Returns what one example takes in the folder, a bound."""
    pixels = 3 * data.image_size**2 if data.storage == "decoded" else 0
    return pixels + np.dtype(np.int32).itemsize + _NAME_BYTES


def write(recipe: Recipe, builder: Any, folder: pathlib.Path) -> Info:
    """Writes all splits and, last, info.json, to `folder`; returns what is in info.json.

    Args:
      recipe: of the data set.
      builder: of its prepared TFDS dataset.
      folder: empty.
    """
    part, data, facts = recipe.part, recipe.data, builder.facts
    decode = data.storage == "decoded" or not part.mean
    depth = data.bit_depth or bit_depth(part.name, facts)
    statistics = {
        split: [
            each.tolist()
            for each in _write_split(recipe, builder, split, folder, depth if decode else None)
        ]
        for split in builder.info.splits
    }
    # Where another split is trained on, its own statistics count, below.
    train = part.train_split if part.train_split in statistics else next(iter(statistics))
    if decode:
        check_colors(recipe, statistics[train][1], where=pathlib.Path(builder.data_dir))
    mean, std = (part.mean, part.std) if part.mean else statistics[train]
    source = prepared_by(builder)
    info = {
        "format": FORMAT,
        "name": builder.name,
        "version": recipe.version,
        "image_size": data.image_size,
        "class_names": list(builder.class_names),
        "mean": list(mean),
        "std": list(std),
        "splits": {split: facts.num_examples for split, facts in builder.info.splits.items()},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "sha256": {
            file.name: _file_digest(file)
            for file in sorted(folder.iterdir())
            if not file.name.endswith(_IMAGES)
        },
        "source": {"path": source.path, "digest": source.digest, "settings": source.settings},
    }
    if source.code:
        info["source"]["code"] = source.code
    if "train_split" in part.takes:
        info["statistics"] = statistics
    if builder.fields is not None:
        info["fields"] = builder.fields._asdict()
    # Where the records do not say it, as those of older versions, nor does what is made from them.
    if data.bit_depth or "bit_depth" in facts:
        info["bit_depth"] = depth
    if data.storage == "records":
        info["records"] = {
            split: [os.path.relpath(file, folder) for file in builder.files(split)]
            for split in builder.info.splits
        }
        for file in itertools.chain.from_iterable(info["records"].values()):
            info["files"][file] = (folder / file).stat().st_size
    info["sha256 of this"] = _digest(info)
    with _synced(folder / "info.json") as file:
        file.write(json.dumps(info, indent=2).encode())
    return info


def _write_split(
    recipe: Recipe, builder: Any, split: str, folder: pathlib.Path, bit_depth: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split and writes what is kept of it.

    Args:
      recipe: of the data set.
      builder: of the prepared TFDS dataset.
      split: its name.
      folder: where to write to.
      bit_depth: to decode the images with, to keep them or to measure them; None: they are not.

    Returns:
      Mean and standard deviation of its pixels, float64 [3]; zeros if they were not decoded.
    """
    from inception_jax.datasets.records import DEFAULT_FIELDS, Records

    data, size = recipe.data, recipe.data.image_size
    records = Records(builder.files(split), builder.fields or DEFAULT_FIELDS)
    count = len(records)
    pieces = decode.pieces(range(count), _PIECE)
    work = functools.partial(_list_piece, records)
    if bit_depth is not None:
        work = functools.partial(_decode_piece, records, size, bit_depth)
    labels, checksums, plain = [], [], []
    total, squares = np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    label = f"{builder.name}: {'listing' if bit_depth is None else 'decoding'} {split}"
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(_synced(folder / f"{split}_names.txt"))
        if data.storage == "decoded":
            # Plain writes, not a mapped file: its dirty pages would count as this process's memory.
            file = stack.enter_context(_synced(folder / f"{split}{_IMAGES}"))
            _write_header(file, (count, size, size, 3))
        progress = stack.enter_context(Progress(label, count, log=recipe.log))
        for piece in decode.threaded_map(work, pieces):
            if data.storage == "decoded":
                file.write(piece.pixels)
            checksums.append(piece.digests)
            labels.append(piece.labels)
            names.write("".join(f"{name}\n" for name in piece.names).encode())
            total += piece.total
            squares += piece.squares
            plain += piece.plain
            progress.update(len(piece.labels))
    with _synced(folder / f"{split}_labels.npy") as file:
        np.save(file, np.concatenate(labels))
    with _synced(folder / f"{split}{_DIGESTS}") as file:
        np.save(file, np.concatenate(checksums))
    if plain:
        recipe.log(
            f"{builder.name}: {len(plain):,} of {count:,} {split} images are a single color, such "
            f"as black, all over: {folders.listed(plain)}"
        )
    return splits.mean_and_std(total, squares, count * size * size)


def _write_header(file: Any, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some examples: labels, int32; digests, uint64; sums over pixels and squares, uint64 [3].

    `plain` has the names of those that are a single color all over.
    """

    pixels: np.ndarray
    digests: np.ndarray
    labels: np.ndarray
    names: list[str]
    total: np.ndarray
    squares: np.ndarray
    plain: list[str] = dataclasses.field(default_factory=list)


def _decode_piece(records: "Records", size: int, bit_depth: int, indices: Sequence[int]) -> _Piece:
    pixels = np.empty((len(indices), size, size, 3), np.uint8)
    labels, names, plain = [], [], []
    for row, example in zip(pixels, _examples(records, indices), strict=True):
        row[:] = decode.decode(example.image, size, example.file_name, bit_depth=bit_depth)
        if (row == row[0, 0]).all():
            plain.append(example.file_name)
        labels.append(example.label)
        names.append(example.file_name)
    total, squares = splits.sums(pixels)
    return _Piece(
        pixels=pixels,
        digests=digests.of_images(pixels),
        labels=np.array(labels, np.int32),
        names=names,
        plain=plain,
        total=total,
        squares=squares,
    )


def _list_piece(records: "Records", indices: Sequence[int]) -> _Piece:
    """Reads examples without decoding their images."""
    facts = [
        (example.label, example.file_name, digests.of_file(example.image))
        for example in _examples(records, indices)
    ]
    return _Piece(
        pixels=np.empty((0,), np.uint8),
        digests=np.array([digest for _, _, digest in facts], np.uint64),
        labels=np.array([label for label, _, _ in facts], np.int32),
        names=[name for _, name, _ in facts],
        total=np.zeros(3, np.uint64),
        squares=np.zeros(3, np.uint64),
    )


def _examples(records: "Records", indices: Sequence[int]) -> Iterator["Example"]:
    """Yields the examples at `indices`, few of which are in memory at a time."""
    for part in decode.pieces(indices, _READ):
        yield from records.read(part)


@contextlib.contextmanager
def _synced(path: pathlib.Path) -> Iterator[Any]:
    """Opens a file for writing, and sees it safely on disk at the end."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
