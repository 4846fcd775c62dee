"""The parts that a configuration names by a string, and the class that keeps them by name.

A network, data set, optimizer, schedule, augmentation, metric or writer is a function registered
under a name, the package's own and a user's alike. A user's file registers a part with a decorator
when it is imported (an experiment file, or a module that it imports); after that the configuration
can name it::

    import inception_jax as ij

    @ij.register_optimizer("lion", options={"beta": 0.99})
    def lion(settings, schedule): ...

Settings of such a part that the typed configuration does not have are its options: declared with
their defaults where it is registered, given as `config.<group>.options`.
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

_PACKAGE = pathlib.Path(__file__).parent


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A function under a name.

    Attributes:
      name: as the configuration has it.
      build: the function; what it takes and returns is up to its kind.
      options: the settings of its own, by name, with their defaults.
      settings: which settings of its group it reads; others have to stay as they are. None: it does
        not say, and any is allowed.
      check: yields what is wrong with a whole configuration that names it; None: nothing is.
      file: that registered it.
      line: of that file, where the function begins.
    """

    name: str
    build: Callable[..., Any]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    settings: tuple[str, ...] | None = None
    check: Callable[[Any], Iterator[str]] | None = None
    file: str = ""
    line: int = 0

    @property
    def is_own(self) -> bool:
        """Whether the package itself registered it."""
        return pathlib.Path(self.file).is_relative_to(_PACKAGE)

    @property
    def place(self) -> str:
        """Where it was registered, for messages."""
        return f"{self.file}, line {self.line}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelPart(Part):
    """A network, as `register_model` describes it."""

    min_image_size: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerPart(Part):
    """An update rule, as `register_optimizer` describes it."""

    decay: str = "own"
    auto_rate: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatasetPart(Part):
    """A data set: what has to be known of it before anything of it is read or prepared.

    `build` takes the settings (`config.Data`, its options complete) and returns the splits, in one
    of the forms that `register_dataset` describes; or, with `is_builder`, the class of an
    `ImageBuilder`. It is called when the data set is prepared, not when prepared data are opened.

    Attributes:
      version: rises when the records change, so that they are made again.
      train_split, eval_split: names of the splits to train on and to evaluate on; an eval_split of
        '' is "validation" or "test" where there is one, or else the only other one.
      class_names: in the order of the labels; empty: the splits say them.
      classes: how many there are; 0: only the source decides.
      takes: the fields of `config.Data` that this data set takes and most others do not.
      takes_source: whether `config.data.source` has a meaning.
      fixed_content: whether every source holds the same examples, so that data prepared from one
        serve for another.
      contents: returns the `sources.files.Contents` of a source, given its path and the values of
        `takes` by name; needs no TFDS. None: of any file or folder, by names, sizes and times.
      check: yields what is wrong with the settings, messages each.
      locate: returns the name and the version of what is prepared, given settings, the folder of
        prepared data and a log; None: they are those of this entry.
      mean, std: the published ones of the training pixels, in units of pixel value / 255; empty:
        they are measured when the data set is made ready, for which every image is decoded.
      is_builder: whether `build` returns a builder's class, imported with TFDS.
    """

    version: str = "1.0.0"
    train_split: str = "train"
    eval_split: str = ""
    class_names: Sequence[str] = ()
    classes: int = 0
    takes: tuple[str, ...] = ()
    takes_source: bool = True
    fixed_content: bool = False
    contents: Callable[..., Any] | None = None
    locate: Callable[..., tuple[str, str]] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    is_builder: bool = False

    def __post_init__(self) -> None:
        # They are names of folders, and what TFDS takes for such.
        if not re.fullmatch(r"[A-Za-z]\w*", self.name, re.ASCII):
            raise ConfigError(
                f"{self.place}: registers the dataset {self.name!r}: a name must be of letters, "
                'digits and underscores, and begin with a letter, such as "my_set"'
            )
        if not re.fullmatch(r"\d+\.\d+\.\d+", self.version):
            raise ConfigError(
                f"{self.place}: registers the dataset {self.name!r} with version = "
                f'{self.version!r}: must be three numbers, such as "1.0.0"'
            )

    def source_problem(self, data: Any) -> str:
        """Returns what is wrong with a source for a data set that takes none, or ''."""
        if not data.source or self.takes_source:
            return ""
        return f"config.data.source = {data.source!r}: {self.name!r} needs none; leave it empty"

    def problems(self, data: Any, default: Any) -> Iterator[str]:
        """Yields what is wrong with settings for this data set.

        Args:
          data: the settings, `config.Data`.
          default: the same, all at their defaults.
        """
        if problem := self.source_problem(data):
            yield problem
        takers: dict[str, list[str]] = {}
        for part in DATASETS:
            for name in part.takes:
                takers.setdefault(name, []).append(part.name)
        for name in sorted(takers.keys() - set(self.takes)):
            value, usual = getattr(data, name), getattr(default, name)
            if value != usual:
                yield (
                    f"config.data.{name} = {value!r}: only {' and '.join(map(repr, takers[name]))} "
                    f"has this setting; leave it at {usual!r} for {self.name!r}"
                )
        if self.check is not None:
            yield from self.check(data)


