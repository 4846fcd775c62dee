"""inception_jax: training the GoogLeNet family (Inception v1) with JAX and Flax.

The names of `inception_jax.api` are here too, and the doors for parts of one's own::

    import inception_jax as ij

They are imported when they are first used: a command's start does not wait for all of them, and an
experiment file that registers a part imports no JAX by that.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inception_jax.api import (
        Predictor,
        assemble,
        create_state,
        evaluate,
        load_dataset,
        load_model,
        load_weights,
        make_train_step,
        train,
        train_batches,
    )
    from inception_jax.experiment import load_config

from inception_jax.version import __version__ as __version__

_DOORS = (
    "register_augmentation",
    "register_dataset",
    "register_metric",
    "register_model",
    "register_optimizer",
    "register_schedule",
    "register_writer",
)
__all__ = [
    "Predictor",
    "assemble",
    "create_state",
    "evaluate",
    "load_config",
    "load_dataset",
    "load_model",
    "load_weights",
    "make_train_step",
    "train",
    "train_batches",
    *_DOORS,
]


def __getattr__(name: str) -> Any:
    """Returns a name of the modules that hold them (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "registry" if name in _DOORS else "experiment" if name == "load_config" else "api"
    return getattr(importlib.import_module(f"inception_jax.{home}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
