"""What the builders need of TFDS that it does not offer: known of the version below.

A GeneratorBasedBuilder writes ArrayRecords without TensorFlow as long as images are handed over as
encoded bytes and archives are read here rather than by TFDS's download manager. What is left of
TensorFlow, and of what TFDS prints, is replaced here.
"""

import contextlib
import os
import types
from collections.abc import Iterator

import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

# Tests compare it with the installed one, and each name that is used here with what is there.
TESTED_WITH = {"tensorflow-datasets": ("4.9.10",)}
# TFDS shuffles a split of more than 1 GB through temporary files that it opens with TensorFlow.
# This stands in for the part of TensorFlow that it uses there.
_PLAIN_FILES = types.SimpleNamespace(
    io=types.SimpleNamespace(
        gfile=types.SimpleNamespace(GFile=open, exists=os.path.exists, remove=os.remove)
    ),
    errors=types.SimpleNamespace(ResourceExhaustedError=()),
)


# TFDS registers every builder by name unless told not to, by an argument of the class statement
# that it declares no type for: hence "type: ignore" here and at the subclasses.
class QuietBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A builder of local files, whose progress is shown by others."""

    # TFDS's own way to find the checksums of downloads, of which there are none here, imports
    # importlib_resources, a package that TFDS uses without requiring it.
    url_infos = None

    def _log_download_bytes(self) -> None:
        """Silences TFDS's first line."""

    def _log_download_done(self) -> None:
        """Silences TFDS's last line."""


@contextlib.contextmanager
def without_tensorflow() -> Iterator[None]:
    """Lets TFDS write a data set of any size, for the time of the `with` block."""
    before = shuffle.tf
    shuffle.tf = _PLAIN_FILES
    try:
        yield
    finally:
        shuffle.tf = before
