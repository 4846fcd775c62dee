"""Private TFDS behavior that the builders rely on, tested with the version below.

A GeneratorBasedBuilder writes ArrayRecords without TensorFlow as long as images are passed as
encoded bytes and archives are read by this package rather than by TFDS's download manager. This
module replaces the remaining uses of TensorFlow, serializes examples quickly, and silences TFDS's
own progress messages.
"""

import contextlib
import os
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, shuffle
from tensorflow_datasets.proto import tf_example_pb2

# Tests compare this with the installed version and check that each name used here exists.
TESTED_WITH = {"tensorflow-datasets": ("4.9.10",)}
# TFDS shuffles splits larger than 1 GB through temporary files that it opens with TensorFlow. This
# replaces the part of TensorFlow used there.
_PLAIN_FILES = types.SimpleNamespace(
    io=types.SimpleNamespace(
        gfile=types.SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
    ),
    errors=types.SimpleNamespace(ResourceExhaustedError=()),
)


class _Serializer(example_serializer.ExampleSerializer):
    """Serializes examples of texts, bytes and integers, alone or in arrays, as TFDS does.

    In 11 instead of 36 µs, since it does not look up the type of each feature, and in a fixed
    order: TFDS's order, which has no meaning, differs between processes.
    """

    def serialize_example(self, example: Mapping[str, Any]) -> bytes:
        """Returns the bytes of a tf.train.Example."""
        message = tf_example_pb2.Example()
        features = message.features.feature
        for name, value in example.items():
            values = value.ravel().tolist() if isinstance(value, np.ndarray) else [value]
            if all(isinstance(each, str | bytes) for each in values):
                data = [each.encode() if isinstance(each, str) else each for each in values]
                features[name].bytes_list.value.extend(data)
            else:
                features[name].int64_list.value.extend(values)
        return message.SerializeToString(deterministic=True)


# TFDS registers every builder by name unless a class argument disables it; that argument has no
# declared type, hence "type: ignore" here and at the subclasses.
class QuietBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder of local files that does not print TFDS's progress messages."""

    # TFDS's default lookup of download checksums, unused here, imports importlib_resources, which
    # TFDS does not list as a dependency.
    url_infos = None

    def _log_download_bytes(self) -> None:
        """Silences TFDS's first line."""

    def _log_download_done(self) -> None:
        """Silences TFDS's last line."""


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """Lets TFDS write a data set of any size, quickly and without TensorFlow, within the block."""
    tensorflow, serializer = shuffle.tf, example_serializer.ExampleSerializer
    shuffle.tf, example_serializer.ExampleSerializer = _PLAIN_FILES, _Serializer
    try:
        yield
    finally:
        shuffle.tf, example_serializer.ExampleSerializer = tensorflow, serializer
