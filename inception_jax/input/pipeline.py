"""Provides batches as a function of the step number.

There is no state between batches: `train_indices(step)` returns the examples of a step, which
depend only on the seed. So a run that resumes at any step, on any number of devices or processes,
continues with the same batches, and there is no iterator state to save. (Grain's own iterator state
depends on the number of processes and workers.) Grain prefetches in threads.
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

# Maps a position in the infinite sequence of training examples to the crop function to use there.
CropSampler = Callable[[int], CropFn]
# The last word of Philox's counter for flips, which separates them from the epoch orders (0) and
# the crops (1).
_FLIP_STREAM = 2


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, examples: int) -> np.ndarray:
    """Returns the order of the training examples in an epoch, int64 [examples].

    A random permutation that depends on (seed, epoch), from NumPy's counter-based Philox generator.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
    return generator.permutation(examples)


def train_indices(step: int, *, batch_size: int, examples: int, seed: int) -> np.ndarray:
    """Returns the examples of the step after `step` finished steps, int64 [batch_size].

    The epoch orders form one infinite sequence, which is divided into batches: a batch may span two
    epochs, and no example is skipped.
    """
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, offsets = np.divmod(positions, examples)
    indices = np.empty(batch_size, np.int64)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        indices[here] = epoch_order(seed, int(epoch), examples)[offsets[here]]
    return indices


@functools.lru_cache(maxsize=4)
def _first_flips(seed: int, examples: int) -> np.ndarray:
    """Returns whether each example is flipped in the first epoch, bool [examples]."""
    counter = np.array([0, 0, 0, _FLIP_STREAM], np.uint64)
    philox = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter)
    return np.random.Generator(philox).integers(0, 2, examples, np.bool_)


def alternating_flips(step: int, *, batch_size: int, examples: int, seed: int) -> np.ndarray:
    """Returns which examples of a step are flipped, bool [batch_size], so that epochs alternate.

    Each example is flipped in every second epoch; whether in the even or the odd ones depends on
    (seed, example). So any two epochs in a row contain each image once as it is and once mirrored
    (Jordan 2024, arXiv:2404.00498, "alternating flip").
    """
    indices = train_indices(step, batch_size=batch_size, examples=examples, seed=seed)
    epochs = np.arange(step * batch_size, (step + 1) * batch_size) // examples
    return _first_flips(seed, examples)[indices] ^ (epochs % 2 == 1)


def train_batches(
    split: Split,
    *,
    batch_size: int,
    seed: int,
    start: int,
    stop: int,
    mesh: Mesh | None = None,
    sample_crop: CropSampler | None = None,
    alternate_flips: bool = False,
) -> Iterator[dict[str, Any]]:
    """Yields the batches of steps `start` to `stop` - 1, counted in finished steps.

    Args:
      split: the training split.
      batch_size: examples per step over all processes; a multiple of the number of devices.
      seed: seed of the order.
      start, stop: range of steps.
      mesh: devices to place each batch on; None: yield this process's part as NumPy arrays.
      sample_crop: crops of the original images (`crops`); None: use whole images.
      alternate_flips: whether to mirror the images of `alternating_flips`.

    Yields:
      image: uint8 [batch_size, H, W, 3] and label: int32 [batch_size], sharded over the devices.
    """
    rows = sharding.local_rows(batch_size)

    def load(step: int) -> dict[str, np.ndarray]:
        indices = train_indices(step, batch_size=batch_size, examples=len(split), seed=seed)[rows]
        if sample_crop is None:
            images = split.read(indices)
        else:
            positions = range(step * batch_size, (step + 1) * batch_size)[rows]
            images = split.read_crops(indices, [sample_crop(position) for position in positions])
        if alternate_flips:
            flipped = alternating_flips(
                step, batch_size=batch_size, examples=len(split), seed=seed
            )[rows, None, None, None]
            images = np.where(flipped, images[:, :, ::-1], images)
        return {"image": images, "label": split.labels[indices]}

    batches = _prefetch(load, start, stop, threads=split.threads)
    return batches if mesh is None else _prefetch_to_devices(batches, mesh)


def abstract_train_batch(
    split: Split, *, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract training batch, for compiling the step without data."""
    placed = sharding.batch_sharding(mesh)
    image_shape = (batch_size, *split.image_shape)
    return {
        "image": jax.ShapeDtypeStruct(image_shape, np.uint8, sharding=placed),
        "label": jax.ShapeDtypeStruct((batch_size,), split.labels.dtype, sharding=placed),
    }


def eval_batch_size(examples: int, *, limit: int) -> int:
    """Returns the smallest batch size that needs no more batches than `limit` does.

    >>> eval_batch_size(8, limit=250), eval_batch_size(300, limit=250)
    (8, 150)

    Args:
      examples: size of the split, at least 1.
      limit: maximum batch size.
    """
    return -(-examples // -(-examples // limit))


def abstract_eval_batch(
    split: Split, *, batch_size: int, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns an abstract batch of `eval_batches`, for compiling a step without data."""
    batch_size += -batch_size % mesh.size
    batch = abstract_train_batch(split, batch_size=batch_size, mesh=mesh)
    return batch | {
        "mask": jax.ShapeDtypeStruct((batch_size,), bool, sharding=batch["label"].sharding)
    }


def eval_batches(split: Split, *, batch_size: int, mesh: Mesh) -> Iterator[dict[str, jax.Array]]:
    """Yields each example of a split once, in order.

    The last batch is padded with masked copies of the first example. `batch_size` is rounded up to
    a multiple of the number of devices, which does not change any result.

    Yields:
      image: uint8 [B, H, W, 3], label: int32 [B] and mask: bool [B], True for real examples.
    """
    batch_size += -batch_size % mesh.size
    rows = sharding.local_rows(batch_size)

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

    Each thread loads a batch, and one more batch is buffered.
    """
    if start >= stop:
        return iter(())
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    return iter(grain.MapDataset.range(start, stop).map(load).to_iter_dataset(options))


def _prefetch_to_devices(
    batches: Iterator[dict[str, np.ndarray]], mesh: Mesh
) -> Iterator[dict[str, jax.Array]]:
    """Yields batches on the devices while transferring the next one."""
    ahead: dict[str, jax.Array] | None = None
    for batch in batches:
        current, ahead = ahead, sharding.make_global_batch(batch, mesh)
        if current is not None:
            yield current
    if ahead is not None:
        yield ahead
