"""Reads image classification data sets prepared as ArrayRecord by TFDS's own commands.

TFDS's builders need TensorFlow to prepare a data set; this module reads the result without it.
"""

import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from inception_jax.console import Progress
from inception_jax.datasets import decode
from inception_jax.datasets.builders import base, tfds_folders
from inception_jax.datasets.records import Fields, Records
from inception_jax.errors import DataError

# Features that can name an example, in order of preference.
_NAME_FEATURES = ("file_name", "filename", "image/filename", "id", "image_id", "image/id")


class PreparedTfds:
    """A prepared data set, with the reading part of `base.ImageBuilder`'s interface.

    Args:
      tfds: as `config.data.tfds`.
      data_dir: directory of TFDS data sets.
      log: called with one line of text.
      unused: settings that apply only when splits are opened.

    Raises:
      DataError: if it is not prepared, or has no image and class label features.
    """

    def __init__(
        self,
        *,
        tfds: str,
        data_dir: pathlib.Path,
        log: Callable[[str], None] = print,
        **unused: Any,
    ) -> None:
        place = tfds_folders.find(tfds, pathlib.Path(data_dir), lambda line: None)
        self.name, self.version, self.data_dir = place.title, place.version, place.folder
        self._log = log
        self.info = _open(place.folder)
        base.check_format(self.info, f"{self.name}/{self.version}")
        self.fields = self._find_fields()

    def _find_fields(self) -> Fields:
        features, keys = dict(self.info.features.items()), self.info.supervised_keys
        images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
        labels = [
            key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)
        ]
        described = ", ".join(f"{key} ({type(kind).__name__})" for key, kind in features.items())
        if keys is None and len(images) == len(labels) == 1:
            keys = images[0], labels[0]
        if keys is None or len(keys) != 2 or not all(isinstance(key, str) for key in keys):
            raise DataError(
                f"{self.data_dir}: does not define which features are image and label "
                f"(supervised_keys = {keys}); its features are {described}. Register a custom data "
                "set that reads it, with register_dataset"
            )
        image, label = keys
        if image not in images:
            raise DataError(
                f"{self.data_dir}: feature {image!r} is not an image; the features are {described}"
            )
        if label not in labels:
            raise DataError(
                f"{self.data_dir}: feature {label!r} is not a ClassLabel; the features are "
                f"{described}. Other targets, such as numbers or several labels per image, are not "
                "supported"
            )
        if features[image].np_dtype not in (np.uint8, np.uint16):
            raise DataError(
                f"{self.data_dir}: feature {image!r} has dtype "
                f"{np.dtype(features[image].np_dtype)}; must be uint8 or uint16"
            )
        name = next((each for each in _NAME_FEATURES if _is_name(features.get(each))), "")
        return Fields(image, label, name)

    @property
    def class_names(self) -> list[str]:
        """The class names, in label order."""
        return self.info.features[self.fields.label].names

    @functools.cached_property
    def facts(self) -> Mapping[str, Any]:
        """Metadata: a digest of this build, and the bit depth that 16-bit images require."""
        facts = {"source_digest": tfds_folders.fingerprint(self.data_dir)}
        if self.info.features[self.fields.image].np_dtype != np.uint16:
            return facts
        depth = 0
        for split, known in self.info.splits.items():
            records = Records(self.files(split), self.fields)
            label = f"{self.name}: inspecting {split}"
            with Progress(label, known.num_examples, log=self._log) as progress:
                for example in map(records.read_one, range(known.num_examples)):
                    depth = max(depth, decode.inspect(example.image, example.file_name).bit_depth)
                    progress.update(1)
        return facts | {"bit_depth": depth}

    def is_prepared(self) -> bool:
        """Returns True: the constructor fails otherwise."""
        return True

    def missing_files(self) -> list[str]:
        """Returns no files, since missing ones could not be rebuilt."""
        return []

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the record files of a split, in order."""
        return [pathlib.Path(path) for path in self.info.splits[split].filepaths]


def _open(folder: pathlib.Path) -> tfds.core.DatasetInfo:
    try:
        return tfds.builder_from_directory(folder).info
    # A damaged description makes TFDS raise nearly any exception.
    except Exception as error:
        raise DataError(
            f"{folder}: cannot be opened as a TFDS data set ({type(error).__name__}: {error}). "
            "Prepare it again with tfds build --overwrite"
        ) from error


def _is_name(feature: Any) -> bool:
    is_number = isinstance(feature, tfds.features.Scalar | tfds.features.Tensor)
    return isinstance(feature, tfds.features.Text) or (
        is_number and feature.shape == () and np.issubdtype(feature.np_dtype, np.integer)
    )
