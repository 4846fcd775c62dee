"""Data sets made ready for training, once.

`prepare` makes a folder from a standard TFDS dataset, and makes that from the original files. With
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
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import filelock
import numpy as np

from inception_jax import config
from inception_jax.datasets import decode, digests, duplicates, registry, splits
from inception_jax.datasets.builders import folders
from inception_jax.datasets.duplicates import Duplicates
from inception_jax.datasets.progress import Progress
from inception_jax.datasets.registry import DatasetSpec
from inception_jax.datasets.splits import DecodedSplit, RecordSplit, Split
from inception_jax.errors import ConfigError, DataError
from inception_jax.storage import paths

# Rises when the files' layout or the way of decoding changes; older caches are then made again.
FORMAT = 1
# The split that config.data.holdout cuts from the training split.
HOLDOUT = "holdout"
_CACHES = "inception_jax"
_IMAGES, _DIGESTS = "_images.npy", "_digests.npy"
# A full disk, a quota, a limit on files' sizes, a disk that turned read-only, one that is broken.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# Images that one thread decodes at a time: some 10 ms of work.
_PIECE = 64
# Records that it reads at a time for that: a user's photos may have 10 MB each.
_READ = 8
# What TFDS keeps of an example besides its image, and what it takes in its index: bytes, a bound.
_RECORD_OVERHEAD = 512
_NAME_BYTES = 128

if TYPE_CHECKING:
    # It imports TFDS, which opening decoded images does without.
    from inception_jax.datasets.records import Example, Records

Log = Callable[[str], None]
# What info.json holds.
Info = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready for training.

    Attributes:
      name, version: as in the registry.
      image_size: height and width of the images, pixels.
      class_names: in the order of the labels.
      mean, std: float32 [3], of each channel over all pixels of the training split (a hold-out
        included), in units of pixel value / 255; the published ones where the registry has them.
        Of a channel that never changes the deviation is 1, not 0.
      splits: all splits by name.
      train_split, eval_split: the names of the two that training and evaluation use.
      train_cut: the training split with its images cut as those to evaluate on are; None where
        neither are cut.
      bit_depth: how many bits the values of image files with 16 bits a channel use; 0: there are no
        such files.
    """

    name: str
    version: str
    image_size: int
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    splits: dict[str, Split]
    train_split: str
    eval_split: str
    train_cut: Split | None = None
    bit_depth: int = 0

    @classmethod
    def from_arrays(
        cls, images: np.ndarray, labels: np.ndarray, *, eval_share: float = 0.2
    ) -> "Dataset":
        """Returns a data set of arrays, of which a share of each class is held out.

        Args:
          images: uint8 [N, H, W, 3], H = W.
          labels: int [N], from 0 on.
          eval_share: that share.

        Raises:
          DataError: if an array is of another shape or type.
        """
        shape = np.shape(images)
        if len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3 or images.dtype != np.uint8:
            raise DataError(f"images: must be uint8 [N, S, S, 3], got {images.dtype} {list(shape)}")
        if np.shape(labels) != shape[:1]:
            raise DataError(f"labels: must be int [{shape[0]}], got {list(np.shape(labels))}")
        known = np.asarray(labels, np.int32)
        classes = int(known.max()) + 1
        held = splits.stratified(known, classes * max(1, int(eval_share * len(known) / classes)))
        values = images[~held].reshape(-1, 3) / 255
        digest = hashlib.sha256(images.tobytes() + known.tobytes()).hexdigest()
        return cls(
            name="arrays",
            version=digest[:16],
            image_size=shape[1],
            class_names=tuple(str(label) for label in range(int(known.max()) + 1)),
            mean=values.mean(0).astype(np.float32),
            std=np.where(values.std(0) > 0, values.std(0), 1).astype(np.float32),
            splits={
                name: splits.ArraySplit(
                    labels=known[chosen],
                    names_path=pathlib.Path(),
                    image_size=shape[1],
                    pixels=images[chosen],
                )
                for name, chosen in (("train", ~held), ("validation", held))
            },
            train_split="train",
            eval_split="validation",
        )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def train(self) -> Split:
        """The split to train on."""
        return self.splits[self.train_split]

    @property
    def train_evaluated(self) -> Split:
        """The examples to train on, as an evaluation sees them."""
        return self.train if self.train_cut is None else self.train_cut

    @property
    def evaluation(self) -> Split:
        """The split to evaluate on."""
        return self.splits[self.eval_split]

    @functools.cached_property
    def trained_on(self) -> Duplicates | None:
        """The images to evaluate on that are training images, too; None: not known."""
        return duplicates.between(self.evaluation, self.train)


