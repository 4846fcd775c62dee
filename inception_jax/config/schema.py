"""Every setting of a run with its unit, range and default.

An experiment file returns a `Config`; the command line overrides single fields
(`--config.train.batch_size=256`); `validation.validate` checks the whole before anything is
downloaded or compiled.

Each field is declared with `setting`, or `resumable`, whose metadata is read in four places:
`validate` (type, range, choices), `describe` (the --help text), `changes` (what may differ when a
run is resumed) and the tests, which require that every field is read somewhere in the package.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

# What cameras and scanners put into files of 16 bits a channel.
BIT_DEPTHS = (8, 10, 12, 14, 16)
STEMS = ("paper", "s16", "s32")
FIVE_BY_FIVE = ("5x5", "3x3", "two_3x3")
NORMS = ("batch", "lrn", "none")
DTYPES = ("float32", "bfloat16", "auto")


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
    registry: str = "",
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
      registry: the kind of registered part that the value names, or each of its values; '': none.
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
        "registry": registry,
    }
    if isinstance(default, dict):
        entries = default
        return dataclasses.field(default_factory=lambda: copy.deepcopy(entries), metadata=metadata)
    if dataclasses.is_dataclass(default) and not isinstance(default, type):
        template = default
        # Deep: a group within the group would be shared otherwise.
        return dataclasses.field(default_factory=lambda: copy.deepcopy(template), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# Declares a field whose value may be another one when a run is resumed.
resumable = functools.partial(setting, resumable=True)


@dataclasses.dataclass
class Duration:
    """A length of training in one of three units; at most one of them is more than zero.

    With all at zero the duration is absent, which each user of a duration gives a meaning ("off").
    """

    epochs: float = resumable(0.0, "passes over the training split; 0: not the unit", low=0)
    steps: int = resumable(0, "optimizer steps; 0: not the unit", low=0)
    examples: int = resumable(0, "training examples seen; 0: not the unit", low=0)

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
    name: str = setting("tiny_imagenet", "the data set", registry="dataset")
    source: str = resumable(
        "",
        "the original files: an archive or a folder; empty: the official download, where there is "
        "one",
        per_host=True,
        path=True,
    )
    directory: str = resumable(
        "",
        "where prepared data are kept; empty: TFDS's own default (~/tensorflow_datasets)",
        per_host=True,
        path=True,
    )
    tfds: str = setting(
        "",
        "of the data set 'tfds': which of those that TFDS prepared as ArrayRecord, NAME, "
        "NAME:VERSION or NAME/CONFIG:VERSION",
    )
    train_split: str = setting(
        "",
        "of the data set 'tfds': the split to train on, or a slice of it such as train[:90%]; "
        "empty: train",
    )
    eval_split: str = setting(
        "",
        "of the data set 'tfds': the split to evaluate on, or a slice; empty: validation or test, "
        "or the only other one",
    )
    eval_share: float = setting(
        0.2,
        "share of each class that image_folder evaluates on, where the folder has no val/ or test/",
        above=0,
        below=1,
    )
    unreadable: str = setting(
        "refuse",
        "what image_folder does about corrupt or non-image files: stop, or leave them out",
        choices=("refuse", "skip"),
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
        choices=("auto", "classes"),
    )
    on_change: str = resumable(
        "refuse",
        "what to do where the source, or a setting that decides on what is taken from it, is not "
        "what was prepared: stop, or prepare it again in place of what is there",
        choices=("refuse", "prepare"),
    )
    # Whether the pixels are those of before is compared with the data set.
    bit_depth: int = resumable(
        0,
        "bits that the values of image files with 16 bits a channel use, of which the upper 8 "
        "become the pixels; 0: what the largest value of image_folder's files needs",
        choices=(0, *BIT_DEPTHS),
    )
    image_size: int = setting(64, "height and width of the images fed to the model, pixels", low=8)
    storage: str = resumable(
        "decoded",
        "where a step's images come from: all decoded once into a file (3 x image_size^2 bytes "
        "each on disk), or decoded from the compressed records at each step",
        choices=("decoded", "records"),
        per_host=True,
    )
    workers: int = resumable(
        0, "threads that decode records, a batch each; 0: one for each core", low=0, per_host=True
    )
    eval_crop: float = resumable(
        1.0,
        "side of the centred square that evaluation cuts from an image, over the image's shorter "
        "side; other than 1 with storage 'records' only",
        above=0,
        high=1,
    )
    holdout: int = setting(
        0,
        "training examples, the same number of each class, that are kept from training and "
        "evaluated on in place of the evaluation split: to tune on; 0: none",
        low=0,
    )
    options: dict[str, Any] = setting(
        {}, "settings of a data set of one's own, by the names it is registered with"
    )


@dataclasses.dataclass
class Augment:
    crop: str = resumable(
        "pad",
        "random crop of training images: 'pad' shifts them, 'resized' resizes a box of what was "
        "cut to data.image_size before, 'inception' resizes a box of the original image (storage "
        "'records' only)",
        choices=("none", "pad", "resized", "inception"),
    )
    pad: int = resumable(4, "zeros added on each side before a 'pad' crop, pixels", low=0)
    area_min: float = resumable(
        0.08,
        "smallest share of the image's area in a 'resized' or 'inception' crop",
        above=0,
        high=1,
    )
    aspect_max: float = resumable(
        4 / 3, "largest width/height, and height/width, of a 'resized' or 'inception' crop", low=1
    )
    flip: bool = resumable(True, "mirror half of the training images left to right")
    policy: str = resumable(
        "none",
        "an augmentation of whole grey levels, after crop and flip: randaugment and trivialaugment "
        "draw operations for each image; 'none': none. Experimental: no recorded run has used it",
        choices=("none",),
        registry="augmentation",
    )
    policy_ops: int = resumable(
        2, "operations an image, of randaugment (trivialaugment: one)", low=1
    )
    policy_magnitude: int = resumable(
        9,
        "strength of randaugment's operations, in 30ths of the strongest (trivialaugment: random)",
        low=0,
        high=30,
    )
    color_jitter: float = resumable(
        0.0,
        "brightness, contrast and saturation of each image are multiplied by factors uniform "
        "between 1 - this and 1 + this; 0: they are not; Howard's 2013 are 0.5. Experimental: no "
        "recorded run has used it",
        low=0,
        high=1,
    )
    hue_jitter: float = resumable(
        0.0,
        "the hue of each image turns by up to this share of the colour circle, either way; 0: not. "
        "Experimental: no recorded run has used it",
        low=0,
        high=0.5,
    )
    extra: tuple[str, ...] = resumable(
        (),
        "augmentations of one's own, one after another, after the colour jitter",
        registry="augmentation",
    )
    mixup: float = resumable(
        0.0, "alpha of mixup's Beta(alpha, alpha) distribution; 0: no mixup", low=0
    )
    cutmix: float = resumable(
        0.0, "alpha of CutMix's Beta(alpha, alpha) distribution; 0: no CutMix", low=0
    )
    mix_probability: float = resumable(
        1.0, "share of batches that mixup or CutMix change", low=0, high=1
    )
    mix_until: Duration = resumable(
        Duration(), "time from the start after which nothing is mixed; none: mix to the end"
    )
    cutout: int = resumable(
        0,
        "side of the square that Cutout blanks, pixels of the image as train.image_sizes has it; "
        "0: no Cutout",
        low=0,
    )
    options: dict[str, Any] = resumable(
        {}, "settings of augmentations of one's own, by the names they are registered with"
    )


@dataclasses.dataclass
class Model:
    name: str = setting("googlenet", "the network", registry="model")
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
    norm_momentum: float = resumable(
        0.9, "share of BatchNorm's running statistics kept at each step", low=0, below=1
    )
    norm_epsilon: float = resumable(1e-3, "added to BatchNorm's variance", above=0)
    aux_heads: bool = setting(False, "auxiliary classifiers on modules 4a and 4d, in training only")
    dropout: float = resumable(
        0.4, "share of features dropped before the last layer", low=0, below=1
    )
    aux_dropout: float = resumable(
        0.7, "share of features dropped in the auxiliary heads", low=0, below=1
    )
    dtype: str = resumable(
        "float32",
        "type that layers compute in; parameters and statistics are float32. auto: bfloat16 where "
        "the hardware multiplies it, else float32",
        choices=DTYPES,
    )
    options: dict[str, Any] = setting(
        {}, "settings of a network of one's own, by the names it is registered with"
    )


@dataclasses.dataclass
class Optimizer:
    name: str = setting("sgd_nesterov", "the update rule", registry="optimizer")
    momentum: float = resumable(0.9, "momentum of SGD, Muon and RMSprop", low=0, below=1)
    beta1: float = resumable(
        0.9, "decay of the first moment, of Adam, LAMB and Lion", low=0, below=1
    )
    beta2: float = resumable(
        0.999,
        "decay of the second moment, of Adam, LAMB and RMSprop; of Lion, of its momentum",
        low=0,
        below=1,
    )
    epsilon: float = resumable(1e-8, "epsilon of Adam, LAMB and RMSprop", above=0)
    weight_decay: float = resumable(
        0.0, "L2 coefficient added to the gradient (SGD, Adam, RMSprop), or decoupled decay", low=0
    )
    adam_rate_factor: float = resumable(
        0.05,
        "learning rate of the Adam that muon leaves the first convolution, the classifiers, biases "
        "and norms to, over schedule.learning_rate",
        above=0,
    )
    decay_all: bool = resumable(False, "decay biases and norm scales too, not kernels only")
    clip_norm: float = resumable(0.0, "largest global norm of the gradient; 0: no clipping", low=0)
    sam_rho: float = resumable(
        0.0,
        "radius of sharpness-aware minimisation, in the norm of all parameters together, for twice "
        "the work; 0: off. Experimental: no recorded run has used it",
        low=0,
    )
    options: dict[str, Any] = setting(
        {}, "settings of an optimizer of one's own, by the names it is registered with"
    )


@dataclasses.dataclass
class Schedule:
    name: str = resumable(
        "cosine", "shape of the learning rate after the warm-up", registry="schedule"
    )
    learning_rate: float = resumable(0.1, "the peak rate, at the end of the warm-up", above=0)
    warmup: Duration = resumable(
        Duration(), "linear rise from 0 to the peak; none: start at the peak"
    )
    end_factor: float = resumable(
        0.0, "last rate over peak rate, for cosine, linear and polynomial", low=0, high=1
    )
    power: float = resumable(1.0, "exponent of the polynomial schedule", above=0)
    decay: float = resumable(
        0.1,
        "factor at each boundary (steps) or over each decay_every (exponential)",
        above=0,
        high=1,
    )
    decay_every: Duration = resumable(
        Duration(), "time in which exponential multiplies the rate by `decay`"
    )
    staircase: bool = resumable(
        False, "let exponential fall at whole multiples of decay_every only"
    )
    boundaries: tuple[float, ...] = resumable(
        (), "where `steps` multiplies the rate by `decay`, in boundaries_unit from the start", low=0
    )
    boundaries_unit: str = resumable(
        "epochs", "what `boundaries` counts", choices=("epochs", "steps")
    )
    options: dict[str, Any] = resumable(
        {}, "settings of a schedule of one's own, by the names it is registered with"
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
    auto_size: bool = resumable(
        False,
        "take from the number of training images what is left at 0 or none of the batch size, "
        "learning rate, length, warm-up, and times between evaluations, checkpoints and reports, "
        "and mixup if it is -1",
    )
    batch_size: int = setting(128, "examples a step, over all devices", low=1)
    accumulate: int = resumable(
        1,
        "micro-batches that a step's batch is computed in, one after another, to save memory; "
        "BatchNorm sees each by itself",
        low=1,
    )
    length: Duration = resumable(Duration(epochs=60), "length of the run")
    label_smoothing: float = resumable(
        0.0, "share of the target spread evenly over all classes", low=0, below=1
    )
    image_sizes: tuple[int, ...] = resumable(
        (),
        "progressive resizing: sides that training images are resized to one after another, "
        "pixels; empty: data.image_size throughout",
        low=8,
    )
    image_size_epochs: tuple[float, ...] = resumable(
        (), "where each of image_sizes after the first begins, epochs from the start", above=0
    )
    aux_weight: float = resumable(0.3, "weight of each auxiliary head's loss", low=0)
    ema: Duration = resumable(
        Duration(),
        "time constant of the exponential moving average of parameters and BatchNorm statistics "
        "that evaluation uses; none: no average",
    )
    nonfinite: str = resumable(
        "stop",
        "what a loss or gradient that is not finite does: stop the run, which then goes on from "
        "the checkpoint before, or leave that step's update out",
        choices=("stop", "skip"),
    )
    nonfinite_limit: int = resumable(
        5, "with nonfinite=skip: steps in a row left out at which the run stops", low=1
    )


@dataclasses.dataclass
class Evaluation:
    batch_size: int = resumable(
        500,
        "most examples an evaluation step, over all devices; fewer where the split has fewer",
        low=1,
    )
    every: Duration = resumable(
        Duration(epochs=1), "time between evaluations; there is always one at the end"
    )
    image_size: int = resumable(
        0, "side that images are resized to for evaluation, pixels; 0: data.image_size", low=0
    )
    metrics: tuple[str, ...] = resumable(
        ("top1", "top5"),
        "metrics reported with the loss, in training and evaluation; top5 of more than five "
        "classes only",
        registry="metric",
    )
    flip: bool = resumable(
        False,
        "short for an evaluation 'flip' in evaluations, with flip_tta: the logits averaged over "
        "each image and its mirror image",
    )
    train_examples: int = resumable(
        0,
        "short for an evaluation 'train_eval' in evaluations, of this many training examples, "
        "without augmentation and dropout; 0: none",
        low=0,
    )
    norm_examples: int = resumable(
        0,
        "training examples that BatchNorm's statistics are re-estimated from before each "
        "evaluation, and saved so, for runs of few steps; 0: the running statistics",
        low=0,
    )
    options: dict[str, Any] = resumable(
        {}, "settings of metrics of one's own, by the names they are registered with"
    )


@dataclasses.dataclass
class View:
    """An evaluation in addition to the run's own: which examples, and how the network sees them."""

    split: str = resumable(
        "eval",
        "the examples: eval (those of the run's own evaluation), train (those it trains on, "
        "without augmentation), or a split of the data set by its name",
    )
    examples: int = resumable(0, "how many of them, the first of the split; 0: all", low=0)
    crop: float = resumable(
        0.0,
        "side of the centred square that is cut from an image, over the image's shorter side; 0: "
        "data.eval_crop",
        low=0,
        high=1,
    )
    size: int = resumable(
        0, "side that images are resized to, pixels; 0: evaluation.image_size", low=0
    )
    flip_tta: bool = resumable(False, "average the logits over each image and its mirror image")
    every: Duration = resumable(
        Duration(), "time between them, besides one at the end; none: evaluation.every"
    )


