"""The base of all TFDS builders: files or arrays in, a standard ArrayRecord dataset out."""

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

# Key, then the example's features.
KeyedExample = tuple[str, dict[str, Any]]

_FORMAT = "array_record"
# TFDS keeps a thousand files open at a time; the usual limit is 1,024.
_OPEN_FILES = 4096


class ImageBuilder(_tfds_private.QuietBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds one data set of the features image, label and file_name.

    A subclass gives `VERSION`, what describes it, and the abstract methods. The records of a split
    lie in the order of a hash of their keys, which TFDS fixes: shuffled, the same at every
    preparation.

    Args:
      source: where the original files are, as in `config.data.source`.
      log: takes one line of text.
      data_dir: as of every TFDS builder.

    Attributes:
      DESCRIPTION, HOMEPAGE, CITATION: for TFDS's description of the data set.
      IMAGE: what is known of all images, arguments of TFDS's feature.
    """

    # Those of the features that are read, which are the default ones.
    fields = None
    # The source, of those that keep one open.
    _files: files.Source
    # What `open` found, as `splits` returns it.
    _splits: Mapping[str, Any]

    DESCRIPTION: ClassVar[str]
    HOMEPAGE: ClassVar[str | None] = None
    CITATION: ClassVar[str | None] = None
    IMAGE: ClassVar[Mapping[str, Any]] = {"shape": (None, None, 3)}

    def __init__(
        self,
        *,
        source: str = "",
        log: Callable[[str], None] = print,
        data_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        self.source = source
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
        """Returns the features that are kept of an example besides the three."""
        return {}

    @abc.abstractmethod
    def open(self) -> None:
        """Opens the source and checks what can be checked without reading images.

        `close` is called in the end, also where this fails.

        Raises:
          DataError: if something is missing or wrong.
        """

    def close(self) -> None:
        """Closes the source, if it was opened."""
        if hasattr(self, "_files"):
            self._files.close()

    def splits(self) -> Mapping[str, Any]:
        """Returns what each split consists of, sized, in the form that `examples` takes."""
        return self._splits

    @abc.abstractmethod
    def examples(self, items: Any) -> Generator[KeyedExample, None, None]:
        """Yields the examples of a split, each verified to be a whole image.

        Raises:
          DataError: naming the file that is damaged.
        """

    @abc.abstractmethod
    def class_names_and_metadata(self) -> tuple[Iterable[str], dict[str, Any]]:
        """Returns the class names in label order, and metadata to keep with the dataset."""

    @abc.abstractmethod
    def source_bytes(self) -> int:
        """Returns the size of all encoded images together, bytes."""

    def is_prepared(self) -> bool:
        """Whether the dataset is on disk: TFDS gives the folder its name when all is written.

        Raises:
          DataError: if it is there in another format, written by TFDS's own commands.
        """
        if not self.info.splits:
            return False
        check_format(self.info, f"{self.name}/{self.version}")
        return True

    @property
    def class_names(self) -> list[str]:
        """The names of the classes of the prepared dataset, in the order of the labels."""
        return self.info.features["label"].names

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was kept with the prepared dataset besides: `class_names_and_metadata`."""
        return self.info.metadata

    def missing_files(self) -> list[str]:
        """Returns the files of the prepared dataset that have been removed since."""
        paths = [path for split in self.info.splits for path in self.files(split)]
        return [str(path) for path in paths if not path.exists()]

    def prepare(self) -> None:
        """Writes the dataset; `open` comes first.

        Raises:
          DataError: if an image is damaged; nothing is left behind.
        """
        tfds.disable_progress_bar()
        _allow_open_files(_OPEN_FILES)
        with _tfds_private.without_tensorflow():
            self.download_and_prepare(file_format=_FORMAT)

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the record files of a split of the prepared dataset, in order."""
        return [pathlib.Path(path) for path in self.info.splits[split].filepaths]

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[KeyedExample]]:
        names, metadata = self.class_names_and_metadata()
        # Known only now: `_info` must do without the source, so that what is prepared can be read
        # when the source is gone.
        self.info.features["label"].names = list(names)
        self.info.metadata.update(metadata)
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
    """Raises DataError if a prepared data set, `name` with its version, is no ArrayRecord."""
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
    """Returns an image, uint8 [H, W, 3], [H, W, 1] or [H, W], as the content of a PNG file."""
    buffer = io.BytesIO()
    gray = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    image = Image.fromarray(np.ascontiguousarray(gray))
    image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files to `count`, or to what it may raise it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
