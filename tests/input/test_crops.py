"""Crops of the original images: their distribution, and their dependence on the step alone."""

import dataclasses
import io
import math
import pathlib
import random
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from inception_jax import config
from inception_jax.datasets import decode
from inception_jax.datasets.dataset import Dataset, prepare
from inception_jax.datasets.splits import RecordSplit
from inception_jax.errors import ConfigError
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.input import crops, pipeline
from inception_jax.runtime import sharding
from inception_jax.storage.workdir import Workdir
from tests import archives, small

SIZE = 16
INCEPTION = config.Augment(crop="inception")


def quiet(line: str) -> None:
    pass


def boxes_of(height: int, width: int, count: int = 3000, seed: int = 0) -> np.ndarray:
    """Returns the boxes of the first positions: int64 [count, 4]."""
    sample_crop = crops.crop_sampler(INCEPTION, seed)
    assert sample_crop is not None
    return np.array([sample_crop(position)(height, width) for position in range(count)])


def torchvision_box(rng: random.Random, height: int, width: int) -> tuple[int, int, int, int]:
    """Samples a box as torchvision's RandomResizedCrop.get_params does."""
    for _ in range(10):
        target = height * width * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return 0, 0, height, width


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (64, 64)])
def test_box_distribution_matches_torchvision(height: int, width: int) -> None:
    actual, rng = boxes_of(height, width), random.Random(0)
    expected = np.array([torchvision_box(rng, height, width) for _ in range(3000)])
    for boxes in (actual, expected):
        top, left, h, w = boxes.T
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + h <= height).all() and (left + w <= width).all()
        # Up to rounding of both sides to integer pixels.
        assert (h * w / (height * width)).min() > 0.08 * (1 - 2 / h.min())
        assert (w / h).max() < 4 / 3 * (1 + 2 / h.min())
        assert (h / w).max() < 4 / 3 * (1 + 2 / w.min())
    # Quantiles of area, aspect ratio and position; the deviation of 3,000 draws is about 1%.
    for statistic in (
        lambda b: b[:, 2] * b[:, 3] / (height * width),
        lambda b: np.log(b[:, 3] / b[:, 2]),
        lambda b: (b[:, 0] + b[:, 2] / 2) / height,
        lambda b: (b[:, 1] + b[:, 3] / 2) / width,
    ):
        levels = np.linspace(0.05, 0.95, 10)
        differences = np.quantile(statistic(actual), levels) - np.quantile(
            statistic(expected), levels
        )
        assert np.abs(differences).max() < 0.04


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [(10, 1000, (0, 493, 10, 13)), (1000, 10, (493, 0, 13, 10))],
)
def test_center_crop_is_used_if_no_box_fits(
    height: int, width: int, box: tuple[int, int, int, int]
) -> None:
    # In torchvision: the whole shorter side, and 4 / 3 of it along the other.
    actual = crops.random_crop_box(np.full((10, 4), 0.99), height, width, 0.9, 4 / 3)
    assert actual == box


def test_box_depends_only_on_seed_and_position() -> None:
    one, two = boxes_of(375, 500, count=50), boxes_of(375, 500, count=50)
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one, axis=0)) == 50
    assert (boxes_of(375, 500, count=50, seed=1) != one).any(axis=1).all()


def test_boxes_use_other_random_numbers_than_epoch_orders() -> None:
    key = np.array([3, 5], np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).random(100)
    assert not np.isin(crops.position_rng(3, 5).random(100), order).any()


def test_other_crops_have_no_host_sampler() -> None:
    for crop in ("none", "pad", "resized"):
        assert crops.crop_sampler(config.Augment(crop=crop), 0) is None


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data")
    archives.write_tiny_imagenet(path / "x.zip", 3, 11, 5, 4, 40)
    return path


def dataset(directory: pathlib.Path, **changes: Any) -> Dataset:
    settings = {"image_size": SIZE, "storage": "records", "workers": 2} | changes
    data = config.Data(
        name="tiny_imagenet_subset",
        source=str(directory / "x.zip"),
        directory=str(directory),
        **settings,
    )
    return prepare(data, log=quiet)


def batches_of(
    examples: Dataset, *, batch_size: int = 8, start: int = 0, stop: int = 9, seed: int = 3
) -> np.ndarray:
    """Returns the images of some steps in training order, uint8 [N, H, W, 3]."""
    batches = pipeline.train_batches(
        examples.train,
        batch_size=batch_size,
        seed=seed,
        start=start,
        stop=stop,
        sample_crop=crops.crop_sampler(INCEPTION, seed),
    )
    return np.concatenate([batch["image"] for batch in batches])


