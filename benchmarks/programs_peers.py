"""Compiles our training step and plain Flax's for a TPU or GPU, and compares the estimates.

The contenders are our step with GoogLeNet and the stem s16, the same network in plain Flax, and
ResNet-50 as a yardstick whose real speed is published. All compute in bfloat16, on one device,
without random augmentation. Pairs that `--json` already holds are left out, so that a stopped
command continues. Nothing is run: times are estimates (see `inception_jax.programs.projection`).

  python -m benchmarks.programs_peers --targets h100 --json benchmarks/results/programs-peers.json

On two CPU cores: 2 to 10 minutes for each pair.
"""

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks import measure, programs
from inception_jax.console import markdown_table

if TYPE_CHECKING:
    from inception_jax.programs.compile import Program

CONTENDERS = ("ours", "linen", "resnet50")
TARGETS = ("v5e-1", "h100")
STEM, CLASSES = "s16", 200
# Images a step, where no speed is published, and the side of the images in pixels.
BATCH_SIZE, IMAGE_SIZES = 128, {"ours": 64, "linen": 64, "resnet50": 224}


class Published(NamedTuple):
    """A published speed of one device: images a step, images/s, and the page."""

    batch_size: int
    images_per_second: float
    source: str


# MLPerf Training 3.0: 8 GPUs, MXNet with NVIDIA's own kernels, float16, real input. The median of
# nine epochs there is 55,975 images/s for all.
PUBLISHED = {
    ("resnet50", "h100"): Published(
        400,
        6_997,
        "github.com/mlcommons/training_results_v3.0, "
        "Dell/results/XE9680x8H100-SXM-80GB/resnet/result_0.txt, read November 26, 2026",
    )
}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    return parser.parse_args(argv)


def compile_one(contender: str, target_name: str) -> dict[str, Any]:
    """Compiles a contender for a target, and returns a row of the result."""
    from benchmarks.contenders import linen_networks, ours_step
    from inception_jax.config import Augment
    from inception_jax.programs import compile as compiling
    from inception_jax.programs import targets

    target, image_size = targets.get(target_name), IMAGE_SIZES[contender]
    published = PUBLISHED.get((contender, target_name))
    batch_size = published.batch_size if published else BATCH_SIZE
    if contender == "ours":
        settings = {"stem": STEM, "dtype": "bfloat16", "image_size": image_size}
        config = ours_step.make_config({**settings, "batch_size": batch_size})
        config.augment = Augment(crop="none", flip=False)
        run = compiling.assemble(config, target)
        program = compiling.compile_train_step(run, target, image_size)
    else:
        networks: dict[str, linen_networks.GoogLeNet | linen_networks.ResNet50] = {
            "linen": linen_networks.GoogLeNet(STEM, CLASSES),
            "resnet50": linen_networks.ResNet50(1000),
        }
        lowered = linen_networks.lower_train_step(
            networks[contender],
            targets.make_mesh(target),
            batch_size=batch_size,
            image_size=image_size,
        )
        start = time.monotonic()
        program = compiling.describe(
            lowered.compile(),
            purpose="train",
            image_size=image_size,
            batch_size=batch_size,
            compile_seconds=time.monotonic() - start,
        )
    return row(contender, target_name, program)


def row(contender: str, target_name: str, program: "Program") -> dict[str, Any]:
    """Returns the figures of a contender's step, in FLOP, bytes, and seconds."""
    from inception_jax.programs import projection, targets

    found, times = program.audit, projection.times(program, targets.get(target_name))
    published = PUBLISHED.get((contender, target_name))
    return {
        "contender": contender,
        "target": target_name,
        "batch_size": program.batch_size,
        "image_size": program.image_size,
        "flops": found.flops,
        "bytes": found.bytes,
        "bytes_accessed": program.bytes_accessed,
        "memory": program.memory.peak,
        "cycles": found.cycles,
        "counts": found.counts,
        "roofline": times.roofline,
        "fastest": times.fastest,
        "slowest": times.slowest,
        "published": published and program.batch_size / published.images_per_second,
        "published_source": published and published.source,
        "compile_seconds": round(program.compile_seconds, 1),
        **programs.provenance(target_name),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the comparison as a Markdown table."""
    lines = []
    for each in rows:
        count = each["batch_size"]
        lines.append(
            [
                f"{each['contender']}, {each['image_size']} px, {each['target']}",
                f"{count}",
                f"{each['flops'] / count / 1e9:.2f}",
                f"{each['bytes'] / count / 1e6:.1f}",
                f"{each['cycles'] / count / 1e3:,.0f}" if each["cycles"] else "",
                f"{1e3 * each['roofline']:.1f}",
                f"{1e3 * each['fastest']:.1f} to {1e3 * each['slowest']:.1f}",
                f"{1e3 * each['published']:.1f}" if each["published"] else "",
                f"{each['compile_seconds']:.0f}",
            ]
        )
    head = ["step", "batch", "GFLOP/image", "MB/image", "k cycles/image", "roofline, ms"]
    head += ["estimate, ms", "published, ms", "compiled in s"]
    return markdown_table(head, lines)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    rows = measure.stored_programs(arguments.json)
    for target in arguments.targets:
        for contender in arguments.contenders:
            versions = programs.compiler_versions(target)
            if measure.has_row(rows, contender=contender, target=target, versions=versions):
                continue
            measure.log(f"{contender}, {target}")
            rows.append(compile_one(contender, target))
            result = {
                "benchmark": "programs_peers",
                "environment": measure.environment(),
                "programs": rows,
            }
            measure.write_json(arguments.json, result)
    print(table(rows))


if __name__ == "__main__":
    measure.run(main)
