"""Trains variants of an experiment, of equal duration, that differ in one setting each.

A TOML file names the experiment, the settings common to all variants, and those of each. The
training command trains each variant in a separate workdir under --output. Finished variants are not
trained again and stopped ones resume, so the benchmark can be interrupted. The table shows the last
evaluation of each variant and its difference from the first, with the standard error of that
difference over seeds. With one run per variant, small differences are meaningless.

  python -m benchmarks.ablation benchmarks/ablations/tiny.toml --output runs/ablation

The file:

  experiment = "experiments/tiny.py"
  shared = ["data.holdout=5000", "train.duration=15 epochs"]
  seeds = [0, 1, 2]

  [variants]
  base = []
  "no average" = ["train.ema="]
"""

import argparse
import dataclasses
import json
import pathlib
import re
import statistics
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import command, measure
from inception_jax.console import markdown_table


@dataclasses.dataclass(frozen=True)
class Plan:
    """The variants to compare.

    Attributes:
      experiment: file of the experiment.
      shared: settings of all variants, as PATH=VALUE.
      variants: additional settings of each variant, by name.
      seeds: seeds to train each variant with, unless --seeds gives others.
    """

    experiment: str
    shared: Sequence[str]
    variants: Mapping[str, Sequence[str]]
    seeds: Sequence[int] = (0,)


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
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[], help="default: those of the file, or 0"
    )
    parser.add_argument("--platform", default="", help="--platform of the training command")
    command.add_settings(parser)
    return parser.parse_args(argv)


def train(plan: Plan, variant: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Trains a variant, unless it is finished, and returns its result.json.

    Raises:
      CommandError: if the training command fails.
    """
    folder = arguments.output.resolve() / re.sub(r"[^\w.=-]+", "_", f"{variant}-{seed}")
    settings = [*plan.shared, *arguments.set, *plan.variants[variant], f"seed={seed}"]
    _check_settings(folder, plan.experiment, settings)
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


def _check_settings(folder: pathlib.Path, experiment: str, settings: Sequence[str]) -> None:
    """Records a workdir's experiment and settings, or checks that they are the same as before.

    Raises:
      BenchmarkError: if the workdir was trained with others.
    """
    note = folder / "variant.json"
    now = {"experiment": experiment, "settings": list(settings)}
    if not note.exists():
        measure.write_json(note, now)
        return
    # Older notes do not name the experiment.
    before = {"experiment": experiment} | json.loads(note.read_text(encoding="utf-8"))
    if before != now:
        raise measure.BenchmarkError(
            f"{folder}: trained with other settings ({before['experiment']} "
            f"{' '.join(before['settings'])}); use another --output"
        )


def other_top1(run: Mapping[str, Any]) -> dict[str, float]:
    """Returns the top-1 of a run's additional evaluations by name; older results have only flip."""
    old = {"flip": run["flip_top1"]} if "flip_top1" in run else {}
    return old | {name: each["top1"] for name, each in run.get("evaluations", {}).items()}


def _difference(runs: Sequence[Mapping[str, Any]], first: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the mean difference in top-1 from the first variant, and its standard error.

    Runs of the same seed are compared: they share the order of the images, and the initial kernels.
    """
    pairs = zip(runs, first, strict=False)  # An interrupted variant has fewer.
    differences = [run["top1"] - other["top1"] for run, other in pairs]
    error = ""
    if len(differences) > 1:
        error = f"{statistics.stdev(differences) / len(differences) ** 0.5:.2f}"
    return [f"{statistics.fmean(differences):+.2f}", error]


def table(results: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Returns a Markdown table of means over seeds.

    Args:
      results: the contents of result.json of each variant's runs, the first variant's first.
    """
    averaged = {variant: [other_top1(run) for run in runs] for variant, runs in results.items()}
    names = dict.fromkeys(name for runs in averaged.values() for run in runs for name in run)
    head = ["variant", "top-1 %", "difference", "±", "low–high"]
    head += [*(f"{name} top-1 %" for name in names), "loss", "minutes"]
    rows = []
    first = next(iter(results.values()), [])
    for variant, runs in results.items():
        top1 = [run["top1"] for run in runs]
        others = [[run[name] for run in averaged[variant] if name in run] for name in names]
        rows.append(
            [
                variant,
                f"{statistics.fmean(top1):.2f}",
                *_difference(runs, first),
                f"{min(top1):.2f}–{max(top1):.2f}" if len(runs) > 1 else "",
                *(f"{statistics.fmean(each):.2f}" if each else "" for each in others),
                f"{statistics.fmean(run['loss'] for run in runs):.4f}",
                f"{statistics.fmean(run['seconds'] for run in runs) / 60:.1f}",
            ]
        )
    return markdown_table(head, rows)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    plan = read_plan(arguments.plan)
    if unknown := set(arguments.only) - set(plan.variants):
        raise measure.BenchmarkError(f"--only: unknown variants: {', '.join(sorted(unknown))}")
    seeds = arguments.seeds or plan.seeds
    results: dict[str, list[dict[str, Any]]] = {}
    try:
        for variant in arguments.only or plan.variants:
            for seed in seeds:
                result = train(plan, variant, seed, arguments)
                results.setdefault(variant, []).append(result)
    except KeyboardInterrupt:
        measure.log("interrupted; rerun the same command to continue. Finished so far:")
    measure.write_json(
        arguments.json,
        {
            "benchmark": "ablation",
            "environment": measure.environment(),
            "settings": {**dataclasses.asdict(plan), "seeds": seeds},
            "results": results,
        },
    )
    print(table(results))


if __name__ == "__main__":
    measure.run(main)
