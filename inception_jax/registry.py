"""Registries of the parts that a configuration names by a string.

A network, data set, optimizer, schedule, augmentation, metric or writer is a function registered
under a name; built-in and custom parts use the same functions. A user's file (an experiment file,
or a module that it imports) registers a part with a decorator; then the configuration can name it::

    import inception_jax as ij

    @ij.register_optimizer("lion", options={"beta": 0.99})
    def lion(settings, schedule): ...

Settings of such a part that the typed configuration lacks are its options: declared with their
defaults at registration, and set as `config.<group>.options`.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import os
import pathlib
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from inception_jax.errors import ConfigError, UserError, nearest

_PACKAGE = pathlib.Path(os.path.abspath(__file__)).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A registered function.

    Attributes:
      name: name in the configuration.
      build: the function; its arguments and result depend on the kind of part.
      options: defaults of its options, by name.
      settings: the settings of its group that it reads; others must keep their defaults. None:
        unknown, so any may be changed.
      check: yields what is wrong with a configuration that names the part; None: no check.
      file: file that registered it.
      line: line of that file where the function begins or, if it is imported, is registered.
    """

    name: str
    build: Callable[..., Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: tuple[str, ...] | None = None
    check: Callable[[Any], Iterator[str]] | None = None
    file: str = ""
    line: int = 0

    @property
    def is_builtin(self) -> bool:
        """Whether the package registered it."""
        return pathlib.Path(os.path.abspath(self.file)).is_relative_to(_PACKAGE)

    @property
    def location(self) -> str:
        """File and line of the registration, for messages."""
        return f"{self.file}, line {self.line}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPart(Part):
    """A network; see `register_model`."""

    min_image_size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerPart(Part):
    """An optimizer; see `register_optimizer`."""

    decay: str = "own"
    auto_rate: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetPart(Part):
    """A data set: what must be known before any of it is read or prepared.

    `build` takes the settings (`config.Data` with all options) and returns the splits, in one of
    the forms described in `register_dataset`; or, with `is_builder`, a subclass of `ImageBuilder`.
    It is called when the data set is prepared, not when prepared data is opened.

    Attributes:
      version: increased when the records change, so that they are prepared again.
      train_split, eval_split: names of the splits to train and evaluate on; an eval_split of '' is
        "validation" or "test" if there is one, otherwise the only other split.
      class_names: class names in the order of the labels; empty: returned with the splits.
      classes: number of classes; 0: determined by the source.
      examples: number of examples in each split that is used; empty: determined by the source.
      extra_settings: fields of `config.Data` that apply to this data set but not to most others.
      accepts_source: whether `config.data.source` may be set.
      source_files: names of the files that a source consists of, in one folder; the setting names
        this folder, or one of the files. Empty: a source is a single file or a whole folder.
      content_is_canonical: whether every source contains the same examples, so that data prepared
        from one can be used for another.
      contents: returns the `sources.files.Contents` of a source, given its path and the values of
        `extra_settings` by name; must not need TFDS. None: compare names, sizes and times of files.
      check: yields error messages about the settings.
      locate: returns the name and version of the prepared data, given settings, the folder of
        prepared data and a log; None: the name and version of this entry.
      mean, std: published values for the training pixels, in units of pixel value / 255; empty:
        computed during preparation, for which every image is decoded.
      is_builder: whether `build` returns a builder class, which imports TFDS.
    """

    version: str = "1.0.0"
    train_split: str = "train"
    eval_split: str = ""
    class_names: Sequence[str] = ()
    classes: int = 0
    examples: Mapping[str, int] = dataclasses.field(default_factory=dict)
    extra_settings: tuple[str, ...] = ()
    accepts_source: bool = True
    source_files: tuple[str, ...] = ()
    content_is_canonical: bool = False
    contents: Callable[..., Any] | None = None
    locate: Callable[..., tuple[str, str]] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    is_builder: bool = False

    def __post_init__(self) -> None:
        # They are used as folder names, and must satisfy TFDS.
        if not re.fullmatch(r"[A-Za-z]\w*", self.name, re.ASCII):
            raise ConfigError(
                f"{self.location}: register_dataset({self.name!r}): the name must consist of "
                'letters, digits and underscores and start with a letter, such as "my_set"'
            )
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.version):
            raise ConfigError(
                f"{self.location}: register_dataset({self.name!r}, version={self.version!r}): the "
                'version must be three numbers, such as "1.0.0"'
            )

    @property
    def num_classes(self) -> int:
        """The number of classes; 0: determined by the source."""
        return self.classes or len(self.class_names)

    def known_count(self, what: str, given: int) -> int:
        """Returns a number that either the data set defines or the user gives.

        Args:
          what: "classes" or "examples" (of the training split).
          given: what the user gave as --classes or --examples; 0: nothing.

        Raises:
          UserError: if neither of them defines it, or both do, differently.
        """
        if what == "classes":
            known, meaning = self.num_classes, "classes"
        else:
            known, meaning = self.examples.get(self.train_split, 0), "training images"
        if given and known and given != known:
            raise UserError(f"{what} = {given}: {self.name} has {known:,}; leave it out")
        if not given and not known:
            raise UserError(
                f"the number of {meaning} of {self.name} depends on its source; set --{what}=N "
                f"(in Python, {what}=N)"
            )
        return given or known

    def source_problem(self, data: Any) -> str:
        """Returns an error message if a source is set but not accepted, or ''."""
        if not data.source or self.accepts_source:
            return ""
        return f"config.data.source = {data.source!r}: must be empty for {self.name!r}"

    def problems(self, data: Any, default: Any) -> Iterator[str]:
        """Yields error messages about the settings of this data set.

        Args:
          data: the settings, a `config.Data`.
          default: a `config.Data` with all defaults.
        """
        if problem := self.source_problem(data):
            yield problem
        takers: dict[str, list[str]] = {}
        for part in DATASETS:
            for name in part.extra_settings:
                takers.setdefault(name, []).append(part.name)
        for name in sorted(takers.keys() - set(self.extra_settings)):
            value, usual = getattr(data, name), getattr(default, name)
            if value != usual:
                yield (
                    f"config.data.{name} = {value!r}: must be {usual!r} for {self.name!r}; only "
                    f"{' and '.join(map(repr, takers[name]))} can change it"
                )
        if self.check is not None:
            yield from self.check(data)