@dataclasses.dataclass
class Checkpoint:
    every: Duration = resumable(
        Duration(epochs=1), "time between checkpoints; there is always one at the end"
    )
    keep_last: int = resumable(2, "how many of the newest checkpoints are kept", low=1)
    keep_best: int = resumable(
        1, "how many of the best by validation top-1 are kept besides", low=0
    )
    on_write_error: str = resumable(
        "stop",
        "what a full disk does to the run, or another reason why a checkpoint, a line of metrics "
        "or the report cannot be written: stop it, or continue: say so, and try again at the next "
        "one. The last must succeed. On several processes a run always stops",
        choices=("stop", "continue"),
    )


@dataclasses.dataclass
class Log:
    every: Duration = resumable(Duration(steps=100), "time between training metrics")
    writers: tuple[str, ...] = resumable(
        ("tensorboard",),
        "where metrics go besides metrics.jsonl, which is always written",
        registry="writer",
    )
    options: dict[str, Any] = resumable(
        {}, "settings of writers of one's own, by the names they are registered with"
    )


@dataclasses.dataclass
class Watch:
    host_silence: float = resumable(
        60.0,
        "on several hosts: seconds without a heartbeat after which JAX takes a process for dead "
        "and stops the others",
        low=3,
    )
    stall_minutes: float = resumable(
        10.0,
        "minutes without a step, save or anything else after which a run says what each of its "
        "threads is doing; 0: never",
        low=0,
    )
    long_stall_minutes: float = resumable(
        60.0, "the same while it compiles or evaluates; 0: never", low=0
    )


