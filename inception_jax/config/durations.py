"""Durations of training, each a single string: '20 epochs', '500 steps' or '1e6 examples'."""

import dataclasses
import functools
import re

from inception_jax.errors import ConfigError

UNITS = ("epochs", "steps", "examples")
# Timelines count in fractions of an epoch with denominators of at most a million.
MIN_EPOCHS = 1e-6
EXAMPLE = "'20 epochs', '500 steps' or '1e6 examples'"
_PATTERN = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([a-zA-Z]+)")


@dataclasses.dataclass(frozen=True)
class Duration:
    """A positive length of training.

    Attributes:
      amount: whole for steps and examples.
      unit: "epochs" (passes over the training split), "steps" (optimizer updates) or "examples".
    """

    amount: float
    unit: str

    def __str__(self) -> str:
        amount = int(self.amount) if self.amount == int(self.amount) else self.amount
        return f"{amount} {self.unit.removesuffix('s') if amount == 1 else self.unit}"


@functools.cache
def parse_duration(text: str) -> Duration | None:
    """Returns the duration that a setting holds, or None where it is unset ('' or an amount of 0).

    Args:
      text: an amount and a unit, with or without a space between them: "2.5 epochs", "100steps".

    Raises:
      ConfigError: if it is not a duration; the message does not repeat the text.

    >>> parse_duration("2.5 epochs")
    Duration(amount=2.5, unit='epochs')
    >>> str(parse_duration("1e6examples"))
    '1000000 examples'
    """
    text = text.strip()
    if not text:
        return None
    match = _PATTERN.fullmatch(text)
    unit = match and match[2].lower().removesuffix("s") + "s"
    if match is None or unit not in UNITS:
        unitless = re.fullmatch(r"[-+.\deE]+", text)
        raise ConfigError(
            f"must be a duration such as {EXAMPLE}"
            + (f"; the unit is missing, as in '{text} epochs'" if unitless else "")
        )
    amount = float(match[1])
    if amount < 0:
        raise ConfigError("must not be negative")
    if amount == float("inf"):
        raise ConfigError("must be finite")
    if unit == "epochs" and 0 < amount < MIN_EPOCHS:
        raise ConfigError(f"must be at least {MIN_EPOCHS} epochs")
    if unit != "epochs":
        if amount != int(amount):
            raise ConfigError(f"must be a whole number of {unit}")
        amount = int(amount)
    return Duration(amount, unit) if amount else None


def same(first: str, second: str) -> bool:
    """Whether two durations are equal however they are written: '1 epoch' and '1.0epochs' are."""
    try:
        return parse_duration(first) == parse_duration(second)
    except ConfigError:
        return first == second
