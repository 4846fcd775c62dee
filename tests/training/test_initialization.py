"""Exported weights: evaluated like their checkpoint, and used to initialize another run."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from inception_jax.config import Checkpoint, Config, Data, Init, Model, Train
from inception_jax.errors import ConfigError
from inception_jax.evaluation.evaluate import Evaluator, evaluate_checkpoint, evaluate_weights
from inception_jax.inference import load
from inception_jax.models import networks, weights
from inception_jax.models.weights import Weights
from inception_jax.storage.workdir import Workdir
from inception_jax.training import initialization, run, state
from inception_jax.training.checkpoints import Checkpoints
from tests import small


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A finished run and the file of its last checkpoint."""

    run: run.Run
    workdir: Workdir
    path: pathlib.Path
    weights: Weights


@pytest.fixture(scope="module")
def source(data_directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Source:
    this, folder = small.finished(small.config(data_directory), tmp_path_factory.mktemp("source"))
    exported = load.from_checkpoint(folder, "last")
    path = folder.path / "weights.safetensors"
    weights.save(path, exported)
    return Source(this, folder, path, exported)


def build(config: Config) -> run.Run:
    return run.assemble(config, log=lambda _: None)


def initialize(this: run.Run) -> tuple[state.TrainState, dict[str, np.ndarray], list[str]]:
    """Returns the state before the first step, its leaves by path, and the notes."""
    start = initialization.initialize_from(this, state.abstract_state(this))
    first = state.with_initial_weights(state.create(this), start.values)
    variables = {"params": first.params, "batch_stats": first.batch_stats}
    return first, weights.flatten(jax.device_get(variables)), start.notes


def test_file_evaluates_exactly_as_its_checkpoint(source: Source) -> None:
    expected = evaluate_checkpoint(source.run, source.workdir, "last")
    assert evaluate_weights(source.run, weights.load(source.path)) == expected
    assert source.weights.is_average
    assert source.weights.step == 11
    assert {k: expected[k] for k in ("loss", "top1", "top5")}.items() <= (
        source.weights.metrics.items()
    )


def test_evaluation_uses_normalization_of_weights(source: Source, tmp_path: pathlib.Path) -> None:
    expected = evaluate_weights(source.run, weights.load(source.path))
    dataset = dataclasses.replace(source.run.dataset, mean=np.full(3, 0.9, np.float32))
    other = dataclasses.replace(source.run, dataset=dataset)
    assert evaluate_weights(other, source.weights) == expected


def test_evaluation_tells_how_its_images_differ_from_those_of_weights(source: Source) -> None:
    logged: list[str] = []
    evaluate_weights(source.run, weights.load(source.path), logged.append)
    assert not logged
    size = source.weights.image_size
    other = dataclasses.replace(
        source.weights, eval_crop=0.875, eval_image_size=size + 4, resize_kernel="lanczos3"
    )
    evaluate_weights(source.run, other, logged.append)
    assert [line.partition(": ")[2] for line in logged] == [
        f"config.evaluation.image_size is {size}; recorded with the weights: {size + 4}",
        "config.data.eval_crop_pct is 1.0; recorded with the weights: 0.875",
        "config.data.resize_kernel is 'linear'; recorded with the weights: 'lanczos3'",
    ]
    same = dataclasses.replace(source.weights, eval_image_size=size)
    evaluate_weights(source.run, same, logged.append)
    assert len(logged) == 3


def fine_tuning(directory: pathlib.Path, path: pathlib.Path, **changes: Any) -> Config:
    """Returns settings of a run from a file; its first step has rate 0 and changes nothing."""
    groups = {
        "init": Init(pretrained=str(path)),
        "checkpoint": Checkpoint(every="1 step", keep_last=20),
    }
    return small.config(directory, **(groups | changes))


def test_new_run_starts_from_file_and_resume_does_not_need_it(
    source: Source,
    data_directory: pathlib.Path,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "copy.safetensors"
    train = Train(batch_size=64, duration="3 steps", ema="5 steps")
    this = small.build(fine_tuning(data_directory, path, train=train))
    drawn = small.random_variables(this.model, 8)
    weights.save(path, dataclasses.replace(source.weights, variables=drawn))
    folder = Workdir(tmp_path / "run")
    small.train(this, folder, Evaluator(this), changed=[])
    assert f"initialized from {path}: mini_googlenet, 10 classes, step 11" in capfd.readouterr().err

    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        abstract_model = state.abstract_state(this).model_item()
        model = jax.device_get(checkpoints.restore_model(1, abstract_model))
    expected = drawn["params"]
    jax.tree.map(np.testing.assert_array_equal, model["params"], expected)
    # The average is of equal values, so it adds only rounding errors.
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6),
        model["average"]["params"],
        expected,
    )

    path.unlink()
    resumed = small.train(this, folder, Evaluator(this), changed=[])
    assert resumed["step"] == 3


def test_state_starts_from_parameters_statistics_and_average(
    source: Source, data_directory: pathlib.Path
) -> None:
    this = build(fine_tuning(data_directory, source.path))
    first, leaves, notes = initialize(this)
    expected = weights.flatten(source.weights.variables)
    for name, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    jax.tree.map(np.testing.assert_array_equal, first.average["params"], first.params)
    jax.tree.map(np.testing.assert_array_equal, first.average["batch_stats"], first.batch_stats)
    assert len(notes) == 1
    assert first.step == 0


