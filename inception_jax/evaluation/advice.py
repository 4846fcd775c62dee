"""Advice on one setting, and what earlier diagnoses advised: of this run and of those beside it.

A run's folder keeps its diagnosis, so the next one can know what the user was told. Usually advice
is followed in a new workdir; runs that differ in a few settings only and lie in the same folder are
taken for tries at the same thing.
"""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import UserError
from inception_jax.training import workdir
from inception_jax.training.workdir import Workdir

NAME = "diagnosis.json"

# Runs that differ in more settings than that are not tries at the same thing.
_MOST_DIFFERENCES = 3
# Settings that do not bear on what is learned.
_IRRELEVANT = ("name", "seed", "data.source", "data.directory", "data.storage", "data.workers")
_IRRELEVANT_GROUPS = ("log.", "checkpoint.", "watch.", "expected.", "evaluation.")

# A loss higher than the earlier one by this share is worse, not noise.
_WORSE = 0.02


@dataclasses.dataclass(frozen=True)
class Advice:
    """A setting to change, alone.

    Attributes:
      setting: dotted path in the configuration.
      before: its value in the run that was diagnosed.
      value: to give it.
      reason: what that would do.
    """

    setting: str
    before: Any
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"--config.{self.setting}={self.value} (now {self.before}): {self.reason}"


@dataclasses.dataclass(frozen=True)
class Earlier:
    """Advice that was given before.

    Attributes:
      run: the folder of the run it was given for.
      setting, before, value: as of `Advice`.
      loss, top1: the last validation loss (nats) and accuracy (percent) of that run then; None
        where they were not recorded.
    """

    run: str
    setting: str
    before: Any
    value: Any
    loss: float | None
    top1: float | None

    def __str__(self) -> str:
        return f"{self.setting} from {self.before} to {self.value} ({self.run})"


def objection(advice: Advice, earlier: Iterable[Earlier], *, loss: float) -> str:
    """Returns why advice must not be given after earlier advice, or ''.

    Args:
      advice: what would be advised.
      earlier: what was advised before.
      loss: the last validation loss of the run that the advice is for, nats.
    """
    for before in earlier:
        if before.setting != advice.setting:
            continue
        if _is_against(advice, before):
            return f"an earlier diagnosis advised {before}, so this one does not advise against it"
        if before.value == advice.before and before.loss and loss > (1 + _WORSE) * before.loss:
            return (
                f"an earlier diagnosis advised {before}, and the validation loss rose from "
                f"{before.loss:.4g} to {loss:.4g}: {before.run} has the better value"
            )
    return ""


def _is_against(advice: Advice, before: Earlier) -> bool:
    """Whether advice leads back over what was advised."""
    values = (advice.before, advice.value, before.before, before.value)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return advice.value == before.before
    if before.value > before.before:
        return advice.value < advice.before and advice.value < before.value
    return advice.value > advice.before and advice.value > before.value


def read_earlier(folder: pathlib.Path, config: Config, dataset: Mapping[str, Any]) -> list[Earlier]:
    """Returns what was advised before, for a run and for the runs beside its folder.

    Args:
      folder: of the run.
      config: its settings.
      dataset: what its config.json says of its data set.
    """
    found = stored_earlier(folder)
    for path in sorted(folder.resolve().parent.glob(f"*/{NAME}")):
        try:
            record = workdir.recorded(Workdir(path.parent))
        except UserError:
            continue
        if path.parent == folder.resolve() or not record or record.get("dataset") != dataset:
            continue
        settings = configs.from_dict(record["config"])
        if _differences(settings, config) <= _MOST_DIFFERENCES:
            found += _given(path.parent, settings)
    return [each for n, each in enumerate(found) if each not in found[:n]]


def stored_earlier(folder: pathlib.Path) -> list[Earlier]:
    """Returns what a run's own diagnosis.json says was advised, by it and before it."""
    values = _read(folder)
    try:
        earlier = [Earlier(**each) for each in values.get("earlier", ())]
    except TypeError:
        earlier = []
    return earlier + _given(folder.resolve(), None)


def _given(folder: pathlib.Path, config: Config | None) -> list[Earlier]:
    """Returns the advice in a folder's diagnosis.json, if there is any.

    Args:
      folder: of a run.
      config: its settings, for files of older versions, which do not say what the setting was;
        None: their advice is left out.
    """
    values = _read(folder)
    evidence = values.get("evidence", {})
    # Older versions made several suggestions, the most promising first, and had other names.
    advice = values.get("advice") or next(iter(values.get("suggestions", ())), None)
    try:
        setting, value = advice["setting"], advice["value"]
        if config is not None and "before" not in advice:
            advice = advice | {"before": configs.get(config, setting)}
        top1 = evidence.get("top1", evidence.get("validation_top1"))
        return [
            Earlier(
                run=folder.name,
                setting=setting,
                before=advice["before"],
                value=value,
                loss=evidence.get("loss"),
                top1=top1,
            )
        ]
    except (KeyError, TypeError, AttributeError):
        return []


def _read(folder: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / NAME).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _differences(one: Config, other: Config) -> int:
    """Returns in how many settings that bear on learning two configurations differ."""
    return sum(
        configs.get(one, path) != configs.get(other, path)
        for path, _, _ in configs.leaves()
        if path not in _IRRELEVANT and not path.startswith(_IRRELEVANT_GROUPS)
    )
