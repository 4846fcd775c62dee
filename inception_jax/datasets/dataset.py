"""Data sets ready for training: opened from what was prepared once, or prepared now.

`prepare` makes a folder (`cache`) from a standard TFDS dataset, and makes that from the original
files, or from what a function returns (`registry.register_dataset`).
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from inception_jax import config
from inception_jax.datasets import arrays, cache, duplicates, preparation, splits
from inception_jax.datasets.cache import Info
from inception_jax.datasets.duplicates import Duplicates
from inception_jax.datasets.recipe import Log, Recipe, class_changes, data_directory
from inception_jax.datasets.splits import Split
from inception_jax.errors import ConfigError, DataError, nearest

__all__ = ["HOLDOUT", "Dataset", "class_changes", "class_ids", "data_directory", "prepare"]

# The split that is cut from the training split, by config.data.holdout or a slice.
HOLDOUT = "holdout"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set ready for training.

    Attributes:
      name, version: as in the registry.
      image_size: height and width of the images, pixels.
      class_names: in the order of the labels.
      mean, std: float32 [3], of each channel over all pixels of the training split (a hold-out
        included), in units of pixel value / 255; the published ones where the registry has them.
        Of a channel that never changes the deviation is 1, not 0.
      splits: all splits by name.
      train_split, eval_split: the names of the two that training and evaluation use.
      eval_crop: side of the centred square that is cut from the images of all splits but the one to
        train on, over the shorter side.
      bit_depth: how many bits the values of image files with 16 bits a channel use; 0: there are no
        such files.
    """

    name: str
    version: str
    image_size: int
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    splits: dict[str, Split]
    train_split: str
    eval_split: str
    eval_crop: float = 1.0
    bit_depth: int = 0

    @classmethod
    def from_arrays(
        cls,
        images: np.ndarray,
        labels: np.ndarray | Sequence[int],
        *,
        evaluation: tuple[np.ndarray, np.ndarray | Sequence[int]] | None = None,
        val_fraction: float = 0.2,
        class_names: Sequence[str] = (),
        image_size: int = 0,
        name: str = "arrays",
        seed: int = 0,
    ) -> "Dataset":
        """Returns a data set of arrays, which stays in memory and writes no file.

        Args:
          images: uint8 [N, H, W, 3], or grey: [N, H, W] or [N, H, W, 1].
          labels: int [N], from 0 on.
          evaluation: (images, labels) to evaluate on; None: a share of each class is held out.
          val_fraction: that share, rounded, but at least one example, and never all.
          class_names: in the order of the labels; none: the labels' numbers.
          image_size: height and width that images are resized to, of the centred square, pixels; 0:
            their shorter side.
          name: in logs and records.
          seed: of the choice of what is held out.

        Raises:
          DataError: if an array is of another shape, type or length, or a label out of range.
        """
        pixels = arrays.stack(images, "images")
        classes = len(arrays.check_class_names(class_names, "class_names")) if class_names else 0
        known = arrays.check_labels(labels, len(pixels), "labels", classes=classes)
        if not class_names:
            arrays.check_numbering(known)
        class_names = tuple(class_names) or arrays.numbered(int(known.max()) + 1)
        size = image_size or min(pixels.shape[1:3])
        if evaluation is None:
            if not 0 < val_fraction < 1:
                raise ConfigError(
                    f"val_fraction = {val_fraction}: must be more than 0, less than 1"
                )
            held = arrays.held_out(known, val_fraction, seed)
            if not held.any():
                raise DataError("images: no class has two, so that one could be evaluated on")
            test = arrays.make_split(pixels, known, np.flatnonzero(held), size)
            train = arrays.make_split(pixels, known, np.flatnonzero(~held), size)
        else:
            train = arrays.make_split(pixels, known, np.arange(len(pixels)), size)
            others = arrays.stack(evaluation[0], "evaluation[0]")
            theirs = arrays.check_labels(
                evaluation[1], len(others), "evaluation[1]", classes=len(class_names)
            )
            test = arrays.make_split(others, theirs, np.arange(len(others)), size)
        mean, std = arrays.statistics(train.pixels)
        return cls(
            name=name,
            version=arrays.version(train, test),
            image_size=size,
            class_names=class_names,
            mean=mean.astype(np.float32),
            std=np.where(std > 0, std, 1).astype(np.float32),
            splits={"train": train, "validation": test},
            train_split="train",
            eval_split="validation",
        )

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def train(self) -> Split:
        """The split to train on."""
        return self.splits[self.train_split]

    @property
    def train_evaluated(self) -> Split:
        """The examples to train on, as an evaluation sees them."""
        return self.view(self.train_split, crop=self.eval_crop)

    @property
    def evaluation(self) -> Split:
        """The split to evaluate on."""
        return self.splits[self.eval_split]

    def view(self, split: str, *, crop: float = 1.0, examples: int | None = None) -> Split:
        """Returns a split to evaluate on; the same object for the same arguments.

        Args:
          split: its name; "train" and "eval" stand for those that training and evaluation use,
            whatever their names.
          crop: side of the centred square that is cut from each image, over its shorter side; other
            than 1 of records only (config.data.storage).
          examples: how many, from its first on; None: all.

        Raises:
          ConfigError: if there is no such split, or it cannot be cropped.
        """
        name = {"train": self.train_split, "eval": self.eval_split}.get(split, split)
        if name not in self.splits:
            raise ConfigError(
                f"{self.name} has no split {split!r}; it has {', '.join(self.splits)}."
                f"{nearest(split, self.splits)}"
            )
        if (name, crop, examples) not in self._views:
            found = self.splits[name].cropped(crop)
            if examples is not None and examples < len(found):
                found = splits.subset(found, np.arange(examples))
            self._views[name, crop, examples] = found
        return self._views[name, crop, examples]

    @functools.cached_property
    def _views(self) -> dict[tuple[str, float, int | None], Split]:
        return {}

    @functools.cached_property
    def trained_on(self) -> Duplicates | None:
        """The images to evaluate on that are training images, too; None: not known."""
        return duplicates.between(self.evaluation, self.train)


