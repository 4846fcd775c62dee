"""The file of weights: what is written is what is read, and everything else is refused."""

import dataclasses
import json
import pathlib
import pickle
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from inception_jax.config import Config, Data, Model
from inception_jax.errors import DataError, UserError
from inception_jax.models import weights
from inception_jax.models.weights import Weights
from tests import command


def example(**changes: object) -> Weights:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    found = Weights(
        variables={
            "params": {
                "conv1": {"conv": {"kernel": normal(3, 3, 3, 4)}},
                "classifier": {"dense": {"kernel": normal(4, 2), "bias": normal(2)}},
            },
            "batch_stats": {"conv1": {"norm": {"mean": normal(4), "var": normal(4) ** 2}}},
        },
        config=Config(seed=7, model=Model(width=0.5)),
        class_names=("grün", "blau"),
        mean=normal(3),
        std=normal(3) ** 2,
        is_average=True,
        step=12,
        epoch=1.5,
        metrics={"top1": 99.5, "loss": 0.1},
        checkpoint="best",
        revision="abc",
    )
    return dataclasses.replace(found, **changes)


def test_what_is_saved_is_loaded(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights"
    saved = dataclasses.replace(example(), origin=str(path))
    weights.save(path, saved)
    loaded = weights.load(path)
    for field in dataclasses.fields(Weights):
        one, other = getattr(saved, field.name), getattr(loaded, field.name)
        if field.name == "variables":
            one, other = weights.flatten(one), weights.flatten(other)
            assert {leaf.dtype for leaf in other.values()} == {np.dtype(np.float32)}
        np.testing.assert_equal(other, one)
    assert (loaded.num_classes, loaded.image_size) == (2, 64)
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]


def test_a_network_without_batchnorm_and_unknown_classes_are_possible(
    tmp_path: pathlib.Path,
) -> None:
    saved = example(class_names=(), step=None, epoch=None)
    saved.variables["batch_stats"] = {}
    weights.save(tmp_path / "weights", saved)
    loaded = weights.load(tmp_path / "weights")
    assert (loaded.variables["batch_stats"], loaded.class_names, loaded.step) == ({}, (), None)


def test_the_same_weights_give_the_same_bytes(tmp_path: pathlib.Path) -> None:
    for name in ("one", "two"):
        weights.save(tmp_path / name, example())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bfloat16_rounds_parameters_and_keeps_statistics(tmp_path: pathlib.Path) -> None:
    saved = example()
    weights.save(tmp_path / "weights", saved, dtype="bfloat16")
    with safe_open(tmp_path / "weights", framework="np") as file:
        # The open file has keys(), but cannot be iterated over.
        types = {name: file.get_tensor(name).dtype.name for name in file.keys()}  # noqa: SIM118
    assert types == {
        name: "bfloat16" if name.startswith("params/") else "float32"
        for name in weights.flatten(saved.variables)
    }
    loaded = weights.flatten(weights.load(tmp_path / "weights").variables)
    for name, leaf in weights.flatten(saved.variables).items():
        rounded = leaf.astype(jnp.bfloat16) if name.startswith("params/") else leaf
        np.testing.assert_array_equal(loaded[name], rounded.astype(np.float32))


def write_damaged(path: pathlib.Path, damage: str) -> None:
    weights.save(path, example())
    whole = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(whole[:-5])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"fc.weight": [1.0]}))
    elif damage == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", "x")
    elif damage == "foreign":
        save_file({"fc.weight": np.zeros(3, np.float32)}, path)
    elif damage == "newer":
        path.write_bytes(whole.replace(b'format\\": 1', b'format\\": 2'))
    elif damage == "setting":
        path.write_bytes(whole.replace(b'\\"seed\\"', b'\\"sead\\"'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "No such file"),
        ("truncated", "only a part"),
        ("empty", "only a part"),
        ("pickle", "pickle(.|\n)*import_weights"),
        ("zip", "pickle(.|\n)*import_weights"),
        ("foreign", "nothing about its network(.|\n)*import_weights"),
        ("newer", "its format is 2; this version reads 1"),
        ("setting", "config.sead"),
    ],
)
def test_a_file_that_is_no_good_is_named(damage: str, words: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_damaged(path, damage)
    with pytest.raises(DataError, match=words) as error:
        weights.load(path)
    assert str(path) in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="none/weights: cannot be written"):
        weights.save(tmp_path / "none" / "weights", example())


def test_a_deviation_of_0_is_taken_as_1(tmp_path: pathlib.Path) -> None:
    """Older versions wrote it for a channel that never changes."""
    std = np.array([0, 0.5, 0], np.float32)
    found = example(std=std)
    np.testing.assert_array_equal(found.std, np.array([1, 0.5, 1], np.float32))
    path = tmp_path / "weights"
    weights.save(path, found)
    arrays, metadata = weights.read_arrays(path)
    description = json.loads(metadata["inception_jax"]) | {"std": std.tolist()}
    save_file(arrays, path, {"inception_jax": json.dumps(description)})
    loaded = weights.load(path).std
    np.testing.assert_array_equal(loaded, found.std)
    assert loaded.dtype == np.float32


@pytest.mark.parametrize(("data", "depth"), [("image_folder", 16), ("tiny_imagenet", 0)])
def test_files_of_older_versions_have_the_bit_depth_of_their_images(
    tmp_path: pathlib.Path, data: str, depth: int
) -> None:
    path = tmp_path / "weights"
    weights.save(path, example(config=Config(data=Data(name=data)), bit_depth=12))
    assert weights.load(path).bit_depth == 12
    arrays, metadata = weights.read_arrays(path)
    description = json.loads(metadata["inception_jax"])
    del description["bit_depth"], description["config"]["data"]["bit_depth"]
    save_file(arrays, path, {"inception_jax": json.dumps(description)})
    assert weights.load(path).bit_depth == depth


def test_a_file_of_an_older_version_is_read() -> None:
    """It does not say which checkpoint it was."""
    found = weights.load(
        command.ROOT / "results/pretrained/googlenet-s16-tiny-imagenet.safetensors"
    )
    assert (found.checkpoint, found.step, found.num_classes) == ("", 6250, 200)
    assert str(found) == "googlenet, 200 classes, step 6,250, epoch 16.00, top-1 61.22%"


def test_weights_say_which_checkpoint_they_were() -> None:
    assert "step 12, epoch 1.50 (best checkpoint), top-1 99.50%" in str(example())