def data_directory(directory: str) -> pathlib.Path:
    """Returns where prepared data are kept: `directory`, or TFDS's default if it is ''.

    Raises:
      UserError: if it is no local path or cannot be used, or the default has no home to be in.
    """
    what = f"config.data.directory = {directory!r}"
    if not directory:
        default = os.environ.get("TFDS_DATA_DIR", "")
        directory = default or "~/tensorflow_datasets"
        what += f" (TFDS_DATA_DIR={default})" if default else f" ({directory})"
    found = paths.local(directory, what)
    try:
        str(found.absolute()).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{what}: has bytes in its path that are no UTF-8, which the library that writes the "
            "records cannot take. Rename the folder, or give another."
        ) from error
    return found


def _source(data: config.Data) -> pathlib.Path | None:
    """Returns where the original files are, or None where they are downloaded."""
    if not data.source:
        return None
    return paths.local(data.source, f"config.data.source = {data.source!r}")


def prepare(data: config.Data, *, log: Log = print) -> Dataset:
    """Opens a data set, after preparing it if this has not been done.

    Several processes may call this at once: one prepares, the others wait for it.

    Args:
      data: which data set, from where, kept where and how, at what size.
      log: takes one line of text about what goes on.

    Returns:
      The data set, its images still on disk.

    Raises:
      ConfigError: if a source is given for a data set that takes none.
      DataError: if the source or what is prepared is damaged or missing, or the disk is full or
        read-only.
    """
    spec = registry.get(data.name)
    if data.source and not spec.takes_source:
        raise ConfigError(
            f"config.data.source = {data.source!r}: {spec.name!r} needs no source; leave it empty."
        )
    directory = data_directory(data.directory)
    cache = directory / _CACHES / f"{spec.name}-{spec.version}-{data.image_size}px"
    if data.storage == "records":
        cache = cache.with_name(f"{cache.name}-records")
    if data.bit_depth:
        cache = cache.with_name(f"{cache.name}-{data.bit_depth}bit")
    info, _ = _read_info(cache)
    is_new = False
    again = data.on_change == "prepare"
    if info is None or (again and _change(spec, data, _prepared(info), where=cache)):
        with _locked(directory / _CACHES / f"{spec.name}-{spec.version}.lock", log=log):
            # Another process may have prepared it while this one waited.
            info, problem = _read_info(cache)
            if info is None and problem:
                log(f"{cache}: {problem}; it is made again")
            if info is not None and again and _change(spec, data, _prepared(info), where=cache):
                info = None
            if info is None:
                with _readable_errors(directory):
                    info, is_new = _build(spec, data, cache, log=log), True
    _check_source(spec, data, _prepared(info), where=cache)
    for line in _notes(spec, data, cache, info):
        log(line)
    dataset = _open(spec, data, cache, info)
    if is_new:
        _log_duplicates(dataset, log)
    return dataset


def _log_duplicates(dataset: Dataset, log: Log) -> None:
    """Says which images occur in two splits, or in one with different labels."""
    train = dataset.train
    for name, split in dataset.splits.items():
        if split is not train and (found := duplicates.between(split, train)) and found.total:
            log(
                f"{dataset.name}: {found.total:,} of {len(split):,} images of the {name} split are "
                f"also among those to train on, so that its accuracy says too much: {found}"
            )
    if (found := duplicates.of_different_labels(train)) and found.total:
        log(
            f"{dataset.name}: {found.total:,} of {len(train):,} images to train on are there with "
            f"different labels: {found}"
        )


def class_ids(data: config.Data) -> tuple[str, ...]:
    """Returns what a prepared data set's authors call its classes, such as wnids; often nothing.

    Args:
      data: as of `prepare`, which comes first.

    Returns:
      An id for each label, in order; empty: there are none besides the names.

    Raises:
      DataError: if the records are gone, so that it cannot be told.
    """
    spec, directory = registry.get(data.name), data_directory(data.directory)
    builder = _builder(spec, data, directory, log=print)
    if not builder.is_prepared():
        raise DataError(
            f"{builder.data_dir}: is missing, and with it the ids of the classes. Put it back, or "
            f"remove {_all_of(spec, data)}, to prepare the data set anew."
        )
    return tuple(builder.info.metadata.get("wnids", ()))