PartT = TypeVar("PartT", bound=Part)
FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


class Registry(Generic[PartT]):
    """The parts of one kind, by name.

    Args:
      kind: name of the kind in messages and in `register_KIND`: "model".
      setting: dotted path of the setting that names a part: "model.name".
      part: class of the parts.
      module: module that registers the built-in parts, imported when they are first needed.
      common: settings of the group that the package reads for every part.
    """

    def __init__(
        self,
        kind: str,
        *,
        setting: str,
        part: type[PartT],
        module: str = "",
        common: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.setting = setting
        self.common = tuple(common)
        self._part = part
        self._module = module
        self._parts: dict[str, PartT] = {}

    def register(
        self, name: str, *, options: Mapping[str, Any] | None = None, **attributes: Any
    ) -> Callable[[FunctionT], FunctionT]:
        """Returns a decorator that registers a function.

        Registering the same function of the same file again replaces it, for example when a
        notebook cell or an experiment file is run twice.

        Args:
          name: unique, nonempty name for the configuration.
          options: defaults of the part's options.
          attributes: other attributes of the part class.

        Raises:
          ConfigError: if the name is taken, or an argument has the wrong type.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"register_{self.kind}({name!r}): the name must be a non-empty string, such as "
                f'"my_{self.kind}"'
            )

        if not isinstance(options or {}, Mapping):
            raise ConfigError(
                f"register_{self.kind}({name!r}): options must map names to defaults, got "
                f"{type(options).__name__}"
            )

        def decorate(function: FunctionT) -> FunctionT:
            if not callable(function):
                raise ConfigError(
                    f"register_{self.kind}({name!r}): must decorate a function, got {function!r}"
                )
            file, line = _registration(function, sys._getframe(1))
            part = self._part(
                name=name,
                build=function,
                options=dict(options or {}),
                file=file,
                line=line,
                **attributes,
            )
            # Built-in names are reserved, even if the built-in parts are not loaded yet.
            if not part.is_builtin:
                self._load()
            before = self._parts.get(name)
            if before is not None and _conflicts(before, part):
                raise ConfigError(
                    f"{part.location}: the {self.kind} {name!r} is already registered by "
                    f"{before.location}; use another name"
                )
            self._parts[name] = part
            return function

        return decorate

    def get(self, name: str) -> PartT:
        """Returns the part called `name`.

        Raises:
          ConfigError: if there is none, with the closest name.
        """
        self._load()
        if name not in self._parts:
            raise ConfigError(f"config.{self.setting} = {name!r}: {self.unknown_message(name)}")
        return self._parts[name]

    def unknown_message(self, name: str) -> str:
        """Returns the error message for a name that is not registered."""
        return (
            f"no such {self.kind}.{nearest(name, self.names())} Registered: "
            f"{', '.join(self.names())}. To use a custom {self.kind}, import the file that "
            "registers it, for example in the experiment file"
        )

    def names(self) -> tuple[str, ...]:
        """Returns all names, built-in ones first, in the order of registration."""
        self._load()
        return tuple(sorted(self._parts, key=lambda name: not self._parts[name].is_builtin))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._parts

    def __iter__(self) -> Iterator[PartT]:
        return iter([self._parts[name] for name in self.names()])

    def _load(self) -> None:
        """Imports the module that registers the built-in parts."""
        if not (module := self._module):
            return
        # The registrations in that module call this method, too.
        self._module = ""
        try:
            importlib.import_module(module)
        except BaseException:
            self._module = module
            raise


@contextlib.contextmanager
def as_config_error(part: Part, what: str) -> Iterator[None]:
    """Converts exceptions of custom parts to `ConfigError`; those of built-in parts are unchanged.

    Args:
      part: the part that is called in the block.
      what: name of the part in the message, such as "the optimizer 'lion'".

    Raises:
      ConfigError: with the part, the error, and the line of the part's file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if part.is_builtin:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [
            each.lineno
            for each in frames
            if part.file in (each.filename, os.path.abspath(each.filename))
        ]
        where = f" (line {lines[-1]})" if lines else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{part.location}: {what} failed{where}: {type(error).__name__}: {reason}"
        ) from error


