"""In-memory data sets from arrays."""

import pathlib
from typing import Any

import numpy as np
import pytest

from inception_jax.datasets.dataset import Dataset
from inception_jax.errors import ConfigError, DataError


def arrays(count: int = 30, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, size, size, 3), np.uint8), np.arange(count) % 3


def test_fraction_of_each_class_is_held_out_by_seed(tmp_path: pathlib.Path) -> None:
    images, labels = arrays()
    dataset, again = (Dataset.from_arrays(images, labels) for _ in range(2))
    assert (len(dataset.train), len(dataset.evaluation)) == (24, 6)
    assert np.bincount(dataset.evaluation.labels).tolist() == [2, 2, 2]
    both = [split.read(np.arange(len(split))) for split in (dataset.train, dataset.evaluation)]
    assert sorted(map(bytes, np.concatenate(both))) == sorted(map(bytes, images))
    np.testing.assert_array_equal(both[1], again.evaluation.read(np.arange(6)))
    other = Dataset.from_arrays(images, labels, seed=1)
    assert (other.evaluation.read(np.arange(6)) != both[1]).any()
    assert dataset.class_names == ("0", "1", "2")
    pixels = both[0] / 255
    np.testing.assert_allclose(dataset.mean, pixels.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(dataset.std, pixels.std((0, 1, 2)), rtol=1e-6)
    assert list(tmp_path.iterdir()) == []


def test_changed_image_changes_version() -> None:
    images, labels = arrays()
    before = Dataset.from_arrays(images, labels)
    images[0, 0, 0, 0] ^= 1
    assert Dataset.from_arrays(images, labels).version != before.version
    assert before.eval_train_overlap is not None and before.eval_train_overlap.total == 0


def test_grayscale_images_are_resized_and_evaluated() -> None:
    random = np.random.default_rng(0)
    images, few = (random.integers(0, 256, (n, 12, 10), np.uint8) for n in (6, 4))
    dataset = Dataset.from_arrays(
        images[..., None],
        [0, 1] * 3,
        evaluation=(few, [0, 1, 1, 1]),
        class_names=["cat", "dog"],
        image_size=16,
    )
    assert dataset.class_names == ("cat", "dog")
    assert dataset.train.read(np.array([2, 0])).shape == (2, 16, 16, 3)
    assert dataset.evaluation.labels.tolist() == [0, 1, 1, 1]
    assert dataset.evaluation.names == ("000000", "000001", "000002", "000003")
    # The default size is the shorter side.
    assert Dataset.from_arrays(images, [0, 1] * 3).image_size == 10


@pytest.mark.parametrize("names", [[3, 7], (3, 7), np.array(["3", "7"]), np.array([3, 7])])
def test_class_names_may_be_numbers_or_an_array(names: Any) -> None:
    images = np.zeros((6, 8, 8, 3), np.uint8)
    dataset = Dataset.from_arrays(images, [0, 1] * 3, class_names=names)
    assert dataset.class_names == ("3", "7")
    assert all(type(name) is str for name in dataset.class_names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": arrays()[0] / 255}, r"images: has dtype float64; .*np\.round\(images \* 255"),
        ({"images": arrays()[0].tolist()}, r"images: has type list; must be a uint8 NumPy array"),
        ({"images": arrays()[0].astype(np.int64)}, r"dtype int64; must be uint8.*astype"),
        ({"images": np.full((30, 8, 8), 4096)}, r"from 4096 to 4096, which must be scaled"),
        ({"images": np.zeros((30, 8, 8, 2), np.uint8)}, r"first channel with images\[\.\.\., :1\]"),
        ({"labels": ["cat"] * 30}, r"labels: have dtype <U3.* or names of the classes, which"),
        ({"images": arrays()[0].transpose(0, 3, 1, 2)}, r"channels last with np\.moveaxis"),
        ({"images": np.zeros((30, 8, 8, 4), np.uint8)}, r"\[30, 8, 8, 4\].*images\[\.\.\., :3\]"),
        ({"images": np.zeros((8, 8), np.uint8)}, r"\[8, 8\]; must be \[N, H, W, 3\], or"),
        ({"labels": np.zeros(29, int)}, r"labels: 29 labels for 30 images"),
        ({"labels": np.zeros(30)}, r"labels: have dtype float64"),
        ({"labels": np.eye(30, dtype=int)}, r"one-hot rows with labels\.argmax\(axis=1\)"),
        ({"labels": np.arange(30) - 1}, r"labels: contain -1; must be 0 or more"),
        ({"class_names": ["a", "b"]}, r"labels: contain 2; must be 0 to 1 \(there are 2"),
        ({"class_names": ["a", "b", "b"]}, r"class_names: are 'a', 'b', 'b'; must be at least"),
        ({"class_names": "abc"}, r"class_names: have type str; must be a list"),
        ({"labels": np.arange(30)}, r"no class has two images"),
        ({"labels": [[0], [0, 1]]}, r"labels: .*inhomogeneous"),
        ({"image_size": -1}, r"image_size = -1: must be at least 0"),
        ({"seed": -1}, r"seed = -1: must be at least 0"),
        ({"evaluation": (arrays()[0],)}, r"evaluation: must be \(images, labels\), got 1"),
        ({"val_fraction": 1.0}, r"val_fraction = 1\.0: must be between 0 and 1"),
        ({"evaluation": (arrays()[0], [3] * 30)}, r"evaluation\[1\]: contain 3"),
    ],
)
def test_invalid_arrays_are_refused_with_remedy(changes: dict[str, Any], message: str) -> None:
    images, labels = arrays()
    with pytest.raises((DataError, ConfigError), match=message):
        Dataset.from_arrays(**({"images": images, "labels": labels} | changes))
