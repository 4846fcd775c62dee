"""A command for tests with several processes: trains a small network, or only adds numbers.

Has the flags of the training command that identify the process.
"""

import pathlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from inception_jax import cli, console, registry
from inception_jax.config import Schedule
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.runtime import devices, sharding
from inception_jax.storage.workdir import Workdir
from inception_jax.training import workdir
from inception_jax.training.run import Run
from tests import small

_DATA = flags.DEFINE_string(
    "data", "", "directory of the prepared digits; empty = only add numbers"
)
_WORKDIR = flags.DEFINE_string("workdir", "", "directory of the run")
_STEPS = flags.DEFINE_integer("steps", 0, "steps of the run")
_SILENCE = flags.DEFINE_float(
    "silence", 60, "seconds without a heartbeat after which a process counts as dead"
)
_FAIL = flags.DEFINE_integer("fail", -1, "index of the process that fails after a while; -1 = none")
_PROCESSES = cli.define_processes()


def macro(logits: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean accuracy over classes."""
    right = logits.argmax(axis=1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


registry.register_metric("worker_macro", over="split", percent=True)(macro)


def build(data: pathlib.Path, steps: int) -> Run:
    """Returns a run whose learning rate does not depend on its duration."""
    config = small.config(data, schedule=Schedule(name="constant", learning_rate=0.05))
    config.train.duration = f"{steps} steps"
    config.evaluation.every = config.checkpoint.every = "4 steps"
    config.log.every = "2 steps"
    config.evaluation.metrics = ("top1", "top5", "worker_macro")
    config.evaluation.flip_tta = True
    return small.build(config)


def train() -> None:
    """Trains."""
    folder = Workdir(pathlib.Path(_WORKDIR.value))
    workdir.check_writable(folder)
    workdir.check_shared(folder)
    this = build(pathlib.Path(_DATA.value), _STEPS.value)
    changed = workdir.check_compatible(workdir.load_previous_run(folder), this.config)
    small.train(this, folder, Evaluator(this), changed=changed)


def add() -> None:
    """Adds numbers over all devices repeatedly."""
    mesh = sharding.make_mesh()
    total = jax.jit(lambda x: x.sum(), out_shardings=sharding.replicated(mesh))
    ones = jax.jit(lambda: jnp.ones((mesh.size,)), out_shardings=sharding.batch_sharding(mesh))()
    for count in range(1_000_000):
        assert total(ones) == mesh.size
        if count == 20:
            print("adding", flush=True)
        if count == 50 and jax.process_index() == _FAIL.value:
            raise KeyError("a bug")
        time.sleep(0.01)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    devices.initialize(**_PROCESSES(), heartbeat_timeout=_SILENCE.value, log=console.log)
    if _DATA.value:
        train()
    else:
        add()


if __name__ == "__main__":
    cli.run(main, "")
