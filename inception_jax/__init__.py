"""inception_jax: training the GoogLeNet family (Inception v1) with JAX and Flax.

The package exports the functions of `inception_jax.api` and those that register custom parts::

    import inception_jax as ij

They are imported on first use, so that commands start fast and an experiment file can register a
part without importing JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inception_jax.api import (
        Predictor,
        assemble,
        compile_for,
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

_REGISTRARS = (
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
    "compile_for",
    "create_state",
    "evaluate",
    "load_config",
    "load_dataset",
    "load_model",
    "load_weights",
    "make_train_step",
    "train",
    "train_batches",
    *_REGISTRARS,
]


def __getattr__(name: str) -> Any:
    """Imports an exported name on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "registry" if name in _REGISTRARS else "api"
    if name == "load_config":
        module = "experiment"
    return getattr(importlib.import_module(f"inception_jax.{module}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
