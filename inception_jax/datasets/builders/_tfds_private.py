"""Private TFDS behavior that the builders rely on, tested with the version below.

A GeneratorBasedBuilder writes ArrayRecords without TensorFlow as long as images are passed as
encoded bytes and archives are read by this package rather than by TFDS's download manager. This
module replaces the remaining uses of TensorFlow and silences TFDS's own progress messages.
"""

import contextlib
import os
import types
from collections.abc import Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

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
def without_tensorflow() -> Iterator[None]:
    """Lets TFDS write a data set of any size without TensorFlow, within the `with` block."""
    before = shuffle.tf
    shuffle.tf = _PLAIN_FILES
    try:
        yield
    finally:
        shuffle.tf = before
