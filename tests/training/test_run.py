"""Assembling a run: data sets, batches and devices."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from inception_jax.errors import ConfigError, UserError
from inception_jax.training import run
from tests import small


def test_dataset_fingerprint_distinguishes_content(data_directory: pathlib.Path) -> None:
    dataset = run.assemble(small.config(data_directory), log=lambda _: None).dataset
    content = run.dataset_fingerprint(dataset)
    assert content == run.dataset_fingerprint(dataset)
    assert content["train examples"] == 1437 and content["test examples"] == 360

    def differing(other: object) -> set[str]:
        return {
            name for name, value in run.dataset_fingerprint(other).items() if value != content[name]
        }

    labels = dataset.train.labels.copy()
    labels[700] = (labels[700] + 1) % 10
    train = dataclasses.replace(dataset.train, labels=labels)
    splits = dataset.splits | {"train": train}
    assert differing(dataclasses.replace(dataset, splits=splits)) == {"train labels"}
    brighter = dataclasses.replace(dataset, mean=np.nextafter(dataset.mean, np.float32(1)))
    assert differing(brighter) == {"mean and standard deviation"}
    names = ("none", *dataset.class_names[1:])
    assert differing(dataclasses.replace(dataset, class_names=names)) == {"class names"}


@pytest.mark.parametrize(("start", "stop"), [(0, 2.5), (2.0, 4), (3, 2), (-1, 2)])
def test_range_of_batches_must_be_integers(
    start: Any, stop: Any, data_directory: pathlib.Path
) -> None:
    this = small.build(small.config(data_directory))
    with pytest.raises(UserError, match=r"must be integers with 0 <= start <= stop"):
        run.train_batches(this, start, stop)


def test_only_training_needs_batches_that_the_devices_divide(data_directory: pathlib.Path) -> None:
    config = small.config(data_directory)
    config.train.batch_size = 64 * jax.device_count() + 1
    if jax.device_count() > 1:
        with pytest.raises(ConfigError, match="must be a multiple of"):
            run.assemble(config, log=lambda _: None)
    run.assemble(config, trains=False, log=lambda _: None)
