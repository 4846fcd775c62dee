"""Saves checkpoints in a process of its own, which tests kill, or in several together.

    python -m tests.checkpoint_worker FOLDER STEP,STEP… [COORDINATOR COUNT INDEX]

With a coordinator, arrays are sharded over the devices of all processes.
"""

import sys

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from inception_jax.storage import buckets, paths
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.state import TrainState
from tests import saved


def sharded(state: TrainState) -> TrainState:
    """Returns a state whose large arrays are split over all devices."""
    mesh = Mesh(np.array(jax.devices()), ("data",))

    def place(array: jax.Array) -> jax.Array:
        spec = PartitionSpec("data") if array.size > 1000 else PartitionSpec()
        values = np.asarray(array)
        return jax.make_array_from_callback(
            values.shape, NamedSharding(mesh, spec), lambda index: values[index]
        )

    return jax.tree.map(place, state)


def main(folder: str, steps: str, *coordination: str) -> None:
    if coordination:
        address, count, index = coordination
        jax.distributed.initialize(address, int(count), int(index))
    buckets.set_retry_seconds(20)
    with Checkpoints(paths.user_path(folder, folder), keep_last=2) as checkpoints:
        for step in map(int, steps.split(",")):
            state = saved.state(step)
            checkpoints.save(
                sharded(state) if coordination else state,
                progress={"seconds": {"train": step}},
                metrics={"top1": 100.0 - step},  # The first is the best.
            )
            checkpoints.wait()
            print("saved", step, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
