"""What an evaluation leaves of each example, and its file."""

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
from tests import run_folders


def split(folder: pathlib.Path, count: int, size: int) -> DecodedSplit:
    """A split of plain pictures, each of a grey of its own."""
    pixels = np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, size, size, 3)
    )
    np.save(folder / "images.npy", pixels)
    (folder / "names.txt").write_text("".join(f"{n}.png\n" for n in range(count)))
    labels = np.zeros(count, np.int32)
    return DecodedSplit(labels, size, folder / "names.txt", folder / "images.npy")


def test_the_surest_mistakes_come_first_then_a_spread_of_right_answers() -> None:
    made = run_folders.fake_predictions(10, count=200)
    shown = predictions.choose(made)
    mistakes, right = shown[: predictions.MISTAKES], shown[predictions.MISTAKES :]
    wrong = [n for n in range(200) if made.guesses[n, 0] != made.labels[n]]
    expected = sorted(wrong, key=lambda n: -made.probabilities[n, 0])[: predictions.MISTAKES]
    assert mistakes.tolist() == expected
    assert len(right) == predictions.RIGHT
    assert made.right[right].all()
    assert right[0] == np.flatnonzero(made.right)[0] and right[-1] == np.flatnonzero(made.right)[-1]


@pytest.mark.parametrize("right", [True, False])
def test_a_split_may_be_all_right_or_all_wrong(right: bool) -> None:
    one = np.ones(3, np.float32)
    guesses = np.full((3, 1), 0 if right else 1, np.int32)
    shown = predictions.choose(Predictions(np.zeros(3, np.int32), guesses, one[:, None], one))
    assert shown.tolist() == [0, 1, 2]


def test_the_file_gives_back_what_was_written(tmp_path: pathlib.Path) -> None:
    made = run_folders.fake_predictions(7, count=60)
    result = {"step": 3, "split": "test", "loss": 0.1234567890123}
    written = predictions.gather(result, made, split(tmp_path, 60, 8))
    predictions.write(tmp_path, written)
    found = predictions.read(tmp_path)
    assert found is not None
    assert found.result == result
    for field in dataclasses.fields(Predictions):
        before, after = (getattr(each, field.name) for each in (made, found.predictions))
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)
    assert found.names == tuple(f"{index}.png" for index in found.shown)
    assert found.pictures.shape[1:] == (8, 8, 3)
    assert found.pictures[:, 0, 0, 0].tolist() == found.shown.tolist()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_large_pictures_are_kept_small(tmp_path: pathlib.Path) -> None:
    made = run_folders.fake_predictions(7, count=60)
    found = predictions.gather({}, made, split(tmp_path, 60, 160))
    side = predictions.MOST_PIXELS
    assert found.pictures.shape[1:] == (side, side, 3)
    assert found.pictures[:, 5, 5, 1].tolist() == found.shown.tolist()


def test_a_folder_without_the_file_has_none(tmp_path: pathlib.Path) -> None:
    assert predictions.read(tmp_path) is None


@pytest.mark.parametrize("damage", ["cut", "text", "other", "pickle"])
def test_a_damaged_file_is_the_users_error(damage: str, tmp_path: pathlib.Path) -> None:
    path = run_folders.write(tmp_path) / "predictions.npz"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-300])
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "other":
        np.savez(path, labels=np.zeros(3))
    else:
        np.savez(path, result=np.array([object()], object))
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}: cannot be read"):
        predictions.read(tmp_path)


def test_a_full_disk_is_the_users_error_and_keeps_the_old_file(tmp_path: pathlib.Path) -> None:
    found = predictions.read(run_folders.write(tmp_path))
    assert found is not None
    before = (tmp_path / "predictions.npz").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of a file fails a write as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            predictions.write(tmp_path, found)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "predictions.npz").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path: pathlib.Path) -> None:
    found = predictions.read(run_folders.write(tmp_path / "run"))
    assert found is not None
    with pytest.raises(UserError, match="cannot be written"):
        predictions.write(tmp_path / "none", found)
