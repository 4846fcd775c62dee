import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import shuffle

from inception_jax.datasets.builders import _tfds_private


@pytest.mark.parametrize("name", ["url_infos", "_log_download_bytes", "_log_download_done"])
def test_patched_tfds_names_exist(name: str) -> None:
    assert name in vars(_tfds_private.QuietBuilder)
    assert any(name in vars(kind) for kind in tfds.core.GeneratorBasedBuilder.__mro__)


def test_tensorflow_replacement_is_removed_afterwards() -> None:
    before = shuffle.tf
    with pytest.raises(KeyError), _tfds_private.without_tensorflow():
        assert shuffle.tf.io.gfile.GFile is open
        raise KeyError
    assert shuffle.tf is before
