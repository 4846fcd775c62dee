"""Data parallelism: the state is replicated, batches are split along their first axis.

One mesh axis, `data`, spans every device of every process. Its type is Auto: with the Explicit axes
that `jax.make_mesh` uses by default, a linen convolution with BatchNorm fails to type-check its
shardings. With Auto the compiler inserts the cross-device sums, so the loss, the gradients and
BatchNorm's statistics (of the whole batch or of each group) do not depend on the devices.
"""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from inception_jax.errors import ConfigError


def make_mesh(devices: Iterable[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of some devices, with the single axis `data`.

    Unlike jax.make_mesh, which on some TPU slices orders the devices in a ring through all hosts,
    this keeps a process's rows of a batch contiguous. Sums over all devices do not depend on it.

    Args:
      devices: the devices; None: all devices of all processes.
    """
    ordered = np.array(in_process_order(jax.devices() if devices is None else devices))
    return Mesh(ordered, ("data",), axis_types=(AxisType.Auto,))


def in_process_order(devices: Iterable[jax.Device]) -> list[jax.Device]:
    """Returns the devices sorted by process index, then by id."""
    return sorted(devices, key=lambda device: (device.process_index, device.id))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of the train state: a full copy on each device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def microbatch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of micro-batches [M, B, ...]: the second axis is split over devices."""
    return NamedSharding(mesh, PartitionSpec(None, "data"))


def check_batch_size(batch_size: int, device_count: int, num_microbatches: int = 1) -> None:
    """Checks that a training batch can be split evenly over the devices and micro-batches.

    Raises:
      ConfigError: with the nearest valid batch sizes.
    """
    divisor = device_count * num_microbatches
    if batch_size % divisor:
        below = batch_size // divisor * divisor
        nearest = [str(size) for size in (below, below + divisor) if size]
        factors = f"{device_count} devices"
        if num_microbatches > 1:
            factors += f" × {num_microbatches} micro-batches (config.train.grad_accum_steps)"
        raise ConfigError(
            f"config.train.batch_size = {batch_size}: must be a multiple of {divisor}: {factors}. "
            f"Set it to {' or '.join(nearest)}, or use a number of devices that divides it"
        )


def local_rows(batch_size: int) -> slice:
    """Returns the rows of a global batch that this process must provide.

    They are contiguous, because the devices of a process are adjacent in the mesh.
    """
    rows = batch_size // jax.process_count()
    return slice(jax.process_index() * rows, (jax.process_index() + 1) * rows)


def make_global_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Combines the rows of each process into global arrays.

    Args:
      batch: this process's rows of each array, [B / number of processes, ...].
      mesh: mesh of all devices.

    Returns:
      The global arrays, [B, ...], split over the `data` axis.
    """
    return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)
