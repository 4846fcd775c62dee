"""Validates a configuration: each setting by its declaration, then rules between settings."""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from inception_jax import registry
from inception_jax.config import durations
from inception_jax.config.fields import (
    entries,
    get,
    is_open,
    leaves,
    matches,
    type_name,
    unknown_field,
)
from inception_jax.config.schema import Config, Data
from inception_jax.errors import ConfigError, nearest
from inception_jax.storage import paths


def _problem(value: Any, hint: Any, metadata: Mapping[str, Any]) -> str:
    """Returns the problem of a single value, or ''."""
    if not matches(value, hint):
        return f"must be of type {type_name(hint)}"
    if metadata["choices"] and not metadata["registry"] and value not in metadata["choices"]:
        choices = [str(choice) for choice in metadata["choices"]]
        return f"must be one of {', '.join(choices)}.{nearest(str(value), choices)}"
    if metadata["path"] and (problem := paths.find_problem(value)):
        return problem
    if metadata["duration"]:
        return _duration_problem(value)
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
                return f"must be {words} {metadata[bound]:.10g}"
    return ""


def _duration_problem(value: str | tuple[str, ...]) -> str:
    """Returns the problem of a duration or of a tuple of durations, or ''."""
    for each in value if isinstance(value, tuple) else (value,):
        try:
            durations.parse_duration(each)
        except ConfigError as error:
            return str(error)
    return ""


def _boundary_problem(boundaries: tuple[str, ...]) -> str:
    """Returns the problem of durations that must increase from one to the next, or ''."""
    parsed = [durations.parse_duration(each) for each in boundaries]
    amounts = [each.amount for each in parsed if each]
    if len(amounts) < len(parsed) or amounts != sorted(set(amounts)):
        return "must increase from one to the next"
    if len({each.unit for each in parsed if each}) > 1:
        return "must all have the same unit"
    return ""