@pytest.mark.parametrize("classes", [10, 7], ids=["other-names", "other-number"])
def test_classifier_is_reinitialized_for_other_classes(
    classes: int, source: Source, data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    leaves = {
        name: leaf[..., :classes] if "/classifier/" in name else leaf
        for name, leaf in weights.flatten(source.weights.variables).items()
    }
    other = dataclasses.replace(
        source.weights,
        variables=weights.unflatten(leaves),
        class_names=tuple(f"animal {index}" for index in range(classes)),
    )
    path = tmp_path / "other.safetensors"
    weights.save(path, other)
    this = build(fine_tuning(data_directory, path))
    _, initial, notes = initialize(this)
    fresh = weights.flatten(jax.device_get({"params": state.create(this).params}))
    for name, leaf in initial.items():
        expected = fresh if "/classifier/" in name else leaves
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    assert any("the classifier is re-initialized" in note for note in notes)
    with pytest.raises(ConfigError, match="other classes"):
        evaluate_weights(this, weights.load(path))


def test_other_normalization_is_folded_into_first_layer(
    source: Source, data_directory: pathlib.Path
) -> None:
    this = build(fine_tuning(data_directory, source.path))
    mean, std = np.float32([0.2, 0.4, 0.5]), np.float32([0.5, 0.2, 0.3])
    other = dataclasses.replace(this, dataset=dataclasses.replace(this.dataset, mean=mean, std=std))
    _, leaves, notes = initialize(other)
    assert "adapted" in notes[-1]

    # For an image of a single color, the first layer's output is unchanged away from the border.
    def inside(variables: Any, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
        image = (np.full((1, 8, 8, 3), [0.3, 0.6, 0.9], np.float32) - mean) / std

        # Compiled, so that later layers are removed as dead code.
        @jax.jit
        def first(variables: Any, image: np.ndarray) -> jax.Array:
            _, outputs = this.model.apply(variables, image, capture_intermediates=True)
            return outputs["intermediates"]["conv1"]["__call__"][0]

        return np.asarray(first(variables, image))[:, 2:-2, 2:-2]

    expected = inside(source.weights.variables, source.weights.mean, source.weights.std)
    result = inside(weights.unflatten(leaves), mean, std)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(result, expected, atol=1e-4)


def test_other_mean_that_no_variable_absorbs_is_refused(
    source: Source, data_directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this = build(fine_tuning(data_directory, source.path))
    dataset = dataclasses.replace(this.dataset, mean=np.float32([0.2, 0.4, 0.5]))
    monkeypatch.setattr(type(this.model), "first_norm", "")
    with pytest.raises(ConfigError, match=r"needs a bias of conv1/conv, or the BatchNorm after it"):
        initialize(dataclasses.replace(this, dataset=dataset))
    # The kernel alone absorbs another deviation.
    dataset = dataclasses.replace(
        this.dataset, mean=source.weights.mean, std=np.float32([0.5, 0.2, 0.3])
    )
    assert "adapted" in initialize(dataclasses.replace(this, dataset=dataset))[2][-1]


def test_weights_of_another_network_are_rejected_with_differences(
    source: Source, data_directory: pathlib.Path
) -> None:
    wide = Model(name="mini_googlenet", width=0.25, dropout=0.1)
    this = build(fine_tuning(data_directory, source.path, model=wide))
    with pytest.raises(ConfigError) as error:
        initialization.initialize_from(this, state.abstract_state(this))
    message = str(error.value)
    assert f"{source.path}: the weights belong to another network" in message
    assert "shape mismatch: params/" in message and "(3, 3, 3, 12) in the file" in message
    assert message.count("shape mismatch") == 10 and "more\n" in message
    assert "config.model.width: 0.125 in the file, 0.25 here" in message
    with pytest.raises(ConfigError, match="another network"):
        evaluate_weights(this, source.weights)


def test_weights_with_other_norm_epsilon_are_not_evaluated(
    source: Source, data_directory: pathlib.Path
) -> None:
    other = Model(name="mini_googlenet", width=0.125, dropout=0.1, norm_epsilon=0.1)
    this = build(fine_tuning(data_directory, source.path, model=other))
    with pytest.raises(ConfigError, match=r"norm_epsilon: 0\.001 in the file, 0\.1 here"):
        evaluate_weights(this, source.weights)
    assert any("norm_epsilon" in note for note in initialize(this)[2])


@pytest.mark.parametrize("theirs", [True, False], ids=["ignored", "re-initialized"])
def test_auxiliary_heads_may_be_on_one_side_only(
    theirs: bool, data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    def model(heads: bool) -> Model:
        return Model(stem="s16", width=0.03, aux_heads=heads)

    data = Data(name="digits", directory=str(data_directory), image_size=16)
    path = tmp_path / "weights"
    this = build(fine_tuning(data_directory, path, data=data, model=model(not theirs)))
    module = networks.create(model(theirs), 10)
    shapes = jax.eval_shape(
        lambda: module.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))
    )
    variables = jax.tree.map(lambda leaf: np.full(leaf.shape, 0.5, np.float32), shapes)
    dataset = this.dataset
    saved = Weights(
        variables=variables,
        model=model(theirs),
        image_size=16,
        class_names=dataset.class_names,
        mean=dataset.mean,
        std=dataset.std,
    )
    weights.save(path, saved)
    start = initialization.initialize_from(this, state.abstract_state(this))
    assert set(start.values) == {name for name in weights.flatten(variables) if "/aux_" not in name}
    notes = [note for note in start.notes if "auxiliary head aux_4a" in note]
    assert len(notes) == 1
    assert ("ignored" if theirs else "re-initialized") in notes[0]
