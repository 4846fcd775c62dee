import hashlib
import io
import os
import pathlib
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inception_jax import config
from inception_jax.datasets.builders import cifar10, cifar10_files
from inception_jax.datasets.dataset import Dataset, prepare
from inception_jax.errors import DataError
from tests import archives

NAMES = [f"thing {number}" for number in range(10)]


@pytest.fixture(autouse=True)
def few_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Reduces batch files to 20 images."""
    monkeypatch.setattr(cifar10_files, "IMAGES_PER_FILE", 20)
    yield


def batch(number: int, *, keys: type = bytes) -> dict[Any, Any]:
    """Returns the content of a batch file, with keys as in Python 2 (bytes) or 3 (str)."""
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
    """Writes files into an archive, or into a folder."""
    return archives.write_files(path, contents, "cifar-10-batches-py")


def opened(source: pathlib.Path, directory: pathlib.Path) -> Dataset:
    settings = {"source": str(source), "directory": str(directory), "image_size": 32}
    return prepare(config.Data(name="cifar10", **settings), log=lambda line: None)


@pytest.mark.parametrize("name", ["x.tar.gz", "folder", "folder/cifar-10-batches-py"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pixels_match_batch_files(tmp_path: pathlib.Path, name: str, protocol: int) -> None:
    write(tmp_path / name.split("/")[0], files(protocol))
    dataset = opened(tmp_path / name, tmp_path / "data")
    assert dataset.class_names == tuple(NAMES)
    assert (dataset.train_split, dataset.eval_split) == ("train", "test")
    for split, numbers in (("train", range(1, 6)), ("test", [6])):
        pixels = np.concatenate([batch(number)[b"data"] for number in numbers])
        labels = np.concatenate([batch(number)[b"labels"] for number in numbers])
        actual = dataset.splits[split]
        index = [int(name.removeprefix(f"{split}_").removesuffix(".png")) for name in actual.names]
        assert sorted(index) == list(range(len(labels)))
        np.testing.assert_array_equal(actual.labels, labels[index])
        images = actual.read(np.arange(len(actual)))
        # Computed independently: the value of pixel (row, column) in each color plane.
        for image, row in zip(images, pixels[index], strict=True):
            for channel in range(3):
                plane = row[1024 * channel : 1024 * (channel + 1)]
                np.testing.assert_array_equal(image[..., channel].ravel(), plane)


@pytest.mark.parametrize("official", [True, False])
def test_unofficial_archive_with_same_counts_is_logged(
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


def test_pickles_of_python_2_and_3_are_read() -> None:
    for keys in (bytes, str):
        content = cifar10_files.unpickle(pickle.dumps(batch(1, keys=keys)), "x")
        assert set(content) == {"batch_label", "labels", "data", "filenames"}


def test_numpy_1_pickle_is_read() -> None:
    data = pickle.dumps(batch(1), protocol=0)
    assert b"numpy._core" in data
    data = data.replace(b"numpy._core", b"numpy.core")
    np.testing.assert_array_equal(cifar10_files.unpickle(data, "x")["data"], batch(1)[b"data"])


class Attack:
    """Runs a command when unpickled."""

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
def test_pickle_that_executes_code_is_refused(
    tmp_path: pathlib.Path, make: Any, protocol: int
) -> None:
    path = str(tmp_path / "made")
    changed = files(protocol, data_batch_3={b"labels": make(path)})
    with pytest.raises(DataError, match=r"data_batch_3: not a pickle of plain data .*refers to"):
        opened(write(tmp_path / "x.tar.gz", changed), tmp_path / "data")
    assert not os.path.exists(path)


def without(name: str) -> dict[str, bytes]:
    return {file: data for file, data in files().items() if file != name}


def changed_batch(**changes: Any) -> dict[str, bytes]:
    return files(test_batch=batch(6) | {key.encode(): value for key, value in changes.items()})


WRONG = {
    "missing file": (lambda: without("test_batch"), r"missing test_batch"),
    "cut pickle": (lambda: files() | {"test_batch": files()["test_batch"][:-99]}, "plain data"),
    "a list": (lambda: files(test_batch=[1]), "contains a list; must be a dictionary"),
    "no pixels": (
        lambda: changed_batch(data=None),
        r"'data' must be a uint8 array of shape \(20, 3",
    ),
    "few pixels": (lambda: changed_batch(data=np.zeros((20, 3), np.uint8)), "'data' must be"),
    "floats": (lambda: changed_batch(data=np.zeros((20, 3072))), "'data' must be"),
    "few labels": (lambda: changed_batch(labels=[1]), "'labels' must list 20"),
    "large label": (lambda: changed_batch(labels=[10] * 20), "from 0 to 9"),
    "odd label": (lambda: changed_batch(labels=["1"] * 20), "from 0 to 9"),
    "counts": (lambda: changed_batch(labels=[3] * 20), r"test split has 0, 0, 0, 20.*2 each"),
    "names": (lambda: files(**{"batches.meta": {b"label_names": ["x"] * 10}}), "10 distinct"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_content_is_refused(tmp_path: pathlib.Path, case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(DataError, match=message) as error:
        opened(write(tmp_path / "x.tar.gz", make()), tmp_path / "data")
    assert str(tmp_path / "x.tar.gz") in str(error.value)


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_truncated_archive_is_refused(tmp_path: pathlib.Path, kept: int) -> None:
    complete = write(tmp_path / "x.tar.gz", files()).read_bytes()
    (tmp_path / "x.tar.gz").write_bytes(complete[:kept])
    with pytest.raises(
        DataError, match=r"x\.tar\.gz: (not a complete|neither a zip nor a) tar archive"
    ):
        opened(tmp_path / "x.tar.gz", tmp_path / "data")


def test_missing_path_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(DataError, match=r"config\.data\.source = .*nowhere.*download the official"):
        opened(tmp_path / "nowhere", tmp_path)


# Other formats.


def pixels_of(*numbers: int) -> tuple[np.ndarray, list[int]]:
    """Returns pixels and labels of some batches."""
    parts = [batch(number) for number in numbers]
    labels = [label for part in parts for label in part[b"labels"]]
    return np.concatenate([part[b"data"] for part in parts]), labels


def as_pictures(name: Callable[[str, int, str], str], kind: str = "PNG") -> dict[str, bytes]:
    """Returns one file per image; `name` gives its path from split, number and class."""
    result = {}
    for split, numbers in (("train", range(1, 6)), ("test", [6])):
        for number, (row, label) in enumerate(zip(*pixels_of(*numbers), strict=True)):
            buffer = io.BytesIO()
            Image.fromarray(row.reshape(3, 32, 32).transpose(1, 2, 0)).save(buffer, kind)
            result[name(split, number, cifar10_files._NAMES[label])] = buffer.getvalue()
    return result


def as_binary() -> dict[str, bytes]:
    result = {}
    for number, name in enumerate(
        [*(f"data_batch_{n}.bin" for n in range(1, 6)), "test_batch.bin"]
    ):
        pixels, labels = pixels_of(number + 1)
        records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        result[f"cifar-10-batches-bin/{name}"] = records.tobytes()
    return result


FORMS = {
    "zip": ("x.zip", lambda: {f"cifar-10-batches-py/{n}": d for n, d in named().items()}),
    "deep": ("x.zip", lambda: {f"archive/a/{n}": d for n, d in named().items()}),
    "plain tar": ("x.tar", lambda: {f"./{n}": d for n, d in named().items()}),
    "deep folder": ("folder", lambda: {f"cifar-10-python/c/{n}": d for n, d in named().items()}),
    "archive next to it": ("folder", lambda: named() | {"cifar-10-python.tar.gz": b"x"}),
    "binary": ("x.tar.gz", as_binary),
    "fast.ai": (
        "cifar10.tgz",
        lambda: (
            as_pictures(lambda split, n, c: f"cifar10/{split}/{c}/{n}_{c}.png")
            | {"cifar10/labels.txt": b"x"}
        ),
    ),
    "one folder": ("cifar", lambda: as_pictures(lambda split, n, c: f"{split}/{n}_{c}.png")),
}


def named() -> dict[str, bytes]:
    return files(**{"batches.meta": {b"label_names": cifar10_files._NAMES}})


def prepared(source: pathlib.Path, directory: pathlib.Path) -> dict[str, bytes]:
    """Returns the cache files by name, without the description."""
    opened(source, directory)
    (cache,) = (directory / "inception_jax").glob("cifar10-*px")
    return {f.name: f.read_bytes() for f in cache.iterdir() if f.name != "info.json"}


@pytest.mark.parametrize("form", FORMS)
def test_other_formats_give_identical_data(tmp_path: pathlib.Path, form: str) -> None:
    name, make = FORMS[form]
    official = prepared(write(tmp_path / "official.tar.gz", named()), tmp_path / "one")
    source = archives.write_files(tmp_path / name, make(), "")
    assert prepared(source, tmp_path / "two") == official


NO_FORMS = {
    "matlab": ({"cifar-10-batches-mat/data_batch_1.mat": b""}, "the MATLAB version of CIFAR-10"),
    "100": (
        {"cifar-100-python/train": b"", "cifar-100-python/meta": b""},
        "CIFAR-100, not CIFAR-10",
    ),
    "100 binary": ({"c/train.bin": b"", "c/fine_label_names.txt": b""}, "CIFAR-100, not CIFAR-10"),
    "competition": (
        {"trainLabels.csv": b"", "train/1.png": b"", "test/1.png": b""},
        "Kaggle competition version of CIFAR-10, whose test images are unlabeled",
    ),
    "competition, packed": ({"trainLabels.csv": b"", "train.7z": b""}, "Kaggle competition"),
    "JPEGs": (
        {"train/airplane/0001.jpg": b"", "test/cat/0001.jpg": b""},
        "they are JPEGs, which do not preserve the original pixels. Set config.data.name=image_f",
    ),
    "PNGs": (
        {"c/train/cat/0001.png": b""},
        "lack the official image numbers.*image_folder",
    ),
    "packed": ({"cifar-10-python.tar.gz": b""}, r"contains archives, .*: cifar-10-python\.tar\.gz"),
    "others": ({"a/1.jpg": b"", "b/1.jpg": b""}, r"data_batch_1 not found \(contents: a, b\)"),
}


@pytest.mark.parametrize("name", ["x.zip", "folder"])
@pytest.mark.parametrize("case", NO_FORMS)
def test_unsupported_format_is_named(tmp_path: pathlib.Path, case: str, name: str) -> None:
    contents, message = NO_FORMS[case]
    path = archives.write_files(tmp_path / name, contents, "")
    with pytest.raises(DataError, match=message) as error:
        opened(path, tmp_path / "data")
    assert str(path) in str(error.value) and "cifar-10-python.tar.gz" in str(error.value)


def without_one(contents: dict[str, bytes]) -> dict[str, bytes]:
    return dict(list(contents.items())[1:])


WRONG_FORMS = {
    "missing": (lambda: without_one(numbered()), "its train folder has 99 images .expected 100"),
    "numbers": (
        lambda: as_pictures(lambda split, n, c: f"{split}/{n + 1}_{c}.png"),
        "numbered 0 to 99",
    ),
    "class": (
        lambda: as_pictures(lambda split, n, c: f"{split}/{n}_{c[:4]}.png"),
        r"'airp', .*: not CIFAR-10 classes.*image_folder",
    ),
    "labels": (lambda: as_pictures(lambda split, n, c: f"{split}/{n}_cat.png"), "0, 0, 0, 100, 0"),
    "broken": (lambda: numbered() | {"train/0_x.png": b"x"}, "folder has 101 images"),
    "binary": (lambda: without_one(as_binary()), r"binary version: missing data_batch_1\.bin"),
    "cut": (
        lambda: {n: d[:-1] for n, d in as_binary().items()},
        r"has 61,459 bytes; must have 61,460 \(20 images",
    ),
    "label": (lambda: {n: b"\x0a" + d[1:] for n, d in as_binary().items()}, "labels above 9"),
}


def numbered() -> dict[str, bytes]:
    return as_pictures(lambda split, n, c: f"{split}/{n}_{c}.png")


@pytest.mark.parametrize("case", WRONG_FORMS)
def test_other_formats_must_be_complete(tmp_path: pathlib.Path, case: str) -> None:
    make, message = WRONG_FORMS[case]
    path = archives.write_files(tmp_path / "x.zip", make(), "")
    with pytest.raises(DataError, match=message):
        opened(path, tmp_path / "data")


def test_png_with_wrong_size_or_mode_is_refused(tmp_path: pathlib.Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (32, 32)).save(buffer, "PNG")
    contents = numbered()
    contents[next(iter(contents))] = buffer.getvalue()
    archives.write_files(tmp_path / "x.zip", contents, "")
    with pytest.raises(DataError, match=r"0_\w+\.png: has 32 x 32 pixels in mode L; must"):
        opened(tmp_path / "x.zip", tmp_path / "data")