def _read_info(cache: pathlib.Path) -> tuple[Info | None, str]:
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


def _open(spec: DatasetSpec, data: config.Data, cache: pathlib.Path, info: Info) -> Dataset:
    # Only what is evaluated is cut: training has crops of its own.
    crop = dict.fromkeys(info["splits"], data.eval_crop) | {spec.train_split: 1.0}
    opened = {split: _open_split(data, cache, info, split, crop[split]) for split in info["splits"]}
    train, eval_split = opened[spec.train_split], spec.eval_split
    train_cut: Split | None = None
    if data.eval_crop != 1:
        train_cut = _open_split(data, cache, info, spec.train_split, data.eval_crop)
    if data.holdout:
        eval_split = HOLDOUT
        held = splits.stratified(train.labels, data.holdout)
        rest, held = np.flatnonzero(~held), np.flatnonzero(held)
        opened[spec.train_split] = splits.subset(train, rest)
        if train_cut is None:
            opened[HOLDOUT] = splits.subset(train, held)
        else:
            opened[HOLDOUT] = splits.subset(train_cut, held)
            train_cut = splits.subset(train_cut, rest)
    return Dataset(
        name=info["name"],
        version=info["version"],
        image_size=info["image_size"],
        class_names=tuple(info["class_names"]),
        mean=np.array(info["mean"], np.float32),
        # What never changes is 0 once its mean is subtracted, whatever it is divided by.
        std=np.array([each if each > 0 else 1 for each in info["std"]], np.float32),
        splits=opened,
        train_split=spec.train_split,
        eval_split=eval_split,
        train_cut=train_cut,
        bit_depth=_bit_depth(spec.name, info),
    )


def _open_split(
    data: config.Data, cache: pathlib.Path, info: Info, split: str, crop: float
) -> Split:
    labels = np.load(cache / f"{split}_labels.npy")
    names_path = cache / f"{split}_names.txt"
    # Caches of older versions have none.
    digests_path = cache / file if (file := f"{split}{_DIGESTS}") in info["files"] else None
    if data.storage == "decoded":
        known = None if digests_path is None else np.load(digests_path)
        images_path = cache / f"{split}{_IMAGES}"
        return DecodedSplit(labels, names_path, data.image_size, images_path, known)
    # Imports TFDS (0.3 s).
    from inception_jax.datasets.records import Records

    files = [pathlib.Path(os.path.normpath(cache / file)) for file in info["records"][split]]
    workers = data.workers or len(os.sched_getaffinity(0))
    records = Records(files)
    return RecordSplit(
        labels,
        names_path,
        data.image_size,
        records,
        workers,
        crop,
        bit_depth=_bit_depth(data.name, info),
        digests_path=digests_path,
    )


def _bit_depth(name: str, facts: Mapping[str, Any]) -> int:
    """Returns the bit depth that a cache's or a TFDS dataset's description has, or implies."""
    return facts.get("bit_depth", config.unrecorded_bit_depth(name))


def _notes(spec: DatasetSpec, data: config.Data, cache: pathlib.Path, info: Info) -> Iterator[str]:
    """Yields what to know of a data set that is opened.

    Raises:
      DataError: if its training images are nothing but one color.
    """
    _check_colors(spec, data, info["std"], where=cache)
    channels = zip(("red", "green", "blue"), info["mean"], info["std"], strict=True)
    if constant := [f"{color} ({mean:.3g})" for color, mean, std in channels if not std > 0]:
        yield (
            f"{cache}: every training pixel has the same {' and '.join(constant)}; the standard "
            "deviation of 0 is taken as 1"
        )
    if "bit_depth" in info or not config.unrecorded_bit_depth(spec.name):
        return
    names = (cache / f"{spec.train_split}_names.txt").read_text(encoding="utf-8").splitlines()
    if others := [name for name in names if not name.lower().endswith((".jpg", ".jpeg"))]:
        yield (
            f"{cache}: prepared by an older version, which dropped transparency and used the upper "
            f"8 of 16 bits even where those are empty. {len(others):,} training images may be "
            f"concerned, such as {others[0]}. If they are, remove {_all_of(spec, data)}, to "
            "prepare them again; for 16-bit files alone, setting config.data.bit_depth is enough"
        )


