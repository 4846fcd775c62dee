"""Trains variants of an experiment, of equal length, that differ in one setting each.

A file names the experiment, what all variants share and what each changes. Each is trained by the
real command in a folder of its own under --output; one that has finished there is not trained
again, and one that was stopped goes on, so the whole can be interrupted. The table has the last
evaluation of each, and its difference to the first variant. One run a variant: differences of less
than a few times the spread between seeds (--seeds) mean nothing.

  python -m benchmarks.ablation benchmarks/ablations/tiny.toml --output runs/ablation

The file, in TOML:

  experiment = "experiments/tiny.py"
  shared = ["data.holdout=5000", "train.duration=15 epochs"]

  [variants]
  base = []
  "no average" = ["train.ema="]
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import command, measure


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
      experiment: the experiment's file.
      shared: settings of all variants, as PATH=VALUE.
      variants: settings of each variant besides, by its name.
    """

    experiment: str
    shared: Sequence[str]
    variants: Mapping[str, Sequence[str]]


def read_plan(path: pathlib.Path) -> Plan:
    """Reads a file of variants.

    Raises:
      BenchmarkError: if it cannot be read as one.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**values)
    except (OSError, ValueError, TypeError) as error:
        raise measure.BenchmarkError(f"{path}: is no file of variants: {error}") from error
    if not plan.variants:
        raise measure.BenchmarkError(f"{path}: names no variants")
    return plan


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("plan", type=pathlib.Path, help="the file of variants")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the workdirs")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="train just these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--platform", default="", help="as of the training command")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="PATH=VALUE", help="as --config.PATH=VALUE"
    )
    return parser.parse_args(argv)


def train(plan: Plan, variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains a variant, unless that was done before, and returns its result.json.

    Raises:
      CommandError: if the training command fails.
    """
    folder = arguments.output.resolve() / re.sub(r"[^\w.=-]+", "_", f"{variant}-{seed}")
    settings = [*plan.shared, *arguments.set, *plan.variants[variant], f"seed={seed}"]
    _claim(folder, settings)
    if not (folder / "result.json").exists():
        flags = [
            f"--config={plan.experiment}",
            f"--workdir={folder}",
            f"--platform={arguments.platform}",
            *command.overrides(settings),
        ]
        measure.say(f"=== {variant}, seed {seed}")
        called = [sys.executable, "-m", "inception_jax.main", *flags]
        done = subprocess.run(called, cwd=measure.ROOT, stdout=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise command.CommandError(f"{variant}: the command ended with {done.returncode}")
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def _claim(folder: pathlib.Path, settings: Sequence[str]) -> None:
    """Notes what a folder is for, so that no result is taken for that of other settings.

    Raises:
      BenchmarkError: if it was made for other ones.
    """
    note = folder / "variant.json"
    if not note.exists():
        measure.write_json(note, {"settings": list(settings)})
    elif (found := json.loads(note.read_text(encoding="utf-8"))["settings"]) != list(settings):
        raise measure.BenchmarkError(
            f"{folder}: was trained with other settings, {' '.join(found)}; give another --output"
        )


def _flip_top1(run: Mapping[str, Any]) -> float | None:
    """Returns the top-1 of the mirror average, which older results name differently."""
    return run.get("evaluations", {}).get("flip", {}).get("top1", run.get("flip_top1"))


def rows(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Returns the table's rows: means over seeds, and the difference in top-1 to the first."""
    found = []
    first: float | None = None
    for variant, runs in results.items():
        top1 = measure.summarise(run["top1"] for run in runs)
        mean = sum(run["top1"] for run in runs) / len(runs)
        first = mean if first is None else first
        flip = [value for run in runs if (value := _flip_top1(run)) is not None]
        found.append(
            [
                variant,
                f"{mean:.2f}",
                f"{mean - first:+.2f}",
                f"{top1.low:.2f}–{top1.high:.2f}" if len(runs) > 1 else "",
                f"{sum(flip) / len(flip):.2f}" if flip else "",
                f"{sum(run['loss'] for run in runs) / len(runs):.4f}",
                f"{sum(run['seconds'] for run in runs) / len(runs) / 60:.1f}",
            ]
        )
    return found


def main() -> None:
    """Runs the command."""
    arguments = parse()
    plan = read_plan(arguments.plan)
    if unknown := set(arguments.only) - set(plan.variants):
        raise measure.BenchmarkError(f"--only: there is no variant {', '.join(sorted(unknown))}")
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        for variant in arguments.only or plan.variants:
            for seed in arguments.seeds:
                results.setdefault(variant, []).append(train(plan, variant, seed, arguments))
    except KeyboardInterrupt:
        measure.say("interrupted; the same command goes on. What has finished:")
    measure.write_json(
        arguments.json,
        {
            "benchmark": "ablation",
            "environment": measure.environment(),
            "settings": {**dataclasses.asdict(plan), "seeds": arguments.seeds},
            "results": results,
        },
    )
    head = ["variant", "top-1 %", "difference", "low–high", "flip top-1 %", "loss", "minutes"]
    print(measure.table(head, rows(results)))


if __name__ == "__main__":
    measure.run(main)
