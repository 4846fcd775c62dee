"""Compiles the experiments for the targets of tools.compile, and records which programs compile.

Each experiment is compiled for each target with the batch size of its recipe and with
`--per-device` images a device: the training step at each image size, and the evaluation. Each is a
separate process of `python -m inception_jax.tools.compile`, which needs the compiler, but no
device. Combinations that `--json` holds already, compiled by the same versions, are left out, so a
stopped command continues.

  python -m benchmarks.programs --json benchmarks/results/programs.json
  python -m benchmarks.programs --experiments tiny --targets v5e-8 --details benchmarks/results

Nothing is run on a device: memory and cycles are the compiler's figures; milliseconds, images/s and
the minutes of the whole recipe are estimates, if reading keeps up.
On two CPU cores: 5 to 15 minutes for each combination of tiny.py.
"""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import measure
from inception_jax.console import markdown_table

EXPERIMENTS = (
    "tiny",
    "tiny_adam",
    "tiny_base",
    "tiny_cpu",
    "tiny_deeper",
    "tiny_paper",
    "tiny_steps",
    "cifar10_mini",
    "digits",
    "imagenet",
    "image_folder",
)
TARGETS = ("v4-8", "v5e-1", "v5e-8", "v5p-8", "v6e-1", "v6e-8", "tpu7x-8")
# The data set's size, for experiments with the user's own images.
UNKNOWN_SIZES = {"image_folder": ("--classes=10", "--examples=10000")}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), metavar="TARGET")
    parser.add_argument(
        "--per-device", type=int, default=128, help="images a device; 0: the recipe's batch alone"
    )
    parser.add_argument(
        "--recipe-batch",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to compile for the recipe's batch",
    )
    parser.add_argument(
        "--details",
        type=measure.local_path,
        metavar="FOLDER",
        help="also write all figures of each combination to programs-EXPERIMENT-TARGET-BATCH.json",
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="limit for each combination (default: 60)"
    )
    parser.add_argument("flags", nargs="*", help="more flags of tools.compile, after --")
    return parser.parse_args(argv)


def combinations(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yields experiments, targets and batch sizes (0: left open by the recipe)."""
    from inception_jax.programs import targets

    for experiment in arguments.experiments:
        recipe = importlib.import_module(f"experiments.{experiment}").get_config().train.batch_size
        for name in arguments.targets:
            devices = targets.get(name).devices
            sizes = [recipe] if arguments.recipe_batch and recipe % devices == 0 else []
            if arguments.per_device:
                sizes.append(arguments.per_device * devices)
            for size in dict.fromkeys(sizes):
                yield experiment, name, size


def compile_one(
    arguments: argparse.Namespace, experiment: str, target: str, batch_size: int
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Compiles an experiment for a target.

    Returns:
      A row for each program, or one with the error's text; and the record of tools.compile, or
      None if it failed.
    """
    base = {
        "experiment": experiment,
        "target": target,
        "batch_size": batch_size,
        **provenance(target),
    }
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "record.json"
        command = [
            *(sys.executable, "-m", "inception_jax.tools.compile"),
            *("--config", f"experiments/{experiment}.py", f"--target={target}"),
            *(f"--config.train.batch_size={batch_size}", f"--json={output}"),
            *UNKNOWN_SIZES.get(experiment, ()),
            *arguments.flags,
        ]
        try:
            done = subprocess.run(
                command,
                cwd=measure.ROOT,
                capture_output=True,
                text=True,
                timeout=60 * arguments.minutes,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [base | {"error": f"stopped after {arguments.minutes:g} minutes"}], None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return [base | {"error": lines[-1]}], None
        record = json.loads(output.read_text(encoding="utf-8"))
    return [base | _figures(program, record) for program in record["programs"]], record


def _figures(program: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    seconds = program["seconds"]
    return {
        "program": program["name"],
        "compile_seconds": program["compile_seconds"],
        "memory_gib": round(program["memory"]["peak"] / 2**30, 2),
        "gflop": round(program["flops"] / 1e9, 1),
        "gigabytes": round(program["bytes"] / 1e9, 2),
        "mega_cycles": program["cycles"] and round(program["cycles"] / 1e6, 2),
        "all_reduces": program["collectives"].get("all-reduce", {}).get("count", 0),
        "milliseconds": [round(1e3 * seconds[end], 2) for end in ("fastest", "slowest")],
        "images_per_second": [round(each) for each in record["recipe"]["images_per_second"]],
        "minutes": [round(each, 2) for each in record["recipe"]["minutes"]],
    }


def compiler_versions(target: str) -> dict[str, str]:
    """Returns the versions of the packages that compile for a target."""
    from inception_jax.programs import report, targets

    return report.versions(targets.get(target))


def provenance(target: str) -> dict[str, Any]:
    """Returns when, of which revision, and with which versions a target's program is compiled."""
    environment = measure.environment()
    return {
        "versions": compiler_versions(target),
        "date": environment["date"],
        "revision": environment["revision"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the programs, or the errors, as a Markdown table."""
    lines = []
    for row in rows:
        where = [f"{row['experiment']}, {row['target']}", f"{row['batch_size']:,}"]
        if "error" in row:
            lines.append([*where, row["error"], *[""] * 6])
            continue
        cycles, trains = row["mega_cycles"], row["program"].startswith("training")
        lines.append(
            [
                *where,
                row["program"].rpartition(", batch")[0],
                f"{row['memory_gib']:.2f}",
                f"{cycles:.1f}" if cycles else "",
                "{:.1f} to {:.1f}".format(*row["milliseconds"]),
                "{:,} to {:,}".format(*row["images_per_second"]) if trains else "",
                "{:.1f} to {:.1f}".format(*row["minutes"]) if trains else "",
                f"{row['compile_seconds']:.0f}",
            ]
        )
    head = ["experiment, target", "batch", "program", "GiB", "M cycles", "ms"]
    head += ["images/s", "minutes", "compiled in s"]
    return markdown_table(head, lines)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    rows = measure.stored_programs(arguments.json)
    for experiment, target, batch_size in combinations(arguments):
        if measure.has_row(
            rows,
            experiment=experiment,
            target=target,
            batch_size=batch_size,
            versions=compiler_versions(target),
        ):
            continue
        measure.log(f"{experiment}, {target}, batch {batch_size}")
        made, record = compile_one(arguments, experiment, target, batch_size)
        rows += made
        environment = measure.environment()
        if record and arguments.details:
            name = f"programs-{experiment}-{target}-{batch_size}.json"
            measure.write_json(
                arguments.details / name,
                {"benchmark": "programs", "environment": environment, **record},
            )
        measure.write_json(
            arguments.json, {"benchmark": "programs", "environment": environment, "programs": rows}
        )
    print(table(rows))


if __name__ == "__main__":
    measure.run(main)
