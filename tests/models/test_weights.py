"""Tests weights files: the round trip, and rejection of everything else."""

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
from inception_jax.config.other_names import Renamed
from inception_jax.errors import ConfigError, DataError, UserError
from inception_jax.models import weights
from inception_jax.models.weights import Weights
from tests import command, small


def example(**changes: object) -> Weights:
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape).astype(np.float32)

    defaults = Weights(
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
        resize_kernel="lanczos3",
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
    return dataclasses.replace(defaults, **changes)


def test_save_and_load_round_trip(tmp_path: pathlib.Path) -> None:
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


def test_batch_norm_and_class_names_are_optional(
    tmp_path: pathlib.Path,
) -> None:
    saved = example(class_names=(), step=None, epoch=None)
    saved.variables["batch_stats"] = {}
    weights.save(tmp_path / "weights", saved)
    loaded = weights.load(tmp_path / "weights")
    assert (loaded.variables["batch_stats"], loaded.class_names, loaded.step) == ({}, (), None)


def test_same_weights_give_same_bytes(tmp_path: pathlib.Path) -> None:
    for name in ("one", "two"):
        weights.save(tmp_path / name, example())
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_bfloat16_rounds_parameters_and_keeps_statistics(tmp_path: pathlib.Path) -> None:
    saved = example()
    weights.save(tmp_path / "weights", saved, dtype="bfloat16")
    with safe_open(tmp_path / "weights", framework="np") as file:
        # The open file has keys(), but is not iterable.
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
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-5])
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
        path.write_bytes(content.replace(b'format\\": 2', b'format\\": 3'))
    elif damage == "setting":
        path.write_bytes(content.replace(b'width\\": 0.5', b'width\\": [1]'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", "No such file"),
        ("truncated", "truncated"),
        ("empty", "truncated"),
        ("pickle", "pickle(.|\n)*import_weights"),
        ("zip", "pickle(.|\n)*import_weights"),
        ("foreign", "no description of its network(.|\n)*import_weights"),
        ("newer", "format = 3: this version reads up to 2"),
        ("setting", "config.model.width = .*: must be of type float"),
    ],
)
def test_damaged_or_foreign_file_is_rejected(
    damage: str, message: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "weights.safetensors"
    write_damaged(path, damage)
    with pytest.raises(DataError, match=message) as error:
        weights.load(path)
    assert str(path) in str(error.value)


def test_missing_folder_is_reported(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="none/weights: cannot be written"):
        weights.save(tmp_path / "none" / "weights", example())


def test_zero_deviation_becomes_one(tmp_path: pathlib.Path) -> None:
    """Older versions stored 0 for constant channels."""
    std = np.array([0, 0.5, 0], np.float32)
    saved = example(std=std)
    np.testing.assert_array_equal(saved.std, np.array([1, 0.5, 1], np.float32))
    path = tmp_path / "weights"
    weights.save(path, saved)
    rewrite(path, lambda description: description | {"std": std.tolist()})
    loaded = weights.load(path).std
    np.testing.assert_array_equal(loaded, saved.std)
    assert loaded.dtype == np.float32


def rewrite(path: pathlib.Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Changes a file's description."""
    arrays, metadata = weights.read_arrays(path)
    description = change(json.loads(metadata["inception_jax"]))
    save_file(arrays, path, {"inception_jax": json.dumps(description)})


def in_format_1(**groups: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Returns a function that converts a description to version 0.1.0, with training settings."""
    config = configs.to_dict(Config(name="old", **groups))
    # Settings that version 0.1.0 did not have.
    del config["data"]["bit_depth"], config["model"]["options"]
    kept = ("image_size", "class_names", "mean", "std", "is_average", "step", "epoch", "metrics")
    return lambda description: (
        {"format": 1, "version": "0.1.0", "revision": None, "config": config}
        | {name: description[name] for name in kept}
    )


@pytest.mark.parametrize(("data", "depth"), [("image_folder", 16), ("tiny_imagenet", 0)])
def test_format_1_provides_what_inference_needs(
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
    loaded = weights.load(path, pytest.fail)
    assert loaded.model == Model(width=0.25)
    assert (loaded.image_size, loaded.eval_crop, loaded.eval_image_size) == (64, 0.9, 80)
    assert (loaded.bit_depth, loaded.dataset, loaded.experiment) == (depth, data, "old")
    assert (loaded.checkpoint, loaded.step, loaded.class_names) == ("", 12, ("grün", "blau"))
    # Later files of that format have these.
    rewrite(path, lambda description: description | {"bit_depth": 12, "checkpoint": "last"})
    loaded = weights.load(path)
    assert (loaded.bit_depth, loaded.checkpoint) == (12, "last")


@pytest.mark.parametrize("format", [1, 2])
def test_settings_of_other_versions_are_tolerated(
    format: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    weights.save(path, example(model=Model(width=0.5)))
    if format == 1:
        rewrite(path, in_format_1(model=Model(width=0.5)))

    def change(description: dict[str, Any]) -> dict[str, Any]:
        model = (description["config"] if format == 1 else description)["model"]
        del model["norm_epsilon"]
        # A setting that this version lacks, one that it renamed, one that is out of range.
        model |= {"gate": "sigmoid", "breadth": model.pop("width"), "dropout": 7.0}
        return description

    rewrite(path, change)
    monkeypatch.setitem(configs.RENAMED, "model.breadth", Renamed("model.width"))
    log: list[str] = []
    loaded = weights.load(path, log.append)
    assert loaded.model == Model(width=0.5, dropout=7.0)
    assert log == [
        f"{path}: config.model.gate = 'sigmoid': ignored, because this version has no such setting"
    ]


def test_training_settings_are_not_stored(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights"
    weights.save(path, example())
    description = json.loads(weights.read_arrays(path)[1]["inception_jax"])
    fields = {field.name for field in dataclasses.fields(Weights)}
    assert description.keys() == fields - {"variables", "origin", "module"} | {"format"}


def test_model_settings_are_copied() -> None:
    model = Model()
    copied = example(model=model)
    model.width = 0.1
    dataclasses.replace(copied, step=3).model.width = 0.2
    assert copied.model.width == 1.0


def test_unregistered_network_is_reported(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "weights"
    weights.save(path, example(model=Model(name="my_net")))
    with pytest.raises(
        ConfigError, match=r"weights: .*'my_net'.* import the file that registers it"
    ):
        _ = weights.load(path).network


def test_class_names_must_match_logits(tmp_path: pathlib.Path) -> None:
    weights.save(tmp_path / "weights", example(class_names=("a", "b", "c")))
    with pytest.raises(DataError, match="3 class names and 2 logits"):
        weights.load(tmp_path / "weights")


def test_published_weights_are_read() -> None:
    """Written by version 0.1.0, which did not record the checkpoint's role."""
    loaded = weights.load(
        command.ROOT / "results/pretrained/googlenet-s16-tiny-imagenet.safetensors", pytest.fail
    )
    assert str(loaded) == "googlenet, 200 classes, step 6,250, epoch 16.00, top-1 61.22%"
    assert (loaded.checkpoint, loaded.step, loaded.num_classes) == ("", 6250, 200)
    assert (loaded.class_names[0], loaded.class_names[-1]) == ("goldfish", "acorn")
    assert (loaded.experiment, loaded.dataset, loaded.image_size) == (
        "tiny_cpu",
        "tiny_imagenet",
        64,
    )
    assert loaded.metrics["flip_top1"] == pytest.approx(61.65)
    shapes = jax.eval_shape(loaded.network.init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    assert jax.tree.map(np.shape, loaded.variables) == jax.tree.map(np.shape, shapes)


def test_weights_name_their_checkpoint() -> None:
    assert "step 12, epoch 1.50 (best checkpoint), top-1 99.50%" in str(example())


def test_scalar_parameters_keep_their_shape(tmp_path: pathlib.Path) -> None:
    given = small.weights()
    given.variables["params"]["temperature"] = np.float32(2)
    weights.save(tmp_path / "w.safetensors", given)
    arrays, _ = weights.read_arrays(tmp_path / "w.safetensors")
    assert arrays["params/temperature"].shape == ()
