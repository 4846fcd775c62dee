"""Stored predictions and their file."""

import dataclasses
import pathlib
import re
import resource

import numpy as np
import pytest

from inception_jax.datasets.splits import DecodedSplit
from inception_jax.errors import UserError
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Predictions
from inception_jax.storage.workdir import Workdir
from tests import run_folders


def split(folder: pathlib.Path, count: int, size: int) -> DecodedSplit:
    """Returns a split of uniform images, each with a different gray level."""
    pixels = np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, 3)
    )
    np.save(folder / "images.npy", pixels)
    (folder / "names.txt").write_text("".join(f"{n}.png\n" for n in range(count)))
    labels = np.zeros(count, np.int32)
    return DecodedSplit(labels, size, folder / "names.txt", folder / "images.npy")


def test_confident_mistakes_come_first_then_spaced_correct_examples() -> None:
    predicted = run_folders.fake_predictions(10, count=200)
    indices = predictions.select_examples(predicted)
    mistakes, correct = indices[: predictions.MAX_MISTAKES], indices[predictions.MAX_MISTAKES :]
    wrong = [n for n in range(200) if predicted.top_classes[n, 0] != predicted.labels[n]]
    expected = sorted(wrong, key=lambda n: -predicted.top_probs[n, 0])[: predictions.MAX_MISTAKES]
    assert mistakes.tolist() == expected
    assert len(correct) == predictions.MAX_CORRECT
    assert predicted.correct[correct].all()
    assert (
        correct[0] == np.flatnonzero(predicted.correct)[0]
        and correct[-1] == np.flatnonzero(predicted.correct)[-1]
    )


@pytest.mark.parametrize("correct", [True, False])
def test_split_may_be_all_correct_or_all_wrong(correct: bool) -> None:
    one = np.ones(3, np.float32)
    guesses = np.full((3, 1), 0 if correct else 1, np.int32)
    indices = predictions.select_examples(
        Predictions(np.zeros(3, np.int32), guesses, one[:, None], one)
    )
    assert indices.tolist() == [0, 1, 2]


def test_file_round_trip(tmp_path: pathlib.Path) -> None:
    predicted = run_folders.fake_predictions(7, count=60)
    result = {"step": 3, "split": "test", "loss": 0.1234567890123}
    written = predictions.with_images(result, predicted, split(tmp_path, 60, 8))
    predictions.write(Workdir(tmp_path), written)
    saved = predictions.read(Workdir(tmp_path))
    assert saved is not None
    assert saved.result == result
    for field in dataclasses.fields(Predictions):
        before, after = (getattr(each, field.name) for each in (predicted, saved.predictions))
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert saved.names == tuple(f"{index}.png" for index in saved.indices)
    assert saved.images.shape[1:] == (8, 8, 3)
    assert saved.images[:, 0, 0, 0].tolist() == saved.indices.tolist()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_large_images_are_downscaled(tmp_path: pathlib.Path) -> None:
    predicted = run_folders.fake_predictions(7, count=60)
    saved = predictions.with_images({}, predicted, split(tmp_path, 60, 160))
    side = predictions.MAX_IMAGE_SIZE
    assert saved.images.shape[1:] == (side, side, 3)
    assert saved.images[:, 5, 5, 1].tolist() == saved.indices.tolist()


def test_missing_file_gives_none(tmp_path: pathlib.Path) -> None:
    assert predictions.read(Workdir(tmp_path)) is None


@pytest.mark.parametrize("damage", ["cut", "text", "other", "pickle"])
def test_corrupt_file_is_a_user_error(damage: str, tmp_path: pathlib.Path) -> None:
    path = run_folders.write(tmp_path) / "predictions.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "other":
        np.savez(path, labels=np.zeros(3))
    else:
        np.savez(path, result=np.array([object()], object))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: not a readable"):
        predictions.read(Workdir(tmp_path))


def test_full_disk_is_a_user_error_and_keeps_old_file(tmp_path: pathlib.Path) -> None:
    saved = predictions.read(Workdir(run_folders.write(tmp_path)))
    assert saved is not None
    before = (tmp_path / "predictions.npz").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the file size makes writes fail like a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            predictions.write(Workdir(tmp_path), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "predictions.npz").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_unwritable_directory_is_a_user_error(tmp_path: pathlib.Path) -> None:
    saved = predictions.read(Workdir(run_folders.write(tmp_path / "run")))
    assert saved is not None
    with pytest.raises(UserError, match="cannot be written"):
        predictions.write(Workdir(tmp_path / "none"), saved)
