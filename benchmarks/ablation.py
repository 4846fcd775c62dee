"""Trains variants of an experiment, of equal duration, that differ in one setting each.

A TOML file names the experiment, the settings common to all variants, and those of each. The
training command trains each variant in a separate workdir under --output. Finished variants are not
trained again and stopped ones resume, so the benchmark can be interrupted. The table shows the last
evaluation of each variant and its difference from the first. With one run per variant, differences
smaller than a few times the spread between seeds (--seeds) are meaningless.

  python -m benchmarks.ablation benchmarks/ablations/tiny.toml --output runs/ablation

The file:

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
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import command, measure


@dataclasses.dataclass(frozen=True)
class Plan:
    """The variants to compare.

    Attributes:
      experiment: file of the experiment.
      shared: settings of all variants, as PATH=VALUE.
      variants: additional settings of each variant, by name.
    """

    experiment: str
    shared: Sequence[str]
    variants: Mapping[str, Sequence[str]]


def read_plan(path: pathlib.Path) -> Plan:
    """Reads a file of variants.

    Raises:
      BenchmarkError: if it cannot be read.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        plan = Plan(**values)
    except (OSError, ValueError, TypeError) as error:
        raise measure.BenchmarkError(
            f"{path}: cannot be read as a file of variants: {error}"
        ) from error
    if not plan.variants:
        raise measure.BenchmarkError(f"{path}: contains no variants; add a [variants] table")
    return plan


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("plan", type=measure.local_path, help="TOML file of variants")
    parser.add_argument(
        "--output", type=measure.local_path, required=True, help="directory for the workdirs"
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="train only these")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--platform", default="", help="--platform of the training command")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="PATH=VALUE",
        help="settings, as in --config.PATH=VALUE",
    )
    return parser.parse_args(argv)


def train(plan: Plan, variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains a variant, unless it is finished, and returns its result.json.

    Raises:
      CommandError: if the training command fails.
    """
    folder = arguments.output.resolve() / re.sub(r"[^\w.=-]+", "_", f"{variant}-{seed}")
    settings = [*plan.shared, *arguments.set, *plan.variants[variant], f"seed={seed}"]
    _check_settings(folder, settings)
    if not (folder / "result.json").exists():
        flags = [
            f"--config={plan.experiment}",
            f"--workdir={folder}",
            f"--platform={arguments.platform}",
            *command.overrides(settings),
        ]
        measure.log(f"=== {variant}, seed {seed}")
        command.train(variant, flags)
    result: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return result


def _check_settings(folder: pathlib.Path, settings: Sequence[str]) -> None:
    """Records a workdir's settings, or checks that they are the same as before.

    Raises:
      BenchmarkError: if the workdir was trained with other settings.
    """
    note = folder / "variant.json"
    if not note.exists():
        measure.write_json(note, {"settings": list(settings)})
    elif (before := json.loads(note.read_text(encoding="utf-8"))["settings"]) != list(settings):
        raise measure.BenchmarkError(
            f"{folder}: trained with other settings ({' '.join(before)}); use another --output"
        )


def flip_top1(run: Mapping[str, Any]) -> float | None:
    """Returns the top-1 of the horizontal-flip average, which older results name differently."""
    return run.get("evaluations", {}).get("flip", {}).get("top1", run.get("flip_top1"))


def table_rows(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[list[str]]:
    """Returns the table rows: means over seeds, and the difference in top-1 from the first."""
    rows = []
    first: float | None = None
    for variant, runs in results.items():
        top1 = measure.summarize(run["top1"] for run in runs)
        mean = sum(run["top1"] for run in runs) / len(runs)
        first = mean if first is None else first
        flip = [value for run in runs if (value := flip_top1(run)) is not None]
        rows.append(
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
    return rows


def main() -> None:
    """Runs the command."""
    arguments = parse()
    plan = read_plan(arguments.plan)
    if unknown := set(arguments.only) - set(plan.variants):
        raise measure.BenchmarkError(f"--only: unknown variants: {', '.join(sorted(unknown))}")
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        for variant in arguments.only or plan.variants:
            for seed in arguments.seeds:
                results.setdefault(variant, []).append(train(plan, variant, seed, arguments))
    except KeyboardInterrupt:
        measure.log("interrupted; rerun the same command to continue. Finished so far:")
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
    print(measure.markdown_table(head, table_rows(results)))


if __name__ == "__main__":
    measure.run(main)
