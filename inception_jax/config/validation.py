"""Checks a whole configuration: each field by its declaration, then the rules between fields."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from inception_jax import registry
from inception_jax.config.fields import get, is_open, leaves, matches, type_name, unknown_field
from inception_jax.config.schema import Config, Data
from inception_jax.errors import ConfigError, nearest
from inception_jax.storage import paths


def _problem(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str:
    """Returns what is wrong with one value, or ''."""
    if not matches(value, hint):
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
    problems = problems or list(_part_problems(config))
    problems = problems or list(_contradictions(config))
    if problems:
        raise ConfigError("\n".join(problems))


def _part_problems(config: Config) -> Iterator[str]:
    """Yields what is wrong with the names of registered parts, and with their options."""
    parts: dict[str, list[registry.Part]] = {}
    for path, _, field in leaves():
        group = path.partition(".")[0]
        if path.endswith(".options"):
            parts.setdefault(group, [])
        if not (kind := field.metadata["registry"]):
            continue
        value, known = get(config, path), registry.REGISTRIES[kind]
        for name in value if isinstance(value, tuple) else (value,):
            if name in known:
                parts.setdefault(group, []).append(known.get(name))
            else:
                yield f"config.{path} = {value!r}: {known.unknown(name)}"
    for group, found in parts.items():
        options = get(config, f"{group}.options")
        yield from registry.option_problems(found, options, f"{group}.options")
    if config.data.name in registry.DATASETS:
        yield from registry.DATASETS.get(config.data.name).problems(config.data, Data())


def _strangers(group: Any, prefix: str = "") -> Iterator[str]:
    """Yields the paths of what a program assigned to a group that is no setting of it."""
    fields = {field.name for field in dataclasses.fields(group)}
    for name, value in vars(group).items():
        if name not in fields:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(value):
            yield from _strangers(value, f"{prefix}{name}.")
