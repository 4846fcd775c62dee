import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from inception_jax.errors import ConfigError
from inception_jax.input import pipeline
from inception_jax.runtime import sharding


def make_split(examples: int) -> types.SimpleNamespace:
    """Images that contain their index, so that a batch identifies its examples."""

    class Split(types.SimpleNamespace):
        def __len__(self) -> int:
            return examples

    index = np.arange(examples)
    images = np.broadcast_to(index[:, None, None, None] % 256, (examples, 2, 2, 3))
    read = images.astype(np.uint8).__getitem__
    return Split(read=read, labels=index.astype(np.int32), threads=3)


def mesh_of(devices: int) -> Mesh:
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


def test_each_epoch_sees_each_example_once() -> None:
    seen = np.concatenate(
        [pipeline.train_indices(s, batch_size=16, examples=50, seed=3) for s in range(25)]
    )
    epochs = seen.reshape(8, 50)
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert not (epochs[0] == epochs[1]).all()


def test_seeds_change_order() -> None:
    orders = [pipeline.epoch_order(seed, 0, 100).tolist() for seed in (0, 1)]
    assert orders[0] != orders[1]


def test_a_batch_may_be_larger_than_the_data_set() -> None:
    indices = pipeline.train_indices(1, batch_size=25, examples=10, seed=0)
    assert np.bincount(indices).tolist() == [
        2 if count == 2 else 3 for count in np.bincount(indices)
    ]
    assert len(indices) == 25


def test_batches_depend_only_on_step() -> None:
    split, mesh = make_split(50), mesh_of(8)
    arguments = {"batch_size": 16, "seed": 5, "mesh": mesh}
    whole = list(pipeline.train_batches(split, start=0, stop=9, **arguments))
    part = list(pipeline.train_batches(split, start=6, stop=9, **arguments))
    assert len(whole) == 9
    for expected, actual in zip(whole[6:], part, strict=True):
        np.testing.assert_array_equal(expected["label"], actual["label"])
        np.testing.assert_array_equal(actual["image"][:, 0, 0, 0], actual["label"])
    assert [b["label"].sharding.num_devices for b in part] == [8] * 3


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_the_batch(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    rows: list[int] = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        rows += range(8)[sharding.local_rows(8)]
    assert rows == list(range(8))


@pytest.mark.parametrize(("examples", "batch_size"), [(50, 16), (48, 16), (5, 16), (50, 7), (1, 1)])
@pytest.mark.parametrize("devices", [1, 8])
def test_evaluation_sees_each_example_once(examples: int, batch_size: int, devices: int) -> None:
    split, mesh = make_split(examples), mesh_of(devices)
    seen: list[int] = []
    for batch in pipeline.eval_batches(split, batch_size=batch_size, mesh=mesh):
        assert len(batch["label"]) % devices == 0
        seen += np.asarray(batch["label"])[np.asarray(batch["mask"])].tolist()
    assert seen == list(range(examples))


def test_empty_step_range_gives_no_batches() -> None:
    arguments = {"batch_size": 16, "seed": 5, "mesh": mesh_of(8)}
    assert list(pipeline.train_batches(make_split(50), start=4, stop=4, **arguments)) == []


def test_indivisible_batch_size_is_refused() -> None:
    sharding.check_batch_size(16, 8)
    with pytest.raises(
        ConfigError, match=r"batch_size = 12: must be a multiple of 8: 8 devices.* 8 or 16"
    ):
        sharding.check_batch_size(12, 8)
    with pytest.raises(ConfigError, match=r"Set it to 8, or use a number of devices"):
        sharding.check_batch_size(3, 8)
    sharding.check_batch_size(48, 8, 3)
    with pytest.raises(ConfigError, match=r"40: .* 24: 8 devices × 3 micro-batches.* 24 or 48"):
        sharding.check_batch_size(40, 8, 3)


def test_devices_of_a_process_are_adjacent_in_the_mesh() -> None:
    # As on a TPU slice, where each host's devices form a square but are numbered across squares.
    devices = [types.SimpleNamespace(id=i, process_index=i // 2 % 2) for i in range(8)]
    ordered = sharding.in_process_order(reversed(devices))
    assert [device.id for device in ordered] == [0, 1, 4, 5, 2, 3, 6, 7]


def test_flips_alternate_from_epoch_to_epoch() -> None:
    examples, seed = 1000, 3
    orders = [pipeline.epoch_order(seed, epoch, examples) for epoch in range(4)]
    flips = [
        pipeline.alternating_flips(step, batch_size=250, examples=examples, seed=seed)
        for step in range(16)
    ]
    first, *others = [
        dict(zip(order.tolist(), flipped.tolist(), strict=True))
        for order, flipped in zip(orders, np.reshape(flips, (4, examples)), strict=True)
    ]
    assert 430 < sum(first.values()) < 570
    for epoch, later in enumerate(others, start=1):
        assert later == {index: flipped != (epoch % 2 == 1) for index, flipped in first.items()}
    # Another seed flips others, whatever their order; more examples change nothing for the first.
    coins = pipeline._first_flips(4, examples)
    assert 400 < (coins != [first[index] for index in range(examples)]).sum() < 600
    np.testing.assert_array_equal(pipeline._first_flips(4, 100), coins[:100])


def test_batches_with_alternating_flips_depend_only_on_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    split = make_split(50)
    index = np.arange(50, dtype=np.uint8)
    images = np.zeros((50, 2, 3, 3), np.uint8)
    images[:, 0, 0] = index[:, None]
    split.read = images.__getitem__
    arguments = {"batch_size": 16, "seed": 5, "alternate_flips": True}
    # 144 examples, almost three epochs.
    whole = list(pipeline.train_batches(split, start=0, stop=9, **arguments))
    for step, batch in enumerate(whole):
        flipped = pipeline.alternating_flips(step, batch_size=16, examples=50, seed=5)
        for image, label, mirror in zip(batch["image"], batch["label"], flipped, strict=True):
            np.testing.assert_array_equal(
                image, images[label, :, ::-1] if mirror else images[label]
            )
    part = list(pipeline.train_batches(split, start=6, stop=9, **arguments))
    for before, after in zip(whole[6:], part, strict=True):
        np.testing.assert_array_equal(before["image"], after["image"])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        rows = slice(8 * process, 8 * process + 8)
        for full, half in zip(
            whole, pipeline.train_batches(split, start=0, stop=9, **arguments), strict=True
        ):
            np.testing.assert_array_equal(half["image"], full["image"][rows])
