"""Describes a run's compiled programs, as a record for JSON and as text."""

import copy
import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import optax

from inception_jax.config import Config
from inception_jax.programs import audit, projection
from inception_jax.programs import compile as programs
from inception_jax.programs.compile import Program
from inception_jax.programs.targets import GIB, Target
from inception_jax.runtime import environment
from inception_jax.training.run import Run

_PACKAGES = {
    "tpu": ("jax", "jaxlib", "flax", "libtpu"),
    "cuda": ("jax", "jaxlib", "flax", "jax-cuda12-plugin", "jax-cuda13-plugin"),
}
# Rows of a table in the text; the record has all of them.
_ROWS = 12


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a run's programs; `print` shows it.

    Attributes:
      record: JSON values: date, revision, versions, config, target, programs, recipe (estimates for
        the whole run) and largest_batch (None: not looked for). Durations are in seconds unless
        their name says otherwise, and estimated, except compile_seconds.
    """

    record: dict[str, Any]

    def __str__(self) -> str:
        lines = [*_head(self.record), ""]
        for program in self.record["programs"]:
            lines += [*_program(program, self.record["target"]), ""]
        return "\n".join([*lines, *_tail(self.record)])


def compile_for(
    config: Config,
    target: Target,
    *,
    classes: int = 0,
    examples: int = 0,
    model: nn.Module | None = None,
    optimizer: optax.GradientTransformation | None = None,
    largest_batch: bool = False,
    log: Callable[[str], None] = print,
) -> Report:
    """Compiles the programs of a run for a target.

    Args:
      config: settings.
      target: the devices.
      classes, examples: numbers of classes and of training images, if the data set does not define
        them.
      model, optimizer: used in place of the configured ones, as in `api.assemble`.
      largest_batch: whether to look for the largest batch that fits, too.
      log: called with a line about each compilation, and about settings.

    Raises:
      UserError: if a setting is invalid, the compiler is not installed, the devices cannot share
        the batch, or a program does not fit into their memory.
      RunError: if the compiler fails.
    """

    def assemble(batch_size: int, log: Callable[[str], None]) -> Run:
        changed = copy.deepcopy(config)
        changed.train.batch_size = batch_size
        return programs.assemble(
            changed,
            target,
            classes=classes,
            examples=examples,
            model=model,
            optimizer=optimizer,
            log=log,
        )

    this = assemble(config.train.batch_size, log)
    largest = None
    if largest_batch:
        start = this.config.train.batch_size
        largest = programs.largest_batch(
            lambda size: assemble(size, lambda line: None), target, start, log
        )
        log(f"largest batch that fits: {largest:,}")
    return _report(this, target, list(programs.compile_run(this, target, log)), largest)


def _report(
    this: Run, target: Target, programs: list[Program], largest_batch: int | None
) -> Report:
    config, recipe = this.config, projection.recipe(this, programs, target)
    return Report(
        {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "revision": environment.revision(),
            "versions": {"python": platform.python_version(), **versions(target)},
            "config": config.name,
            "model": this.model_name,
            "dtype": config.model.dtype,
            "batch_size": config.train.batch_size,
            "training_images": len(this.dataset.train),
            "steps": this.total_steps,
            "target": _target_record(target),
            "programs": [program_record(each, target) for each in programs],
            "recipe": dataclasses.asdict(recipe),
            "largest_batch": largest_batch,
        }
    )


def versions(target: Target) -> dict[str, str]:
    """Returns the versions of the installed packages that compile for a target, by name."""
    found = {}
    for name in _PACKAGES[target.chip.platform]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _target_record(target: Target) -> dict[str, Any]:
    record = dataclasses.asdict(target)
    # A long text, which the name of the chip stands for.
    record["options"].pop("target_config", None)
    return record


def program_record(program: Program, target: Target) -> dict[str, Any]:
    """Returns the figures of a program as JSON values (see `Report.record`)."""
    found, times = program.audit, projection.times(program, target)
    return {
        "name": program.name,
        "purpose": program.purpose,
        "image_size": program.image_size,
        "batch_size": program.batch_size,
        "compile_seconds": round(program.compile_seconds, 1),
        "code_bytes": program.code_bytes,
        "memory": dataclasses.asdict(program.memory) | {"peak": program.memory.peak},
        "flops": found.flops,
        "compiler_flops": program.compiler_flops,
        "bytes": found.bytes,
        "bytes_accessed": program.bytes_accessed,
        "cycles": found.cycles,
        "operations": sum(each.times for each in found.operations),
        "operations_without_estimate": sum(
            each.times for each in found.operations if each.cycles is None and each.bytes
        ),
        "counts": found.counts,
        "collectives": {
            name: {"count": count, "bytes": size}
            for name, (count, size) in found.collectives.items()
        },
        "convolutions": found.convolutions,
        "state_bytes": found.state_bytes,
        "donated_bytes": found.donated_bytes,
        "host_transfers": found.host_transfers,
        "dynamic_shapes": found.dynamic_shapes,
        "seconds": {
            "products": times.products,
            "memory": times.memory,
            "between_devices": times.between_devices,
            "roofline": times.roofline,
            "compiler": times.compiler,
            "fastest": times.fastest,
            "slowest": times.slowest,
        },
        **audit.tables(found.operations, times.operations),
    }


def _head(record: dict[str, Any]) -> list[str]:
    target = record["target"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [
        f"{record['config']} ({record['model']}, {record['dtype']}) on {target['name']}: "
        f"{target['devices']} × {target['chip']['name']}",
        versions,
        "Figures are per device. Nothing was run: times are estimates.",
    ]


def _program(program: dict[str, Any], target: dict[str, Any]) -> list[str]:
    memory, seconds = program["memory"], program["seconds"]
    usable = target["chip"]["memory"] * target["chip"]["usable"]
    code = f", {_size(program['code_bytes'])} of code" if program["code_bytes"] else ""
    intensity = program["flops"] / program["bytes"] if program["bytes"] else 0.0
    parts = [f"memory traffic {_ms(seconds['memory'])}"]
    if seconds["products"] is not None:
        parts.insert(0, f"products {_ms(seconds['products'])}")
    if seconds["between_devices"]:
        parts.append(f"between devices {_ms(seconds['between_devices'])}")
    accessed = program["bytes_accessed"]
    counted = f" ({_size(accessed)} in all memories)" if accessed else ""
    estimate = f"{_ms(seconds['fastest'])} to {_ms(seconds['slowest'])}"
    if program["cycles"]:
        estimate += f" (the compiler estimates {program['cycles'] / 1e6:,.1f} M cycles)"
    lines = [
        program["name"],
        f"  compiled  in {program['compile_seconds']:.0f} s{code}",
        f"  memory    fits: {memory['peak'] / GIB:.2f} of {usable / GIB:.2f} GiB",
        f"  work      {program['flops'] / 1e9:,.1f} GFLOP, {_size(program['bytes'])} to and from "
        f"memory{counted}, {intensity:.0f} FLOP/byte, {program['operations']:,} operations",
        f"  roofline  at least {_ms(seconds['roofline'])}: {', '.join(parts)}",
        f"  estimate  {estimate}",
    ]
    if collectives := program["collectives"]:
        found = [
            f"{each['count']} {name} ({_size(each['bytes'])})" for name, each in collectives.items()
        ]
        lines.append(f"  network   {', '.join(found)}")
    for table, title in (("by_kind", "kind"), ("by_module", "module")):
        lines += _table(program[table], title)
    return lines


def _table(rows: list[dict[str, Any]], title: str) -> list[str]:
    """Returns the longest rows of a table as lines of text, in columns."""
    total = sum(row["seconds"] for row in rows) or 1.0
    has_cycles = any(row["cycles"] for row in rows)

    def line(name: str, *values: str) -> str:
        *first, cycles, size, operations = values
        columns = [*first, *([cycles] if has_cycles else []), size, operations]
        return f"    {name:<28}" + "".join(f"{value:>12}" for value in columns)

    lines = [line(title, "share", "ms", "M cycles", "MB", "operations")]
    for row in rows[:_ROWS]:
        lines.append(
            line(
                row["name"],
                f"{row['seconds'] / total:.1%}",
                f"{1e3 * row['seconds']:.3f}",
                f"{row['cycles'] / 1e6:.3f}",
                f"{row['bytes'] / 1e6:,.1f}",
                f"{row['operations']:,}",
            )
        )
    if rest := rows[_ROWS:]:
        share = sum(row["seconds"] for row in rest) / total
        lines.append(f"    {f'{len(rest)} more':<28}{share:>12.1%}")
    return lines


def _tail(record: dict[str, Any]) -> list[str]:
    recipe = record["recipe"]
    slow, fast = recipe["images_per_second"]
    low, high = recipe["minutes"]
    # A small data set takes less than a tenth of a minute.
    duration = (
        f"{low:,.1f} to {high:,.1f} min" if high >= 1 else f"{60 * low:.2g} to {60 * high:.2g} s"
    )
    lines = [
        f"estimate  {slow:,.0f} to {fast:,.0f} images/s in training; {duration} for all "
        f"{record['steps']:,} steps with their evaluations, if input keeps up"
    ]
    if record["largest_batch"] is not None:
        lines.append(f"largest batch that fits: {record['largest_batch']:,}")
    return lines


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
