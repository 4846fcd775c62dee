"""The package's own data sets, registered through the same door as a user's.

Each imports its builder when something is to be prepared: training from prepared data must not
import TFDS (0.3 to 1 s at every start).
"""

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from inception_jax.registry import DATASETS

if TYPE_CHECKING:
    from inception_jax.config import Data
    from inception_jax.datasets.sources.files import Contents


@DATASETS.register(
    "tiny_imagenet", eval_split="validation", classes=200, fixed_content=True, is_builder=True
)
def tiny_imagenet(data: "Data") -> Any:
    """Returns the builder of Tiny ImageNet."""
    from inception_jax.datasets.builders.tiny_imagenet import TinyImagenet

    return TinyImagenet


def _layout_contents(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> "Contents":
    from inception_jax.datasets.builders import tiny_imagenet_layout

    return tiny_imagenet_layout.contents(path, settings)


@DATASETS.register(
    "tiny_imagenet_subset", eval_split="validation", contents=_layout_contents, is_builder=True
)
def tiny_imagenet_subset(data: "Data") -> Any:
    """Returns the builder of a part of Tiny ImageNet."""
    from inception_jax.datasets.builders.tiny_imagenet import TinyImagenetSubset

    return TinyImagenetSubset


@DATASETS.register("cifar10", eval_split="test", classes=10, fixed_content=True, is_builder=True)
def cifar10(data: "Data") -> Any:
    """Returns the builder of CIFAR-10."""
    from inception_jax.datasets.builders.cifar10 import Cifar10

    return Cifar10


def _folder_contents(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> "Contents":
    from inception_jax.datasets.builders import folders

    return folders.contents(path, settings)


def _check_encoding(data: "Data") -> Iterator[str]:
    if data.archive_encoding and not _keeps_ascii(data.archive_encoding):
        yield (
            f"config.data.archive_encoding = {data.archive_encoding!r}: must be an encoding of "
            "file names that Python knows, such as gbk, big5, shift_jis, cp866, cp1251 or cp850"
        )


def _keeps_ascii(encoding: str) -> bool:
    """Whether there is such an encoding of text, in which ASCII characters are themselves."""
    text = "train/a.jpg"
    try:
        return text.encode("ascii").decode(encoding) == text
    except (LookupError, ValueError):
        return False


@DATASETS.register(
    "image_folder",
    eval_split="validation",
    takes=("eval_share", "unreadable", "layout", "archive_encoding"),
    contents=_folder_contents,
    check=_check_encoding,
    is_builder=True,
)
def image_folder(data: "Data") -> Any:
    """Returns the builder of a folder of pictures."""
    from inception_jax.datasets.builders.image_folder import ImageFolder

    return ImageFolder


@DATASETS.register(
    "digits",
    eval_split="test",
    classes=10,
    takes_source=False,
    fixed_content=True,
    is_builder=True,
)
def digits(data: "Data") -> Any:
    """Returns the builder of scikit-learn's digits."""
    from inception_jax.datasets.builders.digits import Digits

    return Digits


@DATASETS.register(
    "imagenet2012",
    version="5.1.0",
    eval_split="validation",
    classes=1000,
    # As in torchvision's documentation of its pretrained models.
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    fixed_content=True,
    is_builder=True,
)
def imagenet2012(data: "Data") -> Any:
    """Returns the builder of ImageNet's 1,000 classes."""
    from inception_jax.datasets.builders.imagenet import Imagenet2012

    return Imagenet2012


def _check_tfds(data: "Data") -> Iterator[str]:
    from inception_jax.datasets.builders import tfds_folders

    yield from tfds_folders.problems(data)


def _locate_tfds(data: "Data", directory: pathlib.Path, log: Any) -> tuple[str, str]:
    from inception_jax.datasets.builders import tfds_folders

    return tfds_folders.locate(data, directory, log)


@DATASETS.register(
    "tfds",
    takes=("tfds", "train_split", "eval_split"),
    takes_source=False,
    fixed_content=True,
    check=_check_tfds,
    locate=_locate_tfds,
    is_builder=True,
)
def tfds(data: "Data") -> Any:
    """Returns the reader of a data set that TFDS's own commands prepared."""
    from inception_jax.datasets.builders.tfds_prepared import PreparedTfds

    return PreparedTfds
