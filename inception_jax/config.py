"""The typed configuration of a run: every setting with its unit, range and default.

An experiment file returns a `Config`; the command line overrides single fields
(`--config.train.batch_size=256`); `validate` checks the whole before anything is downloaded or
compiled. `Timeline` turns durations (epochs, steps or examples) into steps.

Each field is declared with `setting`, whose metadata is read in four places: `validate` (type,
range, choices), `describe` (the --help text), `changes` (what may differ when a run is resumed) and
the tests, which require that every field is read somewhere in the package.
"""

import copy
import dataclasses
import json
import math
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

from inception_jax import other_names, paths
from inception_jax.errors import ConfigError, nearest

DATASETS = (
    "tiny_imagenet",
    "tiny_imagenet_subset",
    "cifar10",
    "image_folder",
    "digits",
    "imagenet2012",
)
UNREADABLE = ("refuse", "skip")
LAYOUTS = ("auto", "classes")
ON_CHANGE = ("refuse", "prepare")
STORAGES = ("decoded", "records")
# What cameras and scanners put into files of 16 bits a channel.
BIT_DEPTHS = (8, 10, 12, 14, 16)
MODELS = (
    "googlenet",
    "googlenet_torchvision",
    "deeper_googlenet",
    "eight_module_googlenet",
    "mini_googlenet",
)
STEMS = ("paper", "s16", "s32")
FIVE_BY_FIVE = ("5x5", "3x3", "two_3x3")
NORMS = ("batch", "lrn", "none")
DTYPES = ("float32", "bfloat16", "auto")
CROPS = ("none", "pad", "resized", "inception")
POLICIES = ("none", "randaugment", "trivialaugment")
OPTIMIZERS = ("sgd_nesterov", "sgd", "adam", "adamw", "muon")
NONFINITE = ("stop", "skip")
SCHEDULES = ("constant", "steps", "exponential", "cosine", "linear", "polynomial")


