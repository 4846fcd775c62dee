"""Data sets of arrays in memory."""

import pathlib
from typing import Any

import numpy as np
import pytest

from inception_jax.datasets.dataset import Dataset
from inception_jax.errors import ConfigError, DataError


def arrays(count: int = 30, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    return random.integers(0, 256, (count, size, size, 3), np.uint8), np.arange(count) % 3


def test_a_share_of_each_class_is_held_out_the_same_for_each_seed(tmp_path: pathlib.Path) -> None:
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


def test_another_image_makes_another_version() -> None:
    images, labels = arrays()
    before = Dataset.from_arrays(images, labels)
    images[0, 0, 0, 0] ^= 1
    assert Dataset.from_arrays(images, labels).version != before.version
    assert before.trained_on is not None and before.trained_on.total == 0


def test_grey_images_are_resized_and_evaluated_as_given() -> None:
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
    # Without a size it is the shorter side.
    assert Dataset.from_arrays(images, [0, 1] * 3).image_size == 10


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": arrays()[0] / 255}, r"images: is of dtype float64; .*np\.round\(images \* 255"),
        ({"images": arrays()[0].tolist()}, r"images: is of type list; expected an array of uint8"),
        ({"images": arrays()[0].astype(np.int64)}, r"dtype int64; expected uint8.*astype"),
        ({"images": arrays()[0].transpose(0, 3, 1, 2)}, r"channels last: np\.moveaxis"),
        ({"images": np.zeros((30, 8, 8, 4), np.uint8)}, r"\[30, 8, 8, 4\].*images\[\.\.\., :3\]"),
        ({"images": np.zeros((8, 8), np.uint8)}, r"\[8, 8\]; expected \[N, H, W, 3\], or"),
        ({"labels": np.zeros(29, int)}, r"labels: are 29, of 30 images"),
        ({"labels": np.zeros(30)}, r"labels: are of dtype float64"),
        ({"labels": np.eye(30, dtype=int)}, r"one-hot rows: labels\.argmax\(axis=1\)"),
        ({"labels": np.arange(30) - 1}, r"labels: have -1 among them; expected 0 or more"),
        ({"class_names": ["a", "b"]}, r"labels: have 2 among them; expected 0 to 1, the last of 2"),
        ({"class_names": ["a", "b", "b"]}, r"class_names: are 'a', 'b', 'b'; expected at least"),
        ({"class_names": "abc"}, r"class_names: are of type str; expected a list"),
        ({"labels": np.arange(30)}, r"no class has two"),
        ({"val_fraction": 1.0}, r"val_fraction = 1\.0: must be more than 0, less than 1"),
        ({"evaluation": (arrays()[0], [3] * 30)}, r"evaluation\[1\]: have 3 among them"),
    ],
)
def test_what_is_no_data_set_is_refused_with_the_remedy(
    changes: dict[str, Any], message: str
) -> None:
    images, labels = arrays()
    with pytest.raises((DataError, ConfigError), match=message):
        Dataset.from_arrays(**({"images": images, "labels": labels} | changes))
