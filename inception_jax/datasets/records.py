"""Random access to the records of a prepared TFDS data set, from any thread.

TFDS's own data source takes 35 µs to parse a record because it processes the description of all
features; this module parses one protobuf message and reads three features.
"""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from inception_jax.errors import DataError

# Raised by the reader for missing or damaged files.
_READ_ERRORS = (OSError, RuntimeError, ValueError, IndexError)


class Example(NamedTuple):
    """One record: encoded image, label (−1: unknown) and original file name."""

    image: bytes
    label: int
    file_name: str


class Fields(NamedTuple):
    """Names of the features for image, label and file name ('': use the index)."""

    image: str = "image"
    label: str = "label"
    name: str = "file_name"


# Used by all builders of this package.
DEFAULT_FIELDS = Fields()


class Records:
    """Reads the examples of one split, in the order of its ArrayRecord files.

    Args:
      files: the split's files, in order.
      fields: which features to read.

    Raises:
      DataError: if a file is missing or is not an ArrayRecord file.
    """

    def __init__(self, files: Sequence[pathlib.Path], fields: Fields = DEFAULT_FIELDS) -> None:
        self._files, self._fields = files, fields
        try:
            self._source = ArrayRecordDataSource([str(file) for file in files])
        except _READ_ERRORS as error:
            raise _damaged_error(
                self._first_broken_file(), f"cannot be opened ({error})"
            ) from error

    def __len__(self) -> int:
        return len(self._source)

    def read(self, indices: Sequence[int]) -> list[Example]:
        """Returns the examples at `indices` (at least one), in that order.

        Reads the files in parallel, in threads that it starts for each call: for batches. For
        neighbors, `read_one` is quicker.

        Raises:
          DataError: if a record is damaged or lacks a feature; the message names it.
        """
        try:
            records = self._source.__getitems__(indices)
            return [self._parse(*each) for each in zip(records, indices, strict=True)]
        except _READ_ERRORS:
            # The error of a batched read does not identify the record.
            for index in indices:
                self.read_one(index)
            raise

    def read_one(self, index: int) -> Example:
        """Returns an example, read in the calling thread.

        Raises:
          DataError: as `read` does.
        """
        try:
            return self._parse(self._source[index], index)
        except _READ_ERRORS as error:
            file, place = self._locate(index)
            raise _damaged_error(file, f"record {place} cannot be read ({error})") from error

    def _parse(self, record: bytes, index: int) -> Example:
        features = tf_example_pb2.Example.FromString(record).features.feature
        # Accessing a missing feature would add it.
        if missing := [name for name in self._fields if name and name not in features]:
            raise DataError(
                f"{self._files[0].parent}: feature {missing[0]!r} not found in example {index:,} "
                f"(it has {', '.join(sorted(features))}). Another program wrote these records; "
                "set config.data.directory to another directory"
            )
        image, label, name = self._fields
        if not name:
            text = f"{index:06d}"
        elif numbers := features[name].int64_list.value:
            text = str(numbers[0])
        else:
            text = features[name].bytes_list.value[0].decode()
        return Example(
            image=features[image].bytes_list.value[0],
            label=features[label].int64_list.value[0],
            file_name=text,
        )

    def _locate(self, index: int) -> tuple[pathlib.Path, int]:
        """Returns the file of an example, and the record's index in that file."""
        for file in self._files:
            count = len(ArrayRecordDataSource([str(file)]))
            if index < count:
                return file, index
            index -= count
        raise AssertionError("an index that was read is in one of the files")

    def _first_broken_file(self) -> pathlib.Path:
        """Returns the first file that cannot be opened."""
        for file in self._files[:-1]:
            try:
                ArrayRecordDataSource([str(file)])
            except _READ_ERRORS:
                return file
        return self._files[-1]


def _damaged_error(file: pathlib.Path, what: str) -> DataError:
    return DataError(
        f"{file}: {what}. The data set is damaged; remove the folder {file.parent} and rerun to "
        "prepare it again from its source or, if TFDS's commands prepared it, run tfds build "
        "--overwrite"
    )
