"""Decoded pixels and records give the same batches; memory is bounded; damage is named."""

import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from inception_jax import config
from inception_jax.datasets.dataset import Dataset, prepare
from inception_jax.datasets.records import Records
from inception_jax.errors import ConfigError, DataError
from inception_jax.input import pipeline
from inception_jax.runtime import sharding
from tests import archives, command

SIZE = 24


def quiet(line: str) -> None:
    pass


def settings(directory: pathlib.Path, **changes: Any) -> config.Data:
    source = str(directory / "x.zip")
    defaults = {"source": source, "directory": str(directory), "image_size": SIZE}
    return config.Data(name="tiny_imagenet_subset", **(defaults | changes))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data")
    archives.write_tiny_imagenet(path / "x.zip", 3, 11, 5, 4, SIZE)
    return path


def train_batches(dataset: Dataset, start: int = 0) -> list[dict[str, np.ndarray]]:
    # 33 examples: the fifth batch spans two epochs.
    batches = pipeline.train_batches(
        dataset.train, batch_size=8, seed=3, start=start, stop=9, mesh=sharding.make_mesh()
    )
    return [{name: np.asarray(array) for name, array in batch.items()} for batch in batches]


def assert_equal(one: list[dict[str, np.ndarray]], two: list[dict[str, np.ndarray]]) -> None:
    assert len(one) == len(two) > 0
    for left, right in zip(one, two, strict=True):
        assert left.keys() == right.keys()
        for name, array in left.items():
            np.testing.assert_array_equal(array, right[name])


@pytest.mark.parametrize("workers", [0, 1, 5])
@pytest.mark.parametrize("image_size", [SIZE, 16])
def test_records_and_decoded_images_give_same_batches(
    directory: pathlib.Path, image_size: int, workers: int
) -> None:
    decoded = prepare(settings(directory, image_size=image_size), log=quiet)
    streamed = prepare(
        settings(directory, image_size=image_size, storage="records", workers=workers), log=quiet
    )
    assert_equal(train_batches(decoded), train_batches(streamed))
    assert_equal(train_batches(decoded)[5:], train_batches(streamed, start=5))
    np.testing.assert_array_equal(decoded.mean, streamed.mean)
    np.testing.assert_array_equal(decoded.std, streamed.std)
    mesh = sharding.make_mesh()
    evaluation = [
        [
            {name: np.asarray(array) for name, array in batch.items()}
            for batch in pipeline.eval_batches(dataset.evaluation, batch_size=4, mesh=mesh)
        ]
        for dataset in (decoded, streamed)
    ]
    assert_equal(*evaluation)
    assert sum(batch["mask"].sum() for batch in evaluation[1]) == 15
    assert decoded.evaluation.names == streamed.evaluation.names


def test_records_store_no_pixels(directory: pathlib.Path) -> None:
    prepare(settings(directory, storage="records"), log=quiet)
    (folder,) = (directory / "inception_jax").glob(f"*{SIZE}px-records")
    assert (folder / "info.json").exists() and not list(folder.glob("*images*"))


def test_a_damaged_record_is_named(tmp_path: pathlib.Path) -> None:
    archives.write_tiny_imagenet(tmp_path / "x.zip", 3, 11, 5, 4, SIZE)
    dataset = prepare(settings(tmp_path, storage="records", workers=2), log=quiet)
    (file,) = (tmp_path / "tiny_imagenet_subset" / "1.0.0").glob("*train*")
    data = bytearray(file.read_bytes())
    place = data.index(b"\xff\xd8\xff\xe0") + 200
    data[place] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(DataError, match=rf"{file.name}.*: record \d+ cannot be read"):
        train_batches(dataset)


