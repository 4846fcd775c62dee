"""Derives times from what a program does and what a data sheet says a device can do.

No time is measured. A roofline (Williams, Waterman and Patterson 2009) is a bound: a program takes
at least its operations divided by the peak, and its memory traffic divided by the bandwidth. The
estimate is a range. At its fast end, only what the compiler itself estimates takes time, and the
rest goes on at the same time, as far as the roofline permits. At its slow end, everything happens
one after another in the order of the program, except what the compiler starts as a copy between
memories and awaits later. Such copies go on beside other operations, one after another in the order
of their start, in the time in which these leave the memory's bandwidth unused; what is not done
when its end is awaited, the program waits for. Compilers for GPUs estimate nothing: there, the fast
end is the roofline, and at the slow end each operation reaches half of the peak or of the bandwidth
after some microseconds for its start, which are assumptions.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Sequence

from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.programs.audit import Operation
from inception_jax.programs.compile import Program
from inception_jax.programs.targets import Chip, Target
from inception_jax.training.run import Run

_GPU_EFFICIENCY, _GPU_LAUNCH = 0.5, 3e-6


@dataclasses.dataclass(frozen=True)
class Times:
    """Estimated seconds of a program.

    Attributes:
      products: its operations at the peak; None: the peak is unknown.
      memory: its memory traffic at full bandwidth.
      between_devices: its collectives, without latency; None: the bandwidth of links is unknown.
      roofline: the longest of these.
      compiler: the sum of the compiler's estimates; None: it makes none.
      operations: what each operation adds to the slow end, without collectives, in order.
      fastest, slowest: the range.
    """

    products: float | None
    memory: float
    between_devices: float | None
    roofline: float
    compiler: float | None
    operations: tuple[float, ...]
    fastest: float
    slowest: float


def times(program: Program, target: Target) -> Times:
    """Returns the estimated times of a program."""
    chip, found = target.chip, program.audit
    products = found.flops / chip.peak if chip.peak else None
    memory = found.bytes / chip.bandwidth
    between = _between_devices(program, target)
    compiler = found.cycles / chip.cycles if chip.cycles and found.cycles is not None else None
    operations = tuple(_in_order(found.operations, chip))
    roofline = max(products or 0.0, memory, between or 0.0)
    fastest = max(roofline, compiler or 0.0)
    return Times(
        products=products,
        memory=memory,
        between_devices=between,
        roofline=roofline,
        compiler=compiler,
        operations=operations,
        fastest=fastest,
        slowest=max(fastest, sum(operations) + (between or 0.0)),
    )


def _in_order(operations: Sequence[Operation], chip: Chip) -> list[float]:
    """Returns what each operation of a program adds to its time."""
    seconds = [0.0] * len(operations)
    # Copies under way, in the order of their start, with the time that each still needs.
    under_way: dict[int, float] = {}

    def copy_for(available: float) -> None:
        for index, needed in list(under_way.items()):
            under_way[index] = needed - min(needed, available)
            available -= min(needed, available)

    awaited = collections.defaultdict(list)
    for index, each in enumerate(operations):
        if each.awaited is not None:
            awaited[each.awaited].append(index)
    for index in range(len(operations) + 1):
        for copy in awaited[index]:
            # Earlier copies come first.
            for before in [other for other in under_way if other <= copy]:
                seconds[before] += under_way.pop(before)
        if index == len(operations):
            break
        each = operations[index]
        traffic = each.times * each.bytes / chip.bandwidth
        if each.awaited is not None:
            under_way[index] = traffic
        else:
            seconds[index] = each.times * _operation_seconds(each, chip)
            copy_for(max(0.0, seconds[index] - traffic))
    return seconds


def _operation_seconds(each: Operation, chip: Chip) -> float:
    """Returns the estimated time of one operation."""
    if chip.cycles and each.cycles is not None:
        return each.cycles / chip.cycles
    roofline = max(each.flops / chip.peak if chip.peak else 0.0, each.bytes / chip.bandwidth)
    return roofline if chip.cycles else _GPU_LAUNCH + roofline / _GPU_EFFICIENCY


def _between_devices(program: Program, target: Target) -> float | None:
    """Returns the time of all collectives, as rings over all devices, without latency."""
    if target.chip.link is None:
        return None
    share = (target.devices - 1) / target.devices
    total = 0.0
    for name, (_, size) in program.audit.collectives.items():
        total += (2 * share if name == "all-reduce" else share) * size
    return total / target.chip.link


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Estimates for a whole run.

    Attributes:
      images_per_second: slowest and fastest, in training, without evaluations.
      minutes: fastest and slowest, with evaluations.
    """

    images_per_second: tuple[float, float]
    minutes: tuple[float, float]


def recipe(this: Run, programs: list[Program], target: Target) -> Recipe:
    """Returns estimates for a whole run; input, checkpoints and compilation are not counted."""
    found = {(each.purpose, each.image_size): times(each, target) for each in programs}
    training = collections.Counter(map(this.train_image_size, range(this.total_steps)))
    # All evaluations have the same batch size.
    batch_size = next(each.batch_size for each in programs if each.purpose == "evaluate")
    evaluating = _evaluation_batches(this, batch_size)
    images = this.total_steps * this.config.train.batch_size
    totals = []
    speeds = []
    for end in ("fastest", "slowest"):
        seconds = {key: getattr(each, end) for key, each in found.items()}
        trained = sum(count * seconds["train", size] for size, count in training.items())
        evaluated = sum(count * seconds["evaluate", size] for size, count in evaluating.items())
        totals.append((trained + evaluated) / 60)
        speeds.append(images / trained if trained else math.inf)
    return Recipe((speeds[1], speeds[0]), (totals[0], totals[1]))


def _evaluation_batches(this: Run, batch_size: int) -> dict[int, int]:
    """Returns how often the evaluation program runs, by image size."""
    evaluator, total, default = Evaluator(this), this.total_steps, this.config.evaluation.every
    # Evaluations of the same images after the same step share their passes over them.
    passes = {}
    for name, view in evaluator.views.items():
        every = this.timeline.steps(view.every) or this.timeline.steps(default) or total
        steps = {*range(every, total, every), total}
        flips, shifts = {False, view.flip_tta}, {0, view.shift_tta, -view.shift_tta}
        for each in itertools.product(steps, [evaluator.input_key(name)], flips, shifts):
            passes[each] = name
    batches: collections.Counter[int] = collections.Counter()
    for name in passes.values():
        size = evaluator.image_size(evaluator.views[name])
        batches[size] += -(-len(evaluator.splits[name]) // batch_size)
    return batches