def prepare(data: config.Data, *, log: Log = print) -> Dataset:
    """Opens a data set, after preparing it if this has not been done.

    Several processes may call this at once: one prepares, the others wait for it.

    Args:
      data: which data set, from where, kept where and how, at what size.
      log: takes one line of text about what goes on.

    Returns:
      The data set, its images still on disk.

    Raises:
      ConfigError: if a source is given for a data set that takes none.
      DataError: if the source or what is prepared is damaged or missing, or the disk is full or
        read-only.
    """
    recipe = Recipe.of(data, log)
    folder, is_new = recipe.cache, False

    def is_outdated(info: Info) -> bool:
        return recipe.is_outdated(cache.prepared(info), folder)

    info, _ = cache.read_info(folder)
    if info is None or is_outdated(info):
        lock = recipe.caches / f"{recipe.name}-{recipe.version}.lock"
        with preparation.locked(lock, log=log):
            # Another process may have prepared it while this one waited.
            info, problem = cache.read_info(folder)
            if info is None and problem:
                log(f"{folder}: {problem}; it is made again")
            if info is None or is_outdated(info):
                with preparation.readable_errors(recipe.directory):
                    info, is_new = preparation.build(recipe), True
    recipe.check(cache.prepared(info), folder)
    dataset = _open(recipe, info)
    for line in _notes(recipe, dataset, info):
        log(line)
    if is_new:
        _log_duplicates(dataset, log)
    return dataset


def _log_duplicates(dataset: Dataset, log: Log) -> None:
    """Says which images occur in two splits, or in one with different labels."""
    train = dataset.train
    for name, split in dataset.splits.items():
        if split is not train and (found := duplicates.between(split, train)) and found.total:
            log(
                f"{dataset.name}: {found.total:,} of {len(split):,} images of the {name} split are "
                f"also among those to train on, so that its accuracy says too much: {found}"
            )
    if (found := duplicates.of_different_labels(train)) and found.total:
        log(
            f"{dataset.name}: {found.total:,} of {len(train):,} images to train on are there with "
            f"different labels: {found}"
        )


def class_ids(data: config.Data) -> tuple[str, ...]:
    """Returns what a prepared data set's authors call its classes, such as wnids; often nothing.

    Args:
      data: as of `prepare`, which comes first.

    Returns:
      An id for each label, in order; empty: there are none besides the names.

    Raises:
      DataError: if the records are gone, so that it cannot be told.
    """
    recipe = Recipe.of(data, print)
    builder = preparation.make_builder(recipe)
    if not builder.is_prepared():
        raise DataError(
            f"{builder.data_dir}: is missing, and with it the ids of the classes. Put it back, or "
            f"remove {recipe.all_of_it}, to prepare the data set anew"
        )
    return tuple(builder.facts.get("wnids", ()))


