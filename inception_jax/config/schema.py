"""Every setting of a run with its unit, range and default.

An experiment file returns a `Config`; the command line overrides single fields
(`--config.train.batch_size=256`); `validation.validate` checks the whole before anything is
downloaded or compiled.

Each field is declared with `setting`, or `resumable`, whose metadata is read in four places:
`validate` (type, range, choices), `reference` (--help, --print_config, docs/configuration.md),
`changes` (what may differ when a run is resumed) and the tests, which require that every field is
read somewhere in the package.
"""

import copy
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from inception_jax.config.durations import parse_duration

# Bits per channel that cameras and scanners use in 16-bit files.
BIT_DEPTHS = (8, 10, 12, 14, 16)
STEMS = ("paper", "s16", "s32")
CONV5X5 = ("5x5", "3x3", "two_3x3")
NORMS = ("batch", "lrn", "none")
DTYPES = ("float32", "bfloat16", "auto")


def setting(
    default: Any,
    meaning: str,
    *,
    unit: str = "",
    choices: Sequence[Any] = (),
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    resumable: bool = False,
    per_host: bool = False,
    path: bool = False,
    duration: bool = False,
    registry: str = "",
) -> Any:
    """Declares a field of the configuration.

    Args:
      default: its value if not set; a dataclass instance is copied for each use.
      meaning: a description for users, without unit and range; `empty = …` or `0 = …` says what
        the unset value does.
      unit: of a number ("pixels", "seconds"); '' = none.
      choices: the allowed values; empty = any.
      low, high: inclusive bounds.
      above, below: exclusive bounds.
      resumable: whether a run may be resumed with a different value. Not so for a field that
        determines the shape of the state, or which examples a step sees.
      per_host: whether the processes of a run on several hosts may have different values.
      path: whether it is the path of a file or folder, maybe in a bucket; '' = none.
      duration: whether it is a duration (see `durations`), or a tuple of durations.
      registry: the kind of registered part that the value, or each of its values, names; '' = none.
    """
    metadata = {
        "help": meaning,
        "unit": unit,
        "choices": tuple(choices),
        "low": low,
        "high": high,
        "above": above,
        "below": below,
        "resumable": resumable,
        "per_host": per_host,
        "path": path,
        "duration": duration,
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


# Declares a field that may change when a run is resumed.
resumable = functools.partial(setting, resumable=True)
# Declares a duration, or a tuple of durations, that may change when a run is resumed.
resumable_duration = functools.partial(resumable, duration=True)


# Settings that may be left open, and the value that leaves them open: `model.dtype`, which the
# hardware decides, and those that train.auto_size derives from the size of the data.
OPEN: dict[str, Any] = {
    "model.dtype": "auto",
    "train.batch_size": 0,
    "schedule.learning_rate": 0,
    "train.duration": "",
    "schedule.warmup": "",
    "augment.mixup": -1,
    "evaluation.every": "",
    "checkpoint.every": "",
    "log.every": "",
}


@dataclasses.dataclass
class Data:
    name: str = setting("tiny_imagenet", "data set", registry="dataset")
    source: str = resumable(
        "",
        "original files: an archive or a folder, local or gs://BUCKET/PATH; empty = the official "
        "download, if there is one",
        per_host=True,
        path=True,
    )
    directory: str = resumable(
        "",
        "folder for prepared data, local or gs://BUCKET/PATH; empty = the TFDS default "
        "($TFDS_DATA_DIR or ~/tensorflow_datasets)",
        per_host=True,
        path=True,
    )
    cache: str = resumable(
        "",
        "local folder for copies of data and sources in a bucket; empty = "
        "~/.cache/inception_jax/data, or below $XDG_CACHE_HOME",
        per_host=True,
        path=True,
    )
    tfds: str = setting(
        "",
        "for name=tfds: a data set that TFDS has prepared as ArrayRecord, written as NAME, "
        "NAME:VERSION or NAME/CONFIG:VERSION",
    )
    train_split: str = setting(
        "",
        "for name=tfds: the split to train on, or a slice of it such as train[:90%]; empty = train",
    )
    eval_split: str = setting(
        "",
        "for name=tfds: the split to evaluate on, or a slice of it; empty = validation or test, or "
        "the only split other than train",
    )
    val_fraction: float = setting(
        0.2,
        "for name=image_folder: fraction of each class held out for evaluation if the folder has "
        "no val/ or test/",
        above=0,
        below=1,
    )
    on_unreadable: str = setting(
        "refuse",
        "for name=image_folder: on corrupt or non-image files, stop (refuse) or leave them out "
        "(skip)",
        choices=("refuse", "skip"),
    )
    archive_encoding: str = setting(
        "",
        "for name=image_folder: encoding of file names in an archive that does not declare it "
        "(gbk, shift_jis, cp866, …); empty = UTF-8",
    )
    layout: str = setting(
        "auto",
        "for name=image_folder: auto = treat top-level folders as splits if they are named like "
        "splits (train/, val/); classes = always treat them as classes",
        choices=("auto", "classes"),
    )
    on_change: str = resumable(
        "refuse",
        "if the source, or a setting that affects its contents, differs from what was prepared: "
        "stop (refuse) or prepare it again, replacing the old data (prepare)",
        choices=("refuse", "prepare"),
    )
    # Whether the pixels are those of before is compared with the data set.
    bit_depth: int = resumable(
        0,
        "bits per channel used in 16-bit image files; the upper 8 of them become the pixels; 0 = "
        "detect from the largest value in image_folder's files",
        unit="bits",
        choices=(0, *BIT_DEPTHS),
    )
    image_size: int = setting(
        64, "height and width of the images fed to the model", unit="pixels", low=8
    )
    resize_kernel: str = resumable(
        "linear",
        "interpolation from image_size to the sizes of training phases and evaluations, with "
        "antialiasing; lanczos3 keeps images sharper",
        choices=("linear", "lanczos3"),
    )
    storage: str = resumable(
        "decoded",
        "decoded = decode all images once into a file (3 × image_size² bytes each); records = "
        "decode the compressed records at each step",
        choices=("decoded", "records"),
        per_host=True,
    )
    workers: int = resumable(
        0,
        "for storage=records: decoding threads, each working on one batch; 0 = one per core",
        low=0,
        per_host=True,
    )
    eval_crop_pct: float = resumable(
        1.0,
        "side of the center crop for evaluation, as a fraction of the image's shorter side; values "
        "other than 1 need storage=records",
        above=0,
        high=1,
    )
    holdout: int = setting(
        0,
        "training examples to hold out and evaluate on instead of the evaluation split, the same "
        "number from each class; use it to tune hyperparameters; 0 = none",
        unit="examples",
        low=0,
    )
    options: dict[str, Any] = setting({}, "options of a registered data set, by name")


@dataclasses.dataclass
class Augment:
    crop: str = resumable(
        "pad",
        "random crop of training images: pad = shift by up to `pad` pixels; resized = resize a "
        "random box of the image at data.image_size; inception = resize a random box of the "
        "original image (needs data.storage=records)",
        choices=("none", "pad", "resized", "inception"),
    )
    pad: int = resumable(
        4, "for crop=pad: black pixels added on each side before cropping", unit="pixels", low=0
    )
    crop_scale_min: float = resumable(
        0.08,
        "for crop=resized and inception: smallest area of the box, as a fraction of the image's",
        above=0,
        high=1,
    )
    crop_ratio_max: float = resumable(
        4 / 3,
        "for crop=resized and inception: largest aspect ratio of the box; the smallest is its "
        "reciprocal",
        low=1,
    )
    flip: bool = resumable(True, "flip half of the training images horizontally")
    alternating_flip: bool = resumable(
        False,
        "flip each image in every second epoch, half of them in the first, instead of at random",
    )
    policy: str = resumable(
        "none",
        "augmentation policy applied after crop and flip: randaugment, trivialaugment or none. "
        "Experimental: not used in any recorded run",
        choices=("none",),
        registry="augmentation",
    )
    policy_ops: int = resumable(2, "for policy=randaugment: operations per image", low=1)
    policy_magnitude: int = resumable(
        9, "for policy=randaugment: magnitude of the operations, out of 30", low=0, high=30
    )
    color_jitter: float = resumable(
        0.0,
        "brightness, contrast and saturation are each multiplied by a factor drawn uniformly from "
        "1 ± this; 0 = off; Howard (2013) used 0.5. Experimental: not used in any recorded run",
        low=0,
        high=1,
    )
    hue_jitter: float = resumable(
        0.0,
        "the hue is shifted by up to this fraction of the color circle in either direction; 0 = "
        "off. Experimental: not used in any recorded run",
        low=0,
        high=0.5,
    )
    extra: tuple[str, ...] = resumable(
        (), "registered augmentations, applied in order after color jitter", registry="augmentation"
    )
    mixup: float = resumable(0.0, "alpha of mixup's Beta(alpha, alpha); 0 = off", low=0)
    cutmix: float = resumable(0.0, "alpha of CutMix's Beta(alpha, alpha); 0 = off", low=0)
    mix_probability: float = resumable(
        1.0, "fraction of batches to which mixup or CutMix is applied", low=0, high=1
    )
    mix_end: str = resumable_duration(
        "", "time from the start after which mixup and CutMix are off; empty = never"
    )
    cutout: int = resumable(
        0,
        "side of the square that Cutout blanks, at the current training image size; 0 = off",
        unit="pixels",
        low=0,
    )
    options: dict[str, Any] = resumable({}, "options of registered augmentations, by name")


@dataclasses.dataclass
class Model:
    name: str = setting("googlenet", "network", registry="model")
    stem: str = setting(
        "paper",
        "for googlenet: the first layers; paper = total stride 8; for small images, s16 (stride 4) "
        "and s32 (stride 2) keep feature maps larger",
        choices=STEMS,
    )
    width: float = setting(1.0, "multiplier for the number of channels of every layer", above=0)
    conv5x5: str = setting(
        "5x5", "convolutions in the 5x5 branch of the inception modules", choices=CONV5X5
    )
    norm: str = setting(
        "batch",
        "batch = BatchNorm after each convolution; lrn = the paper's two local response "
        "normalizations; none = neither",
        choices=NORMS,
    )
    norm_momentum: float = resumable(
        0.9, "fraction of BatchNorm's running statistics kept at each step", low=0, below=1
    )
    norm_epsilon: float = resumable(1e-3, "added to BatchNorm's variance", above=0)
    norm_group_size: int = resumable(
        0,
        "images that BatchNorm normalizes together in training (ghost batch normalization); must "
        "divide the batch or micro-batch; devices that hold whole groups exchange no statistics; "
        "0 = the whole batch",
        unit="images",
        low=0,
    )
    aux_heads: bool = setting(
        False, "add auxiliary classifiers to modules 4a and 4d, used in training only"
    )
    dropout: float = resumable(0.4, "dropout rate before the last layer", low=0, below=1)
    aux_dropout: float = resumable(0.7, "dropout rate in the auxiliary heads", low=0, below=1)
    dtype: str = resumable(
        "float32",
        "type that layers compute in; parameters and statistics are always float32; auto = "
        "bfloat16 where the hardware multiplies it natively, otherwise float32",
        choices=DTYPES,
    )
    options: dict[str, Any] = setting({}, "options of a registered network, by name")


@dataclasses.dataclass
class Optimizer:
    name: str = setting("sgd_nesterov", "optimizer", registry="optimizer")
    momentum: float = resumable(0.9, "momentum of SGD, Muon and RMSprop", low=0, below=1)
    beta1: float = resumable(
        0.9, "decay rate of the first moment of Adam, LAMB and Lion", low=0, below=1
    )
    beta2: float = resumable(
        0.999,
        "decay rate of the second moment of Adam, LAMB and RMSprop, and of Lion's momentum",
        low=0,
        below=1,
    )
    epsilon: float = resumable(1e-8, "epsilon of Adam, LAMB and RMSprop", above=0)
    weight_decay: float = resumable(
        0.0,
        "weight decay: L2 added to the gradient for SGD, Adam and RMSprop; decoupled for the "
        "others",
        low=0,
    )
    muon_adam_lr_ratio: float = resumable(
        0.05,
        "for name=muon: learning rate of Adam, relative to schedule.learning_rate; Adam updates "
        "the first convolution, the classifiers, biases and norms",
        above=0,
    )
    decay_norm_and_bias: bool = resumable(
        False, "apply weight decay to biases and norm parameters too, not only to kernels"
    )
    norm_bias_lr_ratio: float = resumable(
        1.0,
        "learning rate of the biases of BatchNorm, relative to that of the other parameters; does "
        "not multiply weight decay (except with adam, rmsprop and lamb)",
        above=0,
    )
    clip_norm: float = resumable(0.0, "clip the gradient's global norm to this; 0 = off", low=0)
    sam_rho: float = resumable(
        0.0,
        "radius of sharpness-aware minimization, in the norm over all parameters; doubles the "
        "compute; 0 = off. Experimental: not used in any recorded run",
        low=0,
    )
    options: dict[str, Any] = setting({}, "options of a registered optimizer, by name")


@dataclasses.dataclass
class Schedule:
    name: str = resumable("cosine", "shape of the learning rate after warmup", registry="schedule")
    learning_rate: float = resumable(0.1, "peak learning rate, reached after warmup", above=0)
    warmup: str = resumable_duration(
        "", "linear rise from 0 to the peak; empty = start at the peak"
    )
    final_lr_ratio: float = resumable(
        0.0, "for cosine, linear and polynomial: final over peak learning rate", low=0, high=1
    )
    power: float = resumable(1.0, "for polynomial: the exponent", above=0)
    decay_rate: float = resumable(
        0.1,
        "for steps and exponential: factor at each of `boundaries`, or over each decay_period",
        above=0,
        high=1,
    )
    decay_period: str = resumable_duration(
        "", "for exponential: time over which the learning rate is multiplied by decay_rate"
    )
    staircase: bool = resumable(
        False, "for exponential: decay only at whole multiples of decay_period"
    )
    boundaries: tuple[str, ...] = resumable_duration(
        (), "for steps: times from the start at which the rate is multiplied by decay_rate"
    )
    options: dict[str, Any] = resumable({}, "options of a registered schedule, by name")


@dataclasses.dataclass
class Init:
    pretrained: str = setting(
        "",
        "weights file that a new run starts from (see tools.export and tools.import_weights); "
        "not read again on resume; empty = random initialization",
        path=True,
    )
    identity_convs: bool = setting(
        False,
        "start convolutions larger than 1x1, except the first, by passing their input channels on; "
        "output channels beyond those stay random",
    )
    whiten: bool = setting(
        False,
        "compute filters of the first convolution from training images, so that their responses "
        "are uncorrelated, and do not train them",
    )
    whiten_bias: str = resumable_duration(
        "",
        "for whiten: time from the start after which the biases of those filters are not trained "
        "any more either, nor with BatchNorm its scales; empty = always trained",
    )


@dataclasses.dataclass
class Train:
    auto_size: bool = resumable(
        False,
        "derive from the number of training images whichever of these are unset: batch size, "
        "learning rate, duration, warmup, the intervals of evaluation, checkpoints and logging, "
        "and mixup (-1 = unset)",
    )
    batch_size: int = setting(128, "examples per step, over all devices", unit="examples", low=1)
    grad_accum_steps: int = resumable(
        1,
        "micro-batches per step, computed in sequence to save memory; BatchNorm sees each one "
        "separately",
        low=1,
    )
    duration: str = resumable_duration("60 epochs", "length of the run")
    label_smoothing: float = resumable(
        0.0, "fraction of the target spread evenly over all classes", low=0, below=1
    )
    image_sizes: tuple[int, ...] = resumable(
        (),
        "progressive resizing: image sizes to train at, in order; empty = data.image_size "
        "throughout",
        unit="pixels",
        low=8,
    )
    image_size_boundaries: tuple[str, ...] = resumable_duration(
        (), "times from the start at which each of image_sizes after the first takes over"
    )
    aux_weight: float = resumable(0.3, "weight of each auxiliary head's loss", low=0)
    ema: str = resumable_duration(
        "",
        "time constant of the exponential moving average (EMA) of parameters and BatchNorm "
        "statistics that evaluation uses; empty = no EMA; a resumed run cannot add or remove it",
    )
    on_nonfinite: str = resumable(
        "stop",
        "on a NaN or infinite loss or gradient: stop, so that the run can resume from the last "
        "checkpoint, or skip that step's update",
        choices=("stop", "skip"),
    )
    nonfinite_limit: int = resumable(
        5,
        "for on_nonfinite=skip: consecutive skipped steps after which the run stops",
        unit="steps",
        low=1,
    )

    @property
    def keeps_average(self) -> bool:
        """Whether the training state contains averages of parameters and statistics."""
        return bool(parse_duration(self.ema))


@dataclasses.dataclass
class Evaluation:
    batch_size: int = resumable(
        500,
        "largest number of examples per evaluation step, over all devices; smaller splits use "
        "smaller batches",
        unit="examples",
        low=1,
    )
    every: str = resumable_duration(
        "1 epoch", "interval between evaluations; there is always one at the end"
    )
    image_size: int = resumable(
        0, "size to resize images to for evaluation; 0 = data.image_size", unit="pixels", low=0
    )
    metrics: tuple[str, ...] = resumable(
        ("top1", "top5"),
        "metrics to report in addition to the loss, in training and evaluation; top5 needs more "
        "than five classes",
        registry="metric",
    )
    flip_tta: bool = resumable(
        False,
        "add an evaluation named flip that averages the logits of each image and its mirror image "
        "(shorthand for an entry of `evaluations` with flip_tta)",
    )
    train_eval_examples: int = resumable(
        0,
        "add an evaluation named train_eval of this many training examples, without augmentation "
        "and dropout (shorthand for an entry of `evaluations`); 0 = off",
        unit="examples",
        low=0,
    )
    norm_examples: int = resumable(
        0,
        "training examples from which BatchNorm statistics are re-estimated before each "
        "evaluation of a training and saved with its checkpoints, for runs of few steps; 0 = use "
        "the running ones; evaluating a finished run uses what it saved",
        unit="examples",
        low=0,
    )
    options: dict[str, Any] = resumable({}, "options of registered metrics, by name")


@dataclasses.dataclass
class View:
    """An additional evaluation: which examples to evaluate, and how the network sees them."""

    split: str = resumable(
        "eval",
        "eval = the run's own evaluation split; train = the training examples without "
        "augmentation; otherwise a split of the data set by name",
    )
    examples: int = resumable(
        0, "evaluate only this many, from the start of the split; 0 = all", unit="examples", low=0
    )
    crop: float = resumable(
        0.0,
        "side of the center crop, as a fraction of the image's shorter side; 0 = "
        "data.eval_crop_pct",
        low=0,
        high=1,
    )
    size: int = resumable(
        0, "size to resize images to; 0 = evaluation.image_size", unit="pixels", low=0
    )
    flip_tta: bool = resumable(False, "average the logits of each image and its mirror image")
    shift_tta: int = resumable(
        0,
        "average the logits of each image with those of two copies, shifted by this much up and "
        "left, and down and right, which together count as much as the image; 0 = off",
        unit="pixels",
        low=0,
    )
    every: str = resumable_duration(
        "", "interval between these evaluations; empty = evaluation.every"
    )


@dataclasses.dataclass
class Checkpoint:
    every: str = resumable_duration(
        "1 epoch", "interval between checkpoints; there is always one at the end"
    )
    keep_last: int = resumable(2, "number of newest checkpoints to keep", low=1)
    keep_best: int = resumable(
        1, "number of checkpoints with the best validation top-1 to keep in addition", low=0
    )
    on_write_error: str = resumable(
        "stop",
        "if a checkpoint, a line of metrics or the report cannot be written (full disk, …): stop, "
        "or continue: log the error and retry at the next one; the last write must succeed. Runs "
        "on several processes always stop",
        choices=("stop", "continue"),
    )


@dataclasses.dataclass
class Bucket:
    retry_seconds: float = resumable(
        300.0,
        "how long to repeat a request to a bucket (gs://) that fails temporarily, such as when "
        "the network is down",
        unit="seconds",
        above=0,
        per_host=True,
    )


@dataclasses.dataclass
class Log:
    every: str = resumable_duration("100 steps", "interval between reports of training metrics")
    writers: tuple[str, ...] = resumable(
        ("tensorboard",),
        "where metrics go in addition to metrics.jsonl, which is always written",
        registry="writer",
    )
    options: dict[str, Any] = resumable({}, "options of registered writers, by name")


@dataclasses.dataclass
class Watch:
    heartbeat_timeout_seconds: float = resumable(
        60.0,
        "on several hosts: time without a heartbeat after which a process counts as dead and the "
        "others stop",
        unit="seconds",
        low=3,
    )
    stall_minutes: float = resumable(
        10.0,
        "time without progress (a step, a save, …) after which the stacks of all threads are "
        "logged; 0 = never",
        unit="minutes",
        low=0,
    )
    long_stall_minutes: float = resumable(
        60.0, "the same during compilation and evaluation; 0 = never", unit="minutes", low=0
    )


@dataclasses.dataclass
class Expected:
    top1: float = resumable(
        0.0,
        "top-1 on the evaluation split that the experiment should reach, shown in its report; 0 = "
        "unknown",
        unit="percent",
        low=0,
        high=100,
    )
    source: str = resumable("", "where that figure comes from, in one line")


@dataclasses.dataclass
class Config:
    """All settings of a run."""

    name: str = resumable("unnamed", "name of the experiment in logs and plots")
    seed: int = setting(
        0, "seed of initialization, shuffling and augmentation", low=0, high=2**32 - 1
    )
    data: Data = setting(Data(), "the data set, where it comes from and how it is stored")
    augment: Augment = setting(Augment(), "augmentation of training images")
    model: Model = setting(Model(), "the network")
    init: Init = setting(Init(), "what a new run starts from")
    optimizer: Optimizer = setting(Optimizer(), "how parameters are updated")
    schedule: Schedule = setting(Schedule(), "the learning rate over time")
    train: Train = setting(Train(), "how training runs")
    evaluation: Evaluation = setting(Evaluation(), "how the model is evaluated")
    evaluations: dict[str, View] = resumable(
        {}, "additional evaluations, by the name under which their metrics are reported"
    )
    checkpoint: Checkpoint = setting(Checkpoint(), "when checkpoints are saved, and which are kept")
    bucket: Bucket = setting(Bucket(), "access to Google Cloud Storage (gs:// paths)")
    log: Log = setting(Log(), "when and where metrics are reported")
    watch: Watch = setting(Watch(), "when a run counts as stalled or a host as dead")
    expected: Expected = setting(Expected(), "the result to compare with")
