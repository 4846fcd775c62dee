"""The package's own data sets, registered through the same door as a user's.

Each imports its builder when something is to be prepared: training from prepared data must not
import TFDS (0.3 to 1 s at every start).
"""

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from inception_jax.registry import DATASETS

if TYPE_CHECKING:
    from inception_jax.config import Data


def _find(path: str) -> Any:
    """Returns what a module of the builders has under a name, "module.name"; imports it now."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f"inception_jax.datasets.builders.{module}"), name)


def _late(path: str) -> Callable[..., Any]:
    """Returns a function that imports the one at `path`, as of `_find`, when it is called."""
    return lambda *arguments: _find(path)(*arguments)


def _register(name: str, builder: str, **facts: Any) -> None:
    """Registers a data set by its builder's path, as of `_find`; `facts` are of `DatasetPart`."""
    DATASETS.register(name, is_builder=True, **facts)(lambda data: _find(builder))


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


_register(
    "tiny_imagenet",
    "tiny_imagenet.TinyImagenet",
    eval_split="validation",
    classes=200,
    fixed_content=True,
)
_register(
    "tiny_imagenet_subset",
    "tiny_imagenet.TinyImagenetSubset",
    eval_split="validation",
    contents=_late("tiny_imagenet_layout.contents"),
)
_register("cifar10", "cifar10.Cifar10", eval_split="test", classes=10, fixed_content=True)
_register(
    "image_folder",
    "image_folder.ImageFolder",
    eval_split="validation",
    takes=("val_fraction", "on_unreadable", "layout", "archive_encoding"),
    contents=_late("folders.contents"),
    check=_check_encoding,
)
_register(
    "digits",
    "digits.Digits",
    eval_split="test",
    classes=10,
    takes_source=False,
    fixed_content=True,
)
_register(
    "imagenet2012",
    "imagenet.Imagenet2012",
    version="5.1.0",
    eval_split="validation",
    classes=1000,
    # As in torchvision's documentation of its pretrained models.
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    fixed_content=True,
)
# What TFDS's own commands prepared.
_register(
    "tfds",
    "tfds_prepared.PreparedTfds",
    takes=("tfds", "train_split", "eval_split"),
    takes_source=False,
    fixed_content=True,
    check=_late("tfds_folders.problems"),
    locate=_late("tfds_folders.locate"),
)
