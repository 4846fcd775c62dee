"""Batches as a function of the step number.

Nothing is carried from one batch to the next: `train_indices(step)` says which examples a step
sees, from the seed alone. So a run that resumes at any step, on any number of devices or processes,
goes on with the same batches, and there is no iterator state to save. (Grain's own saved iterator
state is bound to the process and worker count.) Grain reads ahead in threads.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from inception_jax.datasets.decode import CropFn
from inception_jax.datasets.splits import Split
from inception_jax.runtime import sharding

# Gives, for a position in the endless sequence of training examples, the box to cut there.
CropSampler = Callable[[int], CropFn]


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order in which an epoch visits the training examples: int64 [examples].

    A permutation drawn from (seed, epoch) by numpy's counter-based Philox generator.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return generator.permutation(examples)


def train_indices(step: int, *, batch_size: int, examples: int, seed: int) -> np.ndarray:
    """Returns which examples the step after `step` finished steps sees: int64 [batch_size].

    The epochs' orders are one endless sequence, cut into batches: a batch may span two epochs, and
    no example is left out.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, examples)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_order(seed, int(epoch), examples)[offsets[here]]
    return indices


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    mesh: Mesh | None = None,
    sample_crop: CropSampler | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields the batches of steps `start` to `stop` - 1 (counted in finished steps before each).

    Args:
      split: the training examples.
      batch_size: examples a step over all processes; a multiple of the device count.
      seed: of the order.
      start, stop: range of steps.
      mesh: the devices that each batch is laid on; None: this process's share, as NumPy arrays.
      box_at: the boxes to cut from the original images (`crops`); None: the whole images.

    Yields:
      image: uint8 [batch_size, H, W, 3] and label: int32 [batch_size], split over the devices.
    """
    rows = sharding.process_rows(batch_size)

    def load(step: int) -> dict[str, np.ndarray]:
        indices = train_indices(step, batch_size=batch_size, examples=len(split), seed=seed)[rows]
        if sample_crop is None:
            images = split.read(indices)
        else:
            positions = range(step * batch_size, (step + 1) * batch_size)[rows]
            images = split.read_crops(indices, [sample_crop(position) for position in positions])
        return {"image": images, "label": split.labels[indices]}

    batches = _prefetch(load, start, stop, threads=split.threads)
    return batches if mesh is None else _prefetch_to_devices(batches, mesh)


def abstract_train_batch(
    split: Split, *, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a training batch looks like, to compile the step without one."""
    placed = sharding.batch_sharding(mesh)
    image_shape = (batch_size, *split.image_shape)
    return {
        "image": jax.ShapeDtypeStruct(image_shape, np.uint8, sharding=placed),
        "label": jax.ShapeDtypeStruct((batch_size,), split.labels.dtype, sharding=placed),
    }


def eval_batch_size(examples: int, *, limit: int) -> int:
    """Returns the smallest batch that takes no more batches than the limit does.

    Eight pictures are not filled up to a batch of 250, and 300 become two batches of 150.

    Args:
      examples: size of the split, at least 1.
      limit: the largest batch.
    """
    return -(-examples // -(-examples // limit))


def abstract_eval_batch(
    split: Split, *, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns what a batch of `eval_batches` looks like, to compile a step without one."""
    batch_size += -batch_size % mesh.size
    batch = abstract_train_batch(split, batch_size=batch_size, mesh=mesh)
    return batch | {
        "mask": jax.ShapeDtypeStruct((batch_size,), bool, sharding=batch["label"].sharding)
    }


def eval_batches(split: Split, *, batch_size: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Yields every example of a split once, in order.

    The last batch is filled up with copies of the first example, masked out. `batch_size` is
    rounded up to a multiple of the device count, which changes no result.

    Yields:
      image: uint8 [B, H, W, 3], label: int32 [B] and mask: bool [B], True for real examples.
    """
    batch_size += -batch_size % mesh.size
    rows = sharding.process_rows(batch_size)

    def load(batch: int) -> dict[str, np.ndarray]:
        indices = np.arange(batch * batch_size, (batch + 1) * batch_size)[rows]
        mask = indices < len(split)
        indices = np.where(mask, indices, 0)
        return {"image": split.read(indices), "label": split.labels[indices], "mask": mask}

    batches = -(-len(split) // batch_size)
    return _prefetch_to_devices(_prefetch(load, 0, batches, threads=split.threads), mesh)


def _prefetch(
    load: Callable[[int], dict[str, np.ndarray]], start: int, stop: int, *, threads: int
) -> Iterator[dict[str, np.ndarray]]:
    """Yields `load(start)` … `load(stop - 1)`.

    Each of the threads loads a batch, and one more batch waits.
    """
    if start >= stop:
        return iter(())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))


def _prefetch_to_devices(
    batches: Iterator[dict[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Yields batches on the devices, the next one already on its way."""
    ahead: dict[str, jax.Array] | None = None
    for batch in batches:
        current, ahead = ahead, sharding.to_devices(batch, mesh)
        if current is not None:
            yield current
    if ahead is not None:
        yield ahead