def test_batch_contains_crops_of_original_images(directory: pathlib.Path) -> None:
    examples = dataset(directory)
    actual = batches_of(examples)
    files = archives.tiny_imagenet_files(3, 11, 5, 4, 40)
    sample_crop = crops.crop_sampler(INCEPTION, 3)
    assert sample_crop is not None
    for step in (0, 4, 8):
        indices = pipeline.train_indices(step, batch_size=8, examples=33, seed=3)
        for row, index in enumerate(indices):
            position = 8 * step + row
            with Image.open(io.BytesIO(files[examples.train.names[index]])) as image:
                top, left, height, width = sample_crop(position)(40, 40)
                crop = image.convert("RGB").crop((left, top, left + width, top + height))
            expected = np.asarray(crop.resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            inner = np.abs(actual[position].astype(int) - expected)[2:-2, 2:-2]
            if min(height, width) < 2 * SIZE:
                assert inner.max() <= 1
            assert inner.mean() < 3


def test_batches_depend_only_on_step(
    directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = batches_of(dataset(directory))
    np.testing.assert_array_equal(whole, batches_of(dataset(directory, workers=5)))
    np.testing.assert_array_equal(whole[40:], batches_of(dataset(directory), start=5))
    np.testing.assert_array_equal(whole, batches_of(dataset(directory), batch_size=24, stop=3))
    assert (whole != batches_of(dataset(directory), seed=4)).any()
    # The second epoch uses other boxes than the first.
    order = np.concatenate(
        [pipeline.train_indices(s, batch_size=8, examples=33, seed=3) for s in range(9)]
    )
    for index in range(3):
        first, second = np.flatnonzero(order == index)[:2]
        assert (whole[first] != whole[second]).any()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    halves = []
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        halves.append(batches_of(dataset(directory)).reshape(9, 4, SIZE, SIZE, 3))
    together = np.concatenate(halves, axis=1).reshape(whole.shape)
    np.testing.assert_array_equal(together, whole)


def test_holdout_keeps_crops_of_training_images(directory: pathlib.Path) -> None:
    rest = dataset(directory, holdout=6).train
    indices = np.arange(len(rest))
    chosen = [lambda height, width: (3, 5, 20, 16)] * len(rest)
    actual = rest.read_crops(indices, chosen)
    whole = dataset(directory).train
    where = [whole.names.index(name) for name in rest.names]
    np.testing.assert_array_equal(actual, whole.read_crops(np.array(where), chosen))


def test_decoded_split_cannot_be_cropped(directory: pathlib.Path) -> None:
    split = dataset(directory, storage="decoded").train
    with pytest.raises(ConfigError, match=r"'inception'.* with config\.data\.storage=records"):
        split.read_crops(np.arange(1), [lambda height, width: (0, 0, 8, 8)])


def test_only_evaluation_splits_are_center_cropped(directory: pathlib.Path) -> None:
    mesh = sharding.make_mesh()
    files = archives.tiny_imagenet_files(3, 11, 5, 4, 40)
    whole, cut = dataset(directory), dataset(directory, eval_crop_pct=0.5)
    indices = np.arange(33)
    np.testing.assert_array_equal(whole.train.read(indices), cut.train.read(indices))
    (batch,) = pipeline.eval_batches(cut.evaluation, batch_size=16, mesh=mesh)
    actual = np.asarray(batch["image"])[:15]
    expected = [decode.decode(files[name], SIZE, name, crop=0.5) for name in cut.evaluation.names]
    np.testing.assert_array_equal(actual, expected)
    assert (actual != whole.evaluation.read(np.arange(15))).any()
    both = dataset(directory, eval_crop_pct=0.5, holdout=6)
    assert both.train_eval_view.names == both.train.names
    for split, count in (
        (both.evaluation, 6),
        (both.train_eval_view, 27),
        (cut.train_eval_view, 33),
    ):
        expected = [decode.decode(files[name], SIZE, name, crop=0.5) for name in split.names]
        np.testing.assert_array_equal(split.read(np.arange(count)), expected)
    assert whole.train_eval_view is whole.train


def test_training_examples_are_cropped_for_evaluation(data_directory: pathlib.Path) -> None:
    data = config.Data(
        name="digits",
        directory=str(data_directory),
        image_size=8,
        storage="records",
        eval_crop_pct=0.5,
    )
    evaluation = config.Evaluation(train_eval_examples=10)
    this = small.build(small.config(data_directory, data=data, evaluation=evaluation))
    sample = Evaluator(this).splits["train_eval"]
    whole, indices = this.dataset.train, np.arange(10)
    assert sample.names == whole.names[:10]
    assert isinstance(whole, RecordSplit) and whole.crop == 1
    cut = dataclasses.replace(whole, crop=0.5)
    np.testing.assert_array_equal(sample.read(indices), cut.read(indices))
    assert (sample.read(indices) != whole.read(indices)).any()


def test_training_uses_sampled_crops(
    data_directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = "3 steps"
    this = small.build(
        small.config(
            data_directory,
            data=config.Data(
                name="digits", directory=str(data_directory), image_size=8, storage="records"
            ),
            augment=INCEPTION,
            train=config.Train(batch_size=64, duration=steps),
        )
    )
    drawn: list[np.ndarray] = []

    def read_crops(self: RecordSplit, indices: np.ndarray, boxes: Any) -> np.ndarray:
        drawn.append(np.array([choose(8, 8) for choose in boxes]))
        return self.read(indices)

    monkeypatch.setattr(RecordSplit, "read_crops", read_crops)
    small.train(this, Workdir(tmp_path / "run"), Evaluator(this), changed=[])
    actual = {tuple(box) for boxes in drawn for box in boxes.tolist()}
    assert actual == {tuple(box) for box in boxes_of(8, 8, count=192).tolist()}
