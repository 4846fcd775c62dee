"""The fingerprint that distinguishes the data sets of hosts."""

import dataclasses
import pathlib

import numpy as np

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
