"""Networks, data and calls of a user's program that are rejected before training."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import inception_jax as ij
from inception_jax import experiment
from inception_jax.datasets.dataset import Dataset
from inception_jax.errors import DataError, UserError
from tests import small


class Named(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10, name="network")(x.reshape(x.shape[0], -1))


class TrainingArgument(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, training: bool = True) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not training)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


class IntegerLogits(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(x.reshape(x.shape[0], -1)).astype(jnp.int32)


class NoParameters(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)[:, :10]


class Misspelled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dens(10)(x)  # type: ignore[attr-defined]


def test_network_may_have_a_module_of_any_name(data_directory: pathlib.Path) -> None:
    setup = ij.assemble(small.config(data_directory), model=Named())
    assert set(ij.create_state(setup).params) == {"network"}
    # The model of an assembled run can be passed again.
    again = ij.assemble(small.config(data_directory), model=setup.model)
    assert set(ij.create_state(again).params) == {"network"}


def test_nn_sequential_is_a_network(data_directory: pathlib.Path) -> None:
    layers = nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(10)])
    assert ij.create_state(ij.assemble(small.config(data_directory), model=layers)).params


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            TrainingArgument(),
            "'TrainingArgument' has the argument 'training', .* an argument train instead",
        ),
        (
            IntegerLogits(),
            r"'IntegerLogits' returned int32 \[2, 10\] .* must return logits, float \[2, 10\]",
        ),
        (NoParameters(), "'NoParameters' has no parameters, so it cannot be trained"),
        (Misspelled(), "'Misspelled' failed .* AttributeError: .* has no attribute 'Dens'"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_network_that_cannot_be_evaluated_is_rejected_before_training(
    model: nn.Module, words: str, data_directory: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=words):
        ij.assemble(small.config(data_directory), model=model)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 2, 2**31 - 1] * 4, "4 distinct values, up to 2147483647; must be 0 to 3; renumber"),
        ([0, 100, 200, 300] * 4, "4 distinct values, up to 300"),
        ([0] * 16, "only one class"),
    ],
)
def test_invalid_label_numbering_is_rejected(labels: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Dataset.from_arrays(np.zeros((16, 8, 8), np.uint8), labels)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c, s: ij.train(c, ""), "workdir: must not be empty"),
        (lambda c, s: ij.train_batches(c), "run: must be a Run from assemble.*, got Config"),
        (lambda c, s: ij.train_batches(s, -3, 1), "start = -3, stop = 1: must be integers"),
        (lambda c, s: ij.train_batches(s, 3, 1), "start = 3, stop = 1: must be integers"),
    ],
    ids=["folder", "run", "negative", "backwards"],
)
def test_invalid_calls_are_rejected(call: Any, words: str, data_directory: pathlib.Path) -> None:
    config = small.config(data_directory)
    setup = ij.assemble(config, model=small.Linear())
    with pytest.raises(UserError, match=words):
        call(config, setup)


def test_file_imported_for_its_parts_does_not_train(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import inception_jax as ij\n"
        "config = ij.load_config('experiments/digits.py')\n"
        f"ij.train(config, {str(tmp_path / 'run')!r})\n"
    )
    with pytest.raises(UserError, match=r"script\.py: trains when it is run, .* to register"):
        experiment.register_parts(path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="file not found"):
        experiment.register_parts(tmp_path / "none.py")


def test_training_split_is_called_train_whatever_its_source_name() -> None:
    base = Dataset.from_arrays(np.arange(16 * 64, dtype=np.uint8).reshape(16, 8, 8), [0, 1] * 8)
    other = Dataset.from_arrays(np.ones((4, 8, 8), np.uint8), [0, 1] * 2).train
    dataset = dataclasses.replace(
        base, splits={"extra": base.train, "train": other, "test": base.evaluation},
        train_split="extra", eval_split="test",
    )  # fmt: skip
    for split in (dataset.train_eval_view, dataset.view("train")):
        np.testing.assert_array_equal(split.labels, base.train.labels)
        assert len(split) == len(base.train) != len(other)