def test_changed_byte_in_records_is_detected_or_harmless(
    directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    prepare(settings(directory, storage="records"), log=quiet)
    (original,) = (directory / "tiny_imagenet_subset" / "1.0.0").glob("*train*")
    complete = original.read_bytes()
    expected = Records([original]).read(range(33))
    path = tmp_path / original.name
    detected = 0
    for place in range(0, len(complete), 131):
        content = bytearray(complete)
        content[place] ^= 0x20
        path.write_bytes(content)
        try:
            assert Records([path]).read(range(33)) == expected, place
        except DataError as error:
            assert str(path) in str(error)
            detected += 1
    # Most of such a small file is empty.
    assert detected > 100


def test_damaged_record_file_is_named(directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    prepare(settings(directory, storage="records"), log=quiet)
    (original,) = (directory / "tiny_imagenet_subset" / "1.0.0").glob("*train*")
    paths = [tmp_path / f"part_{number}" for number in range(3)]
    for path in paths:
        path.write_bytes(original.read_bytes())
    content = bytearray(original.read_bytes())
    content[content.index(b"\xff\xd8\xff\xe0") + 200] ^= 0xFF
    paths[1].write_bytes(content)
    with pytest.raises(DataError, match=r"part_1: record \d+ cannot be read"):
        Records(paths).read(range(99))
    paths[1].write_bytes(content[:100])
    with pytest.raises(DataError, match=r"part_1: cannot be opened"):
        Records(paths)


def test_truncated_image_file_is_named(tmp_path: pathlib.Path) -> None:
    archives.write_tiny_imagenet(tmp_path / "x.zip", 3, 11, 5, 4, SIZE)
    dataset = prepare(settings(tmp_path), log=quiet)
    (file,) = (tmp_path / "inception_jax").glob("*px/train_images.npy")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"train_images\.npy: was truncated"):
        train_batches(dataset)


def test_negative_workers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"config\.data\.workers = -1: must be at least 0"):
        config.validate(config.Config(data=config.Data(workers=-1)))


GROWTH = """
import pathlib, sys
import numpy as np
from inception_jax.datasets.splits import DecodedSplit

def resident() -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) * 1024

path = pathlib.Path(sys.argv[1])
count = np.load(path, mmap_mode="r").shape[0]
split = DecodedSplit(np.zeros(count, np.int32), 64, path, path)
split.read(np.arange(256))
before = resident()
for start in range(0, count, 256):
    split.read(np.arange(start, start + 256))
print(resident() - before)
"""


def test_memory_does_not_grow_with_reads(tmp_path: pathlib.Path) -> None:
    # A sparse file of 403 MB: a hole after the header.
    path = tmp_path / "images.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(32768, 64, 64, 3))
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(path)],
        cwd=command.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 64e6


@pytest.mark.parametrize("storage", ["decoded", "records"])
def test_holdout_takes_same_number_of_each_class(directory: pathlib.Path, storage: str) -> None:
    complete = prepare(settings(directory, storage=storage), log=quiet)
    held = prepare(settings(directory, storage=storage, holdout=6), log=quiet)
    assert (held.eval_split, len(held.train), len(held.evaluation)) == ("holdout", 27, 6)
    assert np.bincount(held.evaluation.labels).tolist() == [2, 2, 2]
    assert sorted((*held.train.names, *held.evaluation.names)) == sorted(complete.train.names)
    # Labels, names and pixels stay aligned.
    at = {name: index for index, name in enumerate(complete.train.names)}
    for split in (held.train, held.evaluation):
        places = np.array([at[name] for name in split.names])
        np.testing.assert_array_equal(split.labels, complete.train.labels[places])
        everything = np.arange(len(split))
        np.testing.assert_array_equal(split.read(everything), complete.train.read(places))
    again = prepare(settings(directory, holdout=6), log=quiet)
    assert again.evaluation.names == held.evaluation.names


@pytest.mark.parametrize(("count", "message"), [(4, "such as 3"), (33, "must keep at least one")])
def test_holdout_that_does_not_fit_classes_is_refused(
    directory: pathlib.Path, count: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"config.data.holdout = {count}: .*{message}"):
        prepare(settings(directory, holdout=count), log=quiet)
