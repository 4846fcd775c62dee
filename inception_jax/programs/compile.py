"""Compiles the programs of a run for devices that this machine need not have.

The programs are those that training compiles: the training step for each image size, and the
evaluation. They need the shapes of the data, not the data.
"""

import contextlib
import copy
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.experimental.compilation_cache import compilation_cache

from inception_jax import advice
from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.datasets import arrays
from inception_jax.datasets.dataset import HOLDOUT, Dataset
from inception_jax.datasets.splits import Split
from inception_jax.errors import RunError, UserError
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.programs import audit, targets
from inception_jax.programs.audit import Audit
from inception_jax.programs.targets import GIB, Target
from inception_jax.registry import DATASETS
from inception_jax.training import run as runs
from inception_jax.training import state as states
from inception_jax.training import step as steps
from inception_jax.training.run import Run

Log = Callable[[str], None]

# What the compilers write when a program does not fit.
_OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|Ran out of memory|out of memory", re.IGNORECASE)
# By libtpu 0.0.50, and by older ones.
_AMOUNTS = re.compile(
    r"\(([\d.]+\w)\) exceeds available HBM \(([\d.]+\w)\)|"
    r"Used ([\d.]+\w) of ([\d.]+\w) hbm"
)


class OutOfMemory(UserError):
    """A program needs more memory than a device has."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a program on each device, bytes.

    Attributes:
      arguments: state and batch.
      results: new state and output.
      reused: results that take the place of arguments.
      temporaries: everything between.
      resident: what else the run keeps there: in evaluation, the rest of the training state.
    """

    arguments: int
    results: int
    reused: int
    temporaries: int
    resident: int

    @property
    def peak(self) -> int:
        """The most that is needed at a time."""
        return self.arguments + self.results - self.reused + self.temporaries + self.resident


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      purpose: "train" or "evaluate".
      image_size: side of the network's images, pixels.
      batch_size: images of all devices together.
      compile_seconds: duration of the compilation on this machine.
      code_bytes: size of the program; 0: unknown.
      memory: on each device.
      audit: what it does on each device.
      compiler_flops: operations on each device as the compiler counts them, which includes those of
        one number at a time, and each loop once; None: it counts none.
      bytes_accessed: bytes read and written by all operations in any memory, as the compiler counts
        them; None: it counts none.
    """

    purpose: str
    image_size: int
    batch_size: int
    compile_seconds: float
    code_bytes: int
    memory: Memory
    audit: Audit
    compiler_flops: float | None = None
    bytes_accessed: float | None = None

    @property
    def name(self) -> str:
        """What it is, for people."""
        return _name(self.purpose, self.image_size, self.batch_size)


def _name(purpose: str, image_size: int, batch_size: int) -> str:
    what = {"train": "training step", "evaluate": "evaluation"}[purpose]
    return f"{what}, {image_size} px, batch {batch_size}"


@dataclasses.dataclass(frozen=True, eq=False)
class _ShapesOnly(Split):
    """A split of which only the shapes are known."""

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Fails: there are no images."""
        raise AssertionError("programs are compiled without data")

    def cropped(self, crop: float) -> Split:
        """Returns the same split: a crop changes no shape."""
        del crop
        return self


def abstract_dataset(config: Config, *, classes: int = 0, examples: int = 0) -> Dataset:
    """Returns a data set with the shapes of the configured one, without any data.

    Args:
      config: validated settings.
      classes: number of classes, if the data set does not define it; 0: not given.
      examples: number of training images, if the data set does not define it; 0: not given.

    Raises:
      UserError: if a number is neither defined nor given, or given and defined otherwise.
    """
    data, part = config.data, DATASETS.get(config.data.name)
    classes, examples = part.known_count("classes", classes), part.known_count("examples", examples)
    train = examples - data.holdout
    if train < 1:
        raise UserError(
            f"config.data.holdout = {data.holdout}: must be less than the number of training "
            f"images, {examples:,}"
        )
    # An evaluation of unknown size is compiled for a full batch.
    evaluated = data.holdout or part.examples.get(part.eval_split, config.evaluation.batch_size)
    eval_split = HOLDOUT if data.holdout else data.eval_split or part.eval_split or "validation"
    train_split = data.train_split or part.train_split
    names = {view.split for view in configs.views(config).values()} - {"train", "eval"}

    def split(count: int) -> Split:
        return _ShapesOnly(np.broadcast_to(np.int32(0), (count,)), data.image_size)

    others = {name: split(part.examples.get(name, evaluated)) for name in names}
    return Dataset(
        name=part.name,
        version=part.version,
        image_size=data.image_size,
        class_names=tuple(part.class_names) or arrays.numbered_names(classes),
        # Constants of the program, whose values change nothing else.
        mean=np.array(part.mean or (0.5, 0.5, 0.5), np.float32),
        std=np.array(part.std or (0.25, 0.25, 0.25), np.float32),
        splits=others | {train_split: split(train), eval_split: split(evaluated)},
        train_split=train_split,
        eval_split=eval_split,
        eval_crop=data.eval_crop_pct,
    )


