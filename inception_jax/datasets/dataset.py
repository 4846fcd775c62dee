"""Opens data sets for training, preparing them first if necessary.

`prepare` writes a cache folder (`cache`) from a standard TFDS data set, which it writes from the
original files or from a registered function (`registry.register_dataset`).
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from inception_jax import config
from inception_jax.datasets import arrays, cache, duplicates, locks, preparation, splits
from inception_jax.datasets.cache import Info
from inception_jax.datasets.duplicates import Duplicates
from inception_jax.datasets.recipe import Log, Recipe, class_changes, data_location
from inception_jax.datasets.splits import Split
from inception_jax.errors import ConfigError, DataError, nearest

__all__ = ["HOLDOUT", "Dataset", "class_changes", "class_ids", "data_location", "prepare"]

# The split taken from the training split by config.data.holdout or a slice.
HOLDOUT = "holdout"


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set that is ready for training.

    Attributes:
      name, version: as in the registry.
      image_size: height and width of the images, pixels.
      class_names: in label order.
      mean, std: float32 [3], per channel over all pixels of the training split (including a
        hold-out), of pixel value / 255; published values if the registry defines them. `std` is 1
        instead of 0 for a constant channel.
      splits: all splits by name.
      train_split, eval_split: names of the splits used for training and evaluation.
      eval_crop: side of the center crop, as a fraction of the shorter side, of all splits except
        the training split.
      bit_depth: number of bits used by the values of image files with 16 bits per channel; 0: no
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
        """Returns an in-memory data set of arrays; writes no files.

        Args:
          images: uint8 [N, H, W, 3], or grayscale [N, H, W] or [N, H, W, 1].
          labels: integers [N], from 0.
          evaluation: (images, labels) to evaluate on; None: hold out a fraction of each class.
          val_fraction: that fraction, rounded, but at least one example and never all.
          class_names: in label order; empty: '0', '1', ….
          image_size: height and width, pixels, to which the center square of each image is resized;
            0: its shorter side.
          name: used in logs and run records.
          seed: for choosing the held-out examples.

        Raises:
          DataError: if an array has the wrong shape, dtype or length, or a label is out of range.
          ConfigError: if another argument has an invalid value.
        """
        for what, number in (("image_size", image_size), ("seed", seed)):
            if number < 0:
                raise ConfigError(f"{what} = {number}: must be at least 0")
        if evaluation is not None and len(evaluation) != 2:
            raise ConfigError(f"evaluation: must be (images, labels), got {len(evaluation)} values")
        pixels = arrays.as_pixel_array(images, "images")
        unnamed = isinstance(class_names, Sequence) and not class_names
        names = () if unnamed else arrays.check_class_names(class_names, "class_names")
        known = arrays.check_labels(labels, len(pixels), "labels", classes=len(names))
        if not names:
            arrays.check_contiguous_labels(
                known,
                "labels",
                "renumber with np.unique(labels, return_inverse=True)[1], or pass class_names",
            )
            names = arrays.numbered_names(int(known.max()) + 1)
        size = image_size or min(pixels.shape[1:3])
        if evaluation is None:
            if not 0 < val_fraction < 1:
                raise ConfigError(
                    f"val_fraction = {val_fraction}: must be between 0 and 1, exclusive"
                )
            held = arrays.holdout_mask(known, val_fraction, seed)
            if not held.any():
                raise DataError(
                    "images: no class has two images, so none can be held out for "
                    "evaluation; add images, or pass evaluation"
                )
            test = arrays.make_split(pixels, known, np.flatnonzero(held), size)
            train = arrays.make_split(pixels, known, np.flatnonzero(~held), size)
        else:
            train = arrays.make_split(pixels, known, np.arange(len(pixels)), size)
            others = arrays.as_pixel_array(evaluation[0], "evaluation[0]")
            theirs = arrays.check_labels(
                evaluation[1], len(others), "evaluation[1]", classes=len(names)
            )
            test = arrays.make_split(others, theirs, np.arange(len(others)), size)
        mean, std = arrays.statistics(train.pixels)
        return cls(
            name=name,
            version=arrays.version(train, test),
            image_size=size,
            class_names=names,
            mean=mean.astype(np.float32),
            std=np.where(std > 0, std, 1).astype(np.float32),
            splits={"train": train, "validation": test},
            train_split="train",
            eval_split="validation",
        )

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def train(self) -> Split:
        """The training split."""
        return self.splits[self.train_split]

    @property
    def train_eval_view(self) -> Split:
        """The training examples with the evaluation crop."""
        return self.view(self.train_split, crop=self.eval_crop)

    @property
    def evaluation(self) -> Split:
        """The evaluation split."""
        return self.splits[self.eval_split]

    def view(self, split: str, *, crop: float = 1.0, examples: int | None = None) -> Split:
        """Returns a split for evaluation; the same object for the same arguments.

        Args:
          split: its name; "train" and "eval" select the splits used for training and evaluation,
            whatever their names.
          crop: side of the center crop as a fraction of the shorter side; values other than 1 need
            config.data.storage=records.
          examples: number of examples, from the first; None: all.

        Raises:
          ConfigError: if the split does not exist or cannot be cropped.
        """
        name = {"train": self.train_split, "eval": self.eval_split}.get(split, split)
        if name not in self.splits:
            raise ConfigError(
                f"{self.name}: split {split!r} not found.{nearest(split, self.splits)} Its splits "
                f"are {', '.join(self.splits)}"
            )
        if (name, crop, examples) not in self._views:
            view = self.splits[name].cropped(crop)
            if examples is not None and examples < len(view):
                view = splits.subset(view, np.arange(examples))
            self._views[name, crop, examples] = view
        return self._views[name, crop, examples]

    @functools.cached_property
    def _views(self) -> dict[tuple[str, float, int | None], Split]:
        return {}

    @functools.cached_property
    def eval_train_overlap(self) -> Duplicates | None:
        """The evaluation images that are also training images; None: unknown."""
        return duplicates.between(self.evaluation, self.train)


def prepare(data: config.Data, *, log: Log = print) -> Dataset:
    """Opens a data set, preparing it first if necessary.

    Several processes may call this at once, also on several hosts if `config.data.directory` is in
    a bucket: one prepares the data set while the others wait.

    Args:
      data: the settings in config.data.
      log: called with one line of text at a time.

    Returns:
      The data set, with its images still on disk.

    Raises:
      ConfigError: if a setting does not apply to the data set.
      DataError: if the source or the prepared data are damaged or missing, or the disk is full or
        read-only.
      BucketError: if a bucket cannot be read, or prepared data cannot be uploaded.
    """
    recipe = Recipe.from_config(data, log)
    where, is_new = recipe.original(recipe.cache_dir), False

    def usable(found: preparation.Found) -> Info | None:
        """Returns the description of prepared data that need not be prepared again."""
        if found.info and recipe.is_outdated(cache.prepared_from_info(found.info), where):
            return None
        return found.info

    found = preparation.find(recipe)
    info = usable(found)
    if info is None or (recipe.remote and not found.version):
        lock = recipe.cache_root / f"{recipe.name}-{recipe.version}.lock"
        with locks.locked(
            lock, doing="preparing this data set", setting=recipe.folder_setting, log=log
        ):
            info, is_new = _find_or_prepare(recipe, usable)
    recipe.check(cache.prepared_from_info(info), where)
    dataset = _open(recipe, info)
    for line in _notes(recipe, dataset, info):
        log(line)
    if is_new:
        _log_duplicates(dataset, log)
    return dataset


def _find_or_prepare(
    recipe: Recipe, usable: Callable[[preparation.Found], Info | None]
) -> tuple[Info, bool]:
    """Returns the description of the cache, and whether this process has prepared it.

    Requires the lock of this host.
    """
    while True:
        # Another process may have prepared it in the meantime.
        found = preparation.find(recipe)
        info = usable(found)
        if info and (found.version or not recipe.remote):
            return info, False
        with preparation.sole_writer(recipe, found) as check:
            if check is None:
                continue
            is_new = info is None
            if info is None:
                if found.info is None and found.problem:
                    recipe.log(f"{recipe.cache_dir}: {found.problem}; rebuilding it")
                with preparation.translate_disk_errors(recipe):
                    info = preparation.build(recipe)
            preparation.upload(recipe, check)
            return info, is_new


def _log_duplicates(dataset: Dataset, log: Log) -> None:
    """Logs images that occur in two splits, or with different labels."""
    train = dataset.train
    for name, split in dataset.splits.items():
        if split is not train and (shared := duplicates.between(split, train)) and shared.total:
            log(
                f"{dataset.name}: {shared.total:,} of {len(split):,} images in the {name} split "
                f"are also training images, which inflates its accuracy: {shared}"
            )
    if (conflicting := duplicates.with_conflicting_labels(train)) and conflicting.total:
        log(
            f"{dataset.name}: {conflicting.total:,} of {len(train):,} training images occur with "
            f"different labels: {conflicting}"
        )


def class_ids(data: config.Data) -> tuple[str, ...]:
    """Returns the class ids (such as wnids) of a prepared data set, if it has any.

    Args:
      data: as for `prepare`, which must be called first.

    Returns:
      An id per label, in label order; empty if there are only names.

    Raises:
      DataError: if the records are missing.
    """
    recipe = Recipe.from_config(data, print)
    recipe.fetch_records(metadata_only=True)
    builder = preparation.make_builder(recipe)
    if not builder.is_prepared():
        where = recipe.original(pathlib.Path(builder.data_dir))
        raise DataError(
            f"{where}: is missing, so the class ids are unknown. Restore it, or remove "
            f"{recipe.prepared_paths} to prepare the data set again"
        )
    return tuple(builder.facts.get("wnids", ()))


def _open(recipe: Recipe, info: Info) -> Dataset:
    part, data, folder = recipe.part, recipe.data, recipe.cache_dir
    opened = {name: cache.open_split(data, folder, info, name) for name in info["splits"]}
    train, eval_split = data.train_split or part.train_split, data.eval_split or part.eval_split
    train, part_of_train = splits.parse_slice(train, info["splits"], "train_split")
    mean, std = info.get("statistics", {}).get(train, (info["mean"], info["std"]))

    def check_usable(name: str) -> None:
        if not len(opened[name]) or opened[name].labels.min() < 0:
            raise DataError(
                f"{folder}: the split {name!r} is empty or contains unlabeled examples; use "
                "another split for training or evaluation"
            )

    full_split = opened[train]
    opened[train] = splits.take_range(full_split, part_of_train)
    check_usable(train)
    if data.holdout:
        held = splits.stratified_holdout(
            opened[train].labels, data.holdout, len(info["class_names"])
        )
        opened[HOLDOUT] = splits.subset(opened[train], np.flatnonzero(held))
        opened[train] = splits.subset(opened[train], np.flatnonzero(~held))
        evaluated = HOLDOUT
    else:
        evaluated, part_of_it = splits.parse_slice(
            eval_split or _usual_eval_split(recipe, opened, train), info["splits"], "eval_split"
        )
        if evaluated == train:
            if set(part_of_it) & set(part_of_train):
                raise ConfigError(
                    f"config.data.eval_split = {data.eval_split!r}: overlaps "
                    f"config.data.train_split = {data.train_split!r}; use disjoint parts, such as "
                    "train[:90%] and train[90%:]"
                )
            evaluated, opened[HOLDOUT] = HOLDOUT, full_split
        opened[evaluated] = splits.take_range(opened[evaluated], part_of_it)
    check_usable(evaluated)
    # Only evaluation splits are cropped; training uses its own crops.
    opened = {
        name: split if name == train else split.cropped(data.eval_crop_pct)
        for name, split in opened.items()
    }
    return Dataset(
        name=info["name"],
        version=info["version"],
        image_size=info["image_size"],
        class_names=tuple(info["class_names"]),
        mean=np.array(mean, np.float32),
        # A constant channel is 0 after subtracting its mean, whatever the divisor.
        std=np.array([each if each > 0 else 1 for each in std], np.float32),
        splits=opened,
        train_split=train,
        eval_split=evaluated,
        eval_crop=data.eval_crop_pct,
        bit_depth=cache.bit_depth(part.name, info),
    )


def _usual_eval_split(recipe: Recipe, opened: Collection[str], train: str) -> str:
    """Returns the default evaluation split."""
    others = [name for name in opened if name != train]
    for name in ("validation", "test"):
        if name in others:
            return name
    if len(others) == 1:
        return others[0]
    alternatives = f"the others are {', '.join(others)}" if others else "there are no others"
    remedy = (
        "set config.data.eval_split"
        if "eval_split" in recipe.part.extra_settings
        else "set register_dataset(..., eval_split=...)"
    )
    raise ConfigError(
        f"{recipe.name}: cannot choose an evaluation split other than {train!r} ({alternatives}); "
        f"{remedy}, or hold out training examples with config.data.holdout"
    )


def _notes(recipe: Recipe, dataset: Dataset, info: Info) -> Iterator[str]:
    """Yields log lines about problems of an opened data set.

    Raises:
      DataError: if all training images are one single color.
    """
    folder = recipe.original(recipe.cache_dir)
    cache.check_not_constant(recipe, info["std"], where=folder)
    channels = zip(("red", "green", "blue"), info["mean"], info["std"], strict=True)
    if constant := [f"{color} ({mean:.3g})" for color, mean, std in channels if not std > 0]:
        yield (
            f"{folder}: every training pixel has the same {' and '.join(constant)}; using a "
            "standard deviation of 1 instead of 0"
        )
    if "bit_depth" in info or not config.unrecorded_bit_depth(recipe.part.name):
        return
    names = dataset.train.names
    if others := [name for name in names if not name.lower().endswith((".jpg", ".jpeg"))]:
        yield (
            f"{folder}: prepared by an older version, which dropped transparency and used the "
            f"upper 8 of 16 bits even where those are empty. {len(others):,} training images may "
            f"be affected, such as {others[0]}. If they are, remove {recipe.prepared_paths} to "
            "prepare them again; for 16-bit files only, setting config.data.bit_depth is enough"
        )
