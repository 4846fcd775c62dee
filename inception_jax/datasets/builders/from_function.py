"""Builds a TFDS data set from a registered function (`registry.register_dataset`)."""

import dataclasses
import functools
import operator
import re
import types
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from inception_jax import registry
from inception_jax.datasets import arrays, decode
from inception_jax.datasets.builders import base, folders
from inception_jax.datasets.recipe import Recipe
from inception_jax.errors import DataError
from inception_jax.registry import DatasetPart

_EXPECTED = (
    'must be a mapping of splits, such as {"train": (images, labels), "validation": (images, '
    "labels)}, or a tuple of such a mapping and the class names"
)
# Split names with another meaning.
_RESERVED = ("holdout", "eval", "train_eval")
# Images encoded or checked per task of a thread.
_CHUNK_SIZE = 32


@dataclasses.dataclass(frozen=True)
class _ReturnedSplit:
    """One split as returned by the function.

    Attributes:
      examples: tuples (image, label) or (image, label, name).
      count: number of examples; 0: unknown until all are read.
      labels: of all examples; None: unknown until all are read.
    """

    split: str
    examples: Iterable[Any]
    count: int = 0
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return self.count


def make_class(part: DatasetPart) -> type["FunctionBuilder"]:
    """Returns a builder class for a data set: TFDS reads name and version from the class."""
    body = {"__module__": __name__, "name": part.name}
    body["VERSION"] = tfds.core.Version(part.version)
    return types.new_class(
        "Function",
        (FunctionBuilder,),
        {"skip_registration": True},
        lambda names: names.update(body),
    )


