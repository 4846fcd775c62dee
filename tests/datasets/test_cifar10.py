import hashlib
import io
import os
import pathlib
import pickle
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from inception_jax import config
from inception_jax.datasets import cifar10
from inception_jax.errors import DataError
from inception_jax.input.dataset import Dataset, prepare

NAMES = [f"thing {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes a batch file one of 20 images."""
    monkeypatch.setattr(cifar10, "PER_FILE", 20)
    yield


def batch(number: int, *, keys: type = bytes) -> dict[Any, Any]:
    """Returns the content of a batch file, as Python 2 (bytes) or 3 (str) has it."""
    rng = np.random.default_rng(number)
    content = {
        "batch_label": b"a label",
        "labels": rng.permutation(np.repeat(np.arange(10), 2)).tolist(),
        "data": rng.integers(0, 256, (20, 3072), np.uint8),
        "filenames": [b"name.png"] * 20,
    }
    return {key.encode() if keys is bytes else key: value for key, value in content.items()}


def files(protocol: int = 2, **changes: Any) -> dict[str, bytes]:
    """Returns all files by name, pickled; `changes` replace contents."""
    contents: dict[str, Any] = {f"data_batch_{number}": batch(number) for number in range(1, 6)}
    contents |= {"test_batch": batch(6), "batches.meta": {b"label_names": NAMES}} | changes
    return {name: pickle.dumps(content, protocol) for name, content in contents.items()}


def write(path: pathlib.Path, contents: dict[str, bytes]) -> pathlib.Path:
    """Writes files into a .tar.gz, or into a folder."""
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path, "w:gz") as archive:
            for name, data in contents.items():
                info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
        return path
    folder = path / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return path


def opened(source: pathlib.Path, directory: pathlib.Path) -> Dataset:
    settings = {"source": str(source), "directory": str(directory), "image_size": 32}
    return prepare(config.Data(name="cifar10", **settings), log=lambda line: None)


@pytest.mark.parametrize("name", ["x.tar.gz", "folder", "folder/cifar-10-batches-py"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_the_pixels_are_those_of_the_batches(
    tmp_path: pathlib.Path, name: str, protocol: int
) -> None:
    write(tmp_path / name.split("/")[0], files(protocol))
    dataset = opened(tmp_path / name, tmp_path / "data")
    assert dataset.class_names == tuple(NAMES)
    assert (dataset.train_split, dataset.eval_split) == ("train", "test")
    for split, numbers in (("train", range(1, 6)), ("test", [6])):
        pixels = np.concatenate([batch(number)[b"data"] for number in numbers])
        labels = np.concatenate([batch(number)[b"labels"] for number in numbers])
        found = dataset.splits[split]
        index = [int(name.removeprefix(f"{split}_").removesuffix(".png")) for name in found.names]
        assert sorted(index) == list(range(len(labels)))
        np.testing.assert_array_equal(found.labels, labels[index])
        images = found.read(np.arange(len(found)))
        # Written by another rule: the value of pixel (row, column) in the plane of each colour.
        for image, row in zip(images, pixels[index], strict=True):
            for channel in range(3):
                plane = row[1024 * channel : 1024 * (channel + 1)]
                np.testing.assert_array_equal(image[..., channel].ravel(), plane)


@pytest.mark.parametrize("official", [True, False])
def test_another_archive_of_the_same_counts_is_noted(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, official: bool
) -> None:
    content = write(tmp_path / "x.tar.gz", files()).read_bytes()
    monkeypatch.setattr(cifar10, "BYTES", len(content))
    if official:
        monkeypatch.setattr(cifar10, "MD5", hashlib.md5(content).hexdigest())
    lines: list[str] = []
    data = config.Data(
        name="cifar10", source=str(tmp_path / "x.tar.gz"), directory=str(tmp_path), image_size=32
    )
    prepare(data, log=lines.append)
    assert any("not the official archive" in line for line in lines) != official


def test_keys_of_either_python_are_read() -> None:
    for keys in (bytes, str):
        content = cifar10.unpickle(pickle.dumps(batch(1, keys=keys)), "x")
        assert set(content) == {"batch_label", "labels", "data", "filenames"}


def test_a_pickle_as_numpy_1_writes_it_is_read() -> None:
    data = pickle.dumps(batch(1), protocol=0)
    assert b"numpy._core" in data
    data = data.replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(cifar10.unpickle(data, "x")["data"], batch(1)[b"data"])


class Attack:
    """Runs a command when it is loaded by pickle."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.reduced


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "make",
    [
        lambda path: Attack(os.mkdir, path),
        lambda path: Attack(eval, f"__import__('os').mkdir({path!r})"),
        lambda path: Attack(np.load, path, None, True),
        lambda path: Attack(getattr, path, "join"),
        lambda path: [Attack(os.mkdir, path)],
    ],
)
def test_a_pickle_that_would_run_something_is_refused(
    tmp_path: pathlib.Path, make: Any, protocol: int
) -> None:
    path = str(tmp_path / "made")
    changed = files(protocol, data_batch_3={b"labels": make(path)})
    with pytest.raises(DataError, match=r"data_batch_3: not a pickle of plain data .*asks for"):
        opened(write(tmp_path / "x.tar.gz", changed), tmp_path / "data")
    assert not os.path.exists(path)


def without(name: str) -> dict[str, bytes]:
    return {file: data for file, data in files().items() if file != name}


def changed_batch(**changes: Any) -> dict[str, bytes]:
    return files(test_batch=batch(6) | {key.encode(): value for key, value in changes.items()})


WRONG = {
    "missing file": (lambda: without("test_batch"), r"it has no test_batch"),
    "cut pickle": (lambda: files() | {"test_batch": files()["test_batch"][:-99]}, "plain data"),
    "a list": (lambda: files(test_batch=[1]), "holds a list; expected a dictionary"),
    "no pixels": (lambda: changed_batch(data=None), r"'data' must be bytes of shape \(20, 3072\)"),
    "few pixels": (lambda: changed_batch(data=np.zeros((20, 3), np.uint8)), "'data' must be"),
    "floats": (lambda: changed_batch(data=np.zeros((20, 3072))), "'data' must be"),
    "few labels": (lambda: changed_batch(labels=[1]), "'labels' must list 20"),
    "large label": (lambda: changed_batch(labels=[10] * 20), "from 0 to 9"),
    "odd label": (lambda: changed_batch(labels=["1"] * 20), "from 0 to 9"),
    "counts": (lambda: changed_batch(labels=[3] * 20), r"test split has 0, 0, 0, 20.*2 each"),
    "names": (lambda: files(**{"batches.meta": {b"label_names": ["x"] * 10}}), "10 different"),
}


@pytest.mark.parametrize("case", WRONG)
def test_other_content_is_refused(tmp_path: pathlib.Path, case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(DataError, match=message) as error:
        opened(write(tmp_path / "x.tar.gz", make()), tmp_path / "data")
    assert str(tmp_path / "x.tar.gz") in str(error.value)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_cut_archive_is_refused(tmp_path: pathlib.Path, kept: int) -> None:
    whole = write(tmp_path / "x.tar.gz", files()).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(whole[:kept])
    with pytest.raises(DataError, match=r"x\.tar\.gz: cannot be read to its end"):
        opened(tmp_path / "x.tar.gz", tmp_path / "data")


def test_a_path_that_leads_nowhere_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"config\.data\.source = .*nowhere.*official download"):
        opened(tmp_path / "nowhere", tmp_path)
