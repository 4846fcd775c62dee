import errno
import fcntl
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import filelock
import numpy as np
import pytest
from sklearn import datasets as sklearn_datasets

from inception_jax import config
from inception_jax.datasets import decode
from inception_jax.datasets.builders import tiny_imagenet_layout
from inception_jax.datasets.dataset import Dataset, class_ids, data_location, prepare
from inception_jax.datasets.sources import files
from inception_jax.datasets.splits import Split
from inception_jax.errors import ConfigError, DataError
from inception_jax.registry import DATASETS
from tests import archives, disks

ROOT = pathlib.Path(__file__).parents[2]
CLASSES, TRAIN, VAL, TEST, SIZE = 3, 5, 2, 4, 16


def subset(source: pathlib.Path, directory: pathlib.Path, **kwargs: Any) -> config.Data:
    settings = {"image_size": SIZE} | kwargs
    return config.Data(
        name="tiny_imagenet_subset", source=str(source), directory=str(directory), **settings
    )


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("source") / "tiny.zip"
    return archives.write_tiny_imagenet(path, CLASSES, TRAIN, VAL, TEST, SIZE)


@pytest.fixture(scope="module")
def directory(source: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A directory with the prepared subset; do not modify it."""
    path = tmp_path_factory.mktemp("prepared")
    prepare(subset(source, path), log=quiet)
    return path


@pytest.fixture
def prepared(directory: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy that may be modified."""
    return pathlib.Path(shutil.copytree(directory, tmp_path / "prepared"))


def pixels_of(split: Split) -> np.ndarray:
    return split.read(np.arange(len(split)))


def check_subset(dataset: Dataset, size: int = SIZE) -> None:
    """Compares a prepared subset with the archive written by tests/archives.py."""
    assert (dataset.num_classes, dataset.image_size) == (CLASSES, size)
    assert dataset.class_names == tuple(f"class {label}" for label in range(CLASSES))
    counts = {"train": CLASSES * TRAIN, "validation": CLASSES * VAL, "test": TEST}
    assert {name: len(split) for name, split in dataset.splits.items()} == counts
    for name, split in dataset.splits.items():
        images = pixels_of(split)
        assert images.shape == (counts[name], *split.image_shape) == (counts[name], size, size, 3)
        assert (images.dtype, split.labels.dtype) == (np.uint8, np.int32)
        assert len(set(split.names)) == len(split)
        if name == "train":
            by_name = [archives.wnid(label) for label in split.labels]
            assert [file.split("/")[1] for file in split.names] == by_name
        numbers = [int(file.rsplit("_")[-1].removesuffix(".JPEG")) for file in split.names]
        for image, label, number in zip(images, split.labels, numbers, strict=True):
            if name == "train":
                true = label
            else:
                true = number % CLASSES
                assert label == (true if name == "validation" else -1)
            mean = image.mean(axis=(0, 1))
            if name == "train" and number % 5 == 4:
                luma = np.dot([0.299, 0.587, 0.114], archives.color(true))
                np.testing.assert_allclose(mean, [luma] * 3, atol=8)
            else:
                np.testing.assert_allclose(mean, archives.color(true), atol=8)
    pixels = pixels_of(dataset.train).astype(np.float64) / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std(axis=(0, 1, 2)), rtol=1e-6)
    assert dataset.train is dataset.splits["train"]
    assert dataset.evaluation is dataset.splits["validation"]


