"""Tests that prediction and evaluation compute the same logits for the same images."""

import dataclasses
import io
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from inception_jax.config import Data, Evaluation
from inception_jax.datasets.records import Records
from inception_jax.errors import CheckpointError, DataError, UserError
from inception_jax.evaluation.evaluate import evaluate_checkpoint
from inception_jax.inference import gradcam, image_files, load
from inception_jax.inference.predictor import (
    LoadedImage,
    Predictor,
    batch_size_for,
    classify,
    read_files,
)
from inception_jax.storage import atomic
from inception_jax.storage.workdir import Workdir
from inception_jax.training import run
from tests import small


@pytest.fixture(scope="module")
def finished(
    data_directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[run.Run, Workdir]:
    """A run without EMA, evaluated at a different image size."""
    config = small.config(data_directory)
    config.train.ema = ""
    config.evaluation.image_size = 12
    return small.finished(config, tmp_path_factory.mktemp("run"))


def test_predictor_matches_evaluation(finished: tuple[run.Run, Workdir]) -> None:
    this, folder = finished
    expected = evaluate_checkpoint(this, folder, "best")
    predictor = Predictor(load.from_checkpoint(folder, "best"), batch_size=100)
    split = this.dataset.evaluation
    logits = predictor.logits(split.read(np.arange(len(split)))).astype(np.float64)
    assert logits.shape == (360, 10)
    rank = (logits > logits[np.arange(360), split.labels][:, None]).sum(axis=1)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert 100 * (rank < 1).mean() == pytest.approx(expected["top1"])
    assert 100 * (rank < 5).mean() == pytest.approx(expected["top5"])
    assert -log_p[np.arange(360), split.labels].mean() == pytest.approx(expected["loss"], rel=1e-5)
    predictions = predictor.predict(split.read(np.arange(7)), 1)
    assert [best.label for (best,) in predictions] == logits[:7].argmax(axis=1).tolist()


def test_file_gives_the_pixels_of_the_data_set(
    finished: tuple[run.Run, Workdir], data_directory: pathlib.Path
) -> None:
    this, folder = finished
    predictor = Predictor(load.from_checkpoint(folder, "best"))
    split = this.dataset.evaluation
    records = Records(sorted(data_directory.glob("digits/1.0.0/*test.array_record*")))
    for example, pixels in zip(records.read([0, 5]), split.read(np.array([0, 5])), strict=True):
        np.testing.assert_array_equal(predictor.read(example.image, example.file_name), pixels)


def test_16_bit_files_use_the_training_bit_depth(
    finished: tuple[run.Run, Workdir],
) -> None:
    weights = load.from_checkpoint(finished[1], "best")
    assert weights.bit_depth == 0, "the digits are not 16-bit"
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8), 1000, np.uint16)).save(buffer, format="PNG")
    for depth, value in ((0, 250), (10, 250), (12, 62), (16, 3)):
        predictor = Predictor(dataclasses.replace(weights, bit_depth=depth))
        assert (predictor.read(buffer.getvalue(), "x") == value).all()


def test_run_of_older_version_says_how_to_upgrade(
    finished: tuple[run.Run, Workdir], tmp_path: pathlib.Path
) -> None:
    record = json.loads(finished[1].config.read_text())
    del record["dataset"]["class names"]
    atomic.write_json(Workdir(tmp_path).config, record)
    with pytest.raises(CheckpointError, match="Rerun the training command once to add them"):
        load.load(workdir=tmp_path, weights=None, checkpoint="best")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(small.weights(), batch_size=4)


@pytest.mark.parametrize("count", [1, 4, 6])
def test_logits_do_not_depend_on_the_batch(predictor: Predictor, count: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    alone = np.concatenate([predictor.logits(image[None]) for image in pixels[:count]])
    assert np.abs(alone[0] - alone[-1]).max() > 0.01 or count == 1
    np.testing.assert_allclose(predictor.logits(pixels[:count]), alone, rtol=1e-5, atol=1e-5)


GOOD = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (GOOD.astype(np.int32), r"got int32 .* pixels\.round\(\)\.astype\(numpy\.uint8\)"),
        (GOOD.astype(np.float32), r"got float32 .*from 0 to 255.* pixels\.round\(\)"),
        (GOOD / 255, r"got float64 .*from 0 to 1; use \(pixels \* 255\)\.round\(\)"),
        (GOOD / 64 - 2, r"images before normalization"),
        (GOOD.astype(np.int64) - 128, r"images before normalization"),
        (GOOD > 9, r"got bool .*integers from 0 to 255"),
        (GOOD[0], r"got uint8 \[8, 8, 3\]\. For a single image, use pixels\[None\]"),
        (GOOD.transpose(0, 3, 1, 2), r"\[2, 3, 8, 8\]\. .*numpy\.moveaxis\(pixels, -3, -1\)"),
        (GOOD.transpose(0, 3, 1, 2) / 255, r"moveaxis.*\. Its values are from 0 to 1; use"),
        (GOOD[0].transpose(2, 0, 1), r"numpy\.moveaxis\(pixels, -3, -1\)"),
        (GOOD[..., 0], r"numpy\.stack\(\[pixels\] \* 3, axis=-1\)"),
        (GOOD[..., :1], r"numpy\.repeat\(pixels, 3, axis=-1\)"),
        (GOOD[..., [0, 1, 2, 0]], r"alpha channel, use pixels\[\.\.\., :3\]"),
        (
            GOOD[:, :7],
            r"got uint8 \[2, 7, 8, 3\]\. Resize the images to 8 × 8 px, or prepare the files",
        ),
        (GOOD[:0], "must contain at least one image"),
        ("cat.jpg", "Use one array of all images"),
        ([GOOD[0], GOOD[0, :7]], "must be one array of all images"),
    ],
)
def test_invalid_arrays_are_rejected_with_remedy(
    predictor: Predictor, pixels: Any, message: str
) -> None:
    for use in (predictor.logits, predictor.predict):
        with pytest.raises(UserError, match=f"pixels: .*{message}"):
            use(pixels)