def _open(recipe: Recipe, info: Info) -> Dataset:
    part, data, folder = recipe.part, recipe.data, recipe.cache
    opened = {name: cache.open_split(data, folder, info, name) for name in info["splits"]}
    train, eval_split = data.train_split or part.train_split, data.eval_split or part.eval_split
    train, part_of_train = splits.sliced(train, info["splits"], "train_split")
    mean, std = info.get("statistics", {}).get(train, (info["mean"], info["std"]))
    whole = opened[train]
    opened[train] = splits.part_of(whole, part_of_train)
    if data.holdout:
        held = splits.stratified(opened[train].labels, data.holdout)
        opened[HOLDOUT] = splits.subset(opened[train], np.flatnonzero(held))
        opened[train] = splits.subset(opened[train], np.flatnonzero(~held))
        evaluated = HOLDOUT
    else:
        evaluated, part_of_it = splits.sliced(
            eval_split or _usual_eval_split(recipe, opened, train), info["splits"], "eval_split"
        )
        if evaluated == train:
            if set(part_of_it) & set(part_of_train):
                raise ConfigError(
                    f"config.data.eval_split = {data.eval_split!r}: has training examples of "
                    f"config.data.train_split = {data.train_split!r}; give parts that do not "
                    "overlap, such as train[:90%] and train[90%:]"
                )
            evaluated, opened[HOLDOUT] = HOLDOUT, whole
        opened[evaluated] = splits.part_of(opened[evaluated], part_of_it)
    # Only what is evaluated is cut: training has crops of its own.
    opened = {
        name: split if name == train else split.cropped(data.eval_crop_pct)
        for name, split in opened.items()
    }
    for name in (train, evaluated):
        if not len(opened[name]) or opened[name].labels.min() < 0:
            raise DataError(
                f"{folder}: the split {name!r} has examples without a label, or none at all; train "
                "and evaluate on others"
            )
    return Dataset(
        name=info["name"],
        version=info["version"],
        image_size=info["image_size"],
        class_names=tuple(info["class_names"]),
        mean=np.array(mean, np.float32),
        # What never changes is 0 once its mean is subtracted, whatever it is divided by.
        std=np.array([each if each > 0 else 1 for each in std], np.float32),
        splits=opened,
        train_split=train,
        eval_split=evaluated,
        eval_crop=data.eval_crop_pct,
        bit_depth=cache.bit_depth(part.name, info),
    )


def _usual_eval_split(recipe: Recipe, opened: Collection[str], train: str) -> str:
    """Returns the split to evaluate on where nothing says which."""
    others = [name for name in opened if name != train]
    for name in ("validation", "test"):
        if name in others:
            return name
    if len(others) == 1:
        return others[0]
    found = f"it has {', '.join(others)} besides" if others else "it has no other"
    remedy = (
        "set config.data.eval_split"
        if "eval_split" in recipe.part.takes
        else ("name one in register_dataset(..., eval_split=...)")
    )
    raise ConfigError(
        f"{recipe.name}: which split is to be evaluated on, with {train!r} to train on? ({found}); "
        f"{remedy}, or hold out training examples with config.data.holdout"
    )


def _notes(recipe: Recipe, dataset: Dataset, info: Info) -> Iterator[str]:
    """Yields what to know of a data set that is opened.

    Raises:
      DataError: if its training images are nothing but one color.
    """
    folder = recipe.cache
    cache.check_colors(recipe, info["std"], where=folder)
    channels = zip(("red", "green", "blue"), info["mean"], info["std"], strict=True)
    if constant := [f"{color} ({mean:.3g})" for color, mean, std in channels if not std > 0]:
        yield (
            f"{folder}: every training pixel has the same {' and '.join(constant)}; the standard "
            "deviation of 0 is taken as 1"
        )
    if "bit_depth" in info or not config.unrecorded_bit_depth(recipe.part.name):
        return
    names = dataset.train.names
    if others := [name for name in names if not name.lower().endswith((".jpg", ".jpeg"))]:
        yield (
            f"{folder}: prepared by an older version, which dropped transparency and used the "
            f"upper 8 of 16 bits even where those are empty. {len(others):,} training images may "
            f"be concerned, such as {others[0]}. If they are, remove {recipe.all_of_it}, to "
            "prepare them again; for 16-bit files alone, setting config.data.bit_depth is enough"
        )