def _registration(function: Any, caller: types.FrameType) -> tuple[str, int]:
    """Returns the file whose execution registers a function or class, and the line.

    That is the file of the function, unless another one imports and registers it. The path is
    absolute, because the program may change its folder.

    Args:
      function: the function or class.
      caller: the frame that registers it.
    """
    file, line = _source_location(function)
    running: set[str] = set()
    frame: types.FrameType | None = caller
    while frame:
        running.add(frame.f_code.co_filename)
        frame = frame.f_back
    # Generated code, as of a dataclass, has the name "<string>".
    if file not in running or file == "<string>":
        file, line = caller.f_code.co_filename, caller.f_lineno
    return os.path.abspath(file) if os.path.isfile(file) else file, line


def _source_location(function: Any) -> tuple[str, int]:
    """Returns the file and line where a registered function or class begins."""
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    # For a class, the location of __init__; for a callable object, that of __call__.
    for each in (inner, getattr(inner, "__init__", None), type(inner).__call__):
        if isinstance(code := getattr(each, "__code__", None), types.CodeType):
            return code.co_filename, code.co_firstlineno
    module = sys.modules.get(getattr(inner, "__module__", ""))
    return getattr(module, "__file__", None) or "", 0


def _is_again(before: Part, part: Part) -> bool:
    """Whether a part is registered again: a function of the same name, from the same file."""
    if len({getattr(each.build, "__qualname__", "") for each in (before, part)}) > 1:
        return False
    # The file name of a notebook cell changes each time the cell is edited or run.
    registering = {each.file if os.path.isfile(each.file) else "" for each in (before, part)}
    # Several files may import and register the same function.
    defining = {_source_location(each.build)[0] for each in (before, part)}
    return len(registering) == 1 or (len(defining) == 1 and os.path.isfile(*defining))


def _conflicts(before: Part, part: Part) -> bool:
    """Whether two parts with the same name differ, rather than one being registered again."""
    if before.build is part.build:
        return False
    if not _is_again(before, part):
        return True
    # A file that is run again has new globals; notebook cells share those of the notebook.
    modules = [getattr(each.build, "__globals__", None) for each in (before, part)]
    same_run = modules[0] is not None and modules[0] is modules[1] and os.path.isfile(part.file)
    return same_run and before.line != part.line


