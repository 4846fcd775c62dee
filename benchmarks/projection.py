"""Projects the speed of training on machines that were not measured, from counts and data sheets.

A step of b images on each of n devices takes

    t = max(F b / (u P), M b / (v W)) + 2 (n - 1) / n * 4 N / L

with F operations and M bytes of memory traffic an image, N parameters (gradients are float32), P
the peak operations a second in bfloat16, W the memory's and L the links' bytes a second of a
device, and u and v the shares of P and W that are reached: by default 0.4 and 0.7, assumptions.
The run then makes n b / t images a second, and the hosts have to read as many.

M counts 16 passes over the convolutions' outputs in bfloat16. Forward, 5: the output is written,
read for its moments, read and written normalised, read by the next layer. Backward, 11: gradient,
output and input of the ReLU are read for BatchNorm's two sums and once more, its result is written
and read for both gradients, the layer's input is read and its gradient written.

  python -m benchmarks.projection

It computes only; a second.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence

from benchmarks import measure
from benchmarks.contenders import network

_PASSES = 16


@dataclasses.dataclass(frozen=True)
class Machine:
    """Devices as their makers describe them.

    Attributes:
      name: what it is called.
      devices: how many there are.
      hosts: how many machines they sit in.
      peak: bfloat16 operations a second of a device.
      memory: bytes a second of a device's memory.
      link: bytes a second between a device and the others.
    """

    name: str
    devices: int
    hosts: int
    peak: float
    memory: float
    link: float


@dataclasses.dataclass(frozen=True)
class Work:
    """A network on a data set.

    Attributes:
      name: what it is called.
      stem, image_size, classes: of the network.
      batch_size: images a step and device.
      examples: images of an epoch.
      epochs: length of the run.
    """

    name: str
    stem: str
    image_size: int
    classes: int
    batch_size: int
    examples: int
    epochs: int


# A v5p-32 slice has 32 cores, which are 16 chips.
MACHINES = (
    Machine("v5e-8", 8, 1, 197e12, 819e9, 200e9),
    Machine("v5p-32", 16, 4, 459e12, 2765e9, 600e9),
    Machine("8 x H200", 8, 1, 989e12, 4800e9, 450e9),
)
WORKS = (
    Work("Tiny ImageNet, s16", "s16", 64, 200, 128, 100_000, 100),
    Work("Tiny ImageNet, s32", "s32", 64, 200, 128, 100_000, 100),
    Work("ImageNet, 224 px", "paper", 224, 1000, 128, 1_281_167, 90),
)


def bytes_moved(stem: str, image_size: int) -> int:
    """Returns the bytes of memory traffic that one image of a training step causes."""
    outputs = sum(layer.outputs * layer.grid**2 for layer in network.convolutions(stem, image_size))
    return _PASSES * 2 * outputs


def step_seconds(
    machine: Machine, work: Work, *, compute_share: float, memory_share: float
) -> tuple[float, float, float]:
    """Returns the seconds of a step that computing, memory traffic and the all-reduce take."""
    operations = network.flops("train", work.stem, work.image_size, work.classes)
    gradients = 4 * network.parameters(work.stem, work.classes)
    return (
        operations * work.batch_size / (compute_share * machine.peak),
        bytes_moved(work.stem, work.image_size) * work.batch_size / (memory_share * machine.memory),
        2 * (machine.devices - 1) / machine.devices * gradients / machine.link,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--compute-share", type=float, default=0.4, help="u")
    parser.add_argument("--memory-share", type=float, default=0.7, help="v")
    return parser.parse_args(argv)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    rows, results = [], []
    for work in WORKS:
        for machine in MACHINES:
            compute, memory, reduce = step_seconds(
                machine,
                work,
                compute_share=arguments.compute_share,
                memory_share=arguments.memory_share,
            )
            seconds = max(compute, memory) + reduce
            rate = machine.devices * work.batch_size / seconds
            minutes = work.epochs * work.examples / rate / 60
            bound = "memory" if memory > compute else "compute"
            rows.append(
                [
                    work.name,
                    machine.name,
                    f"{1e3 * compute:.2f}",
                    f"{1e3 * memory:.2f}",
                    f"{1e3 * reduce:.2f}",
                    f"{rate:,.0f}",
                    f"{rate / machine.hosts:,.0f}",
                    f"{math.ceil(minutes):,}",
                ]
            )
            results.append(
                {
                    "work": dataclasses.asdict(work),
                    "machine": dataclasses.asdict(machine),
                    "compute_seconds": compute,
                    "memory_seconds": memory,
                    "all_reduce_seconds": reduce,
                    "images_per_second": rate,
                    "bound": bound,
                    "minutes": minutes,
                }
            )
    head = [
        "work",
        "machine",
        "compute ms",
        "memory ms",
        "all-reduce ms",
        "images/s",
        "per host",
        "minutes",
    ]
    print(measure.table(head, rows))
    measure.write_json(
        arguments.json,
        {
            "benchmark": "projection",
            "environment": measure.environment(),
            "settings": {
                "compute_share": arguments.compute_share,
                "memory_share": arguments.memory_share,
            },
            "results": results,
        },
    )


if __name__ == "__main__":
    measure.run(main)
