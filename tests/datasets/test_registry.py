import pytest

from inception_jax import config
from inception_jax.datasets import registry
from inception_jax.datasets.builders.base import ImageBuilder
from inception_jax.errors import ConfigError


def test_the_registry_has_the_data_sets_that_the_configuration_allows() -> None:
    assert registry.names() == config.DATASETS


@pytest.mark.parametrize("name", config.DATASETS)
def test_every_builder_is_the_one_that_its_entry_says(name: str) -> None:
    spec = registry.get(name)
    builder = spec.builder_class()
    assert issubclass(builder, ImageBuilder)
    assert (builder.name, str(builder.VERSION)) == (name, spec.version)


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'tiny-imagenet'.*Did you mean 'tiny_imagenet'"):
        registry.get("tiny-imagenet")