def option_problems(parts: Sequence[Part], options: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yields error messages about the options of parts that share a group of settings.

    Args:
      parts: the parts that use the options.
      options: the options that are set.
      path: dotted path of the setting: "model.options".
    """
    for name, value in options.items():
        takers = [part for part in parts if name in part.options]
        if not takers:
            known = sorted({option for part in parts for option in part.options})
            names = " and ".join(repr(part.name) for part in parts) or "none of these parts"
            allowed = (
                f"Options: {', '.join(known)}"
                if known
                else f"It has no options; --config.{path}= removes those of an earlier start"
            )
            hint = nearest(name, known)
            yield f"config.{path}.{name}: no such option of {names}.{hint} {allowed}"
        for part in takers:
            default = part.options[name]
            if default is not None and not _has_type_of(value, default):
                yield (
                    f"config.{path}.{name} = {value!r}: must be of type "
                    f"{type(default).__name__} for {part.name!r}, such as {default!r}"
                )


def _has_type_of(value: Any, default: Any) -> bool:
    """Whether a value has the type of a default; int counts as float, and list as tuple."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple | list):
        return isinstance(value, tuple | list)
    return isinstance(value, type(default))


def options_with_defaults(part: Part, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of a part, with defaults for those that are not set."""
    return {name: options.get(name, default) for name, default in part.options.items()}


def describe_value(value: Any) -> str:
    """Returns a short description of a value for messages: dtype and shape, or its type.

    >>> describe_value(0.1)
    'a float'
    """
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} {list(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricPart(Part):
    """A metric; see `register_metric`."""

    over: str = "example"
    percent: bool = False
    min_classes: int = 0


def register_metric(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    over: str = "example",
    percent: bool = False,
    min_classes: int = 0,
) -> Callable[[FunctionT], FunctionT]:
    """Returns a decorator that registers a metric, for `config.evaluation.metrics`.

    A metric over examples is a JAX function of logits, float32 [B, K], and labels, int32 [B], that
    returns one value per example, bool or float [B]. It runs inside the compiled step; every
    example of a split counts once in its average. It is also reported for training batches, which
    are augmented; with mixed labels, the label with the larger weight counts.

    A metric over a split is a function of NumPy arrays, logits float32 [N, K] and labels int32 [N],
    for all N examples in order, that returns a number; only evaluations report it. If one is used,
    each process keeps the logits of an evaluation in memory, 4 N K bytes: 200 MB for ImageNet's
    50,000 images and 1,000 classes.

    Args:
      name: name in the configuration, metrics.jsonl, TensorBoard, report and result.json.
      options: defaults of the metric's options, which are passed as keyword arguments and set as
        config.evaluation.options.NAME.
      over: "example" or "split".
      percent: whether the returned fraction is reported in percent.
      min_classes: minimum number of classes for which the metric is meaningful; with fewer, it is
        omitted.

    Raises:
      ConfigError: if the name is taken or reserved, or `over` is invalid.
    """
    if name in _RESERVED_METRIC_NAMES or (isinstance(name, str) and not re.fullmatch(r"\w+", name)):
        raise ConfigError(
            f"register_metric({name!r}): the name must be a word of letters, digits and "
            "underscores, and not one that lines of metrics already use; choose another name"
        )
    if over not in ("example", "split"):
        raise ConfigError(
            f"register_metric({name!r}, over={over!r}): over must be 'example' or 'split'"
        )
    return METRICS.register(
        name, options=options, over=over, percent=percent, min_classes=min_classes
    )


# Other keys of metrics.jsonl and result.json.
_RESERVED_METRIC_NAMES = (
    *("step", "epoch", "split", "count", "seconds", "learning_rate", "gradient_norm"),
    *("images_per_second", "input_wait", "resident_memory", "free_disk", "evaluations"),
    *("name", "checkpoint", "environment", "seconds_by_phase"),
    # And the names of a checkpoint's metric sums.
    *("first_nonfinite_step", "_reduction_counter"),
)


def settings_with_defaults(part: Part, settings: Any) -> Any:
    """Returns a group of settings with all options of a part, with defaults for those not set."""
    return dataclasses.replace(settings, options=options_with_defaults(part, settings.options))


MODELS = Registry(
    "model",
    setting="model.name",
    part=ModelPart,
    module="inception_jax.models.networks",
    common=["dtype"],
)
DATASETS = Registry(
    "dataset", setting="data.name", part=DatasetPart, module="inception_jax.datasets.catalog"
)
OPTIMIZERS = Registry(
    "optimizer",
    setting="optimizer.name",
    part=OptimizerPart,
    module="inception_jax.training.optimizers",
    common=["clip_norm", "sam_rho", "norm_bias_lr_ratio"],
)
SCHEDULES = Registry(
    "schedule", setting="schedule.name", part=Part, module="inception_jax.training.schedules"
)
AUGMENTATIONS = Registry(
    "augmentation", setting="augment.extra", part=Part, module="inception_jax.input.policies"
)
METRICS = Registry(
    "metric", setting="evaluation.metrics", part=MetricPart, module="inception_jax.training.metrics"
)
WRITERS = Registry(
    "writer", setting="log.writers", part=Part, module="inception_jax.telemetry.writers"
)
REGISTRIES: Mapping[str, Registry[Any]] = {
    each.kind: each
    for each in (MODELS, DATASETS, OPTIMIZERS, SCHEDULES, AUGMENTATIONS, METRICS, WRITERS)
}


def register_writer(
    name: str, *, options: Mapping[str, Any] | None = None
) -> Callable[[FunctionT], FunctionT]:
    """Returns a decorator that registers a writer, which receives every row of metrics.

    The function takes the settings (`config.log`, with the writer's options in `options`) and the
    `Workdir`, whose `config` is the file with the run's settings. It returns an object with the
    methods of `telemetry.writers.Writer`: `write(step, *, epoch, split, values)`, `flush()`,
    `close()` and, optionally, `resume(resume_step)`, which tells where a resumed run starts. Only
    the lead process of a run has writers. An exception in a writer stops the run, or is logged and
    the write retried, depending on `config.checkpoint.on_write_error`.

    Args:
      name: name for `config.log.writers`.
      options: defaults of its options, set as `config.log.options`.

    Raises:
      ConfigError: if the name is taken.
    """
    return WRITERS.register(name, options=options)


def register_model(
    name: str,
    *,
    min_image_size: int = 1,
    options: Mapping[str, Any] | None = None,
    settings: tuple[str, ...] | None = None,
    check: Callable[[Any], Iterator[str]] | None = None,
) -> Callable[[FunctionT], FunctionT]:
    """Registers a network: `(settings, num_classes) -> flax.linen.Module`.

    The module is called with normalized images, float32 [B, H, W, 3], and with train=True or
    train=False if it has that argument. It returns logits, float [B, num_classes], or
    `models.layers.ModelOutput`. Its parameters are in the collection "params", running statistics
    in "batch_stats"; the random key of dropout is named "dropout". `settings.dtype` is the compute
    dtype, never "auto". `models.protocol` describes what else some commands need.

    Args:
      name: name for config.model.name.
      min_image_size: minimum image size in pixels, unless the module defines it.
      options: defaults of its options; `settings.options` has all of them.
      settings, check: as in `Part`.
    """
    return MODELS.register(
        name, options=options, min_image_size=min_image_size, settings=settings, check=check
    )


def register_optimizer(
    name: str,
    *,
    decay: str = "own",
    auto_rate: bool = False,
    options: Mapping[str, Any] | None = None,
    settings: tuple[str, ...] | None = None,
    check: Callable[[Any], Iterator[str]] | None = None,
) -> Callable[[FunctionT], FunctionT]:
    """Registers an optimizer: `(settings, schedule) -> optax.GradientTransformation`.

    `schedule` maps the number of updates to the learning rate, including warmup. The package clips
    the gradient before the transformation (clip_norm). The rest depends on `decay`. By default, the
    function returns a complete optimizer, which multiplies by the negative learning rate and does
    any weight decay (`settings.weight_decay`; `settings.decay_mask` maps parameters to whether each
    is decayed). Otherwise it returns only an update direction. With config.train.on_nonfinite=skip,
    a skipped step counts for the package's schedule, but not for a step count in the optimizer.

    Args:
      name: name for config.optimizer.name.
      decay: "own": complete optimizer; "l2": the function returns a direction, and the package adds
        weight_decay times the weights to the gradient before it and multiplies by the learning
        rate after it; "decoupled": the same, but the decay is added after it.
      auto_rate: whether the learning rate chosen by train.auto_size, meant for SGD, applies.
      options: defaults of its options; `settings.options` has all of them.
      settings, check: as in `Part`.

    Raises:
      ConfigError: if the name is taken, or `decay` is invalid.
    """
    if decay not in ("own", "l2", "decoupled"):
        raise ConfigError(
            f"register_optimizer({name!r}, decay={decay!r}): decay must be 'own', 'l2' or "
            "'decoupled'"
        )
    return OPTIMIZERS.register(
        name, options=options, decay=decay, auto_rate=auto_rate, settings=settings, check=check
    )


def register_schedule(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    check: Callable[[Any], Iterator[str]] | None = None,
) -> Callable[[FunctionT], FunctionT]:
    """Registers a schedule: `(settings, total_steps) -> optax.Schedule`.

    The package prepends the warmup. The schedule maps the number of updates since the end of the
    warmup, an int32 scalar from 0 to total_steps - 1, to the learning rate, a float scalar.
    total_steps is the duration of the run without the warmup, and `settings.learning_rate` the
    peak. `settings.steps(duration)` converts durations to steps.

    Args:
      name: name for config.schedule.name.
      options: defaults of its options; `settings.options` has all of them.
      check: as in `Part`.
    """
    return SCHEDULES.register(name, options=options, check=check)


def register_augmentation(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    settings: tuple[str, ...] | None = None,
) -> Callable[[FunctionT], FunctionT]:
    """Registers an augmentation: `(key, images, **options) -> images`.

    It is a pure function of a typed PRNG key and a batch of images, float32 [B, H, W, 3] between 0
    and 1, traced in the training step, and returns a batch of the same shape and dtype.

    Args:
      name: name for config.augment.extra or config.augment.policy.
      options: defaults of its options, passed as keyword arguments.
      settings: settings of config.augment that are also passed as keyword arguments.
    """
    return AUGMENTATIONS.register(name, options=options, settings=settings)


def register_dataset(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    eval_split: str = "",
    version: str = "1.0.0",
    contents: Callable[..., Any] | None = None,
    is_builder: bool = False,
) -> Callable[[FunctionT], FunctionT]:
    """Returns a decorator that registers a custom data set for `config.data.name`.

    The function takes the settings (`config.data`; `settings.options` has all options) and returns
    a mapping of splits by name: "train", and "validation", "test" or any other to evaluate on. A
    split is either

    * a tuple (images, labels) or (images, labels, names): images a uint8 array [N, H, W, 3],
      [N, H, W, 1] or [N, H, W], or a sequence of single images of any sizes, or of encoded files
      (bytes: JPEG, PNG, …); labels int [N], or class names [N]; names str [N], or none;
    * an iterable of examples (image, label) or (image, label, name), such as a generator, if the
      images do not fit in memory. It requires the class names.

    The function can also return class names: `return splits, class_names`. Without class names,
    the classes are named by their numbers, and the training labels must be 0 to K - 1. A label of
    −1 means unknown; it is allowed in splits that are used neither for training nor for evaluation.

    The function runs once: its result is written to `config.data.directory`, like a built-in data
    set. If config.data.on_change allows it, the data set is prepared again when the options, the
    function's code or the content of `config.data.source` change::

        @ij.register_dataset("noise", options={"count": 100}, class_names=["cat", "dog"])
        def noise(settings):
            random = np.random.default_rng(0)
            def split(count):
                return random.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 2
            return {"train": split(settings.options["count"]), "validation": split(20)}

    Args:
      name: letters, digits and underscores, starting with a letter.
      options: defaults of its options, set as `config.data.options`.
      class_names: class names in the order of the labels.
      eval_split: split to evaluate on; '': "validation" or "test", or the only other one.
      version: three numbers; the data set is prepared again when they change.
      contents: as in `DatasetPart`.
      is_builder: whether the function instead returns a subclass of
        `datasets.builders.base.ImageBuilder`, which opens, checks and reads its original files,
        without TensorFlow.

    Raises:
      ConfigError: if the name is taken or invalid, or another argument is wrong.
    """
    if isinstance(class_names, str):
        raise ConfigError(
            f"register_dataset({name!r}, class_names={class_names!r}): class_names must be a list "
            "of names, not a string"
        )
    return DATASETS.register(
        name,
        options=options,
        class_names=tuple(class_names),
        eval_split=eval_split,
        version=version,
        contents=contents,
        is_builder=is_builder,
    )