def _check_colors(
    spec: DatasetSpec, data: config.Data, std: Sequence[float], *, where: pathlib.Path
) -> None:
    """Raises DataError if there is nothing to see in the training images."""
    if not any(std):
        raise DataError(
            f"{where}: all training images together show a single color, such as black: there is "
            "nothing to learn. Replace the images, unless an older version prepared them, which "
            "took 16-bit files of small values for black; then remove "
            f"{_all_of(spec, data)}, to prepare them again"
        )


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What was prepared: from which source, with which digest and settings, of which classes."""

    path: str
    digest: str
    settings: Mapping[str, Any]
    class_names: Sequence[str]


def _prepared(info: Info) -> _Prepared:
    source = info["source"]
    return _Prepared(source["path"], source["digest"], source["settings"], info["class_names"])


def _prepared_by(builder: Any) -> _Prepared:
    metadata = builder.info.metadata
    return _Prepared(
        path=metadata.get("source", ""),
        digest=metadata.get("source_digest", ""),
        settings=metadata.get("settings", {}),
        class_names=builder.info.features["label"].names,
    )


class _Change(NamedTuple):
    """How source and settings differ from what was prepared, and what can be done about it."""

    what: str
    remedy: str


def _check_source(
    spec: DatasetSpec, data: config.Data, prepared: _Prepared, *, where: pathlib.Path
) -> None:
    """Raises DataError if source and settings are not what was prepared, where that can differ."""
    if change := _change(spec, data, prepared, where=where):
        raise DataError(
            f"{change.what}. {change.remedy}, or give another config.data.directory, or set "
            "config.data.on_change=prepare to prepare it again."
        )


def _change(
    spec: DatasetSpec, data: config.Data, prepared: _Prepared, *, where: pathlib.Path
) -> _Change | None:
    """Returns how source and settings differ from what was prepared; None if they do not."""
    settings = {name: getattr(data, name) for name in spec.settings}
    # Settings that older versions did not have decide on what the source holds, below.
    for name, value in prepared.settings.items():
        if settings[name] != value:
            return _Change(
                f"config.data.{name} = {settings[name]!r}: {where} was prepared with {value!r}",
                "Give that",
            )
    path = _source(data)
    if spec.fixed_content or path is None:
        return None
    path = path.absolute()
    # Removing the original once it is prepared is no mistake. A path may lead into an archive.
    is_there = path.exists() or any(above.is_file() for above in path.parents)
    if not is_there and str(path) == prepared.path:
        return None
    found = spec.contents(path, settings)
    if prepared.digest not in found.digests:
        then = " as it was then" if str(path) == prepared.path else ""
        # A folder's digest has the times of its files in place of their content.
        copied = ", or copied without its times" if path.is_dir() else ""
        what = f"from other content, {prepared.path}{then}{copied}"
    elif found.class_names is None or tuple(found.class_names) == tuple(prepared.class_names):
        return None
    else:
        changes = class_changes(prepared.class_names, found.class_names)
        what = (
            "with other class folders: one was added or removed that holds no picture, or an older "
            f"version took others for the classes ({changes})"
        )
    return _Change(
        f"config.data.source = {data.source!r}: {where} was prepared {what}",
        "Leave config.data.source empty to use what is prepared",
    )


def class_changes(before: Sequence[str], after: Sequence[str]) -> str:
    """Returns how the names of classes, or their order, differ; '' if they do not.

    Args:
      before, after: the names in the order of the labels.
    """
    if tuple(before) == tuple(after):
        return ""
    counts = f"{len(before):,} classes → {len(after):,}, " if len(before) != len(after) else ""
    if sorted(before) == sorted(after):
        what = "the same names in another order"
    else:
        gone, new = (sorted(set(a) - set(b)) for a, b in ((before, after), (after, before)))
        parts = [(gone, "without"), (new, "with")]
        what = ", ".join(f"{word} {folders.quoted(names, 3)}" for names, word in parts if names)
    pairs = itertools.zip_longest(before, after)
    label, (old, now) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
    return f"{counts}{what}; the first that differs is class {label}: {old!r} → {now!r}"


def _all_of(spec: DatasetSpec, data: config.Data) -> str:
    """Returns the folders that hold what is prepared of a data set, for an error's remedy."""
    directory = data_directory(data.directory)
    return f"{directory / spec.name} and {directory / _CACHES / spec.name}-*"


