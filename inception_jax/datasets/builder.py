"""The base of all TFDS builders: files or arrays in, a standard ArrayRecord dataset out.

A GeneratorBasedBuilder writes ArrayRecords without TensorFlow as long as images are handed over as
encoded bytes and archives are read here rather than by TFDS's download manager.
"""

import abc
import contextlib
import os
import pathlib
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from inception_jax.datasets.progress import Progress

# Key, then the example's features.
KeyedExample = tuple[str, dict[str, Any]]


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
        """Whether the dataset is on disk: TFDS gives the folder its name when all is written."""
        return bool(self.info.splits)

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
        self.download_and_prepare(file_format="array_record")

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