def files_below(directory: pathlib.Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_prepared_data_match_archive(source: pathlib.Path, directory: pathlib.Path) -> None:
    lines: list[str] = []
    dataset = prepare(subset(source, directory), log=lines.append)
    check_subset(dataset)
    assert not lines, "the second time there is nothing to do"


def test_extracted_folder_gives_same_data(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = archives.write_tiny_imagenet(tmp_path / "x", CLASSES, TRAIN, VAL, TEST, SIZE)
    one = prepare(subset("", directory))
    two = prepare(subset(folder, tmp_path / "data"), log=quiet)
    for split in one.splits:
        assert (pixels_of(one.splits[split]) == pixels_of(two.splits[split])).all()
        assert one.splits[split].names == two.splits[split].names


def test_other_image_size_reuses_records(prepared: pathlib.Path) -> None:
    check_subset(prepare(subset("", prepared, image_size=8), log=quiet), size=8)
    check_subset(prepare(subset("", prepared), log=quiet))


def test_tfds_can_read_the_records(source: pathlib.Path, directory: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    path = directory / "tiny_imagenet_subset" / "1.0.0"
    builder = tfds.builder_from_directory(path)
    assert builder.info.features["label"].names == ["class 0", "class 1", "class 2"]
    assert builder.info.metadata["wnids"] == [archives.wnid(label) for label in range(3)]
    for split, label in (("train", None), ("test", -1)):
        for example in builder.as_data_source(split):
            assert example["image"].shape == (SIZE, SIZE, 3)
            if label is None:
                wnid = archives.wnid(example["label"]).encode()
                assert example["wnid"] == wnid and wnid in example["file_name"]
                assert example["box"].tolist() == [0, 1, SIZE - 2, SIZE - 1]
            else:
                assert (example["label"], example["wnid"]) == (-1, b"")
                assert example["box"].tolist() == [-1] * 4


def test_quick_preparation_writes_what_tfds_and_pil_give(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorflow_datasets.core import example_serializer
    from tensorflow_datasets.proto import tf_example_pb2

    from inception_jax.datasets.builders import _tfds_private

    def contents(directory: pathlib.Path) -> dict[str, Any]:
        """Returns all files; of records, the messages: TFDS does not fix their features' order."""
        found: dict[str, Any] = {}
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(directory).as_posix()
            if ".array_record-" in name:
                records = ArrayRecordDataSource([str(path)])
                found[name] = [tf_example_pb2.Example.FromString(each) for each in records]
            elif path.is_file() and path.suffix != ".lock":
                found[name] = path.read_bytes()
        return found

    prepare(subset(source, tmp_path / "quick"), log=quiet)
    monkeypatch.setattr(_tfds_private, "_Serializer", example_serializer.ExampleSerializer)
    monkeypatch.setattr(decode, "_is_flawless_jpeg", lambda data: False)
    prepare(subset(source, tmp_path / "slow"), log=quiet)
    quick, slow = contents(tmp_path / "quick"), contents(tmp_path / "slow")
    assert quick == slow
    assert len(quick) > 12 and any(isinstance(each, list) for each in quick.values())


def test_opening_imports_neither_tfds_nor_sklearn(directory: pathlib.Path) -> None:
    code = f"""
import sys
from inception_jax import config
from inception_jax.datasets.dataset import prepare
data = config.Data(name="tiny_imagenet_subset", image_size={SIZE}, directory={str(directory)!r})
assert len(prepare(data).train) == {CLASSES * TRAIN}
print([name for name in ("tensorflow_datasets", "tensorflow", "sklearn") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")


def test_digits_match_scikit_learn(tmp_path: pathlib.Path) -> None:
    data = config.Data(name="digits", image_size=8, directory=str(tmp_path))
    dataset = prepare(data, log=quiet)
    bunch = sklearn_datasets.load_digits()
    assert dataset.class_names == tuple("0123456789")
    assert (dataset.train_split, dataset.eval_split) == ("train", "test")
    assert (len(dataset.train), len(dataset.evaluation)) == (1437, 360)
    seen = []
    for split in dataset.splits.values():
        index = [int(name.removeprefix("digit_").removesuffix(".png")) for name in split.names]
        seen += index
        np.testing.assert_array_equal(split.labels, bunch.target[index])
        gray = np.round(bunch.images[index] / 16 * 255)
        np.testing.assert_array_equal(pixels_of(split), np.repeat(gray[..., None], 3, axis=-1))
    assert sorted(seen) == list(range(1797)), "each example is in one split, once"
    fractions = np.bincount(dataset.evaluation.labels) / np.bincount(bunch.target)
    np.testing.assert_allclose(fractions, 0.2, atol=0.006)


def test_default_directory_is_tfds_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    assert data_location("~/x").local == pathlib.Path.home() / "x"
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert data_location("").local == pathlib.Path.home() / "tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert data_location("").local == tmp_path
    assert data_location("/y").local == pathlib.Path("/y")


# Invalid sources.


def test_source_for_data_set_without_source_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ConfigError, match=r"config\.data\.source = 'x': must be empty for 'digits'"
    ):
        prepare(config.Data(name="digits", source="x", directory=str(tmp_path)))


def test_subset_requires_source(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"config\.data\.source = '':.*no default"):
        prepare(subset("", tmp_path), log=quiet)


@pytest.mark.parametrize("split", ["train", "test"])
def test_corrupt_image_is_named_and_no_files_remain(tmp_path: pathlib.Path, split: str) -> None:
    files = archives.tiny_imagenet_files(1, 2, 1, 1, SIZE)
    name = max(file for file in files if file.startswith(f"{split}/") and file.endswith("JPEG"))
    files[name] = files[name][:-30]
    archives.write_files(tmp_path / "x.zip", files)
    with pytest.raises(DataError, match=rf"x\.zip: {name}: not a readable image"):
        prepare(subset(tmp_path / "x.zip", tmp_path / "data"), log=quiet)
    assert files_below(tmp_path / "data") == {"inception_jax/tiny_imagenet_subset-1.0.0.lock"}


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (0, 1, "train/ contains no JPEG images"),
        (1, 0, "val/ contains no images of the classes in train/"),
    ],
)
def test_subset_requires_training_and_validation_images(
    tmp_path: pathlib.Path, train: int, val: int, message: str
) -> None:
    path = archives.write_tiny_imagenet(tmp_path / "x.zip", 1, train, val, 1, SIZE)
    with pytest.raises(DataError, match=message):
        prepare(subset(path, tmp_path), log=quiet)


def test_incomplete_tiny_imagenet_is_refused(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = config.Data(name="tiny_imagenet", source=str(source), directory=str(tmp_path))
    with pytest.raises(DataError) as error:
        prepare(data, log=quiet)
    assert (
        "3 classes (expected 200), 15 train images (expected 100,000), 6 validation images "
        "(expected 10,000), 4 test images (expected 10,000), 5 training images of class n00001000 "
        "(expected 500)"
    ) in str(error.value)


class WholeListing(files.Source):
    """Tiny ImageNet's text files and image names, without images."""

    def __init__(self, per_class: Sequence[int]) -> None:
        super().__init__(pathlib.Path("whole.zip"))
        wnids = [archives.wnid(label) for label in range(200)]
        self.texts = {"wnids.txt": "\n".join(wnids)}
        self.texts["words.txt"] = "\n".join(f"{wnid}\tname of {wnid}" for wnid in wnids)
        for wnid, count in zip(wnids, per_class, strict=True):
            names = [f"{wnid}_{number}.JPEG" for number in range(count)]
            boxes = "\n".join(f"{name}\t0\t0\t9\t9" for name in names)
            self.texts[f"train/{wnid}/{wnid}_boxes.txt"] = boxes
            self.sizes |= {f"train/{wnid}/images/{name}": 2000 for name in names}
        val = [f"val_{n}.JPEG\t{wnids[n % 200]}\t0\t0\t9\t9" for n in range(10_000)]
        self.texts["val/val_annotations.txt"] = "\n".join(val)
        self.sizes |= {f"val/images/val_{n}.JPEG": 2000 for n in range(10_000)}
        self.sizes |= {f"test/images/test_{n}.JPEG": 2000 for n in range(10_000)}
        self.sizes |= {file: len(text) for file, text in self.texts.items()}

    def _read(self, path: str) -> bytes:
        return self.texts[path].encode()

    def _stat(self, path: str) -> tuple[int, ...]:
        return (self.sizes[path],)

    def close(self) -> None:
        pass


def test_only_official_counts_are_accepted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    make = DATASETS.get("tiny_imagenet").build(config.Data())
    complete = WholeListing([500] * 200)
    monkeypatch.setattr(tiny_imagenet_layout, "open_source", lambda path, scratch: complete)
    builder = make(source="whole.zip", data_dir=tmp_path)
    builder.open()
    sizes = {split: len(items) for split, items in builder.splits().items()}
    assert sizes == {"train": 100_000, "validation": 10_000, "test": 10_000}
    # The test images, whose classes are not published, do not matter.
    complete.sizes = {
        file: size for file, size in complete.sizes.items() if not file.startswith("test")
    }
    builder.open()
    assert set(builder.splits()) == {"train", "validation"}
    complete = WholeListing([499, 501] + [500] * 198)
    with pytest.raises(DataError, match=r"499 .* class n00001000 \(expected 500\), 501"):
        builder.open()


# Existing prepared data.


def test_other_source_is_refused_if_it_determines_content(
    source: pathlib.Path, directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = archives.write_tiny_imagenet(tmp_path / "other.zip", 2, 2, 2, 2, SIZE)
    for size in (SIZE, 2 * SIZE):
        with pytest.raises(DataError) as error:
            prepare(subset(other, directory, image_size=size), log=quiet)
        assert str(other) in str(error.value) and str(source) in str(error.value)
        assert "config.data.directory" in str(error.value)


def test_same_content_at_other_path_is_accepted(
    source: pathlib.Path, directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    copy = shutil.copyfile(source, tmp_path / "copy.zip")
    check_subset(prepare(subset(copy, directory), log=quiet))


def test_source_may_be_removed_after_preparation(tmp_path: pathlib.Path) -> None:
    path = archives.write_tiny_imagenet(tmp_path / "x.zip", CLASSES, TRAIN, VAL, TEST, SIZE)
    prepare(subset(path, tmp_path), log=quiet)
    path.unlink()
    check_subset(prepare(subset(path, tmp_path), log=quiet))
    with pytest.raises(DataError, match="no such file"):
        prepare(subset(tmp_path / "y.zip", tmp_path), log=quiet)


def cut(path: pathlib.Path) -> None:
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - 1)


def flip(path: pathlib.Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 9 // 10] ^= 1
    path.write_bytes(content)


def change_format(path: pathlib.Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 0}))


def change_mean(path: pathlib.Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mean": [0.5, 0.5, 0.5]}))


@pytest.mark.parametrize(
    ("file", "damage", "line"),
    [
        ("train_images.npy", cut, "train_images.npy has 11,647 bytes; must have 11,648"),
        ("test_names.txt", pathlib.Path.unlink, "test_names.txt has 0 bytes; must have"),
        ("info.json", cut, "info.json is damaged"),
        ("info.json", pathlib.Path.unlink, "info.json is missing"),
        ("info.json", change_format, "its format is 0; must be 1"),
        ("info.json", flip, "info.json is damaged"),
        ("info.json", change_mean, "info.json is damaged (checksum mismatch)"),
        ("train_labels.npy", flip, "train_labels.npy is damaged (checksum mismatch)"),
        ("validation_names.txt", flip, "validation_names.txt is damaged"),
        ("train_digests.npy", flip, "train_digests.npy is damaged"),
    ],
)
def test_damaged_cache_is_rebuilt(
    prepared: pathlib.Path, file: str, damage: Callable[[pathlib.Path], None], line: str
) -> None:
    damage(prepared / "inception_jax" / f"tiny_imagenet_subset-1.0.0-{SIZE}px" / file)
    lines: list[str] = []
    check_subset(prepare(subset("", prepared), log=lines.append))
    assert [text for text in lines if line in text and "rebuilding" in text]


def test_changed_image_byte_is_detected_on_read(prepared: pathlib.Path) -> None:
    cache = prepared / "inception_jax" / f"tiny_imagenet_subset-1.0.0-{SIZE}px"
    path = cache / "train_images.npy"
    complete = prepare(subset("", prepared), log=quiet).train
    pixels, offset = pixels_of(complete), path.stat().st_size - len(complete) * 3 * SIZE**2
    content = bytearray(path.read_bytes())
    content[offset + 7 * 3 * SIZE**2 + 100] ^= 0x10
    path.write_bytes(content)
    train = prepare(subset("", prepared), log=quiet).train
    others = np.delete(np.arange(len(train)), 7)
    np.testing.assert_array_equal(train.read(others), pixels[others])
    message = rf"train_images\.npy: image 7 \({complete.names[7]}\) is damaged .*Remove {cache} and"
    with pytest.raises(DataError, match=message):
        train.read(np.array([3, 7, 2]))


def test_old_cache_without_checksums_is_used(prepared: pathlib.Path) -> None:
    cache = prepared / "inception_jax" / f"tiny_imagenet_subset-1.0.0-{SIZE}px"
    info = json.loads((cache / "info.json").read_text())
    for path in cache.glob("*_digests.npy"):
        del info["files"][path.name]
        path.unlink()
    del info["sha256"], info["sha256 of this"]
    (cache / "info.json").write_text(json.dumps(info))
    lines: list[str] = []
    check_subset(prepare(subset("", prepared), log=lines.append))
    assert not lines


def test_missing_records_are_rebuilt(source: pathlib.Path, prepared: pathlib.Path) -> None:
    shutil.rmtree(prepared / "inception_jax")
    records = prepared / "tiny_imagenet_subset" / "1.0.0"
    next(records.glob("*train*")).unlink()
    check_subset(prepare(subset(source, prepared), log=quiet))


def test_order_is_independent_of_directory(
    source: pathlib.Path, directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    one = prepare(subset("", directory)).train.names
    two = prepare(subset(source, tmp_path), log=quiet).train.names
    assert one == two
    assert list(one) != sorted(one), "the records are shuffled"


# The disk.


def test_unwritable_directory_is_refused(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"config\.data\.directory: cannot write to .*file"):
        prepare(subset(source, tmp_path / "file" / "data"), log=quiet)


def test_low_disk_space_is_detected_before_writing(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000))
    with pytest.raises(DataError, match=r"needs up to \d\.\d MB, but only 0\.0 MB is free"):
        prepare(subset(source, tmp_path), log=quiet)
    assert not (tmp_path / "tiny_imagenet_subset").exists()


@pytest.mark.parametrize("full_at", ["records", "cache"])
def test_disk_that_fills_up_is_one_error(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    path = archives.write_tiny_imagenet(tmp_path / "x.zip", CLASSES, TRAIN, VAL, TEST, SIZE)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**12))
    with disks.mounted(tmp_path / "disk", kilobytes=4000) as disk:
        if full_at == "cache":
            prepare(subset(path, disk), log=quiet)
            shutil.rmtree(disk / "inception_jax")
        left = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "other").write_bytes(bytes(left - 16_384))
        with pytest.raises(DataError, match=rf"cannot write to {disk}: No space left"):
            prepare(subset(path, disk), log=quiet)
        (disk / "other").unlink()
        check_subset(prepare(subset(path, disk), log=quiet))


# Several processes, and killed ones.

PREPARE = f"""
import sys
from inception_jax import config
from inception_jax.datasets.dataset import prepare

def log(line: str) -> None:
    print(line, flush=True)
    if sys.argv[3] and sys.argv[3] in line:
        sys.stdin.readline()

data = config.Data(
    name="tiny_imagenet_subset", source=sys.argv[1], directory=sys.argv[2], image_size={SIZE}
)
print(len(prepare(data, log=log).train))
"""


def start(
    source: pathlib.Path, directory: pathlib.Path, *, stop_at: str = ""
) -> subprocess.Popen[str]:
    """Starts a process that prepares data and pauses at a log line until it reads a line."""
    command = [sys.executable, "-c", PREPARE, str(source), str(directory), stop_at]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    for line in process.stdout or ():
        if text in line:
            return
    raise AssertionError(f"the process ended before it said {text!r}")


@pytest.mark.parametrize("stop_at", ["writing validation records", "decoding validation"])
def test_killed_preparation_can_be_restarted(
    source: pathlib.Path, tmp_path: pathlib.Path, stop_at: str
) -> None:
    with start(source, tmp_path, stop_at=stop_at) as process:
        wait_for(process, stop_at)
        os.kill(process.pid, signal.SIGKILL)
    leftovers = [*tmp_path.glob("inception_jax/*.partial"), *tmp_path.glob("*/incomplete.*")]
    assert len(leftovers) == 1, "it was killed midway"
    check_subset(prepare(subset(source, tmp_path), log=quiet))
    assert not [path for path in leftovers if path.exists()]


def test_second_process_waits_for_preparation(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with start(source, tmp_path, stop_at="decoding train") as first:
        wait_for(first, "decoding train")
        with start(source, tmp_path) as second:
            wait_for(second, "waiting for another process")
            first.communicate("\n")
            assert first.returncode == 0
            rest, _ = second.communicate()
    assert rest == f"{CLASSES * TRAIN}\n", "the second had nothing to prepare"
    check_subset(prepare(subset("", tmp_path)))


def test_class_ids_are_from_the_source(
    source: pathlib.Path, prepared: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = subset(source, prepared)
    assert class_ids(data) == tuple(archives.wnid(label) for label in range(CLASSES))
    digits = config.Data(name="digits", directory=str(tmp_path), image_size=8)
    prepare(digits, log=quiet)
    assert class_ids(digits) == ()
    # Decoded images can be trained on without the records, but the class ids are missing.
    shutil.rmtree(prepared / data.name)
    prepare(data, log=quiet)
    with pytest.raises(DataError, match="is missing, so the class ids are unknown"):
        class_ids(data)


# Locks.


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_lock_file_replaces_missing_os_locks(
    answer: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates NFS without a lock service, and Lustre without the option flock."""

    def fail(*_: Any) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", fail)
    lock = tmp_path / "inception_jax" / "digits-1.0.0.lock.held"
    seen: list[tuple[str, bool]] = []
    data = config.Data(name="digits", directory=str(tmp_path), image_size=4)
    prepare(data, log=lambda line: seen.append((line, lock.exists())))
    assert (
        os.strerror(answer) in seen[0][0]
        and "not support locks" in seen[0][0]
        and lock.name in seen[0][0]
    )
    # Another process would have waited.
    assert all(is_held for line, is_held in seen[1:]) and len(seen) > 3
    assert not lock.exists()


def test_lock_file_is_waited_for(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    lock = tmp_path / "inception_jax" / "digits-1.0.0.lock.held"
    lock.parent.mkdir()
    # Left by a process on another host, which may be running or dead.
    lock.write_text("4711\nanother-host\n")
    seen: list[str] = []

    def log(line: str) -> None:
        seen.append(line)
        if "waiting" in line:
            assert str(lock) in line
            lock.unlink()

    prepare(config.Data(name="digits", directory=str(tmp_path), image_size=4), log=log)
    assert [line for line in seen if "waiting" in line] == seen[1:2]


@pytest.mark.parametrize("shared", [0o2775, 0o777, 0o755])
def test_lock_has_permissions_of_the_folder(
    shared: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "data"
    top.mkdir()
    top.chmod(shared)
    before = os.umask(0o022)
    try:
        prepare(config.Data(name="digits", directory=str(top), image_size=4), log=quiet)
    finally:
        os.umask(before)
    made = top / "inception_jax"
    assert made.stat().st_mode & 0o7777 == shared
    assert (made / "digits-1.0.0.lock").stat().st_mode & 0o777 == shared & 0o666


def test_lock_of_other_user_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(DataError, match=r"digits-1.0.0.lock belongs to another user"):
        prepare(config.Data(name="digits", directory=str(tmp_path), image_size=4), log=quiet)
