"""The file of weights: what is written is what is read, and everything else is refused."""

import dataclasses
import json
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from inception_jax import config as configs
from inception_jax.config import Config, Data, Evaluation, Model
from inception_jax.errors import ConfigError, DataError, UserError
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
        model=Model(width=0.5, options={"depth": 3}),
        image_size=64,
        eval_crop=0.875,
        eval_image_size=72,
        experiment="colors",
        dataset="image_folder",
        dataset_version="1.0.0",
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
        path.write_bytes(whole.replace(b'format\\": 2', b'format\\": 3'))
    elif damage == "setting":
        path.write_bytes(whole.replace(b'width\\": 0.5', b'width\\": [1]'))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "No such file"),
        ("truncated", "only a part"),
        ("empty", "only a part"),
        ("pickle", "pickle(.|\n)*import_weights"),
        ("zip", "pickle(.|\n)*import_weights"),
        ("foreign", "nothing about its network(.|\n)*import_weights"),
        ("newer", "its format is 3; this version reads up to 2"),
        ("setting", "config.model.width = .*: must be of type float"),
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
    rewrite(path, lambda description: description | {"std": std.tolist()})
    loaded = weights.load(path).std
    np.testing.assert_array_equal(loaded, found.std)
    assert loaded.dtype == np.float32


def rewrite(path: pathlib.Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes what a file says of itself."""
    arrays, metadata = weights.read_arrays(path)
    description = change(json.loads(metadata["inception_jax"]))
    save_file(arrays, path, {"inception_jax": json.dumps(description)})


def in_format_1(**groups: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns what makes a description one of version 0.1.0, with all settings of the training."""
    config = configs.to_dict(Config(name="old", **groups))
    # Those it did not have yet.
    del config["data"]["bit_depth"], config["model"]["options"]
    kept = ("image_size", "class_names", "mean", "std", "is_average", "step", "epoch", "metrics")
    return lambda description: (
        {"format": 1, "version": "0.1.0", "revision": None, "config": config}
        | {name: description[name] for name in kept}
    )


@pytest.mark.parametrize(("data", "depth"), [("image_folder", 16), ("tiny_imagenet", 0)])
def test_what_inference_needs_is_picked_out_of_the_settings_of_format_1(
    tmp_path: pathlib.Path, data: str, depth: int
) -> None:
    path = tmp_path / "weights"
    weights.save(path, example())
    groups = {
        "data": Data(name=data, eval_crop_pct=0.9),
        "model": Model(width=0.25),
        "evaluation": Evaluation(image_size=80),
    }
    rewrite(path, in_format_1(**groups))
    found = weights.load(path, pytest.fail)
    assert found.model == Model(width=0.25)
    assert (found.image_size, found.eval_crop, found.eval_image_size) == (64, 0.9, 80)
    assert (found.bit_depth, found.dataset, found.experiment) == (depth, data, "old")
    assert (found.checkpoint, found.step, found.class_names) == ("", 12, ("grün", "blau"))
    # Later ones of that format say these.
    rewrite(path, lambda description: description | {"bit_depth": 12, "checkpoint": "last"})
    found = weights.load(path)
    assert (found.bit_depth, found.checkpoint) == (12, "last")


@pytest.mark.parametrize("format", [1, 2])
def test_settings_of_other_versions_do_not_make_a_file_unreadable(
    format: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    weights.save(path, example(model=Model(width=0.5)))
    if format == 1:
        rewrite(path, in_format_1(model=Model(width=0.5)))

    def change(description: dict[str, Any]) -> dict[str, Any]:
        model = (description["config"] if format == 1 else description)["model"]
        del model["norm_epsilon"]
        # One that this version lacks, one that it calls otherwise, one that its rules refuse.
        model |= {"gate": "sigmoid", "breadth": model.pop("width"), "dropout": 7.0}
        return description

    rewrite(path, change)
    monkeypatch.setitem(configs.RENAMED, "model.breadth", "model.width")
    log: list[str] = []
    found = weights.load(path, log.append)
    assert found.model == Model(width=0.5, dropout=7.0)
    assert log == [
        f"{path}: config.model.gate = 'sigmoid': no setting of this version; it is left out"
    ]


def test_training_settings_are_not_written(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights"
    weights.save(path, example())
    description = json.loads(weights.read_arrays(path)[1]["inception_jax"])
    fields = {field.name for field in dataclasses.fields(Weights)}
    assert description.keys() == fields - {"variables", "origin"} | {"format"}


def test_no_one_who_gave_or_copies_the_settings_changes_the_weights() -> None:
    model = Model()
    found = example(model=model)
    model.width = 0.1
    dataclasses.replace(found, step=3).model.width = 0.2
    assert found.model.width == 1.0


def test_a_network_that_nothing_registered_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights"
    weights.save(path, example(model=Model(name="my_net")))
    with pytest.raises(ConfigError, match=r"weights: .*'my_net'.* once the file .* is imported"):
        _ = weights.load(path).network


def test_other_names_than_logits_are_refused(tmp_path: pathlib.Path) -> None:
    weights.save(tmp_path / "weights", example(class_names=("a", "b", "c")))
    with pytest.raises(DataError, match="3 class names and 2 logits"):
        weights.load(tmp_path / "weights")


def test_the_published_weights_are_read() -> None:
    """Version 0.1.0 wrote them, which does not say which checkpoint it was."""
    found = weights.load(
        command.ROOT / "results/pretrained/googlenet-s16-tiny-imagenet.safetensors", pytest.fail
    )
    assert str(found) == "googlenet, 200 classes, step 6,250, epoch 16.00, top-1 61.22%"
    assert (found.checkpoint, found.step, found.num_classes) == ("", 6250, 200)
    assert (found.class_names[0], found.class_names[-1]) == ("goldfish", "acorn")
    assert (found.experiment, found.dataset, found.image_size) == ("tiny_cpu", "tiny_imagenet", 64)
    assert found.metrics["flip_top1"] == pytest.approx(61.65)
    shapes = jax.eval_shape(found.network.init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    assert jax.tree.map(np.shape, found.variables) == jax.tree.map(np.shape, shapes)


def test_weights_say_which_checkpoint_they_were() -> None:
    assert "step 12, epoch 1.50 (best checkpoint), top-1 99.50%" in str(example())