class FunctionBuilder(base.ImageBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Builds a function's data set, storing arrays as PNG and encoded files unchanged.

    Args:
      recipe: settings and registry entry of the data set.
      kwargs: as for `base.ImageBuilder`.
    """

    DESCRIPTION = "Returned by a registered function."

    def __init__(self, *, recipe: Recipe, **kwargs: Any) -> None:
        self._recipe = recipe
        # Prefix of errors.
        self._prefix = f"{recipe.part.location}: the data set {recipe.name!r}"
        super().__init__(**kwargs)

    def is_prepared(self) -> bool:
        """Returns whether the data set is on disk.

        Raises:
          DataError: if the folder contains another data set with the same name and version.
        """
        if not super().is_prepared():
            return False
        if "options" not in (self.facts or {}).get("settings", {}):
            raise DataError(
                f"{self.data_dir}: contains another data set named {self.name!r}. Register yours "
                "under another name, or set config.data.directory to another directory"
            )
        return True

    def open(self) -> None:
        """Calls the function and checks its result without reading individual examples."""
        part, data, source = self._recipe.part, self._recipe.data, self._recipe.local_source
        # Computed before the function runs, which may read the source for a long time.
        self._digest = self._recipe.contents(source).digests[0] if source else ""
        options = registry.options_with_defaults(part, data.options)
        with registry.as_config_error(part, f"the data set {part.name!r}"):
            source_text = str(source) if self._recipe.source_copy else data.source
            returned = part.build(dataclasses.replace(data, options=options, source=source_text))
        names: Any = part.class_names
        if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[0], Mapping):
            returned, names = returned
        if not isinstance(returned, Mapping):
            raise DataError(f"{self._prefix} returned a {type(returned).__name__}; {_EXPECTED}")
        self._check_splits(list(returned))
        self._splits = {split: self._normalize(split, value) for split, value in returned.items()}
        self._classes = self._class_names(names)
        for split, returned_split in self._splits.items():
            if returned_split.labels is not None:
                self._check_labels(split, returned_split)

    def _check_splits(self, names: list[Any]) -> None:
        part, described = self._recipe.part, ", ".join(map(repr, names)) or "none"
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"\w+", name) or name in _RESERVED:
                raise DataError(
                    f"{self._prefix} returned a split named {name!r}; names must be letters, "
                    f"digits and underscores, and not {', '.join(_RESERVED)}"
                )
        if part.train_split not in names:
            raise DataError(
                f"{self._prefix} returned the splits {described}; {part.train_split!r} is missing"
            )
        if self._recipe.data.holdout:
            return
        if len(names) == 1 or (part.eval_split and part.eval_split not in names):
            raise DataError(
                f"{self._prefix} returned the splits {described}; "
                f"{repr(part.eval_split) if part.eval_split else 'a second one'} is required for "
                "evaluation. Return it too, or hold out training examples with "
                "config.data.holdout"
            )

    def _normalize(self, split: str, value: Any) -> _ReturnedSplit:
        """Returns a split in a uniform format."""
        what = f"{self._prefix}, split {split!r}"
        if isinstance(value, tuple):
            return self._normalize_parallel(split, value)
        if isinstance(value, str | bytes | Mapping | np.ndarray) or not isinstance(value, Iterable):
            raise DataError(
                f"{what}: has type {type(value).__name__}; must be a tuple (images, labels) or an "
                "iterable of examples (image, label)"
            )
        return _ReturnedSplit(split, value, len(value) if isinstance(value, Sized) else 0)

    def _normalize_parallel(self, split: str, value: tuple[Any, ...]) -> _ReturnedSplit:
        what = f"{self._prefix}, split {split!r}"
        if len(value) not in (2, 3):
            raise DataError(
                f"{what}: is a tuple of length {len(value)}; must be (images, labels) or (images, "
                "labels, names)"
            )
        images: Any = value[0]
        if isinstance(images, np.ndarray):
            images = arrays.as_pixel_array(images, f"{what}, images")
        elif not isinstance(images, Sequence) or isinstance(images, str | bytes):
            raise DataError(
                f"{what}, images: have type {type(images).__name__}; must be an array or a list"
            )
        labels = arrays.as_label_array(value[1], f"{what}, labels")
        for part in value[1:]:
            if not isinstance(part, Sized):
                raise DataError(
                    f"{what}, names: have type {type(part).__name__}; must be an array or a list"
                )
            if len(part) != len(images):
                raise DataError(
                    f"{what}: {len(part):,} {'labels' if part is value[1] else 'names'} for "
                    f"{len(images):,} images; must be one per image"
                )
        # Iterating over arrays of other libraries may yield arrays.
        plain = [labels if labels.dtype.kind in "iu" else value[1], *value[2:]]
        return _ReturnedSplit(split, zip(images, *plain, strict=True), len(images), labels)

    def _class_names(self, names: Any) -> tuple[str, ...]:
        if names is None or not isinstance(names, Sized) or len(names):
            return arrays.check_class_names(names, f"{self._prefix}, class names")
        split = self._recipe.part.train_split
        returned_split = self._splits[split]
        if returned_split.labels is None:
            raise DataError(
                f"{self._prefix}, split {split!r}: is an iterable of examples, whose labels are "
                "unknown until all are read; set the class names with register_dataset(..., "
                "class_names=[...])"
            )
        what = f"{self._prefix}, split {split!r}, labels"
        known = arrays.check_labels(returned_split.labels, returned_split.count, what)
        remedy = "renumber all splits alike, or return (splits, class_names)"
        arrays.check_contiguous_labels(known, what, remedy)
        return arrays.numbered_names(int(known.max()) + 1)

    def _check_labels(self, split: str, returned_split: _ReturnedSplit) -> None:
        assert returned_split.labels is not None
        is_used = split in (self._recipe.part.train_split, self._recipe.part.eval_split)
        if returned_split.labels.dtype.kind != "U":
            arrays.check_labels(
                returned_split.labels,
                returned_split.count,
                f"{self._prefix}, split {split!r}, labels",
                classes=len(self._classes),
                unknown=not is_used,
            )

    def class_names_and_metadata(self) -> tuple[Sequence[str], dict[str, Any]]:
        """Returns the class names, and metadata on what the examples depend on."""
        source = self._recipe.local_source
        return self._classes, {
            "source": str(source.absolute()) if source else "",
            "source_digest": self._digest,
            "settings": self._recipe.settings,
            "code": self._recipe.code,
        }

    def source_bytes(self) -> int:
        """Returns 0: the size is unknown until the data set is written."""
        return 0

    def examples(self, items: _ReturnedSplit) -> Generator[base.KeyedExample, None, None]:
        """Yields the examples, checked and encoded in threads."""
        work = functools.partial(self._features, items.split)
        examples = self._guarded(items)
        index = -1
        for index, (features, bit_depth) in enumerate(
            decode.threaded_map(work, enumerate(examples), _CHUNK_SIZE)
        ):
            # TFDS writes the metadata after the last example.
            known = self.info.metadata.get("bit_depth", 0)
            self.info.metadata["bit_depth"] = max(known, bit_depth)
            yield f"{items.split}_{index:08d}", features
        if index < 0:
            raise DataError(f"{self._prefix}, split {items.split!r}: contains no examples")

    def _guarded(self, items: _ReturnedSplit) -> Iterator[Any]:
        """Yields what the function returned; a generator of its runs only now, and may fail."""
        what = f"the data set {self._recipe.name!r}, split {items.split!r},"
        with registry.as_config_error(self._recipe.part, what):
            iterator = iter(items.examples)
        while True:
            with registry.as_config_error(self._recipe.part, what):
                try:
                    example = next(iterator)
                except StopIteration:
                    return
            yield example

    def _features(self, split: str, numbered: tuple[int, Any]) -> tuple[dict[str, Any], int]:
        """Returns the features of an example, and its bit depth, as in `decode.Inspection`."""
        number, example = numbered
        what = f"{self._prefix}, split {split!r}, example {number:,}"
        if not isinstance(example, tuple | list) or len(example) not in (2, 3):
            raise DataError(
                f"{what}: has type {type(example).__name__}; must be (image, label) or (image, "
                "label, name)"
            )
        image, label, name = (*example, f"{split}_{number:06d}")[:3]
        bit_depth = 0
        if isinstance(image, bytes):
            bit_depth = decode.verify(image, what)
        else:
            arrays.check_image(image, what)
            image = base.to_png(image)
        if not isinstance(name, str):
            raise DataError(f"{what}: its name has type {type(name).__name__}; must be a string")
        features = {
            "image": image,
            "label": self._label(label, what),
            "file_name": folders.escape_for_display(name),
        }
        return features, bit_depth

    def _label(self, label: Any, what: str) -> int:
        if isinstance(label, str) and label in self._classes:
            return self._classes.index(label)
        try:
            number = -2 if isinstance(label, bool) else operator.index(label)
        except TypeError:
            number = -2
        if not -1 <= number < len(self._classes):
            raise DataError(
                f"{what}: label = {label!r}: must be 0 to {len(self._classes) - 1}, the name of "
                f"one of the {len(self._classes)} classes, or -1 if unknown"
            )
        return number
