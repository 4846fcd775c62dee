"""The records of a prepared TFDS dataset, for random access from any thread.

TFDS's own data source takes 35 µs to parse a record, for it goes through the whole description of
the features; here it is one protobuf message, of which three features are looked at.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from inception_jax.errors import DataError

# What the reader raises for files that are missing or damaged.
_BROKEN = (OSError, RuntimeError, ValueError, IndexError)


class Example(NamedTuple):
    """One record: the image file's content, the label (−1: unknown) and the original file name."""

    image: bytes
    label: int
    file_name: str


class Records:
    """The examples of one split, in the order of its ArrayRecord files.

    Args:
      files: the split's files, in order.

    Raises:
      DataError: if a file is missing or is no ArrayRecord file.
    """

    def __init__(self, files: Sequence[pathlib.Path]) -> None:
        self._files = files
        try:
            self._source = ArrayRecordDataSource([str(file) for file in files])
        except _BROKEN as error:
            raise _damaged(self._unreadable(), f"cannot be opened ({error})") from error

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Returns the examples at `indices`, at least one, in that order.

        Raises:
          DataError: naming the record that is damaged.
        """
        try:
            return [_parse(record) for record in self._source.__getitems__(indices)]
        except _BROKEN:
            # The error of a whole read does not say which record it is.
            for index in indices:
                self._check(index)
            raise

    def _check(self, index: int) -> None:
        try:
            _parse(self._source[index])
        except _BROKEN as error:
            file, place = self._place(index)
            raise _damaged(file, f"record {place} cannot be read ({error})") from error

    def _place(self, index: int) -> tuple[pathlib.Path, int]:
        """Returns the file that holds an example, and which of its records it is."""
        for file in self._files:
            count = len(ArrayRecordDataSource([str(file)]))
            if index < count:
                return file, index
            index -= count
        raise AssertionError("an index that was read is in one of the files")

    def _unreadable(self) -> pathlib.Path:
        """Returns the first file that cannot be opened by itself."""
        for file in self._files[:-1]:
            try:
                ArrayRecordDataSource([str(file)])
            except _BROKEN:
                return file
        return self._files[-1]


def _damaged(file: pathlib.Path, what: str) -> DataError:
    return DataError(
        f"{file}: {what}. The data set is damaged: remove the folder {file.parent}, and the next "
        "start prepares it again from its source."
    )


def _parse(record: bytes) -> Example:
    features = tf_example_pb2.Example.FromString(record).features.feature
    return Example(
        image=features["image"].bytes_list.value[0],
        label=features["label"].int64_list.value[0],
        file_name=features["file_name"].bytes_list.value[0].decode(),
    )
