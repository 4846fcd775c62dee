import subprocess
import sys

import pytest

from inception_jax import config
from inception_jax.config import Data
from inception_jax.datasets.builders.base import ImageBuilder
from inception_jax.errors import ConfigError
from inception_jax.registry import DATASETS


@pytest.mark.parametrize("name", [name for name in DATASETS.names() if name != "tfds"])
def test_every_builder_is_the_one_that_its_entry_says(name: str) -> None:
    part = DATASETS.get(name)
    builder = part.build(Data(name=name))
    assert issubclass(builder, ImageBuilder)
    assert (builder.name, str(builder.VERSION)) == (name, part.version)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'tiny-imagenet'.*Did you mean tiny_imagenet"):
        DATASETS.get("tiny-imagenet")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(name="digits", source="x"), r"source = 'x': 'digits' needs none"),
        (
            Data(name="digits", layout="classes"),
            r"config\.data\.layout = 'classes': only 'image_folder' has this setting; leave it at "
            r"'auto' for 'digits'",
        ),
        (Data(name="cifar10", tfds="cifar100"), r"config\.data\.tfds = 'cifar100': only 'tfds'"),
        (Data(name="tfds"), r"config\.data\.tfds = '': give the name of a data set that TFDS"),
        (Data(name="tfds", tfds="a/b/c"), r"config\.data\.tfds = 'a/b/c': give the name"),
        (Data(name="image_folder", archive_encoding="utf-16"), r"archive_encoding = 'utf-16'"),
        (Data(name="digits", options={"depth": 3}), r"'digits' has no such option"),
    ],
)
def test_settings_that_a_data_set_does_not_take_are_refused(data: Data, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate(config.Config(data=data))


def test_validating_settings_imports_neither_tfds_nor_a_decoder() -> None:
    program = (
        "import sys; from inception_jax import config; config.validate(config.Config()); "
        "print({'tensorflow_datasets', 'PIL'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout == "set()\n", found.stderr
