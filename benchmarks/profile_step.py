"""Traces the training step with jax.profiler and prints the most expensive operations.

The step is that of step_time: GoogLeNet with BatchNorm on a batch of noise on the device. On a GPU
the time is that of kernels, on a CPU that of XLA operations summed over threads, so it may exceed
wall time. The trace is kept in the directory --trace, for XProf and Perfetto.

  python -m benchmarks.profile_step --trace runs/trace
  python -m benchmarks.profile_step --platform gpu --stem s32 --batch-size 1024 --dtype bfloat16

About a minute on two CPU cores, mostly compilation.
"""

import argparse
import collections
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import measure, step_time
from inception_jax.console import markdown_table


class Operation(NamedTuple):
    """Total time of all executions of an operation.

    Attributes:
      name: name of the XLA operation.
      kernel: name of the kernel; on a CPU the same as `name`.
      seconds: total time.
      times: number of executions.
    """

    name: str
    kernel: str
    seconds: float
    times: int


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    step_time.add_network_flags(parser)
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="float32")
    parser.add_argument("--steps", type=int, default=5, help="steps to trace")
    parser.add_argument("--top", type=int, default=10, help="operations to print")
    parser.add_argument(
        "--trace",
        type=measure.local_path,
        default=pathlib.Path("runs/trace"),
        help="directory for the trace",
    )
    return parser.parse_args(argv)


def trace(arguments: argparse.Namespace) -> tuple[float, str, pathlib.Path]:
    """Traces steps; returns seconds per step, the compiled program as text, and the trace file."""
    import jax

    from benchmarks.contenders import ours_step
    from inception_jax.runtime import devices

    devices.initialize(platform=arguments.platform)
    run = ours_step.make_run({**step_time.network_settings(arguments), "dtype": arguments.dtype})
    step, repeated = ours_step.timed_step(run)
    # jax.profiler creates a subdirectory named after the date, down to the second.
    before = set(arguments.trace.rglob("*.xplane.pb"))
    with jax.profiler.trace(str(arguments.trace)):
        seconds = repeated.timed(arguments.steps)
    (file,) = set(arguments.trace.rglob("*.xplane.pb")) - before
    return seconds, step.as_text() or "", file


def operations(planes: Iterable[Any]) -> list[Operation]:
    """Returns the operations in planes of `jax.profiler.ProfileData`, most expensive first."""
    seconds: collections.Counter[tuple[str, str]] = collections.Counter()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in _lines(list(planes)):
        for event in line.events:
            # Other events belong to the runtime and contain these.
            if operation := dict(event.stats).get("hlo_op"):
                key = (str(operation), event.name)
                seconds[key] += event.duration_ns
                counts[key] += 1
    return [
        Operation(name, kernel, nanoseconds / 1e9, counts[name, kernel])
        for (name, kernel), nanoseconds in seconds.most_common()
    ]


def _lines(planes: Sequence[Any]) -> list[Any]:
    """Returns the lines with operations: GPU streams if there are any, or else all threads."""
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    streams = [line for plane in devices for line in plane.lines if line.name.startswith("Stream")]
    return streams or [line for plane in planes for line in plane.lines]


def op_sources(program: str) -> dict[str, str]:
    """Returns the location in the model of each operation of a compiled program."""
    pattern = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)
    return {match[1]: match[2] for match in pattern.finditer(program)}


def report(ops: Sequence[Operation], origin: Mapping[str, str], steps: int, top: int) -> str:
    """Returns the table of the most expensive operations."""
    total = sum(each.seconds for each in ops)
    rows = [
        [
            each.name,
            f"{1e3 * each.seconds / steps:.2f}",
            f"{100 * each.seconds / total:.1f}%",
            f"{each.times / steps:g}",
            "" if each.kernel == each.name else each.kernel[:60],
            "/".join(origin.get(each.name, "").split("/")[-4:])[-70:],
        ]
        for each in ops[:top]
    ]
    return markdown_table(["operation", "ms/step", "% of time", "calls", "kernel", "source"], rows)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    seconds, program, file = trace(arguments)
    from jax.profiler import ProfileData

    with warnings.catch_warnings():
        # JAX warns about the type of an event's statistics.
        warnings.simplefilter("ignore", DeprecationWarning)
        ops = operations(ProfileData.from_file(str(file)).planes)
    if not ops:
        raise measure.BenchmarkError(f"{file}: the trace contains no operations")
    total = sum(each.seconds for each in ops) / arguments.steps
    print(
        f"GoogLeNet, stem {arguments.stem}, {arguments.dtype}, batch {arguments.batch_size}: "
        f"{1e3 * seconds:.1f} ms/step, {1e3 * total:.1f} ms in {len(ops)} operations\n"
    )
    print(report(ops, op_sources(program), arguments.steps, arguments.top))
    print(f"\nTrace: {file}")
    result = {
        "benchmark": "profile_step",
        "environment": measure.environment(),
        "settings": {**step_time.network_settings(arguments), "dtype": arguments.dtype},
        "seconds_per_step": seconds,
        "operations": [each._asdict() for each in ops],
    }
    measure.write_json(arguments.json, result)


if __name__ == "__main__":
    measure.run(main)