def assemble(
    config: Config,
    target: Target,
    *,
    classes: int = 0,
    examples: int = 0,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    log: Log = lambda line: None,
) -> Run:
    """Builds a run on the devices of a target, which can be compiled but not started.

    Args:
      config: settings.
      target: the devices.
      classes, examples: as for `abstract_dataset`.
      model, optimizer: used in place of the configured ones, as in `api.assemble`.
      log: called with lines about settings.

    Raises:
      UserError: if a setting is invalid, the compiler is not installed, or the devices cannot share
        the batch.
    """
    configs.validate(config)
    mesh = targets.make_mesh(target)
    dataset = abstract_dataset(config, classes=classes, examples=examples)
    return runs.assemble(copy.deepcopy(config), dataset, model, optimizer, mesh=mesh, log=log)


def compile_run(this: Run, target: Target, log: Log = lambda line: None) -> Iterator[Program]:
    """Compiles the training step of a run for each image size, and its evaluation.

    Args:
      this: the run, from `assemble`.
      target: its devices.
      log: called with a line before each compilation.

    Yields:
      The programs, the largest training step first.

    Raises:
      OutOfMemory: if a program does not fit into the memory of a device.
      RunError: if the compiler fails.
    """
    state = states.abstract_state(this)
    for size in sorted(set(this.train_image_sizes(0)), reverse=True):
        yield compile_train_step(this, target, size, log)
    variables = state.eval_variables()
    resident = _bytes(state) - _bytes(variables)
    lowered = Evaluator(this).lower(variables)
    for size, forward in lowered.forward.items():
        yield _compile(
            forward,
            target,
            this.config,
            purpose="evaluate",
            image_size=size,
            batch_size=forward.out_info.shape[0],
            resident=resident,
            log=log,
        )


def compile_train_step(
    this: Run, target: Target, image_size: int, log: Log = lambda line: None
) -> Program:
    """Compiles the training step of a run for an image size; raises as `compile_run` does."""
    return _compile(
        steps.lower_train_step(this, states.abstract_state(this), image_size),
        target,
        this.config,
        purpose="train",
        image_size=image_size,
        batch_size=this.config.train.batch_size,
        resident=0,
        log=log,
    )


