"""Base class of the builders, which convert files or arrays to ArrayRecord data sets."""

import abc
import contextlib
import io
import os
import pathlib
import resource
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from inception_jax.console import Progress
from inception_jax.datasets.builders import _tfds_private
from inception_jax.datasets.sources import files
from inception_jax.errors import DataError

# An example's key and its features.
KeyedExample = tuple[str, dict[str, Any]]

_FORMAT = "array_record"
# TFDS keeps a thousand files open at once; the usual limit is 1,024.
_OPEN_FILES = 4096


class ImageBuilder(_tfds_private.QuietBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a data set with the features image, label and file_name.

    A subclass defines `VERSION`, the descriptive attributes and the abstract methods. TFDS orders
    the records of a split by a fixed hash of their keys, so they are shuffled identically every
    time the data set is prepared.

    Args:
      source: local path of the original files.
      original: metadata about a source in a bucket that `source` is a copy of.
      log: called with one line of text.
      data_dir: as for every TFDS builder.

    Attributes:
      DESCRIPTION, HOMEPAGE, CITATION: stored in TFDS's description of the data set.
      IMAGE: arguments of TFDS's Image feature.
    """

    # Names of the features to read; None: `records.DEFAULT_FIELDS`.
    fields = None
    # The source, for builders that keep one open.
    _files: files.Source
    # Set by `open`, returned by `splits`.
    _splits: Mapping[str, Any]

    DESCRIPTION: ClassVar[str]
    HOMEPAGE: ClassVar[str | None] = None
    CITATION: ClassVar[str | None] = None
    IMAGE: ClassVar[Mapping[str, Any]] = {"shape": (None, None, 3)}

    def __init__(
        self,
        *,
        source: str = "",
        original: Mapping[str, str] | None = None,
        log: Callable[[str], None] = print,
        data_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.source = source
        self._original = original or {}
        self.log = log
        super().__init__(data_dir=data_dir, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(**self.IMAGE),
                    "label": tfds.features.ClassLabel(),
                    "file_name": tfds.features.Text(),
                    **self.more_features(),
                }
            ),
            supervised_keys=("image", "label"),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            metadata=tfds.core.MetadataDict(),
        )

    def more_features(self) -> dict[str, Any]:
        """Returns features to store in addition to image, label and file_name."""
        return {}

    @abc.abstractmethod
    def open(self) -> None:
        """Opens the source and checks it as far as possible without reading images.

        `close` is called afterwards, even if this fails.

        Raises:
          DataError: if something is missing or wrong.
        """

    def close(self) -> None:
        """Closes the source if it is open."""
        if hasattr(self, "_files"):
            self._files.close()

    def splits(self) -> Mapping[str, Any]:
        """Returns the items of each split, a sized collection that is passed to `examples`."""
        return self._splits

    @abc.abstractmethod
    def examples(self, items: Any) -> Generator[KeyedExample, None, None]:
        """Yields the examples of a split, after checking that each image decodes completely.

        Raises:
          DataError: if a file is damaged; the message names it.
        """

    @abc.abstractmethod
    def class_names_and_metadata(self) -> tuple[Iterable[str], dict[str, Any]]:
        """Returns the class names in label order, and metadata to store with the data set."""

    @abc.abstractmethod
    def source_bytes(self) -> int:
        """Returns the total size of all encoded images, bytes."""

    def is_prepared(self) -> bool:
        """Returns whether the data set is on disk; TFDS renames its folder once it is complete.

        Raises:
          DataError: if it is stored in another format, written by TFDS's own commands.
        """
        if not self.info.splits:
            return False
        check_format(self.info, f"{self.name}/{self.version}")
        return True

    @property
    def class_names(self) -> list[str]:
        """The class names of the prepared data set, in label order."""
        return self.info.features["label"].names

    @property
    def facts(self) -> Mapping[str, Any]:
        """The metadata stored with the prepared data set (`class_names_and_metadata`)."""
        return self.info.metadata

    def missing_files(self) -> list[str]:
        """Returns files of the prepared data set that no longer exist."""
        paths = [path for split in self.info.splits for path in self.files(split)]
        return [str(path) for path in paths if not path.exists()]

    def prepare(self) -> None:
        """Writes the data set; call `open` first.

        Raises:
          DataError: if an image is damaged; no files are left behind.
        """
        tfds.disable_progress_bar()
        _allow_open_files(_OPEN_FILES)
        with _tfds_private.writing():
            self.download_and_prepare(file_format=_FORMAT)

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the record files of a split of the prepared data set, in order."""
        return [pathlib.Path(path) for path in self.info.splits[split].filepaths]

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[KeyedExample]]:
        names, metadata = self.class_names_and_metadata()
        # Set only now: `_info` must work without the source, so that a prepared data set can be
        # read after the source is removed.
        self.info.features["label"].names = list(names)
        self.info.metadata.update({**metadata, **self._original})
        return {
            split: self._generate_examples(split, items) for split, items in self.splits().items()
        }

    def _generate_examples(self, split: str, items: Any) -> Iterator[KeyedExample]:
        with (
            Progress(f"{self.name}: writing {split} records", len(items), log=self.log) as progress,
            contextlib.closing(self.examples(items)) as examples,
        ):
            for key, example in examples:
                yield key, example
                progress.update(1)


def check_format(info: tfds.core.DatasetInfo, name: str) -> None:
    """Raises DataError if a prepared data set (`name` includes the version) is not ArrayRecord."""
    stored_format = info.file_format.value
    if stored_format != _FORMAT:
        raise DataError(
            f"{info.data_dir}: stored as {stored_format}; must be {_FORMAT}. Set "
            "config.data.directory to another directory, or convert it in an environment with "
            f"TensorFlow: tfds convert_format --dataset_version_dir={info.data_dir} "
            f"--out_file_format={_FORMAT} --out_dir=DIRECTORY/{name}, then use "
            "--config.data.directory=DIRECTORY"
        )


def to_png(pixels: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, W, 3], [H, W, 1] or [H, W], as PNG."""
    buffer = io.BytesIO()
    gray = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    image = Image.fromarray(np.ascontiguousarray(gray))
    image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files to `count`, or to its hard limit if lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
