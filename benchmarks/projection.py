"""Projects training throughput on machines that were not measured, from counts and data sheets.

A step with b images on each of n devices takes

    t = max(F b / (u P), M b / (v W)) + 2 (n - 1) / n * 4 N / L

with F operations and M bytes of memory traffic per image, N parameters (float32 gradients), P the
peak bfloat16 operations per second, W the memory bandwidth and L the link bandwidth of a device in
bytes per second, and u and v the fractions of P and W that are reached, assumed to be 0.4 and 0.7
by default. The throughput is n b / t images per second, which the hosts must be able to read.

M counts 16 passes over the outputs of the convolutions in bfloat16. Forward, 5: the output is
written, read for its moments, read and written when normalized, and read by the next layer.
Backward, 11: gradient, output and input of the ReLU are read for BatchNorm's two sums and once
more, the result is written and read for both gradients, and the layer's input is read and its
gradient written.

  python -m benchmarks.projection

Takes a second.
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
    """Devices according to their data sheets.

    Attributes:
      name: name in the table.
      devices: number of devices.
      hosts: number of hosts.
      peak: bfloat16 operations per second of a device.
      memory: memory bandwidth of a device, bytes per second.
      link: bandwidth between a device and the others, bytes per second.
    """

    name: str
    devices: int
    hosts: int
    peak: float
    memory: float
    link: float


@dataclasses.dataclass(frozen=True)
class Workload:
    """A network trained on a dataset.

    Attributes:
      name: name in the table.
      stem, image_size, classes: of the network.
      batch_size: images per step and device.
      examples: images per epoch.
      epochs: duration of the run.
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
WORKLOADS = (
    Workload("Tiny ImageNet, s16", "s16", 64, 200, 128, 100_000, 100),
    Workload("Tiny ImageNet, s32", "s32", 64, 200, 128, 100_000, 100),
    Workload("ImageNet, 224 px", "paper", 224, 1000, 128, 1_281_167, 90),
)


def bytes_moved(stem: str, image_size: int) -> int:
    """Returns the memory traffic per image of a training step, bytes."""
    outputs = sum(layer.outputs * layer.grid**2 for layer in network.convolutions(stem, image_size))
    return _PASSES * 2 * outputs


def step_seconds(
    machine: Machine, workload: Workload, *, compute_fraction: float, memory_fraction: float
) -> tuple[float, float, float]:
    """Returns the seconds of a step for compute, memory traffic and the all-reduce."""
    operations = network.flops("train", workload.stem, workload.image_size, workload.classes)
    gradients = 4 * network.parameters(workload.stem, workload.classes)
    return (
        operations * workload.batch_size / (compute_fraction * machine.peak),
        bytes_moved(workload.stem, workload.image_size)
        * workload.batch_size
        / (memory_fraction * machine.memory),
        2 * (machine.devices - 1) / machine.devices * gradients / machine.link,
    )


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--compute-fraction", type=float, default=0.4, help="u")
    parser.add_argument("--memory-fraction", type=float, default=0.7, help="v")
    return parser.parse_args(argv)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    rows, results = [], []
    for workload in WORKLOADS:
        for machine in MACHINES:
            compute, memory, reduce = step_seconds(
                machine,
                workload,
                compute_fraction=arguments.compute_fraction,
                memory_fraction=arguments.memory_fraction,
            )
            seconds = max(compute, memory) + reduce
            rate = machine.devices * workload.batch_size / seconds
            minutes = workload.epochs * workload.examples / rate / 60
            bound = "memory" if memory > compute else "compute"
            rows.append(
                [
                    workload.name,
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
                    "work": dataclasses.asdict(workload),
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
    print(measure.markdown_table(head, rows))
    measure.write_json(
        arguments.json,
        {
            "benchmark": "projection",
            "environment": measure.environment(),
            "settings": {
                "compute_fraction": arguments.compute_fraction,
                "memory_fraction": arguments.memory_fraction,
            },
            "results": results,
        },
    )


if __name__ == "__main__":
    measure.run(main)