AnyPart = TypeVar("AnyPart", bound=Part)
Function = TypeVar("Function", bound=Callable[..., Any])


class Registry(Generic[AnyPart]):
    """The parts of one kind by name.

    Args:
      kind: what a part is called in messages: "network".
      setting: the dotted path of the setting that names one: "model.name".
      part: the class of its parts.
      home: the module of the package that registers its own, imported when they are first needed.
      common: settings of the group that the package itself reads, whichever part is named.
    """

    def __init__(
        self,
        kind: str,
        *,
        setting: str,
        part: type[AnyPart],
        home: str = "",
        common: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.setting = setting
        self.common = tuple(common)
        self._part = part
        self._home = home
        self._parts: dict[str, AnyPart] = {}

    def register(
        self, name: str, *, options: Mapping[str, Any] | None = None, **facts: Any
    ) -> Callable[[Function], Function]:
        """Returns a decorator that registers a function.

        Registering the same function of the same file again replaces it, as when a notebook's cell
        or an experiment file is run twice.

        Args:
          name: for the configuration; not '', and not taken.
          options: the part's own settings with their defaults.
          facts: what else its kind declares.

        Raises:
          ConfigError: if the name is taken, or a fact is not of this kind.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"register_{self.kind}({name!r}): give a name, such as "
                f'register_{self.kind}("my_{self.kind}")'
            )

        if not isinstance(options or {}, Mapping):
            raise ConfigError(
                f"register_{self.kind}({name!r}): options must be a mapping of names to defaults, "
                f"got {type(options).__name__}"
            )

        def decorate(function: Function) -> Function:
            if not callable(function):
                raise ConfigError(
                    f"register_{self.kind}({name!r}): must decorate a function, got {function!r}"
                )
            file, line = _place(function)
            part = self._part(
                name=name,
                build=function,
                options=dict(options or {}),
                file=file,
                line=line,
                **facts,
            )
            # The package's own names are taken, whichever is registered first.
            if not part.is_own:
                self._load()
            before = self._parts.get(name)
            if before is not None and _is_another(before, part):
                raise ConfigError(
                    f"{part.place}: registers the {self.kind} {name!r}, which {before.place} has "
                    "registered already; give it another name"
                )
            self._parts[name] = part
            return function

        return decorate

    def get(self, name: str) -> AnyPart:
        """Returns the part called `name`.

        Raises:
          ConfigError: with the nearest name, if there is none.
        """
        self._load()
        if name not in self._parts:
            raise ConfigError(f"config.{self.setting} = {name!r}: {self.unknown(name)}")
        return self._parts[name]

    def unknown(self, name: str) -> str:
        """Returns what is wrong with a name that nothing registered."""
        return (
            f"no {self.kind} is registered under this name.{nearest(name, self.names())} "
            f"Registered: {', '.join(self.names())}. One of your own is known once the file that "
            "registers it is imported, such as by the experiment file"
        )

    def names(self) -> tuple[str, ...]:
        """Returns all names: first the package's own, in the order of their registration."""
        self._load()
        return tuple(sorted(self._parts, key=lambda name: not self._parts[name].is_own))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._parts

    def __iter__(self) -> Iterator[AnyPart]:
        return iter([self._parts[name] for name in self.names()])

    def _load(self) -> None:
        """Imports the module that registers the package's own parts."""
        if not (home := self._home):
            return
        # The module's own registrations come here, too.
        self._home = ""
        try:
            importlib.import_module(home)
        except BaseException:
            self._home = home
            raise


@contextlib.contextmanager
def explained(part: Part, what: str) -> Iterator[None]:
    """Explains what a user's function raises; an error of the package's own stays as it is.

    Args:
      part: that fails, if one does.
      what: it is called in the message, such as "the optimizer 'lion'".

    Raises:
      ConfigError: with the part, the error, and the line of the part's file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if part.is_own:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == part.file]
        where = f" (line {lines[-1]})" if lines else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{part.place}: {what} failed{where}: {type(error).__name__}: {reason}"
        ) from error


def _place(function: Any) -> tuple[str, int]:
    """Returns the file and the line where what is registered begins."""
    inner = inspect.unwrap(function)
    while isinstance(inner, functools.partial):
        inner = inspect.unwrap(inner.func)
    # A class is where its instances are made, an object where its class is called.
    for each in (inner, getattr(inner, "__init__", None), type(inner).__call__):
        if isinstance(code := getattr(each, "__code__", None), types.CodeType):
            return code.co_filename, code.co_firstlineno
    module = sys.modules.get(getattr(inner, "__module__", ""))
    return getattr(module, "__file__", None) or "", 0


def _identity(part: Part) -> tuple[str, str]:
    """Returns what tells a part that is registered again from another of the same name."""
    # A notebook's cell has another name each time it is changed or run.
    file = part.file if os.path.isfile(part.file) else ""
    return file, getattr(part.build, "__qualname__", "")


def _is_another(before: Part, part: Part) -> bool:
    """Whether a part is another than the one that has its name, not the same registered again."""
    if _identity(before) != _identity(part):
        return True
    # A file that is run again has new globals; a cell's are those of its notebook.
    modules = [getattr(each.build, "__globals__", None) for each in (before, part)]
    same_run = modules[0] is not None and modules[0] is modules[1] and os.path.isfile(part.file)
    return same_run and before.line != part.line


def option_problems(parts: Sequence[Part], options: Mapping[str, Any], path: str) -> Iterator[str]:
    """Yields what is wrong with the options given to some parts that share a group of settings.

    Args:
      parts: that take them.
      options: as given.
      path: dotted, of the setting that holds them: "model.options".
    """
    for name, value in options.items():
        takers = [part for part in parts if name in part.options]
        if not takers:
            known = sorted({option for part in parts for option in part.options})
            names = " and ".join(repr(part.name) for part in parts) or "nothing that is named"
            allowed = f"it takes {', '.join(known)}" if known else "it takes none"
            hint = nearest(name, known)
            yield f"config.{path}.{name}: {names} has no such option; {allowed}.{hint}"
        for part in takers:
            default = part.options[name]
            if default is not None and not _fits(value, default):
                yield (
                    f"config.{path}.{name} = {value!r}: must be of type "
                    f"{type(default).__name__} for {part.name!r}, such as {default!r}"
                )


def _fits(value: Any, default: Any) -> bool:
    """Whether a value is of its default's type; an int passes for a float, a list for a tuple."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float)
    if isinstance(default, tuple | list):
        return isinstance(value, tuple | list)
    return isinstance(value, type(default))


def with_defaults(part: Part, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns all options of a part: those given, the others by default."""
    return {name: options.get(name, default) for name, default in part.options.items()}


def described(found: Any) -> str:
    """Returns type and shape of what a part returned, in words."""
    if hasattr(found, "shape") and hasattr(found, "dtype"):
        return f"{found.dtype} {list(found.shape)}"
    return "None" if found is None else f"a {type(found).__name__}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric(Part):
    """A metric of the outputs of a network, as `register_metric` describes it."""

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
) -> Callable[[Function], Function]:
    """Returns a decorator that registers a metric, for `config.evaluation.metrics`.

    A metric over examples is a JAX function of logits, float32 [B, K], and labels, int32 [B], that
    returns one value an example, bool or float [B]. It runs inside the compiled step; every example
    of a split counts once in its average. Training reports it too, of its own batches: augmented,
    and with mixed labels the larger share counts as the label.

    A metric over a split is a function of NumPy arrays, logits float32 [N, K] and labels int32 [N],
    N being all examples in order, that returns a number; only evaluations report it. Where one is
    named, each process keeps the logits of an evaluation in its memory, 4 N K bytes: 200 MB for
    ImageNet's 50,000 images and 1,000 classes.

    Args:
      name: in the configuration, and in metrics.jsonl, TensorBoard, report and result.json.
      options: the metric's own settings with their defaults: keyword arguments of the function,
        given as config.evaluation.options.NAME.
      over: "example" or "split".
      percent: whether what it returns, a share of 1, is reported times 100.
      min_classes: how many classes the data need for the metric to say anything; with fewer it is
        left out.

    Raises:
      ConfigError: if the name is taken or stands for something else in a line of metrics, or `over`
        is unknown.
    """
    if name in _RESERVED or (isinstance(name, str) and not re.fullmatch(r"\w+", name)):
        raise ConfigError(
            f"register_metric({name!r}): this stands for something else in a line of metrics, or "
            "is not a word; give it another name, of letters, digits and _"
        )
    if over not in ("example", "split"):
        raise ConfigError(
            f"register_metric({name!r}, over={over!r}): must be one of example, split."
            f"{nearest(over, ('example', 'split'))}"
        )
    return METRICS.register(
        name, options=options, over=over, percent=percent, min_classes=min_classes
    )


# What else a line of metrics or a result holds.
_RESERVED = (
    *("step", "epoch", "split", "count", "seconds", "learning_rate", "gradient_norm"),
    *("images_per_second", "input_wait", "resident_memory", "free_disk", "evaluations"),
    # And what a checkpoint's sums were called.
    *("first_nonfinite_step", "_reduction_counter"),
)


def fill(part: Part, settings: Any) -> Any:
    """Returns a group of settings in which the options of a part have their defaults."""
    return dataclasses.replace(settings, options=with_defaults(part, settings.options))


MODELS = Registry(
    "model",
    setting="model.name",
    part=ModelPart,
    home="inception_jax.models.networks",
    common=["dtype"],
)
DATASETS = Registry(
    "dataset", setting="data.name", part=DatasetPart, home="inception_jax.datasets.catalog"
)
OPTIMIZERS = Registry(
    "optimizer",
    setting="optimizer.name",
    part=OptimizerPart,
    home="inception_jax.training.optimizers",
    common=["clip_norm", "sam_rho"],
)
SCHEDULES = Registry(
    "schedule", setting="schedule.name", part=Part, home="inception_jax.training.schedules"
)
AUGMENTATIONS = Registry(
    "augmentation", setting="augment.extra", part=Part, home="inception_jax.input.policies"
)
METRICS = Registry(
    "metric", setting="evaluation.metrics", part=Metric, home="inception_jax.training.metrics"
)
WRITERS = Registry(
    "writer", setting="log.writers", part=Part, home="inception_jax.telemetry.writers"
)
REGISTRIES: Mapping[str, Registry[Any]] = {
    each.kind: each
    for each in (MODELS, DATASETS, OPTIMIZERS, SCHEDULES, AUGMENTATIONS, METRICS, WRITERS)
}


def register_writer(
    name: str, *, options: Mapping[str, Any] | None = None
) -> Callable[[Function], Function]:
    """Returns a decorator that registers a writer, which gets every row of a run's metrics.

    The function takes the settings (`config.log`, in whose `options` are the writer's own) and the
    `Workdir`, whose `config` is the file with the run's settings. It returns an object with the
    methods of `telemetry.writers.Writer`: `write(step, *, epoch, split, values)`, `flush()`,
    `close()`, and, if it is to know where a resumed run begins, `resume(resume_step)`. Only the
    lead process of a run has writers. What a writer raises stops the run, or is logged and tried
    again, as `config.checkpoint.on_write_error` says.

    Args:
      name: for `config.log.writers`.
      options: its own settings with their defaults, given as `config.log.options`.

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
) -> Callable[[Function], Function]:
    """Registers a network: `(settings, num_classes) -> flax.linen.Module`.

    The module is called with images, float32 [B, H, W, 3], normalised, and with train=True or
    train=False if it has such an argument. It returns logits, float [B, num_classes], or
    `models.layers.ModelOutput`. Its parameters are in the collection "params", running statistics
    in "batch_stats"; the key of dropout is called "dropout". `settings.dtype` is the type to
    compute in, never "auto". What else some commands need to know is in `models.protocol`.

    Args:
      name: for config.model.name.
      min_image_size: the least side of its images, pixels, where the module itself does not say.
      options: its own settings with their defaults; `settings.options` has them filled in.
      settings, check: as of `Part`.
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
) -> Callable[[Function], Function]:
    """Registers an update rule: `(settings, schedule) -> optax.GradientTransformation`.

    `schedule` maps the number of updates made to the learning rate, warm-up included. The package
    clips the gradient before the rule (clip_norm). The rest is up to `decay`: by default the
    function returns a whole rule, which multiplies by the negative rate, and decays the weights
    if it is to (`settings.weight_decay`; `settings.decay_mask` maps parameters to whether each
    does). Or it returns a direction alone. With config.train.on_nonfinite=skip a skipped step
    still counts for the schedule of the package, but not for a count of the rule's own.

    Args:
      name: for config.optimizer.name.
      decay: "own"; "l2": the function returns a direction, and the package adds weight_decay times
        the weights to the gradient before it, and multiplies by the rate after it; "decoupled":
        the same, the decay being added after it.
      auto_rate: whether the rate that train.auto_size finds, which is for SGD, suits it.
      options: its own settings with their defaults; `settings.options` has them filled in.
      settings, check: as of `Part`.
    """
    if decay not in ("own", "l2", "decoupled"):
        raise ConfigError(
            f"register_optimizer({name!r}, decay={decay!r}): decay must be one of own, l2 and "
            "decoupled"
        )
    return OPTIMIZERS.register(
        name, options=options, decay=decay, auto_rate=auto_rate, settings=settings, check=check
    )


def register_schedule(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    settings: tuple[str, ...] | None = None,
    check: Callable[[Any], Iterator[str]] | None = None,
) -> Callable[[Function], Function]:
    """Registers a schedule: `(settings, total_steps) -> optax.Schedule`.

    The package puts the warm-up before it. What is returned maps the number of updates made since
    the warm-up's end, an int32 scalar from 0 to total_steps - 1, to the learning rate, a float
    scalar; total_steps is the length of the run less the warm-up, and `settings.learning_rate` the
    peak. `settings.steps(duration)` converts durations.

    Args:
      name: for config.schedule.name.
      options: its own settings with their defaults; `settings.options` has them filled in.
      settings, check: as of `Part`.
    """
    return SCHEDULES.register(name, options=options, settings=settings, check=check)


def register_augmentation(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    settings: tuple[str, ...] | None = None,
    check: Callable[[Any], Iterator[str]] | None = None,
) -> Callable[[Function], Function]:
    """Registers an augmentation: `(key, images, **options) -> images`.

    It is a pure function of a typed PRNG key and a whole batch, float32 [B, H, W, 3] between 0 and
    1, traced in the training step, and returns a batch of the same shape and type.

    Args:
      name: for config.augment.extra, or config.augment.policy.
      options: its own settings with their defaults, given to it by keyword.
      settings: which others of config.augment are given to it by keyword.
      check: as of `Part`.
    """
    return AUGMENTATIONS.register(name, options=options, settings=settings, check=check)


def register_dataset(
    name: str,
    *,
    options: Mapping[str, Any] | None = None,
    class_names: Sequence[str] = (),
    eval_split: str = "",
    version: str = "1.0.0",
    contents: Callable[..., Any] | None = None,
    is_builder: bool = False,
) -> Callable[[Function], Function]:
    """Returns a decorator that registers a data set of one's own, for `config.data.name`.

    The function takes the settings (`config.data`; `settings.options` has all of `options`) and
    returns a mapping of splits by name, of which "train" is one, and "validation", "test" or any
    other is there to evaluate on. A split is one of

    * a tuple (images, labels) or (images, labels, names): images a uint8 array [N, H, W, 3],
      [N, H, W, 1] or [N, H, W], or a sequence of such images without N, of any sizes, or of encoded
      files (bytes: JPEG, PNG, …); labels int [N], or class names [N]; names str [N], or none;
    * an iterable of examples (image, label) or (image, label, name), one at a time, such as a
      generator, where the images do not fit in memory. It needs the class names.

    Class names may also be returned: `return splits, class_names`. Where none are given, labels
    are called by their numbers. A label of −1 is an unknown one, allowed in splits that are neither
    trained nor evaluated on.

    The function runs once: what it returns is written to `config.data.directory`, as a built-in
    data set is. It is prepared again, if config.data.on_change allows it, once the options, the
    function's own code or the content of `config.data.source` change::

        @ij.register_dataset("noise", options={"count": 100}, class_names=["cat", "dog"])
        def noise(settings):
            random = np.random.default_rng(0)
            def split(count):
                return random.integers(0, 256, (count, 32, 32, 3), np.uint8), np.arange(count) % 2
            return {"train": split(settings.options["count"]), "validation": split(20)}

    Args:
      name: letters, digits and underscores, beginning with a letter.
      options: the settings of its own with their defaults, given as `config.data.options`.
      class_names: in the order of the labels.
      eval_split: the split to evaluate on; '': "validation" or "test", or the only other one.
      version: three numbers; another one has the data set prepared anew.
      contents: as of `DatasetPart`.
      is_builder: whether the function returns a subclass of `datasets.builders.base.ImageBuilder`
        instead, which opens, checks and reads originals of its own, without TensorFlow.

    Raises:
      ConfigError: if the name is taken or cannot be one, or another argument is wrong.
    """
    if isinstance(class_names, str):
        raise ConfigError(
            f"register_dataset({name!r}, class_names={class_names!r}): is a text; give a list"
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