@dataclasses.dataclass
class Expected:
    top1: float = resumable(
        0.0,
        "top-1 on the evaluation split that the experiment should reach, for its report, percent; "
        "0: not known",
        low=0,
        high=100,
    )
    source: str = resumable("", "where that figure is from, in a line")


@dataclasses.dataclass
class Config:
    """All settings of a run."""

    name: str = resumable("unnamed", "what the experiment is called in logs and plots")
    seed: int = setting(0, "seed of initialisation, shuffling and augmentation", low=0)
    data: Data = setting(Data(), "what the examples are")
    augment: Augment = setting(Augment(), "how training images are varied")
    model: Model = setting(Model(), "what is trained")
    init: Init = setting(Init(), "what training starts from")
    optimizer: Optimizer = setting(Optimizer(), "how parameters are updated")
    schedule: Schedule = setting(Schedule(), "the learning rate over time")
    train: Train = setting(Train(), "how training runs")
    evaluation: Evaluation = setting(Evaluation(), "how the model is evaluated")
    evaluations: dict[str, View] = resumable(
        {}, "more evaluations, by names under which their metrics are reported"
    )
    checkpoint: Checkpoint = setting(Checkpoint(), "when and what is saved")
    log: Log = setting(Log(), "what is reported")
    watch: Watch = setting(Watch(), "when a run counts as stuck or broken")
    expected: Expected = setting(Expected(), "what the result is compared with")