@contextlib.contextmanager
def _locked(path: pathlib.Path, *, log: Log) -> Iterator[None]:
    """Holds a lock that ends with the process, however that ends."""
    _check_writable(path.parent)
    lock = _lock(path, log=log)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        log(f"waiting for the other process that prepares this data set ({lock.lock_file})")
        lock.acquire()
    except PermissionError as error:
        raise DataError(
            f"config.data.directory: {path} belongs to another user, who lets nobody else write "
            "to it. Remove it while nobody prepares the data set, or give a directory of your own."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _lock(path: pathlib.Path, *, log: Log) -> filelock.BaseFileLock:
    """Returns the system's lock on a file or, where the file system has none, the file as a lock.

    Such are NFS without its lock service and Lustre without the option flock.
    """
    with tempfile.TemporaryFile(dir=path.parent) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            held = path.with_name(f"{path.name}.held")
            log(
                f"{path.parent}: this file system has no locks ({error.strerror}); the file "
                f"{held.name} stands for one. If a process on another host is killed while it "
                "prepares the data set, the file stays: remove it then"
            )
            return filelock.SoftFileLock(held)
    # Whoever may make files beside it may hold it, whatever this user's umask is.
    return filelock.FileLock(path, mode=stat.S_IMODE(path.parent.stat().st_mode) & 0o666)


def _check_writable(directory: pathlib.Path) -> None:
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            # A group that shares the folder above shares this one, whatever the umask is.
            with contextlib.suppress(PermissionError):
                directory.chmod(stat.S_IMODE(directory.parent.stat().st_mode))
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise DataError(
            f"config.data.directory: cannot write to {directory} ({error}). Give a directory of "
            "your own."
        ) from error


@contextlib.contextmanager
def _readable_errors(directory: pathlib.Path) -> Iterator[None]:
    """Turns a disk that fills up or fails into a DataError.

    TFDS and ArrayRecord report it in several types, so the text decides.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        reasons = [text for text in map(os.strerror, _DISK_ERRORS) if text in str(error)]
        if not reasons:
            raise
        raise DataError(
            f"config.data.directory: {directory} cannot be written to: {reasons[0]}. Free some "
            "space, or give another directory, and start again: what was not finished is no "
            "hindrance."
        ) from error


def _check_space(directory: pathlib.Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DataError(
            f"config.data.directory: preparing this data set needs {needed / 1e9:.2f} GB in "
            f"{directory}, which has {free / 1e9:.2f} GB free. Free some space, or give another "
            "directory."
        )


def _build(spec: DatasetSpec, data: config.Data, cache: pathlib.Path, *, log: Log) -> Info:
    """Makes the folder, and the TFDS dataset before it if there is none; returns its description.

    The lock is held: what others left unfinished here is nobody's.
    """
    directory = cache.parent.parent
    partial = cache.with_name(cache.name + ".partial")
    # TFDS's name for a folder it has not finished is 'incomplete.XXXXXX_1.0.0'.
    for leftover in (partial, *(directory / spec.name).glob(f"incomplete.*_{spec.version}")):
        shutil.rmtree(leftover, ignore_errors=True)
    builder = _prepared_builder(spec, data, directory, log=log)
    _check_source(spec, data, _prepared_by(builder), where=pathlib.Path(builder.data_dir))
    count = sum(split.num_examples for split in builder.info.splits.values())
    _check_space(directory, count * _example_bytes(data))
    partial.mkdir(parents=True)
    try:
        info = _write_cache(builder, spec, data, partial, log=log)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(cache, ignore_errors=True)
    os.replace(partial, cache)
    log(f"{spec.name}: ready in {cache}")
    return info


def _prepared_builder(
    spec: DatasetSpec, data: config.Data, directory: pathlib.Path, *, log: Log
) -> Any:
    """Returns the builder of a TFDS dataset that is on disk, written now if it was not there."""
    new = functools.partial(_builder, spec, data, directory, log=log)
    builder = new()
    if builder.is_prepared() and (missing := builder.missing_files()):
        with contextlib.closing(builder):
            # What is left is not removed where there is nothing to make it from.
            builder.open()
        log(f"{missing[0]}: is missing; {builder.data_dir} is made again")
        shutil.rmtree(builder.data_dir)
        builder = new()
    place, aside = pathlib.Path(builder.data_dir), None
    if (
        builder.is_prepared()
        and data.on_change == "prepare"
        and (change := _change(spec, data, _prepared_by(builder), where=place))
    ):
        log(f"{change.what}; it is prepared again")
        # As TFDS calls a folder that it has not finished: the next start removes it.
        aside = place.with_name(f"incomplete.old_{spec.version}")
        os.replace(place, aside)
        builder = new()
    if not builder.is_prepared():
        try:
            with contextlib.closing(builder):
                builder.open()
                count = sum(map(len, builder.splits().values()))
                records = builder.source_bytes() + count * _RECORD_OVERHEAD
                _check_space(directory, records + count * _example_bytes(data))
                builder.prepare()
        except BaseException:
            if aside:
                os.replace(aside, place)
            raise
    if aside:
        for old in (directory / _CACHES).glob(f"{spec.name}-{spec.version}-*px*"):
            shutil.rmtree(old)
        shutil.rmtree(aside)
    return builder


def _builder(spec: DatasetSpec, data: config.Data, directory: pathlib.Path, *, log: Log) -> Any:
    settings = {name: getattr(data, name) for name in spec.settings}
    # TFDS expands ~, too, and takes gs:/ for a bucket; below / both are letters of a name.
    directory, source = directory.absolute(), str(_source(data) or "")
    return spec.builder_class()(source=source, log=log, data_dir=directory, **settings)


def _example_bytes(data: config.Data) -> int:
    """Returns what one example takes in the folder, a bound."""
    pixels = 3 * data.image_size**2 if data.storage == "decoded" else 0
    return pixels + np.dtype(np.int32).itemsize + _NAME_BYTES


def _write_cache(
    builder: Any, spec: DatasetSpec, data: config.Data, folder: pathlib.Path, *, log: Log
) -> Info:
    """Writes all splits and, last, info.json, to `folder`; returns what is in info.json."""
    decode = data.storage == "decoded" or not spec.mean
    depth = data.bit_depth or _bit_depth(spec.name, builder.info.metadata)
    statistics = {
        split: _write_split(builder, split, data, folder, depth if decode else None, log=log)
        for split in builder.info.splits
    }
    measured = statistics[spec.train_split]
    source = _prepared_by(builder)
    if decode:
        _check_colors(spec, data, measured[1].tolist(), where=pathlib.Path(builder.data_dir))
    mean, std = (spec.mean, spec.std) if spec.mean else (each.tolist() for each in measured)
    info = {
        "format": FORMAT,
        "name": spec.name,
        "version": spec.version,
        "image_size": data.image_size,
        "class_names": builder.info.features["label"].names,
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
    # Where the records do not say it, as those of older versions, nor does what is made from them.
    if data.bit_depth or "bit_depth" in builder.info.metadata:
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
    builder: Any,
    split: str,
    data: config.Data,
    folder: pathlib.Path,
    bit_depth: int | None,
    *,
    log: Log,
) -> tuple[np.ndarray, np.ndarray]:
    """Reads one split and writes what is kept of it.

    Args:
      builder: of the prepared TFDS dataset.
      split: its name.
      data: the settings.
      folder: where to write to.
      bit_depth: to decode the images with, to keep them or to measure them; None: they are not.
      log: takes one line of text.

    Returns:
      Mean and standard deviation of its pixels, float64 [3]; zeros if they were not decoded.
    """
    from inception_jax.datasets.records import Records

    records, size = Records(builder.files(split)), data.image_size
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
        progress = stack.enter_context(Progress(label, count, log=log))
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
        log(
            f"{builder.name}: {len(plain):,} of {count:,} {split} images are a single color, such "
            f"as black, all over: {folders.listed(plain)}"
        )
    pixels = count * size * size
    mean = total / pixels
    # Rounding may take the variance of what hardly changes below 0.
    return mean / 255, np.sqrt((squares / pixels - mean**2).clip(0)) / 255


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
    channels = [pixels[..., channel] for channel in range(3)]
    return _Piece(
        pixels=pixels,
        digests=digests.of_images(pixels),
        labels=np.array(labels, np.int32),
        names=names,
        plain=plain,
        total=np.array([c.sum(dtype=np.uint64) for c in channels]),
        # The square of a byte fits 16 bits, so integer sums are exact.
        squares=np.array([np.square(c, dtype=np.uint16).sum(dtype=np.uint64) for c in channels]),
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