def _contradictions(config: Config) -> Iterator[str]:
    """Yields contradictions between settings that are each valid on their own."""
    for path in ("train.duration", "evaluation.every", "checkpoint.every", "log.every"):
        duration = get(config, path)
        if durations.parse_duration(duration) is None and not is_open(config, path):
            yield f"config.{path} = {duration!r}: must be a duration such as {durations.EXAMPLE}"
    for path in ("schedule.boundaries", "train.image_size_boundaries"):
        if problem := _boundary_problem(get(config, path)):
            yield f"config.{path} = {get(config, path)}: {problem}"
    if config.augment.crop == "pad" and config.augment.pad >= config.data.image_size:
        yield (
            f"config.augment.pad = {config.augment.pad}: must be less than data.image_size = "
            f"{config.data.image_size}"
        )
    if config.augment.alternating_flip and not config.augment.flip:
        yield (
            "config.augment.alternating_flip = True: needs config.augment.flip; set it to True, or "
            "this to False"
        )
    if config.init.whiten and config.init.pretrained:
        yield (
            "config.init.whiten = True: must be False with config.init.pretrained, a file that "
            "has the first convolution's kernel"
        )
    if config.init.identity_convs and config.init.pretrained:
        yield (
            "config.init.identity_convs = True: must be False with config.init.pretrained, a file "
            "that has these convolutions' kernels"
        )
    if config.init.whiten and config.optimizer.sam_rho:
        yield (
            f"config.optimizer.sam_rho = {config.optimizer.sam_rho:g}: must be 0 with "
            "config.init.whiten, whose filters it would change"
        )
    if durations.parse_duration(config.init.whiten_bias) and not config.init.whiten:
        yield (
            f"config.init.whiten_bias = {config.init.whiten_bias!r}: needs config.init.whiten; set "
            "it to True, or leave this empty"
        )
    if config.data.storage != "records":
        # Decoded storage keeps the full center square at the model's image size.
        if config.augment.crop == "inception":
            yield (
                f"config.augment.crop = 'inception': needs the original images, which "
                f"config.data.storage = {config.data.storage!r} does not keep; set data.storage to "
                "'records', or augment.crop to 'resized'"
            )
        if config.data.eval_crop_pct != 1:
            yield (
                f"config.data.eval_crop_pct = {config.data.eval_crop_pct:g}: must be 1 with "
                f"config.data.storage = {config.data.storage!r}; set data.storage to 'records' for "
                "a smaller crop"
            )
    sizes, begins = config.train.image_sizes, config.train.image_size_boundaries
    if len(begins) != max(len(sizes) - 1, 0):
        yield (
            f"config.train.image_size_boundaries = {begins}: must have one entry for each of "
            f"train.image_sizes = {sizes} except the first"
        )
    length, last = (
        durations.parse_duration(config.train.duration),
        durations.parse_duration(begins[-1] if begins else ""),
    )
    if length and last and last.unit == length.unit and last.amount >= length.amount:
        yield (
            f"config.train.image_size_boundaries = {begins}: the last size would never be used, "
            f"because the run ends at config.train.duration = {config.train.duration!r}; use an "
            "earlier boundary, or remove it and its size"
        )
    group, batch, parts = (
        config.model.norm_group_size,
        config.train.batch_size,
        config.train.grad_accum_steps,
    )
    # A batch that the micro-batches cannot share is another problem, which needs the devices.
    if group and batch % parts == 0 and batch // parts % group:
        images = f"{batch // parts} images of a batch"
        if parts > 1:
            images = f"{batch // parts} images of a micro-batch (batch_size / grad_accum_steps)"
        yield (
            f"config.model.norm_group_size = {group}: must divide the {images}; set it to "
            f"{' or '.join(_nearest_divisors(batch // parts, group))}"
        )
    optimizer = config.optimizer.name
    known = [part.name for part in registry.OPTIMIZERS if part.auto_rate]
    if is_open(config, "schedule.learning_rate") and optimizer not in known:
        yield (
            "config.schedule.learning_rate = 0: config.train.auto_size chooses a learning rate for "
            f"{' and '.join(known)} only, not for {optimizer!r}; set one (tools.find_lr suggests "
            "one)"
        )
    for path, off in (
        ("optimizer.norm_bias_lr_ratio", 1),
        ("model.norm_group_size", 0),
        ("evaluation.norm_examples", 0),
    ):
        if (value := get(config, path)) != off and config.model.norm != "batch":
            yield (
                f"config.{path} = {value:g}: must be {off} with config.model.norm = "
                f"{config.model.norm!r}, which has no BatchNorm"
            )
    if "top1" not in config.evaluation.metrics:
        yield (
            f"config.evaluation.metrics = {config.evaluation.metrics}: must contain 'top1', which "
            "selects the best checkpoint; add it"
        )
    for name, short in (("flip", "flip_tta"), ("train_eval", "train_eval_examples")):
        if name in config.evaluations and (value := get(config, f"evaluation.{short}")):
            yield (
                f"config.evaluation.{short} = {value}: defines an evaluation named {name!r}, as "
                f"config.evaluations.{name} does; rename that one, or turn this off"
            )
    for name, view in config.evaluations.items():
        if not re.fullmatch(r"[A-Za-z]\w*", name) or name == "train":
            yield (
                f"config.evaluations.{name}: invalid name for an evaluation; use letters, digits "
                "and _, starting with a letter, other than 'train'"
            )
        if view.crop not in (0, 1) and config.data.storage != "records":
            yield (
                f"config.evaluations.{name}.crop = {view.crop:g}: must be 0 or 1 with "
                f"config.data.storage = {config.data.storage!r}; set data.storage to 'records' for "
                "a smaller crop"
            )
        if view.shift_tta >= config.data.image_size:
            yield (
                f"config.evaluations.{name}.shift_tta = {view.shift_tta}: must be less than "
                f"config.data.image_size = {config.data.image_size}"
            )
    if config.expected.top1 and not config.expected.source:
        yield (
            f"config.expected.top1 = {config.expected.top1:g}: needs a source; set "
            "config.expected.source to where the figure comes from, or top1 to 0"
        )
    # Parts of which a configuration names exactly one.
    for registered in (registry.MODELS, registry.OPTIMIZERS, registry.SCHEDULES):
        name = get(config, registered.setting)
        # A resumed run may name a part that no longer exists.
        if name in registered and (check := registered.get(name).check) is not None:
            yield from check(config)


def _nearest_divisors(number: int, near: int) -> list[str]:
    """Returns the largest divisor of a number below another one, and the smallest above it."""
    divisors = [each for each in range(1, number + 1) if number % each == 0]
    below, above = [each for each in divisors if each < near], [e for e in divisors if e > near]
    return [str(each) for each in (*below[-1:], *above[:1])]