def largest_batch(
    assemble_for: Callable[[int], Run], target: Target, start: int, log: Log = lambda line: None
) -> int:
    """Returns the largest batch size whose training step fits into the memory of the devices.

    Args:
      assemble_for: returns the run with a batch size, a multiple of `start`'s unit.
      target: its devices.
      start: the batch size to begin with.
      log: called with a line before each compilation.

    Returns:
      The batch size, or 0 if not even the smallest one fits.
    """
    first = assemble_for(start)
    parts, group = first.config.train.grad_accum_steps, first.config.model.norm_group_size
    unit = parts * math.lcm(target.devices, group or 1)

    def fits(units: int) -> bool:
        this = assemble_for(units * unit)
        try:
            compile_train_step(this, target, max(this.train_image_sizes(0)), log)
        except OutOfMemory as error:
            log(str(error))
            return False
        return True

    return unit * bisect_largest(fits, start // unit, len(first.dataset.train) // unit)


def bisect_largest(fits: Callable[[int], bool], start: int, most: int) -> int:
    """Returns about the largest number that fits, where all smaller ones fit as well.

    Doubles or halves the number until it is known to a factor of two, then bisects to an eighth.

    >>> bisect_largest(lambda number: number <= 1000, start=64, most=10_000)
    960

    Args:
      fits: whether a number fits; called once for each number tried.
      start: the first number tried, at least 1.
      most: the largest number of interest, at least `start`.

    Returns:
      The number, or 0 if not even 1 fits.
    """
    below = start
    while below and not fits(below):
        below //= 2
    if not below:
        return 0
    if below == start:
        while 2 * below <= most and fits(2 * below):
            below *= 2
    above, grain = min(2 * below, most + 1), max(1, below // 8)
    while above - below > grain:
        middle = below + max(1, (above - below) // grain // 2) * grain
        if fits(middle):
            below = middle
        else:
            above = middle
    return below


def _compile(
    lowered: jax.stages.Lowered,
    target: Target,
    config: Config,
    *,
    purpose: str,
    image_size: int,
    batch_size: int,
    resident: int,
    log: Log,
) -> Program:
    name = _name(purpose, image_size, batch_size)
    log(f"{name}: compiling for {target.name}")
    start = time.monotonic()
    try:
        with without_cache():
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        what = f"{name}, {target.name}"
        if not _OUT_OF_MEMORY.search(str(error)):
            raise _compiler_fault(what, target, error) from error
        amounts = _AMOUNTS.search(str(error))
        raise _out_of_memory(
            what, config, purpose, *filter(None, amounts.groups() if amounts else ())
        ) from error
    seconds = time.monotonic() - start
    log(f"{name}: compiled in {seconds:.0f} s")
    program = describe(
        compiled,
        purpose=purpose,
        image_size=image_size,
        batch_size=batch_size,
        compile_seconds=seconds,
        resident=resident,
    )
    usable = target.chip.memory * target.chip.usable
    if program.memory.peak > usable:
        what = f"{name}, {target.name}"
        raise _out_of_memory(what, config, purpose, _size(program.memory.peak), _size(usable))
    return program


def describe(
    compiled: jax.stages.Compiled,
    *,
    purpose: str,
    image_size: int,
    batch_size: int,
    compile_seconds: float,
    resident: int = 0,
) -> Program:
    """Returns what a compiled program needs and does; for the arguments, see `Program`."""
    size: Any = compiled.memory_analysis()
    counted = cast(dict[str, float] | None, compiled.cost_analysis()) or {}
    return Program(
        purpose=purpose,
        image_size=image_size,
        batch_size=batch_size,
        compile_seconds=compile_seconds,
        code_bytes=size.generated_code_size_in_bytes,
        memory=Memory(
            arguments=size.argument_size_in_bytes,
            results=size.output_size_in_bytes,
            reused=size.alias_size_in_bytes,
            temporaries=size.temp_size_in_bytes,
            resident=resident,
        ),
        audit=audit.audit(compiled.as_text() or ""),
        compiler_flops=counted.get("flops"),
        bytes_accessed=counted.get("bytes accessed"),
    )


@contextlib.contextmanager
def without_cache() -> Iterator[None]:
    """Disables the compilation cache: JAX would write programs that it cannot read again.

    A start on a device looks for another key, which contains the version of the device's runtime
    as that reports itself (docs/compile.md).
    """
    name = "jax_enable_compilation_cache"
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(name, before)
        compilation_cache.reset_cache()


def _compiler_fault(what: str, target: Target, error: jax.errors.JaxRuntimeError) -> RunError:
    if known := advice.compiler_fault(advice.first_line(error)):
        return RunError(f"{what}: {known}")
    packages = "libtpu with its JAX" if target.chip.platform == "tpu" else "JAX"
    return RunError(
        f"{what}: the compiler failed, which is a fault of the compiler: "
        f"{advice.first_line(error)}. Try another version of {packages}, or another batch size"
    )


def _out_of_memory(
    what: str, config: Config, purpose: str, needed: str = "", usable: str = ""
) -> OutOfMemory:
    if purpose == "train":
        settings = config.train
        remedy = (
            f"reduce config.train.batch_size (currently {settings.batch_size}), or split each "
            "batch with config.train.grad_accum_steps (currently "
            f"{settings.grad_accum_steps}) = 2, 4, …"
        )
    else:
        remedy = f"reduce config.evaluation.batch_size (currently {config.evaluation.batch_size})"
    amount = f": it needs {needed} of {usable} on each device" if needed else ""
    return OutOfMemory(f"{what}: out of memory{amount}; {remedy}")


def _size(count: float) -> str:
    """Returns a number of bytes as the compilers write it."""
    return f"{count / GIB:.2f}G" if count >= GIB else f"{count / 2**20:.2f}M"


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
