"""Writes and opens the cache: the folder prepared once for training from TFDS records.

With `config.data.storage` = "decoded" the folder contains every image as uint8 pixels: decoding a
64 × 64 JPEG takes at least 35 µs, reading its pixels 3 µs, so a training step never waits for a
decoder. With "records" it contains no pixels, only the results of a first pass over all records,
and images are decoded from the TFDS records on demand: for data sets too large to store decoded.
That pass decodes every image too, to measure mean and standard deviation, unless the registry
defines them.

The folder is `<directory>/inception_jax/<name>-<version>-<size>px/`, or `…px-records/`; if
`config.data.bit_depth` is set, its name ends in `-<bit depth>bit`::

    info.json              what follows, with the size of each file, and the training pixels' mean
                           and standard deviation, measured or published, and the bit depth of
                           image files with 16 bits a channel
    <split>_images.npy     uint8 [N, size, size, 3]; not with "records"
    <split>_digests.npy    uint64 [N], checksums of the images, or of files that are not decoded
    <split>_labels.npy     int32 [N], −1 where the class is unknown
    <split>_names.txt      a file name a line

Examples are in the order of the TFDS records, which is a fixed hash of their file names: shuffled,
but identical wherever the data set is prepared. The folder gets its final name only once it is
complete.

info.json contains checksums of itself and of the small files, which are verified when the folder is
opened; a damaged cache is rebuilt. Images are verified as they are read, records by their reader.
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
from inception_jax.errors import DataError, join_truncated
from inception_jax.storage import paths

# Incremented when the file layout or the decoding changes; older caches are then rebuilt.
FORMAT = 1
_IMAGES, _DIGESTS = "_images.npy", "_digests.npy"
# Images decoded per task of a thread: about 10 ms of work.
_CHUNK_SIZE = 64
# Upper bound of what TFDS stores per example in addition to the image, with its index, bytes.
RECORD_OVERHEAD = 512
_NAME_BYTES = 128

if TYPE_CHECKING:
    # Imports TFDS, which is not needed to open decoded images.
    from inception_jax.datasets.records import Records

# The contents of info.json.
Info = dict[str, Any]


def read_info(cache: pathlib.Path) -> tuple[Info | None, str]:
    """Returns a cache's description, or None and the problem ('' if there is no cache)."""
    try:
        info = json.loads((cache / "info.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, "info.json is missing" if cache.exists() else ""
    except ValueError as error:
        return None, f"info.json is damaged ({error})"
    if not isinstance(info, dict):
        return None, "info.json is damaged"
    if info.get("format") != FORMAT:
        return None, f"its format is {info.get('format')}; must be {FORMAT}"
    # Caches of older versions have no checksums.
    if info.get("sha256 of this", "") not in ("", _info_digest(info)):
        return None, "info.json is damaged (checksum mismatch)"
    for file, size in info["files"].items():
        path = _path_of(cache, file)
        actual_size = path.stat().st_size if path.exists() else 0
        if actual_size != size:
            return None, f"{file} has {actual_size:,} bytes; must have {size:,}"
    for file, digest in info.get("sha256", {}).items():
        if _file_digest(cache / file) != digest:
            return None, f"{file} is damaged (checksum mismatch)"
    return info, ""


def _path_of(cache: pathlib.Path, file: str) -> pathlib.Path:
    """Returns the path of a file listed in info.json; those of records begin with "../".

    Resolved as text, because the folder of caches may be a link.
    """
    return pathlib.Path(os.path.normpath(cache / file))


def _info_digest(info: Info) -> str:
    """Returns the SHA-256 of a cache's description, excluding the checksum itself."""
    rest = {key: value for key, value in info.items() if key != "sha256 of this"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _file_digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_split(data: config.Data, cache: pathlib.Path, info: Info, split: str) -> Split:
    """Opens a split of a cache without loading its images."""
    labels = np.load(cache / f"{split}_labels.npy")
    names_path = cache / f"{split}_names.txt"
    # Caches of older versions have none.
    digests_path = cache / file if (file := f"{split}{_DIGESTS}") in info["files"] else None
    if data.storage == "decoded":
        known = None if digests_path is None else np.load(digests_path)
        return DecodedSplit(labels, data.image_size, names_path, cache / f"{split}{_IMAGES}", known)
    # Imports TFDS (0.3 s).
    from inception_jax.datasets.records import Fields, Records

    files = [_path_of(cache, file) for file in info["records"][split]]
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
    """Returns the bit depth stored in, or implied by, the metadata of a cache or TFDS data set."""
    return facts.get("bit_depth", config.unrecorded_bit_depth(name))


def prepared_from_info(info: Info) -> Prepared:
    """Returns what a cache was prepared from, from its info.json."""
    source = info["source"]
    names = info["class_names"]
    return Prepared(
        source["path"],
        source["digest"],
        _settings(source),
        names,
        source.get("code", ""),
        source.get("objects", ""),
    )


def _settings(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings that data were prepared with, under their current names."""
    settings = facts.get("settings", {})
    return {
        config.current_path(f"data.{name}").removeprefix("data."): value
        for name, value in settings.items()
    }


def prepared_from_builder(builder: Any) -> Prepared:
    """Returns what a builder's records were prepared from."""
    facts = builder.facts
    return Prepared(
        path=facts.get("source", ""),
        digest=facts.get("source_digest", ""),
        settings=_settings(facts),
        class_names=builder.class_names,
        code=facts.get("code", ""),
        objects=facts.get("source_objects", ""),
    )


def check_not_constant(recipe: Recipe, std: Sequence[float], *, where: paths.Path) -> None:
    """Raises DataError if all training images are one single color."""
    if not any(std):
        raise DataError(
            f"{where}: all training images are the same single color, such as black, so there is "
            "nothing to learn. Replace the images; if an older version prepared them (it decoded "
            f"16-bit files with small values as black), remove {recipe.prepared_paths} to prepare "
            "them again"
        )


def example_bytes(data: config.Data) -> int:
    """Returns an upper bound of the size of an example in the cache, bytes."""
    pixels = 3 * data.image_size**2 if data.storage == "decoded" else 0
    return pixels + np.dtype(np.int32).itemsize + _NAME_BYTES


def write(recipe: Recipe, builder: Any, folder: pathlib.Path) -> Info:
    """Writes all splits and finally info.json to `folder`; returns the contents of info.json.

    Args:
      recipe: settings and registry entry of the data set.
      builder: of the prepared TFDS data set.
      folder: an empty folder.
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
    # If another split is used for training, its own statistics apply, see below.
    train = part.train_split if part.train_split in statistics else next(iter(statistics))
    if decode:
        check_not_constant(
            recipe, statistics[train][1], where=recipe.original(pathlib.Path(builder.data_dir))
        )
    mean, std = (part.mean, part.std) if part.mean else statistics[train]
    source = prepared_from_builder(builder)
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
    for name in ("code", "objects"):
        if value := getattr(source, name):
            info["source"][name] = value
    if "train_split" in part.extra_settings:
        info["statistics"] = statistics
    if builder.fields is not None:
        info["fields"] = builder.fields._asdict()
    # Omitted if the records, written by an older version, lack it.
    if data.bit_depth or "bit_depth" in facts:
        info["bit_depth"] = depth
    if data.storage == "records":
        info["records"] = {
            split: [os.path.relpath(file, folder) for file in builder.files(split)]
            for split in builder.info.splits
        }
        for file in itertools.chain.from_iterable(info["records"].values()):
            info["files"][file] = _path_of(folder, file).stat().st_size
    info["sha256 of this"] = _info_digest(info)
    with _open_synced(folder / "info.json") as file:
        file.write(json.dumps(info, indent=2).encode())
    return info


def _write_split(
    recipe: Recipe, builder: Any, split: str, folder: pathlib.Path, bit_depth: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split and writes its cache files.

    Args:
      recipe: settings and registry entry of the data set.
      builder: of the prepared TFDS dataset.
      split: name of the split.
      folder: output folder.
      bit_depth: for decoding the images; None: do not decode them.

    Returns:
      Mean and standard deviation of its pixels / 255, float64 [3]; zeros if not decoded.
    """
    from inception_jax.datasets.records import DEFAULT_FIELDS, Records

    data, size = recipe.data, recipe.data.image_size
    records = Records(builder.files(split), builder.fields or DEFAULT_FIELDS)
    count = len(records)
    chunks = decode.chunks(range(count), _CHUNK_SIZE)
    work = functools.partial(_list_chunk, records)
    if bit_depth is not None:
        work = functools.partial(_decode_chunk, records, size, bit_depth)
    labels, checksums, constant = [], [], []
    total, squares = np.zeros(3, np.uint64), np.zeros(3, np.uint64)
    label = f"{builder.name}: {'listing' if bit_depth is None else 'decoding'} {split}"
    with contextlib.ExitStack() as stack:
        names = stack.enter_context(_open_synced(folder / f"{split}_names.txt"))
        if data.storage == "decoded":
            # Plain writes, because dirty pages of a memory-mapped file count as this process's
            # memory.
            file = stack.enter_context(_open_synced(folder / f"{split}{_IMAGES}"))
            _write_header(file, (count, size, size, 3))
        progress = stack.enter_context(Progress(label, count, log=recipe.log))
        for chunk in decode.threaded_map(work, chunks):
            if data.storage == "decoded":
                file.write(chunk.pixels)
            checksums.append(chunk.digests)
            labels.append(chunk.labels)
            lines = map(folders.escape_for_display, chunk.names)
            names.write("".join(f"{line}\n" for line in lines).encode())
            total += chunk.total
            squares += chunk.squares
            constant += chunk.constant
            progress.update(len(chunk.labels))
    with _open_synced(folder / f"{split}_labels.npy") as file:
        np.save(file, np.concatenate(labels))
    with _open_synced(folder / f"{split}{_DIGESTS}") as file:
        np.save(file, np.concatenate(checksums))
    if constant:
        recipe.log(
            f"{builder.name}: {len(constant):,} of {count:,} {split} images are a single color, "
            f"such as black: {join_truncated(constant)}"
        )
    return splits.mean_and_std(total, squares, count * size * size)


def _write_header(file: Any, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk of examples: int32 labels, uint64 digests, sums of pixels and squares, uint64 [3].

    `constant` contains the names of images that are a single color.
    """

    pixels: np.ndarray
    digests: np.ndarray
    labels: np.ndarray
    names: list[str]
    total: np.ndarray
    squares: np.ndarray
    constant: list[str] = dataclasses.field(default_factory=list)


def _decode_chunk(records: "Records", size: int, bit_depth: int, indices: Sequence[int]) -> _Chunk:
    pixels = np.empty((len(indices), size, size, 3), np.uint8)
    labels, names = [], []
    # Read one at a time: photos may have 10 MB each.
    for row, example in zip(pixels, map(records.read_one, indices), strict=True):
        row[:] = decode.decode(example.image, size, example.file_name, bit_depth=bit_depth)
        labels.append(example.label)
        names.append(example.file_name)
    total, squares = splits.pixel_sums(pixels)
    return _Chunk(
        pixels=pixels,
        digests=digests.of_images(pixels),
        labels=np.array(labels, np.int32),
        names=names,
        constant=[names[n] for n in _single_color(pixels)],
        total=total,
        squares=squares,
    )


def _single_color(pixels: np.ndarray) -> Iterator[int]:
    """Yields the indices of the images, uint8 [N, H, W, 3], that are a single color."""
    # The first line of pixels excludes nearly all others in a thirtieth of the time.
    candidates = (pixels[:, 0] == pixels[:, :1, 0]).all(axis=(1, 2))
    for index in np.flatnonzero(candidates).tolist():
        if (pixels[index] == pixels[index, 0, 0]).all():
            yield index


def _list_chunk(records: "Records", indices: Sequence[int]) -> _Chunk:
    """Reads examples without decoding their images."""
    facts = [
        (example.label, example.file_name, digests.of_file(example.image))
        for example in map(records.read_one, indices)
    ]
    return _Chunk(
        pixels=np.empty((0,), np.uint8),
        digests=np.array([digest for _, _, digest in facts], np.uint64),
        labels=np.array([label for label, _, _ in facts], np.int32),
        names=[name for _, name, _ in facts],
        total=np.zeros(3, np.uint64),
        squares=np.zeros(3, np.uint64),
    )


@contextlib.contextmanager
def _open_synced(path: pathlib.Path) -> Iterator[Any]:
    """Opens a file for writing and calls fsync at the end."""
    with path.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
