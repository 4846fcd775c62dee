import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, shuffle
from tensorflow_datasets.proto import tf_example_pb2

from inception_jax.datasets.builders import _tfds_private


@pytest.mark.parametrize("name", ["url_infos", "_log_download_bytes", "_log_download_done"])
def test_patched_tfds_names_exist(name: str) -> None:
    assert name in vars(_tfds_private.QuietBuilder)
    assert any(name in vars(kind) for kind in tfds.core.GeneratorBasedBuilder.__mro__)


def test_replacements_are_removed_afterwards() -> None:
    before = shuffle.tf, example_serializer.ExampleSerializer
    with pytest.raises(KeyError), _tfds_private.writing():
        assert shuffle.tf.io.gfile.GFile is open
        assert example_serializer.ExampleSerializer is not before[1]
        raise KeyError
    assert (shuffle.tf, example_serializer.ExampleSerializer) == before


def test_examples_are_serialized_as_by_tfds_but_in_a_fixed_order() -> None:
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=200),
            "file_name": tfds.features.Text(),
            "box": tfds.features.Tensor(shape=(4,), dtype=np.int64),
        }
    )
    example = features.encode_example(
        {
            "image": b"\xff\xd8\xff\0not decoded\xff\xd9",
            "label": -1,
            "file_name": "train/é 1.JPEG",
            "box": np.array([0, -1, 2**40, 63]),
        }
    )
    by_tfds = example_serializer.ExampleSerializer(features.get_serialized_info())
    with _tfds_private.writing():
        serializer = example_serializer.ExampleSerializer(features.get_serialized_info())
    data = serializer.serialize_example(example)
    parse = tf_example_pb2.Example.FromString
    assert parse(data) == parse(by_tfds.serialize_example(example))
    places = [data.index(name.encode()) for name in sorted(example)]
    assert places == sorted(places)
