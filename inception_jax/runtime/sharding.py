"""How arrays lie on the devices: the state on all of them, a batch split along its first axis.

One mesh axis, `data`, over every device of every process. Its type is Auto: under the Explicit axes
that `jax.make_mesh` takes by default, a linen convolution with BatchNorm fails to type-check its
shardings. Under Auto the compiler inserts the sums between devices, so BatchNorm's statistics, the
loss and the gradients are those of the global batch.
"""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from inception_jax.errors import ConfigError


def make_mesh() -> Mesh:
    """Returns the mesh of all devices of all processes, with the one axis `data`.

    Not jax.make_mesh: on some TPU slices it orders the devices as a ring through all hosts, and a
    process's rows of a batch would not be neighbours. Sums over all devices do not depend on it.
    """
    devices = np.array(in_process_order(jax.devices()))
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def in_process_order(devices: Iterable[jax.Device]) -> list[jax.Device]:
    """Returns devices with those of a process beside each other, in the order of the processes."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of the train state: a whole copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: its first axis split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def parts_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch in parts, [parts, B, ...]: each part split over the devices."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def check_batch_size(batch_size: int, device_count: int, parts: int = 1) -> None:
    """Checks that a training batch can be split evenly, over the devices and each share in parts.

    Raises:
      ConfigError: naming the nearest batch sizes that can.
    """
    unit = device_count * parts
    if batch_size % unit:
        below = batch_size // unit * unit
        nearest = [str(size) for size in (below, below + unit) if size]
        in_parts = (
            f" in {parts} micro-batches each (config.train.grad_accum_steps)" if parts > 1 else ""
        )
        raise ConfigError(
            f"config.train.batch_size = {batch_size}: {device_count} devices cannot share it "
            f"evenly{in_parts}; the nearest sizes that they can are {' and '.join(nearest)}"
        )


def process_rows(batch_size: int) -> slice:
    """Returns which rows of a global batch this process must provide.

    The devices of a process are neighbours in the mesh, so its rows are contiguous.
    """
    share = batch_size // jax.process_count()
    return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def to_devices(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes one global array of the rows that each process holds.

    Args:
      batch: this process's rows of each array.
      mesh: of all devices.

    Returns:
      The global batch, split over the `data` axis.
    """
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)
