"""Estimates from what a program does and from data sheets."""

import dataclasses
import pathlib

import pytest

from inception_jax import config as configs
from inception_jax.programs import compile as programs
from inception_jax.programs import projection, targets
from inception_jax.programs.audit import Audit, Operation
from inception_jax.programs.compile import Memory, Program
from inception_jax.programs.targets import Chip, Target
from inception_jax.runtime import sharding
from tests import small
from tests.programs import narrow

# A millionth of a second for a thousand operations, for a hundred bytes, and for ten cycles.
CHIP = Chip("chip", "tpu", memory=1, bandwidth=1e8, peak=1e9, link=1e8, cycles=1e7)
TARGET = Target("four", CHIP, 4, "")


def operation(
    *, flops: float = 0, size: int = 0, cycles: int | None = None, awaited: int | None = None
) -> Operation:
    return Operation("a", "fusion", "other", "(none)", 1, flops, size, cycles, awaited=awaited)


def program(*operations: Operation, collectives: int = 0, purpose: str = "train") -> Program:
    found = Audit(
        operations,
        {"all-reduce": (1, collectives)} if collectives else {},
        convolutions={},
        arguments={},
        state_bytes=0,
        donated_bytes=0,
        host_transfers=(),
        dynamic_shapes=(),
    )
    return Program(purpose, 16, 64, 1.0, 0, Memory(0, 0, 0, 0, 0), found)


def test_the_roofline_is_the_longest_of_products_traffic_and_network() -> None:
    one = operation(flops=3000, size=200)
    times = projection.times(program(one, collectives=100), TARGET)
    # A ring sends three quarters of the data twice.
    assert (times.products, times.memory) == pytest.approx((3e-6, 2e-6))
    assert times.between_devices == pytest.approx(1.5e-6)
    assert times.roofline == pytest.approx(3e-6)


def test_the_range_goes_from_what_the_compiler_estimates_to_everything_in_turn() -> None:
    both = operation(flops=1000, size=100, cycles=40), operation(size=500)
    times = projection.times(program(*both, collectives=100), TARGET)
    assert times.compiler == pytest.approx(4e-6)
    # The traffic of the operation without an estimate takes longer than the others' estimate.
    assert times.roofline == times.fastest == pytest.approx(6e-6)
    assert times.slowest == pytest.approx(4e-6 + 5e-6 + 1.5e-6)
    assert times.operations == pytest.approx((4e-6, 5e-6))


def test_copies_go_on_beside_operations_until_they_are_awaited() -> None:
    operations = (
        operation(size=400, awaited=4),
        operation(size=300, awaited=2),
        # Leaves the memory 3 of its 5 µs, then the first copy is awaited before the second.
        operation(size=200, cycles=50),
        operation(cycles=10),
        operation(size=100, awaited=6),
        operation(cycles=20),
    )
    times = projection.times(program(*operations), TARGET)
    assert times.operations == pytest.approx((4e-6, 3e-6, 5e-6, 1e-6, 0, 2e-6))
    waited = dataclasses.replace(operations[1], awaited=3)
    times = projection.times(program(operations[0], waited, *operations[2:]), TARGET)
    assert times.operations == pytest.approx((1e-6, 3e-6, 5e-6, 1e-6, 0, 2e-6))
    assert times.slowest == pytest.approx(12e-6)


def test_operations_of_a_gpu_reach_half_the_bandwidth_after_their_start() -> None:
    gpu = dataclasses.replace(TARGET, chip=dataclasses.replace(CHIP, platform="cuda", cycles=None))
    times = projection.times(program(operation(size=100), operation(flops=100)), gpu)
    assert times.compiler is None
    assert times.fastest == pytest.approx(1e-6)
    assert times.operations == pytest.approx((3e-6 + 2e-6, 3e-6 + 0.2e-6))


def test_a_chip_without_a_known_peak_is_bound_by_its_memory() -> None:
    unknown = dataclasses.replace(CHIP, peak=None, link=None, cycles=None)
    times = projection.times(program(operation(flops=1e9, size=100), collectives=9), TARGET)
    assert times.roofline == pytest.approx(1)
    target = dataclasses.replace(TARGET, chip=unknown)
    times = projection.times(program(operation(flops=1e9, size=100), collectives=9), target)
    assert (times.products, times.between_devices) == (None, None)
    assert times.roofline == pytest.approx(1e-6)


def test_a_recipe_counts_all_steps_and_evaluations(
    monkeypatch: pytest.MonkeyPatch, data_directory: pathlib.Path
) -> None:
    monkeypatch.setattr(targets, "make_mesh", lambda target: sharding.make_mesh())
    config = narrow.config()
    config.train.duration, config.evaluation.every = "100 steps", "30 steps"
    config.evaluation.flip_tta = True
    # Without an interval of its own, as in training.
    configs.put(config, "evaluations.shifted.every", "0 steps")
    configs.put(config, "evaluations.shifted.shift_tta", 1)
    this = programs.assemble(config, targets.get("v5e-8"), model=small.Network())
    second, tenth = operation(cycles=10**7), operation(cycles=10**6)
    evaluation = dataclasses.replace(program(tenth, purpose="evaluate"), batch_size=104)
    found = projection.recipe(this, [program(second), evaluation], TARGET)
    assert found.images_per_second == pytest.approx((64, 64))
    # Four evaluations of 360 images in four batches each: as they are, which all three share,
    # mirrored, and shifted in two directions.
    forwards = 4 * 4 * 4
    assert found.minutes == pytest.approx([(100 + 0.1 * forwards) / 60] * 2)
