"""The data sets by name: what has to be known of each before its builder is imported.

Training from prepared data must not import TFDS (0.3 to 1 s at every start), so a builder is named
by its path here and imported by `DatasetSpec.builder_class` when something is to be prepared.
"""

import dataclasses
import importlib
import os
from collections.abc import Mapping
from typing import Any

from inception_jax.datasets.sources import files
from inception_jax.errors import ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class DatasetSpec:
    """A data set's facts.

    Attributes:
      name: as in `config.data.name`; also the name of the TFDS dataset.
      version: of the TFDS dataset; rises when its records change.
      train_split, eval_split: names of the splits to train on and to evaluate on.
      builder: the builder's class as 'module:Class'.
      fixed_content: whether every source holds the same examples, so that data prepared from one
        serve for another.
      takes_source: whether `config.data.source` has a meaning.
      contents_function: the function that returns the `files.Contents` of a source, given its path
        and the settings, as 'module:function'; needed where the content is not fixed.
      classes: how many there are; 0: the source decides.
      settings: the fields of `config.Data` besides the source that the builder takes.
      mean, std: the published ones of the training pixels, in units of pixel value / 255; empty:
        they are measured when the data set is made ready, for which every image is decoded.
    """

    name: str
    version: str
    train_split: str
    eval_split: str
    builder: str
    fixed_content: bool = True
    takes_source: bool = True
    contents_function: str = ""
    classes: int = 0
    settings: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def builder_class(self) -> Any:
        """Imports and returns the builder's class, a subclass of `builder.ImageBuilder`."""
        return _imported(self.builder)

    def contents(self, path: str | os.PathLike[str], settings: Mapping[str, Any]) -> files.Contents:
        """Returns what a source holds now, without TFDS; only where the content is not fixed.

        Args:
          path: of the source.
          settings: the values of `settings`, by name.

        Raises:
          DataError: if there is none at `path`, or it is something else.
        """
        return _imported(self.contents_function)(path, settings)


def _imported(place: str) -> Any:
    """Returns what 'module:name' names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


_SPECS = (
    DatasetSpec(
        name="tiny_imagenet",
        version="1.0.0",
        train_split="train",
        eval_split="validation",
        builder="inception_jax.datasets.builders.tiny_imagenet:TinyImagenet",
        classes=200,
    ),
    DatasetSpec(
        name="tiny_imagenet_subset",
        version="1.0.0",
        train_split="train",
        eval_split="validation",
        builder="inception_jax.datasets.builders.tiny_imagenet:TinyImagenetSubset",
        fixed_content=False,
        contents_function="inception_jax.datasets.builders.archive:contents",
    ),
    DatasetSpec(
        name="cifar10",
        version="1.0.0",
        train_split="train",
        eval_split="test",
        builder="inception_jax.datasets.builders.cifar10:Cifar10",
        classes=10,
    ),
    DatasetSpec(
        name="image_folder",
        version="1.0.0",
        train_split="train",
        eval_split="validation",
        builder="inception_jax.datasets.builders.image_folder:ImageFolder",
        fixed_content=False,
        contents_function="inception_jax.datasets.builders.folders:contents",
        settings=("eval_share", "unreadable", "layout", "archive_encoding"),
    ),
    DatasetSpec(
        name="digits",
        version="1.0.0",
        train_split="train",
        eval_split="test",
        builder="inception_jax.datasets.builders.digits:Digits",
        classes=10,
        takes_source=False,
    ),
    DatasetSpec(
        name="imagenet2012",
        version="5.1.0",
        train_split="train",
        eval_split="validation",
        builder="inception_jax.datasets.builders.imagenet:Imagenet2012",
        classes=1000,
        # As in torchvision's documentation of its pretrained models.
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    ),
)
_BY_NAME = {spec.name: spec for spec in _SPECS}


def names() -> tuple[str, ...]:
    """Returns the names of all data sets, in the order of `config.DATASETS`."""
    return tuple(_BY_NAME)


def get(name: str) -> DatasetSpec:
    """Returns the data set called `name`.

    Raises:
      ConfigError: if there is none.
    """
    if name not in _BY_NAME:
        raise ConfigError(
            f"config.data.name = {name!r}: must be one of {', '.join(_BY_NAME)}."
            f"{nearest(name, _BY_NAME)}"
        )
    return _BY_NAME[name]
