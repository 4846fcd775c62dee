"""Registers the package's own data sets, in the same way as custom ones.

Builders are imported only to prepare data: training from prepared data must not import TFDS (0.3 to
1 s at every start).
"""

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from inception_jax.registry import DATASETS

if TYPE_CHECKING:
    from inception_jax.config import Data


def _load(path: str) -> Any:
    """Imports a builder module and returns one of its attributes; `path` is "module.name"."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"inception_jax.datasets.builders.{module}"), name)


def _lazy(path: str) -> Callable[..., Any]:
    """Returns a function that imports and calls the function at `path` (see `_load`)."""
    return lambda *arguments: _load(path)(*arguments)


def _register(name: str, builder: str, **facts: Any) -> None:
    """Registers a data set by its builder's path (see `_load`) and attributes of `DatasetPart`."""
    DATASETS.register(name, is_builder=True, **facts)(lambda data: _load(builder))


def _check_encoding(data: "Data") -> Iterator[str]:
    if data.archive_encoding and not _is_ascii_superset(data.archive_encoding):
        yield (
            f"config.data.archive_encoding = {data.archive_encoding!r}: must be an encoding of "
            "file names that Python knows, such as gbk, big5, shift_jis, cp866, cp1251 or cp850"
        )


def _is_ascii_superset(encoding: str) -> bool:
    """Returns whether `encoding` exists and encodes ASCII characters as themselves."""
    text = "train/a.jpg"
    try:
        return text.encode("ascii").decode(encoding) == text
    except (LookupError, ValueError):
        return False


_register(
    "tiny_imagenet",
    "tiny_imagenet.TinyImagenet",
    eval_split="validation",
    classes=200,
    examples={"train": 100_000, "validation": 10_000},
    content_is_canonical=True,
)
_register(
    "tiny_imagenet_subset",
    "tiny_imagenet.TinyImagenetSubset",
    eval_split="validation",
    contents=_lazy("tiny_imagenet_layout.contents"),
)
_register(
    "cifar10",
    "cifar10.Cifar10",
    eval_split="test",
    classes=10,
    examples={"train": 50_000, "test": 10_000},
    content_is_canonical=True,
)
_register(
    "image_folder",
    "image_folder.ImageFolder",
    eval_split="validation",
    extra_settings=("val_fraction", "on_unreadable", "layout", "archive_encoding"),
    contents=_lazy("folders.contents"),
    check=_check_encoding,
)
_register(
    "digits",
    "digits.Digits",
    eval_split="test",
    classes=10,
    examples={"train": 1437, "test": 360},
    accepts_source=False,
    content_is_canonical=True,
)
_register(
    "imagenet2012",
    "imagenet.Imagenet2012",
    version="5.1.0",
    eval_split="validation",
    classes=1000,
    examples={"train": 1_281_167, "validation": 50_000},
    # As in torchvision's documentation of its pretrained models.
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    source_files=("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"),
    content_is_canonical=True,
)
# Data sets prepared by TFDS's own commands.
_register(
    "tfds",
    "tfds_prepared.PreparedTfds",
    extra_settings=("tfds", "train_split", "eval_split"),
    accepts_source=False,
    content_is_canonical=True,
    check=_lazy("tfds_folders.problems"),
    locate=_lazy("tfds_folders.locate"),
)
