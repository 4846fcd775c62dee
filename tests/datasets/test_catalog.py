import subprocess
import sys

import pytest

from inception_jax import config
from inception_jax.config import Data
from inception_jax.datasets.builders.base import ImageBuilder
from inception_jax.errors import ConfigError
from inception_jax.registry import DATASETS


@pytest.mark.parametrize("name", [name for name in DATASETS.names() if name != "tfds"])
def test_builders_match_registry_entries(name: str) -> None:
    part = DATASETS.get(name)
    builder = part.build(Data(name=name))
    assert issubclass(builder, ImageBuilder)
    assert (builder.name, str(builder.VERSION)) == (name, part.version)


def test_unknown_name_suggests_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'tiny-imagenet'.*Did you mean tiny_imagenet"):
        DATASETS.get("tiny-imagenet")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Data(name="digits", source="x"), r"source = 'x': must be empty for 'digits'"),
        (
            Data(name="digits", layout="classes"),
            r"config\.data\.layout = 'classes': must be 'auto' for 'digits'; only 'image_folder' ",
        ),
        (
            Data(name="cifar10", tfds="cifar100"),
            r"config\.data\.tfds = 'cifar100': must be '' for 'cifar10'",
        ),
        (Data(name="tfds"), r"config\.data\.tfds = '': must be the name of a TFDS data set"),
        (Data(name="tfds", tfds="a/b/c"), r"config\.data\.tfds = 'a/b/c': must be the name"),
        (Data(name="image_folder", archive_encoding="utf-16"), r"archive_encoding = 'utf-16'"),
        (Data(name="digits", options={"depth": 3}), r"no such option of 'digits'"),
    ],
)
def test_settings_of_other_data_sets_are_refused(data: Data, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.validate(config.Config(data=data))


def test_validation_imports_neither_tfds_nor_decoder() -> None:
    program = (
        "import sys; from inception_jax import config; config.validate(config.Config()); "
        "print({'tensorflow_datasets', 'PIL'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "set()\n", result.stderr