def _unused_settings(config: Config) -> Iterator[str]:
    """Yields settings that were changed although the chosen part does not read them."""
    # Not for schedules: a run may switch from one to another and back.
    for known in (registry.MODELS, registry.OPTIMIZERS):
        name, group = get(config, known.setting), known.setting.partition(".")[0]
        if name not in known or (read := known.get(name).settings) is None:
            continue
        for field in dataclasses.fields(get(config, group)):
            path = f"{group}.{field.name}"
            value, default = get(config, path), get(Config(), path)
            if field.name in ("name", "options", *known.common, *read) or value == default:
                continue
            readers = [repr(part.name) for part in known if field.name in (part.settings or ())]
            yield (
                f"config.{path} = {value!r}: not used by {name!r} (only by {', '.join(readers)}); "
                f"leave it at {default!r}"
            )


def validate(config: Config, *, recorded: Config | None = None) -> list[str]:
    """Validates a configuration.

    Args:
      config: the settings.
      recorded: for a resumed run, its recorded settings, which an older version may have accepted;
        None = the run is new.

    Returns:
      Log lines for problems that both configurations have.

    Raises:
      ConfigError: naming every invalid setting, its value and what is allowed.
    """
    unknown = [
        f"config.{path} = {name!r}: {known.unknown_message(name)}"
        for path, known, name in named_parts(config)
        if name not in known
    ]
    if unknown and recorded is not None:
        raise ConfigError("\n".join(unknown))
    tolerated: list[str] = []
    # In this order, because values of the wrong type would break the comparisons between settings.
    for check in (_field_problems, _part_problems, _contradictions):
        problems = list(check(config))
        before = [] if recorded is None or not problems else list(check(recorded))
        if new := [problem for problem in problems if problem not in before]:
            raise ConfigError("\n".join(new))
        tolerated += problems
    return tolerated


def _field_problems(config: Config) -> Iterator[str]:
    """Yields the problems of each setting on its own, and attributes that are not settings."""
    yield from (unknown_field(path) for path in _unknown_attributes(config))
    for path, hint, field in leaves():
        value = get(config, path)
        if is_open(config, path):
            continue
        if problem := _problem(value, hint, field.metadata):
            yield f"config.{path} = {value!r}: {problem}"
    for path, hint, field in entries(config):
        if problem := _problem(value := get(config, path), hint, field.metadata):
            yield f"config.{path} = {value!r}: {problem}"
    for path, known, name in named_parts(config):
        if name not in known:
            yield f"config.{path} = {name!r}: {known.unknown_message(name)}"


def named_parts(config: Config) -> Iterator[tuple[str, registry.Registry[Any], str]]:
    """Yields (dotted path, registry, name) of every registered part that the settings name."""
    for path, _, field in leaves():
        if kind := field.metadata["registry"]:
            value = get(config, path)
            for name in value if isinstance(value, tuple) else (value,):
                if name not in field.metadata["choices"]:
                    yield path, registry.REGISTRIES[kind], name


def _part_problems(config: Config) -> Iterator[str]:
    """Yields problems of settings and options with the parts that the settings name."""
    parts: dict[str, list[registry.Part]] = {
        path.partition(".")[0]: [] for path, _, _ in leaves() if path.endswith(".options")
    }
    for path, known, name in named_parts(config):
        if name in known:
            parts[path.partition(".")[0]].append(known.get(name))
    yield from _unused_settings(config)
    for group, named in parts.items():
        options = get(config, f"{group}.options")
        yield from registry.option_problems(named, options, f"{group}.options")
    if config.data.name in registry.DATASETS:
        yield from registry.DATASETS.get(config.data.name).problems(config.data, Data())


def _unknown_attributes(group: Any, prefix: str = "") -> Iterator[str]:
    """Yields the paths of attributes that a program set on a group and that are not settings."""
    fields = {field.name for field in dataclasses.fields(group)}
    for name, value in vars(group).items():
        if name not in fields:
            yield f"{prefix}{name}"
        elif dataclasses.is_dataclass(value):
            yield from _unknown_attributes(value, f"{prefix}{name}.")
        elif isinstance(value, dict):
            for entry, group in value.items():
                if dataclasses.is_dataclass(group):
                    yield from _unknown_attributes(group, f"{prefix}{name}.{entry}.")
