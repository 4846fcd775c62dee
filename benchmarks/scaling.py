"""Measures how the cost of a training step grows with the work.

Varies one axis at a time from a base of GoogLeNet with the paper's stem, 64 px, batch 128, width 1,
one device:

  batch     examples per step
  image     side of the images, pixels
  width     multiplier of the channels of all layers
  devices   simulated CPU devices (JAX_NUM_CPU_DEVICES) that share the batch and the same cores

Each point is a separate process; the points of an axis take turns, round after round. "growth" is
the ratio of seconds per step to those of the axis's first point, "work" that of multiply-adds: if
growth is below work, larger steps use the machine better. More devices do not change the work, so
their growth is the overhead of splitting and summing.

  python -m benchmarks.scaling --json FILE
  python -m benchmarks.scaling --axes batch devices --batch 32 64 128 --devices 1 2

On two CPU cores: about 40 s per point and 5 s per point and round; 15 minutes with the defaults.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import measure, workers
from benchmarks.contenders import network
from benchmarks.step_time import CLASSES, DTYPES, SHARED_GPU
from inception_jax.console import markdown_table

# For each axis, its name in the settings of a contender, and its default points.
AXES: Mapping[str, tuple[str, tuple[float, ...]]] = {
    "batch": ("batch_size", (32, 64, 128, 256)),
    "image": ("image_size", (32, 64, 96, 128)),
    "width": ("width", (0.25, 0.5, 1.0, 1.5)),
    "devices": ("devices", (1, 2, 4, 8)),
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    for axis, (_, points) in AXES.items():
        kind = float if axis == "width" else int
        parser.add_argument(f"--{axis}", nargs="+", type=kind, default=list(points))
    parser.add_argument("--stem", choices=network.STEMS, default="paper")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--base-batch", type=int, default=128, help="batch size of the other axes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="approximate seconds per measurement"
    )
    return parser.parse_args(argv)


def contender(arguments: argparse.Namespace, axis: str, point: float) -> workers.Contender:
    """Returns the contender of one point of an axis."""
    settings = {
        "platform": arguments.platform,
        "stem": arguments.stem,
        "dtype": arguments.dtype,
        "classes": CLASSES,
        "batch_size": arguments.base_batch,
        "image_size": 64,
        "width": 1.0,
        "devices": 1,
        "modes": ["train"],
        AXES[axis][0]: point,
    }
    environment = {**SHARED_GPU, "JAX_NUM_CPU_DEVICES": str(settings["devices"])}
    return workers.Contender(
        f"{axis} {point:g}", "benchmarks.contenders.ours_step", settings, environment=environment
    )


def work(settings: Mapping[str, Any]) -> float:
    """Returns the operations of a training step."""
    keys = ("stem", "image_size", "classes", "width")
    return settings["batch_size"] * network.flops("train", *(settings[key] for key in keys))


def measure_axis(
    arguments: argparse.Namespace, axis: str
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Returns an entry per point of an axis, and the reason for each skipped point, by name."""
    points = {
        each.name: each
        for each in (contender(arguments, axis, point) for point in getattr(arguments, axis))
    }
    with workers.running(list(points.values())) as (ready, absent):
        command = {"mode": "train", "seconds": arguments.seconds}
        numbers = workers.take_turns(ready, [command], rounds=arguments.rounds)
    entries = []
    for (name, _), rounds in numbers.items():
        settings = points[name].settings
        summary = measure.summarize(each["seconds"] for each in rounds)
        entries.append(
            {
                "axis": axis,
                "point": settings[AXES[axis][0]],
                "seconds_per_step": summary.to_dict(),
                "images_per_second": settings["batch_size"] / summary.median,
                "flops_per_second": work(settings) / summary.median,
                "operations": work(settings),
            }
        )
    return entries, absent


def report(entries: Sequence[Mapping[str, Any]]) -> str:
    """Returns the table of one axis."""
    first, rows = entries[0], []
    for entry in entries:
        seconds = entry["seconds_per_step"]
        rows.append(
            [
                f"{entry['axis']} {entry['point']:g}",
                f"{1e3 * seconds['median']:,.0f}",
                f"{100 * seconds['spread']:.0f}%",
                f"{entry['images_per_second']:,.0f}",
                f"{entry['flops_per_second'] / 1e9:,.0f}",
                f"{seconds['median'] / first['seconds_per_step']['median']:.2f}",
                f"{entry['operations'] / first['operations']:.2f}",
            ]
        )
    head = ["ms/step", "spread", "images/s", "GF/s", "growth", "work"]
    return markdown_table([first["axis"], *head], rows)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    entries: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    for axis in arguments.axes:
        measured, missing = measure_axis(arguments, axis)
        entries += measured
        absent |= missing
        if measured:
            print(report(measured), end="\n\n", flush=True)
    for name, why in absent.items():
        print(f"Skipped: {name} ({why})")
    result = {
        "benchmark": "scaling",
        "environment": measure.environment(),
        "settings": {
            name: getattr(arguments, name) for name in ("stem", "dtype", "base_batch", "rounds")
        },
        "absent": absent,
        "results": entries,
    }
    measure.write_json(arguments.json, result)


if __name__ == "__main__":
    measure.run(main)
