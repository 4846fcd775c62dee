"""The base of all TFDS builders: files or arrays in, a standard ArrayRecord dataset out.

A GeneratorBasedBuilder writes ArrayRecords without TensorFlow as long as images are handed over as
encoded bytes and archives are read here rather than by TFDS's download manager.
"""

import abc
import contextlib
import os
import pathlib
import resource
import types
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from inception_jax.datasets.progress import Progress
from inception_jax.errors import DataError

# Key, then the example's features.
KeyedExample = tuple[str, dict[str, Any]]

_FORMAT = "array_record"
# TFDS 4.9.10 shuffles a split of more than 1 GB through temporary files that it opens with
# TensorFlow. This stands in for the part of TensorFlow that it uses there.
_PLAIN_FILES = types.SimpleNamespace(
    io=types.SimpleNamespace(
        gfile=types.SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
    ),
    errors=types.SimpleNamespace(ResourceExhaustedError=()),
)
# It keeps a thousand of them open at a time; the usual limit is 1,024.
_OPEN_FILES = 4096


class ImageBuilder(tfds.core.GeneratorBasedBuilder):
    """Builds one data set.

    A subclass gives `VERSION`, `_info` and the abstract methods. The records of a split lie in the
    order of a hash of their keys, which TFDS fixes: shuffled, the same at every preparation.

    Args:
      source: where the original files are, as in `config.data.source`.
      log: takes one line of text.
      data_dir: as of every TFDS builder.
    """

    # TFDS's own way to find the checksums of downloads, of which there are none here, imports
    # importlib_resources, a package that TFDS 4.9.10 uses without requiring it.
    url_infos = None

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

    @abc.abstractmethod
    def open(self) -> None:
        """Opens the source and checks what can be checked without reading images.

        Raises:
          DataError: if something is missing or wrong.
        """

    def close(self) -> None:
        """Releases the source."""

    @abc.abstractmethod
    def splits(self) -> dict[str, Sequence[Any]]:
        """Returns what each split consists of, in the form that `examples` takes."""

    @abc.abstractmethod
    def examples(self, items: Sequence[Any]) -> Generator[KeyedExample, None, None]:
        """Yields the examples of a split, each verified to be a whole image.

        Raises:
          DataError: naming the file that is damaged.
        """

    @abc.abstractmethod
    def label_facts(self) -> tuple[Sequence[str], dict[str, Any]]:
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
        found = self.info.file_format.value
        if found != _FORMAT:
            raise DataError(
                f"{self.data_dir}: is stored as {found}, not as {_FORMAT}. Give another "
                "config.data.directory, or, with TensorFlow installed, convert it: tfds "
                f"convert_format --dataset_version_dir={self.data_dir} --out_file_format={_FORMAT} "
                f"--out_dir=DIRECTORY/{self.name}/{self.version} and "
                "--config.data.directory=DIRECTORY"
            )
        return True

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
        shuffle.tf = _PLAIN_FILES
        _allow_open_files(_OPEN_FILES)
        self.download_and_prepare(file_format=_FORMAT)

    def files(self, split: str) -> list[pathlib.Path]:
        """Returns the record files of a split of the prepared dataset, in order."""
        return [pathlib.Path(path) for path in self.info.splits[split].filepaths]

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[KeyedExample]]:
        names, metadata = self.label_facts()
        # Known only now: `_info` must do without the source, so that what is prepared can be read
        # when the source is gone.
        self.info.features["label"].names = list(names)
        self.info.metadata.update(metadata)
        return {
            split: self._generate_examples(split, items) for split, items in self.splits().items()
        }

    def _generate_examples(self, split: str, items: Sequence[Any]) -> Iterator[KeyedExample]:
        with (
            Progress(f"{self.name}: writing {split} records", len(items), log=self.log) as progress,
            contextlib.closing(self.examples(items)) as examples,
        ):
            for key, example in examples:
                yield key, example
                progress.update(1)

    def _log_download_bytes(self) -> None:
        """Silences TFDS's first line; `Progress` says what happens."""

    def _log_download_done(self) -> None:
        """Silences TFDS's last line."""


def _allow_open_files(count: int) -> None:
    """Raises this process's limit of open files to `count`, or to what it may raise it to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        count = min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
