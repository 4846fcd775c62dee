"""Networks, data and calls of a program's own: what is refused before it trains."""

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


class ToldOtherwise(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, training: bool = True) -> jax.Array:
        x = nn.BatchNorm(use_running_average=not training)(x.reshape(x.shape[0], -1))
        return nn.Dense(10)(x)


class Whole(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(10)(x.reshape(x.shape[0], -1)).astype(jnp.int32)


class Fixed(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1)[:, :10]


class Misspelled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dens(10)(x)  # type: ignore[attr-defined]


def test_a_network_may_have_a_module_of_any_name(data_directory: pathlib.Path) -> None:
    setup = ij.assemble(small.config(data_directory), model=Named())
    assert set(ij.create_state(setup).params) == {"network"}
    # What was assembled can be given again.
    again = ij.assemble(small.config(data_directory), model=setup.model)
    assert set(ij.create_state(again).params) == {"network"}


def test_layers_in_a_row_are_a_network(data_directory: pathlib.Path) -> None:
    layers = nn.Sequential([lambda x: x.reshape(x.shape[0], -1), nn.Dense(10)])
    assert ij.create_state(ij.assemble(small.config(data_directory), model=layers)).params


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (ToldOtherwise(), "'ToldOtherwise' failed .* ModifyScopeVariableError"),
        (Whole(), r"'Whole' returned int32 \[2, 10\] .* must return logits, float \[2, 10\]"),
        (Fixed(), "'Fixed' has no parameters, so there is nothing to train"),
        (Misspelled(), "'Misspelled' failed .* AttributeError: .* has no attribute 'Dens'"),
    ],
    ids=lambda each: type(each).__name__,
)
def test_a_network_that_could_not_be_evaluated_is_refused_before_it_trains(
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
def test_labels_that_are_no_numbering_are_refused(labels: list[int], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Dataset.from_arrays(np.zeros((16, 8, 8), np.uint8), labels)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda c, s: ij.train(c, ""), "workdir: is empty"),
        (lambda c, s: ij.train_batches(c), "run: must be what assemble.* returned, got Config"),
        (lambda c, s: ij.train_batches(s, -3, 1), "start = -3, stop = 1: must be whole"),
        (lambda c, s: ij.train_batches(s, 3, 1), "start = 3, stop = 1: must be whole"),
    ],
    ids=["folder", "run", "negative", "backwards"],
)
def test_calls_that_cannot_be_meant_are_answered(
    call: Any, words: str, data_directory: pathlib.Path
) -> None:
    config = small.config(data_directory)
    setup = ij.assemble(config, model=small.Linear())
    with pytest.raises(UserError, match=words):
        call(config, setup)


def test_a_file_that_is_run_for_its_parts_does_not_train(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(
        "import inception_jax as ij\n"
        "config = ij.load_config('experiments/digits.py')\n"
        f"ij.train(config, {str(tmp_path / 'run')!r})\n"
    )
    with pytest.raises(UserError, match=r"script\.py trains whenever it is run, and .* registe"):
        experiment.register_parts(path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="there is no such file"):
        experiment.register_parts(tmp_path / "none.py")


def test_what_training_uses_is_called_train_whatever_the_splits_are_called() -> None:
    made = Dataset.from_arrays(np.arange(16 * 64, dtype=np.uint8).reshape(16, 8, 8), [0, 1] * 8)
    other = Dataset.from_arrays(np.ones((4, 8, 8), np.uint8), [0, 1] * 2).train
    dataset = dataclasses.replace(
        made, splits={"extra": made.train, "train": other, "test": made.evaluation},
        train_split="extra", eval_split="test",
    )  # fmt: skip
    for split in (dataset.train_eval_view, dataset.view("train")):
        np.testing.assert_array_equal(split.labels, made.train.labels)
        assert len(split) == len(made.train) != len(other)