@pytest.mark.parametrize("pixels", [GOOD.astype(np.float32), GOOD[0], GOOD[:, :7]])
def test_preprocess_requires_pixels(predictor: Predictor, pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"must be uint8 \[N, 8, 8, 3\]"):
        predictor.preprocess(pixels)


def test_images_may_be_a_list_or_on_device(predictor: Predictor) -> None:
    expected = predictor.logits(GOOD)
    for pixels in (list(GOOD), jnp.asarray(GOOD)):
        np.testing.assert_array_equal(predictor.logits(pixels), expected)


def test_wrong_argument_types_are_rejected_with_remedy(predictor: Predictor) -> None:
    with pytest.raises(UserError, match=r"got PosixPath; load .* inception_jax\.load_weights"):
        Predictor(pathlib.Path("runs/x"))
    with pytest.raises(
        UserError, match=r"cat\.jpg: must be the content .* got str; use .*read_bytes\(\)"
    ):
        predictor.read("cat.jpg", "cat.jpg")


def test_top_k_is_sorted_by_probability(predictor: Predictor) -> None:
    logits = np.array([0, 3, 1, 3, -1000, 2, 0, 0, 0, 1000], np.float32)
    assert [g.label for g in predictor.top_k(logits, 5)] == [9, 1, 3, 5, 2]
    # Without the dominant logit: exp(3) / (2 exp(3) + exp(2) + exp(1) + 4), by hand.
    logits[9] = -1000
    best = predictor.top_k(logits)
    assert best[0].probability == pytest.approx(0.370047, abs=1e-6)
    assert best[0].name == "kind 1"
    assert sum(guess.probability for guess in predictor.top_k(logits, 99)) == pytest.approx(1)


def test_class_is_looked_up_by_name_or_number(predictor: Predictor) -> None:
    assert predictor.label("kind 7") == predictor.label("7") == 7
    with pytest.raises(UserError, match=r"'kind 70'.* Did you mean kind 7\?.*from 0 to 9"):
        predictor.label("kind 70")
    nameless = Predictor(dataclasses.replace(predictor.weights, class_names=()))
    assert nameless.class_name(3) == "3"


def test_preparation_is_described() -> None:
    data = Data(name="image_folder", storage="records", image_size=8, eval_crop_pct=0.875)
    changes = {"data": data, "evaluation": Evaluation(image_size=12)}
    for extra, message in (
        ({}, "the center square, resized to 8 × 8 px"),
        (
            changes,
            "the middle 87.5% of the center square, resized to 8 × 8 px, then to 12 × 12 px",
        ),
    ):
        assert Predictor(small.weights(**extra)).preparation == message


def test_view_shows_what_the_network_sees() -> None:
    data = Data(name="image_folder", storage="records", image_size=8, eval_crop_pct=0.5)
    predictor = Predictor(small.weights(data=data))
    # A quarter of the shorter side at each edge, and the ends of the longer side, are cropped.
    image = np.full((64, 96, 3), 255, np.uint8)
    image[16:48, 32:64] = (200, 100, 50)
    for size in (8, 32):
        view = predictor.view(gradcam.encode_png(image), "x", size)
        assert view.shape == (size, size, 3)
        # The filter mixes pixels outside the crop into its outermost pixels.
        assert (view[2:-2, 2:-2] == (200, 100, 50)).all()


def test_files_and_errors_are_read_in_order(predictor: Predictor, tmp_path: pathlib.Path) -> None:
    files = [str(tmp_path / f"{n}.png") for n in range(30)]
    for n, file in enumerate(files):
        image = np.full((9, 11, 3), n, np.uint8)
        pathlib.Path(file).write_bytes(b"" if n % 7 == 3 else gradcam.encode_png(image))
    files.insert(5, str(tmp_path / "gone.png"))
    read = list(read_files(predictor, files, view_size=16))
    assert len(read) == len(files)
    for file, result in zip(files, read, strict=True):
        stem = pathlib.Path(file).stem
        if stem == "gone" or int(stem) % 7 == 3:
            assert isinstance(result, DataError) and image_files.display_name(file) in str(result)
        else:
            assert not isinstance(result, DataError)
            assert result.name == file
            assert (result.pixels == int(stem)).all() and result.pixels.shape == (8, 8, 3)
            assert (result.view == int(stem)).all() and result.view.shape == (16, 16, 3)


def test_images_are_classified_among_errors(predictor: Predictor) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    read = [LoadedImage(str(n), image, image) for n, image in enumerate(pixels)]
    errors = [DataError(str(n)) for n in range(6)]
    mixed = [*errors[:5], read[0], errors[5], *read[1:]]
    batches = list(classify(predictor, mixed))
    assert [len(batch) for batch in batches] == [4, 4, 4, 1]
    flat = [each for batch in batches for each in batch]
    expected = iter(predictor.logits(pixels))
    for result, given in zip(flat, mixed, strict=True):
        if isinstance(given, DataError):
            assert result is given
        else:
            assert not isinstance(result, DataError) and result.image is given
            np.testing.assert_allclose(result.logits, next(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("count", "size"), [(1, 1), (2, 2), (3, 4), (64, 64), (10_000, 64)])
def test_batch_size_for_number_of_images(count: int, size: int) -> None:
    assert batch_size_for(count) == size
