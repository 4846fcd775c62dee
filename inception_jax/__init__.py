"""inception_jax: training the GoogLeNet family (Inception v1) with JAX and Flax.

The names of `inception_jax.api` are here too, for notebooks: `inception_jax.load_config(...)`. They
are imported when they are first used, so that a command's start does not wait for all of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inception_jax.api import (
        Predictor,
        evaluate,
        load_config,
        load_dataset,
        load_model,
        load_weights,
    )

from inception_jax.version import __version__ as __version__

__all__ = [
    "Predictor",
    "evaluate",
    "load_config",
    "load_dataset",
    "load_model",
    "load_weights",
]


def __getattr__(name: str) -> Any:
    """Returns a name of `inception_jax.api` (PEP 562)."""
    if name in __all__:
        return getattr(importlib.import_module("inception_jax.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