def setting(
    default: Any,
    meaning: str,
    *,
    choices: Sequence[Any] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    resumable: bool = False,
    per_host: bool = False,
    path: bool = False,
) -> Any:
    """Declares one field of the configuration.

    Args:
      default: its value when nothing else is said; a dataclass instance is copied for each use.
      meaning: what it is, with its unit.
      choices: the allowed values; empty: any.
      low, high: the smallest and largest allowed value, themselves included.
      above, below: bounds that are themselves excluded.
      resumable: whether a run may be resumed with another value. A field that decides the shape of
        the state, or which examples a step sees, may not.
      per_host: whether the processes of a run on several hosts may have different values.
      path: whether it is a local path; empty: none.
    """
    metadata = {
        "help": meaning,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "resumable": resumable,
        "per_host": per_host,
        "path": path,
    }
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        template = default
        # Deep: a group within the group would be shared otherwise.
        return dataclasses.field(default_factory=lambda: copy.deepcopy(template), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Duration:
    """A length of training in one of three units; at most one of them is more than zero.

    With all at zero the duration is absent, which each user of a duration gives a meaning ("off").
    """

    epochs: float = setting(
        0.0, "passes over the training split; 0: not the unit", low=0, resumable=True
    )
    steps: int = setting(0, "optimizer steps; 0: not the unit", low=0, resumable=True)
    examples: int = setting(0, "training examples seen; 0: not the unit", low=0, resumable=True)

    def given(self) -> dict[str, float | int]:
        """Returns the units that are set, with their values."""
        return {unit: value for unit, value in dataclasses.asdict(self).items() if value}

    def __bool__(self) -> bool:
        """Whether a unit is set."""
        return bool(self.given())

    def __str__(self) -> str:
        return ", ".join(f"{value:g} {unit}" for unit, value in self.given().items()) or "none"


# Settings that may be left open, and the value that says so: of `model.dtype`, which the hardware
# decides, and of those that train.auto_size takes from the size of the data.
OPEN: dict[str, Any] = {
    "model.dtype": "auto",
    "train.batch_size": 0,
    "schedule.learning_rate": 0,
    "train.length": Duration(),
    "schedule.warmup": Duration(),
    "augment.mixup": -1,
    "evaluation.every": Duration(),
    "checkpoint.every": Duration(),
    "log.every": Duration(),
}


@dataclasses.dataclass
class Data:
    name: str = setting("tiny_imagenet", "the data set", choices=DATASETS)
    source: str = setting(
        "",
        "the original files: an archive or a folder; empty: the official download, where there is "
        "one",
        resumable=True,
        per_host=True,
        path=True,
    )
    directory: str = setting(
        "",
        "where prepared data are kept; empty: TFDS's own default (~/tensorflow_datasets)",
        resumable=True,
        per_host=True,
        path=True,
    )
    eval_share: float = setting(
        0.2,
        "share of each class that image_folder evaluates on, where the folder has no val/ or test/",
        above=0,
        below=1,
    )
    unreadable: str = setting(
        "refuse",
        "what image_folder does about files that are no whole image: stop, or leave them out",
        choices=UNREADABLE,
    )
    archive_encoding: str = setting(
        "",
        "encoding of the names in image_folder's archive (gbk, shift_jis, cp866, …) where the "
        "archive does not declare it; empty: UTF-8, or stop if they are not",
    )
    layout: str = setting(
        "auto",
        "what the outermost folders of image_folder are: splits where they are named and built so "
        "(train/, val/), or classes whatever their names",
        choices=LAYOUTS,
    )
    on_change: str = setting(
        "refuse",
        "what to do where the source, or a setting that decides on what is taken from it, is not "
        "what was prepared: stop, or prepare it again in place of what is there",
        choices=ON_CHANGE,
        resumable=True,
    )
    bit_depth: int = setting(
        0,
        "bits that the values of image files with 16 bits a channel use, of which the upper 8 "
        "become the pixels; 0: what the largest value of image_folder's files needs",
        choices=(0, *BIT_DEPTHS),
        # Whether the pixels are those of before is compared with the data set.
        resumable=True,
    )
    image_size: int = setting(64, "height and width of the images fed to the model, pixels", low=8)
    storage: str = setting(
        "decoded",
        "where a step's images come from: all decoded once into a file (3 x image_size^2 bytes "
        "each on disk), or decoded from the compressed records at each step",
        choices=STORAGES,
        resumable=True,
        per_host=True,
    )
    workers: int = setting(
        0,
        "threads that decode records, a batch each; 0: one for each core",
        low=0,
        resumable=True,
        per_host=True,
    )
    eval_crop: float = setting(
        1.0,
        "side of the centred square that evaluation cuts from an image, over the image's shorter "
        "side; other than 1 with storage 'records' only",
        above=0,
        high=1,
        resumable=True,
    )
    holdout: int = setting(
        0,
        "training examples, the same number of each class, that are kept from training and "
        "evaluated on in place of the evaluation split: to tune on; 0: none",
        low=0,
    )


@dataclasses.dataclass
class Augment:
    crop: str = setting(
        "pad",
        "random crop of training images: 'pad' shifts them, 'resized' resizes a box of what was "
        "cut to data.image_size before, 'inception' resizes a box of the original image (storage "
        "'records' only)",
        choices=CROPS,
        resumable=True,
    )
    pad: int = setting(
        4, "zeros added on each side before a 'pad' crop, pixels", low=0, resumable=True
    )
    area_min: float = setting(
        0.08,
        "smallest share of the image's area in a 'resized' or 'inception' crop",
        above=0,
        high=1,
        resumable=True,
    )
    aspect_max: float = setting(
        4 / 3,
        "largest width/height, and height/width, of a 'resized' or 'inception' crop",
        low=1,
        resumable=True,
    )
    flip: bool = setting(True, "mirror half of the training images left to right", resumable=True)
    policy: str = setting(
        "none",
        "operations drawn at random for each image, after crop and flip",
        choices=POLICIES,
        resumable=True,
    )
    policy_ops: int = setting(
        2, "operations an image, of randaugment (trivialaugment: one)", low=1, resumable=True
    )
    policy_magnitude: int = setting(
        9,
        "strength of randaugment's operations, in 30ths of the strongest (trivialaugment: random)",
        low=0,
        high=30,
        resumable=True,
    )
    color_jitter: float = setting(
        0.0,
        "brightness, contrast and saturation of each image are multiplied by factors uniform "
        "between 1 - this and 1 + this; 0: they are not; Howard's 2013 are 0.5",
        low=0,
        high=1,
        resumable=True,
    )
    hue_jitter: float = setting(
        0.0,
        "the hue of each image turns by up to this share of the colour circle, either way; 0: not",
        low=0,
        high=0.5,
        resumable=True,
    )
    mixup: float = setting(
        0.0, "alpha of mixup's Beta(alpha, alpha) distribution; 0: no mixup", low=0, resumable=True
    )
    cutmix: float = setting(
        0.0,
        "alpha of CutMix's Beta(alpha, alpha) distribution; 0: no CutMix",
        low=0,
        resumable=True,
    )
    mix_probability: float = setting(
        1.0, "share of batches that mixup or CutMix change", low=0, high=1, resumable=True
    )
    mix_until: Duration = setting(
        Duration(),
        "time from the start after which nothing is mixed; none: mix to the end",
        resumable=True,
    )
    cutout: int = setting(
        0,
        "side of the square that Cutout blanks, pixels of the image as train.image_sizes has it; "
        "0: no Cutout",
        low=0,
        resumable=True,
    )


@dataclasses.dataclass
class Model:
    name: str = setting("googlenet", "the network", choices=MODELS)
    stem: str = setting(
        "paper",
        "first layers of googlenet: the paper's (total stride 8), or for small images s16 "
        "(stride 4) and s32 (stride 2)",
        choices=STEMS,
    )
    width: float = setting(1.0, "factor on the number of channels of every layer", above=0)
    five_by_five: str = setting(
        "5x5", "what the inception modules' 5x5 branch is made of", choices=FIVE_BY_FIVE
    )
    norm: str = setting(
        "batch",
        "BatchNorm after each convolution, the paper's two local response normalisations, or none",
        choices=NORMS,
    )
    norm_momentum: float = setting(
        0.9,
        "share of BatchNorm's running statistics kept at each step",
        low=0,
        below=1,
        resumable=True,
    )
    norm_epsilon: float = setting(1e-3, "added to BatchNorm's variance", above=0, resumable=True)
    aux_heads: bool = setting(False, "auxiliary classifiers on modules 4a and 4d, in training only")
    dropout: float = setting(
        0.4, "share of features dropped before the last layer", low=0, below=1, resumable=True
    )
    aux_dropout: float = setting(
        0.7, "share of features dropped in the auxiliary heads", low=0, below=1, resumable=True
    )
    dtype: str = setting(
        "float32",
        "type that layers compute in; parameters and statistics are float32. auto: bfloat16 where "
        "the hardware multiplies it, else float32",
        choices=DTYPES,
        resumable=True,
    )


@dataclasses.dataclass
class Optimizer:
    name: str = setting("sgd_nesterov", "the update rule", choices=OPTIMIZERS)
    momentum: float = setting(0.9, "momentum of SGD and Muon", low=0, below=1, resumable=True)
    beta1: float = setting(0.9, "Adam's decay of the first moment", low=0, below=1, resumable=True)
    beta2: float = setting(
        0.999, "Adam's decay of the second moment", low=0, below=1, resumable=True
    )
    epsilon: float = setting(1e-8, "Adam's epsilon", above=0, resumable=True)
    weight_decay: float = setting(
        0.0,
        "L2 coefficient added to the gradient (SGD, Adam), or decoupled decay (AdamW, Muon)",
        low=0,
        resumable=True,
    )
    adam_rate_factor: float = setting(
        0.05,
        "learning rate of the Adam that muon leaves the first convolution, the classifiers, biases "
        "and norms to, over schedule.learning_rate",
        above=0,
        resumable=True,
    )
    decay_all: bool = setting(
        False, "decay biases and norm scales too, not kernels only", resumable=True
    )
    clip_norm: float = setting(
        0.0, "largest global norm of the gradient; 0: no clipping", low=0, resumable=True
    )
    sam_rho: float = setting(
        0.0,
        "radius of sharpness-aware minimisation, in the norm of all parameters together, for twice "
        "the work; 0: off",
        low=0,
        resumable=True,
    )


@dataclasses.dataclass
class Schedule:
    name: str = setting(
        "cosine", "shape of the learning rate after the warm-up", choices=SCHEDULES, resumable=True
    )
    learning_rate: float = setting(
        0.1, "the peak rate, at the end of the warm-up", above=0, resumable=True
    )
    warmup: Duration = setting(
        Duration(), "linear rise from 0 to the peak; none: start at the peak", resumable=True
    )
    end_factor: float = setting(
        0.0,
        "last rate over peak rate, for cosine, linear and polynomial",
        low=0,
        high=1,
        resumable=True,
    )
    power: float = setting(1.0, "exponent of the polynomial schedule", above=0, resumable=True)
    decay: float = setting(
        0.1,
        "factor at each boundary (steps) or over each decay_every (exponential)",
        above=0,
        high=1,
        resumable=True,
    )
    decay_every: Duration = setting(
        Duration(), "time in which exponential multiplies the rate by `decay`", resumable=True
    )
    staircase: bool = setting(
        False, "let exponential fall at whole multiples of decay_every only", resumable=True
    )
    boundaries: tuple[float, ...] = setting(
        (),
        "where `steps` multiplies the rate by `decay`, in boundaries_unit from the start",
        low=0,
        resumable=True,
    )
    boundaries_unit: str = setting(
        "epochs", "what `boundaries` counts", choices=("epochs", "steps"), resumable=True
    )


@dataclasses.dataclass
class Init:
    weights: str = setting(
        "",
        "file of weights that a new run starts from (tools.export, tools.import_weights); "
        "a resumed run does not read it; empty: random values",
        path=True,
    )


@dataclasses.dataclass
class Train:
    auto_size: bool = setting(
        False,
        "take from the number of training images what is left at 0 or none of the batch size, "
        "learning rate, length, warm-up, and times between evaluations, checkpoints and reports, "
        "and mixup if it is -1",
        resumable=True,
    )
    batch_size: int = setting(128, "examples a step, over all devices", low=1)
    accumulate: int = setting(
        1,
        "micro-batches that a step's batch is computed in, one after another, to save memory; "
        "BatchNorm sees each by itself",
        low=1,
        resumable=True,
    )
    length: Duration = setting(Duration(epochs=60), "length of the run", resumable=True)
    label_smoothing: float = setting(
        0.0, "share of the target spread evenly over all classes", low=0, below=1, resumable=True
    )
    image_sizes: tuple[int, ...] = setting(
        (),
        "progressive resizing: sides that training images are resized to one after another, "
        "pixels; empty: data.image_size throughout",
        low=8,
        resumable=True,
    )
    image_size_epochs: tuple[float, ...] = setting(
        (),
        "where each of image_sizes after the first begins, epochs from the start",
        above=0,
        resumable=True,
    )
    aux_weight: float = setting(0.3, "weight of each auxiliary head's loss", low=0, resumable=True)
    ema: Duration = setting(
        Duration(),
        "time constant of the exponential moving average of parameters and BatchNorm statistics "
        "that evaluation uses; none: no average",
        resumable=True,
    )
    nonfinite: str = setting(
        "stop",
        "what a loss or gradient that is not finite does: stop the run, which then goes on from "
        "the checkpoint before, or leave that step's update out",
        choices=NONFINITE,
        resumable=True,
    )
    nonfinite_limit: int = setting(
        5,
        "with nonfinite=skip: steps in a row left out at which the run stops",
        low=1,
        resumable=True,
    )


@dataclasses.dataclass
class Evaluation:
    batch_size: int = setting(
        500,
        "most examples an evaluation step, over all devices; fewer where the split has fewer",
        low=1,
        resumable=True,
    )
    every: Duration = setting(
        Duration(epochs=1),
        "time between evaluations; there is always one at the end",
        resumable=True,
    )
    image_size: int = setting(
        0,
        "side that images are resized to for evaluation, pixels; 0: data.image_size",
        low=0,
        resumable=True,
    )
    flip: bool = setting(
        False,
        "evaluate also with the logits averaged over each image and its mirror image; reported "
        "apart, as flip_loss, flip_top1 and flip_top5",
        resumable=True,
    )
    train_examples: int = setting(
        0,
        "training examples (the first of the data set) that each evaluation covers besides, "
        "without augmentation and dropout, as split train_eval; 0: none",
        low=0,
        resumable=True,
    )
    norm_examples: int = setting(
        0,
        "training examples that BatchNorm's statistics are re-estimated from before each "
        "evaluation, and saved so, for runs of few steps; 0: the running statistics",
        low=0,
        resumable=True,
    )


@dataclasses.dataclass
class Checkpoint:
    every: Duration = setting(
        Duration(epochs=1),
        "time between checkpoints; there is always one at the end",
        resumable=True,
    )
    keep_last: int = setting(
        2, "how many of the newest checkpoints are kept", low=1, resumable=True
    )
    keep_best: int = setting(
        1, "how many of the best by validation top-1 are kept besides", low=0, resumable=True
    )
    on_write_error: str = setting(
        "stop",
        "what a full disk does to the run, or another reason why a checkpoint, a line of metrics "
        "or the report cannot be written: stop it, or continue: say so, and try again at the next "
        "one. The last must succeed. On several processes a run always stops",
        choices=("stop", "continue"),
        resumable=True,
    )


@dataclasses.dataclass
class Log:
    every: Duration = setting(Duration(steps=100), "time between training metrics", resumable=True)


@dataclasses.dataclass
class Watch:
    host_silence: float = setting(
        60.0,
        "on several hosts: seconds without a sign of life after which another process is taken for "
        "dead, and this one stops",
        low=3,
        resumable=True,
    )
    stall_minutes: float = setting(
        10.0,
        "minutes without a step, save or anything else after which a run says what each of its "
        "threads is doing; 0: never",
        low=0,
        resumable=True,
    )
    long_stall_minutes: float = setting(
        60.0, "the same while it compiles or evaluates; 0: never", low=0, resumable=True
    )


@dataclasses.dataclass
class Expected:
    top1: float = setting(
        0.0,
        "top-1 on the evaluation split that the experiment should reach, for its report, percent; "
        "0: not known",
        low=0,
        high=100,
        resumable=True,
    )
    source: str = setting("", "where that figure is from, in a line", resumable=True)


@dataclasses.dataclass
class Config:
    """All settings of a run."""

    name: str = setting(
        "unnamed", "what the experiment is called in logs and plots", resumable=True
    )
    seed: int = setting(0, "seed of initialisation, shuffling and augmentation", low=0)
    data: Data = setting(Data(), "what the examples are")
    augment: Augment = setting(Augment(), "how training images are varied")
    model: Model = setting(Model(), "what is trained")
    init: Init = setting(Init(), "what training starts from")
    optimizer: Optimizer = setting(Optimizer(), "how parameters are updated")
    schedule: Schedule = setting(Schedule(), "the learning rate over time")
    train: Train = setting(Train(), "how training runs")
    evaluation: Evaluation = setting(Evaluation(), "how the model is evaluated")
    checkpoint: Checkpoint = setting(Checkpoint(), "when and what is saved")
    log: Log = setting(Log(), "what is reported")
    watch: Watch = setting(Watch(), "when a run counts as stuck or broken")
    expected: Expected = setting(Expected(), "what the result is compared with")


def leaves(kind: type = Config, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """Yields (dotted path, type, field) of every leaf setting, in order."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hints[field.name]):
            yield from leaves(hints[field.name], path + ".")
        else:
            yield path, hints[field.name], field


def get(config: Any, path: str) -> Any:
    """Returns the setting at a dotted path."""
    for part in path.split("."):
        config = getattr(config, part)
    return config


def put(config: Config, path: str, value: Any) -> None:
    """Changes the setting at a dotted path; a list, which JSON makes of a tuple, becomes one."""
    parent, _, name = path.rpartition(".")
    value = tuple(value) if isinstance(value, list) else value
    setattr(get(config, parent) if parent else config, name, value)


def plain(value: Any) -> Any:
    """Returns a setting's value as JSON gives it back: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else value


def is_open(config: Config, path: str) -> bool:
    """Whether a setting is left to be chosen by the size of the data, or by the hardware."""
    asked = config.train.auto_size is True or path == "model.dtype"
    return asked and path in OPEN and get(config, path) == OPEN[path]


def fill_open(config: Config, values: Mapping[str, Any]) -> Config:
    """Returns a configuration with what it leaves open taken from values by dotted path."""
    filled = copy.deepcopy(config)
    for path, value in values.items():
        if is_open(config, path):
            group, _, name = path.rpartition(".")
            setattr(get(filled, group), name, copy.copy(value))
    return filled


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested dictionaries that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(values: Mapping[str, Any]) -> Config:
    """Returns the configuration that `to_dict` (and a pass through JSON) gave `values`.

    Raises:
      ConfigError: if a field is unknown, or a value fails `validate`.
    """
    config = Config()
    for path, value in flatten(values).items():
        check_path(path)
        put(config, path, value)
    validate(config)
    return config


def unrecorded_bit_depth(data_name: str) -> int:
    """Returns the bit depth of what older versions prepared or trained, which recorded none.

    They took all 16 bits for used. Only image_folder can have such files; for others 0 stands.
    """
    return 16 if data_name == "image_folder" else 0


def read_record(path: pathlib.Path) -> dict[str, Any]:
    """Returns what a run's config.json holds; its "config" is one that `from_dict` takes.

    Raises:
      FileNotFoundError: if it is not there.
      ConfigError: if it cannot be read as the record of a run.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        from_dict(record["config"])
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"{path}: cannot be read as the record of a run: {error}. Was it written by another "
            "version? Restore it from a backup, or use a new --workdir"
        ) from error
    return record


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dictionaries as one, keyed by dotted path."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def shared(config: Config) -> dict[str, Any]:
    """Returns what the processes of a run must have in common, by the settings' full names."""
    return {
        f"config.{path}": get(config, path)
        for path, _, field in leaves()
        if not field.metadata["per_host"]
    }


def check_path(path: str) -> None:
    """Checks that a dotted path is a setting's.

    Raises:
      ConfigError: with what may be meant, if it is not.
    """
    paths = {known for known, _, _ in leaves()}
    if path in paths:
        return
    if inner := [known for known in paths if known.startswith(f"{path}.")]:
        some = ", ".join(sorted(inner))
        raise ConfigError(f"config.{path}: is a group of settings; give one of {some}")
    raise ConfigError(unknown_field(path))


def unknown_field(path: str) -> str:
    """Returns the message for a setting that does not exist, with the one that may be meant."""
    return (
        f"config.{path}: there is no such setting.{did_you_mean(path)} See --help for all of them"
    )


def did_you_mean(path: str, prefix: str = "") -> str:
    """Returns ' Did you mean X?' for a setting's name or path that does not exist, or ''.

    It knows what other trainers call the settings.

    Args:
      path: what was given, with or without a group.
      prefix: what to put before the setting's path.
    """
    path = path.lower().replace("-", "_")
    group, _, name = path.rpartition(".")
    known = [known_path for known_path, _, _ in leaves()]
    same_name = [p for p in known if p.rpartition(".")[2] == name]
    same_group = [p for p in same_name if group and p.startswith(f"{group.partition('.')[0]}.")]
    if not same_group and name in other_names.ANSWER_TO:
        return f" {other_names.ANSWER_TO[name]}."
    meant = [*same_group, *filter(None, [other_names.SETTING_OF.get(name)]), *same_name]
    return f" Did you mean {prefix + meant[0]!r}?" if meant else nearest(path, known, prefix)


def _matches(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's declared type; an int passes for a float."""
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(
            _matches(v, typing.get_args(hint)[0]) for v in value
        )
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)


def type_name(hint: Any) -> str:
    """Returns the name of a setting's type, for messages."""
    return str(hint) if typing.get_args(hint) else hint.__name__


def _problem(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str:
    """Returns what is wrong with one value, or ''."""
    if not _matches(value, hint):
        return f"must be of type {type_name(hint)}"
    if metadata["choices"] and value not in metadata["choices"]:
        choices = [str(choice) for choice in metadata["choices"]]
        return f"must be one of {', '.join(choices)}.{nearest(str(value), choices)}"
    if metadata["path"] and (problem := paths.problem(value)):
        return problem
    numbers = value if isinstance(value, tuple) else (value,)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            return "must be finite"
        for bound, fails, words in (
            ("low", lambda v, b: v < b, "at least"),
            ("high", lambda v, b: v > b, "at most"),
            ("above", lambda v, b: v <= b, "more than"),
            ("below", lambda v, b: v >= b, "less than"),
        ):
            if metadata[bound] is not None and fails(number, metadata[bound]):
                return f"must be {words} {metadata[bound]:g}"
    return ""


def _contradictions(config: Config) -> Iterator[str]:
    """Yields what is wrong between fields that are each right by themselves."""
    for path, duration in (
        ("augment.mix_until", config.augment.mix_until),
        ("schedule.warmup", config.schedule.warmup),
        ("schedule.decay_every", config.schedule.decay_every),
        ("train.length", config.train.length),
        ("train.ema", config.train.ema),
        ("evaluation.every", config.evaluation.every),
        ("checkpoint.every", config.checkpoint.every),
        ("log.every", config.log.every),
    ):
        if len(duration.given()) > 1:
            units = " and ".join(f"{unit}={value}" for unit, value in duration.given().items())
            yield f"config.{path} has {units}: give one unit, and set the others to 0"
    for path, duration in (
        ("train.length", config.train.length),
        ("evaluation.every", config.evaluation.every),
        ("checkpoint.every", config.checkpoint.every),
        ("log.every", config.log.every),
    ):
        if not duration and not is_open(config, path):
            yield f"config.{path} = {duration}: give a unit more than zero, such as {path}.epochs=1"
    schedule = config.schedule
    if schedule.name == "steps" and not schedule.boundaries:
        yield "config.schedule.boundaries = (): the schedule 'steps' needs at least one"
    for path, boundaries in (
        ("schedule.boundaries", schedule.boundaries),
        ("train.image_size_epochs", config.train.image_size_epochs),
    ):
        if list(boundaries) != sorted(set(boundaries)):
            yield f"config.{path} = {boundaries}: must rise from each to the next"
    if schedule.boundaries_unit == "steps" and any(b % 1 for b in schedule.boundaries):
        yield (
            f"config.schedule.boundaries = {schedule.boundaries}: must be whole numbers with "
            "schedule.boundaries_unit = 'steps'"
        )
    if schedule.name == "exponential" and not schedule.decay_every:
        yield "config.schedule.decay_every = none: the schedule 'exponential' needs it"
    if config.augment.crop == "pad" and config.augment.pad >= config.data.image_size:
        yield (
            f"config.augment.pad = {config.augment.pad}: must be less than data.image_size = "
            f"{config.data.image_size}"
        )
    if config.data.archive_encoding and not _keeps_ascii(config.data.archive_encoding):
        yield (
            f"config.data.archive_encoding = {config.data.archive_encoding!r}: must be an encoding "
            "of file names that Python knows, such as gbk, big5, shift_jis, cp866, cp1251 or cp850"
        )
    if config.data.storage != "records":
        # What is kept decoded is the whole centred square, at the size that the model sees.
        if config.augment.crop == "inception":
            yield (
                f"config.augment.crop = 'inception': cuts from the original images, which "
                f"config.data.storage = {config.data.storage!r} does not keep; set data.storage to "
                "'records', or augment.crop to 'resized'"
            )
        if config.data.eval_crop != 1:
            yield (
                f"config.data.eval_crop = {config.data.eval_crop:g}: with config.data.storage = "
                f"{config.data.storage!r} it must be 1; set data.storage to 'records' to cut less"
            )
    sizes, begins = config.train.image_sizes, config.train.image_size_epochs
    if len(begins) != max(len(sizes) - 1, 0):
        yield (
            f"config.train.image_size_epochs = {begins}: must have an entry for each of "
            f"train.image_sizes = {sizes} but the first"
        )
    length = config.train.length
    if begins and length.epochs and begins[-1] >= length.epochs:
        yield (
            f"config.train.image_size_epochs = {begins}: its last begins no sooner than the run "
            f"ends, config.train.length.epochs = {length.epochs:g}, so that its size is never "
            "reached; begin it sooner, or drop it and its size"
        )
    if is_open(config, "schedule.learning_rate") and not config.optimizer.name.startswith("sgd"):
        yield (
            "config.schedule.learning_rate = 0: config.train.auto_size knows a rate for sgd and "
            f"sgd_nesterov only, not for {config.optimizer.name!r}; give one, such as "
            "tools.find_lr proposes"
        )
    if config.expected.top1 and not config.expected.source:
        yield (
            f"config.expected.top1 = {config.expected.top1:g}: a figure needs its source; say in "
            "config.expected.source where it is from, or set top1 to 0"
        )
    model = config.model
    if sizes and model.aux_heads and model.name != "googlenet_torchvision":
        yield (
            f"config.train.image_sizes = {sizes}: the auxiliary heads' shapes depend on the image "
            "size; set model.aux_heads to False, or leave image_sizes empty"
        )
    if model.name != "googlenet":
        fixed = {"stem": "paper", "five_by_five": "5x5", "norm": "batch"}
        for name, value in fixed.items():
            if getattr(model, name) != value:
                yield (
                    f"config.model.{name} = {getattr(model, name)!r}: only 'googlenet' has "
                    f"this setting; leave it at {value!r} for {model.name!r}"
                )
    if model.aux_heads and model.name not in ("googlenet", "googlenet_torchvision"):
        yield f"config.model.aux_heads = True: {model.name!r} has no such heads; set it to False"


def _keeps_ascii(encoding: str) -> bool:
    """Whether there is such an encoding of text, in which ASCII characters are themselves."""
    text = "train/a.jpg"
    try:
        return text.encode("ascii").decode(encoding) == text
    except (LookupError, ValueError):
        return False


def validate(config: Config) -> None:
    """Checks a whole configuration.

    Raises:
      ConfigError: naming every setting that is wrong, its value, what is allowed.
    """
    problems = [unknown_field(path) for path in _strangers(config)]
    for path, hint, field in leaves():
        value = get(config, path)
        if is_open(config, path):
            continue
        if problem := _problem(value, hint, field.metadata):
            problems.append(f"config.{path} = {value!r}: {problem}")
    # Fields of a wrong type would make the comparisons between fields fail in odd ways.
    problems = problems or list(_contradictions(config))
    if problems:
        raise ConfigError("\n".join(problems))


def _strangers(group: Any, prefix: str = "") -> Iterator[str]:
    """Yields the paths of what a program assigned to a group that is no setting of it."""
    fields = {field.name for field in dataclasses.fields(group)}
    for name, value in vars(group).items():
        if name not in fields:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(value):
            yield from _strangers(value, f"{prefix}{name}.")


def changes(old: Config, new: Config) -> tuple[list[str], list[str]]:
    """Returns what differs between the configuration of a workdir and a new one.

    Returns:
      (refused, allowed): 'path: old → new' of the fields that a resumed run may not change, and of
      those that it may.
    """
    refused: list[str] = []
    allowed: list[str] = []
    for path, _, field in leaves():
        before, after = get(old, path), get(new, path)
        if before != after:
            resumable = field.metadata["resumable"]
            (allowed if resumable else refused).append(f"config.{path}: {before!r} → {after!r}")
    # The average is part of the state: it can neither be added to a run nor taken away.
    if bool(old.train.ema) != bool(new.train.ema):
        refused.append(f"config.train.ema: {old.train.ema} → {new.train.ema}")
    return refused, allowed


def describe(config: Config) -> str:
    """Returns every setting with its value and meaning, a line each, for --help and logs."""
    lines = []
    for path, _, field in leaves():
        choices = field.metadata["choices"]
        allowed = f" [{', '.join(map(str, choices))}]" if choices else ""
        lines.append(
            f"  --config.{path}={get(config, path)!r}\n      {field.metadata['help']}{allowed}"
        )
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Converts between epochs, steps and examples for one run.

    Training runs over an endless sequence of shuffled epochs, one after another; a batch may hold
    the end of one epoch and the start of the next, so no example is ever left out. An epoch is
    therefore `train_examples / batch_size` steps, which need not be whole.

    Args:
      batch_size: examples a step, over all devices.
      train_examples: size of the training split.
    """

    batch_size: int
    train_examples: int

    def _examples(self, duration: Duration) -> Fraction:
        if duration.epochs:
            return Fraction(duration.epochs).limit_denominator(10**6) * self.train_examples
        return Fraction(duration.steps * self.batch_size or duration.examples)

    def steps(self, duration: Duration) -> int:
        """Returns the least number of steps that lasts at least `duration`."""
        return math.ceil(self._examples(duration) / self.batch_size)

    def due(self, every: Duration, step: int) -> bool:
        """Whether a multiple of `every` is reached by step `step` (counted from 1)."""
        period = self._examples(every)
        return step * self.batch_size // period > (step - 1) * self.batch_size // period

    def epoch(self, step: int) -> float:
        """Returns how many epochs `step` steps are."""
        return step * self.batch_size / self.train_examples
