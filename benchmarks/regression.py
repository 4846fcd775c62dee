"""Compares the speed of this revision with the last stored one: `make bench`.

A short set of our own figures: training and evaluation step of GoogLeNet (paper's stem, 64 px,
batch 128) in float32 and bfloat16, reading of the decoded cache, warm start of the command to its
first step. Data are the embedded digits, so nothing has to be downloaded. So that another machine,
or a busy one, does not pass for a change of the code, each figure is divided by the rate of a
matrix product measured in the same run and type (float32 for reading and start-up) before it is
compared.
Prints what moved by more than 10%, and ends with 1 where something became slower by more than that
and by more than the spread of its measurements.

  python -m benchmarks.regression            compare with the newest of benchmarks/results/
  python -m benchmarks.regression --store    and keep the new figures there

On two CPU cores: about 4 minutes.
"""

import argparse
import json
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import input_pipeline, measure, startup, step_time, workers
from benchmarks.contenders import network

RESULTS = measure.ROOT / "benchmarks" / "results"
# Moves of less than this are taken for noise.
THRESHOLD = 0.10


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--store", action="store_true", help="add the result to --results")
    parser.add_argument(
        "--results", type=pathlib.Path, default=RESULTS, help="directory of results"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds per measurement of a step"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    return parser.parse_args(argv)


def measure_steps(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns images a second of the step, and operations a second of the matrix product."""
    flags = ["--contenders=ours", f"--rounds={arguments.rounds}", f"--seconds={arguments.seconds}"]
    settings = step_time.parse([*flags, f"--batch-size={arguments.batch_size}"])
    with workers.started(step_time.contenders(settings)) as (ready, absent):
        if absent:
            raise workers.ContenderError("; ".join(absent.values()))
        numbers = workers.take_turns(ready, step_time.commands(settings), rounds=arguments.rounds)
    figures = {}
    for (name, mode), rounds in numbers.items():
        dtype = name.rsplit(" ", 1)[1]
        work = 2 * settings.matmul_size**3 if mode == "matmul" else settings.batch_size
        rates = [work / each["seconds"] for each in rounds]
        figures[f"{mode} {dtype}"] = {
            "value": measure.summarise(rates).median,
            "unit": "operations/s" if mode == "matmul" else "images/s",
            "dtype": dtype,
            "spread": measure.summarise(rates).spread,
        }
    return figures


def measure_reading(arguments: argparse.Namespace, data_directory: str) -> dict[str, Any]:
    """Returns images a second of the reader, into host memory."""
    settings = input_pipeline.parse(
        [
            "--contenders=ours",
            "--dataset=digits",
            f"--data-directory={data_directory}",
            f"--rounds={arguments.rounds}",
            "--seconds=2",
        ]
    )
    found = input_pipeline.run(settings)["results"]
    rate = next(each["images_per_second"] for each in found if each["mode"] == "host")
    return {
        "value": rate["median"],
        "unit": "images/s",
        "dtype": "float32",
        "spread": rate["spread"],
    }


def measure_startup(arguments: argparse.Namespace, data_directory: str) -> dict[str, Any]:
    """Returns starts a second: one over the seconds from the command to its first step, warm."""
    settings = startup.parse(["--set", f"data.directory={data_directory}"])
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
        startup.start(settings, cache)
        rates = [1 / startup.start(settings, cache)[0] for _ in range(arguments.rounds)]
    return {
        "value": measure.summarise(rates).median,
        "unit": "starts/s",
        "dtype": "float32",
        "spread": measure.summarise(rates).spread,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns what is stored."""
    figures = measure_steps(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmark-data-") as data_directory:
        figures["read host"] = measure_reading(arguments, data_directory)
        figures["start warm"] = measure_startup(arguments, data_directory)
    return {
        "benchmark": "regression",
        "environment": measure.environment(),
        "settings": {
            "batch_size": arguments.batch_size,
            "rounds": arguments.rounds,
            "parameters": network.parameters("paper", step_time.CLASSES),
        },
        "figures": figures,
    }


def relative(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns each figure over the rate of the matrix product of its type."""
    return {
        name: figure["value"] / figures[f"matmul {figure['dtype']}"]["value"]
        for name, figure in figures.items()
        if not name.startswith("matmul")
    }


def changes(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Returns by how much each figure that both have moved, relative to the matrix product.

    0.2 is a fifth faster. All figures are rates: more is better.
    """
    old, new = relative(before), relative(now)
    return {name: new[name] / old[name] - 1 for name in new if name in old}


def newest(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """Returns the stored result of the latest date, with its file, or None."""
    found = [
        (path, json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("regression-*.json")
    ]
    return max(found, key=lambda each: each[1]["environment"]["date"], default=None)


def store(folder: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Writes a result under a name of its date and revision, and returns the file."""
    environment = result["environment"]
    moment = environment["date"][:19].replace(":", "").replace("-", "")
    path = folder / f"regression-{moment}-{environment['revision'].rstrip('+') or 'unknown'}.json"
    measure.write_json(path, result)
    return path


def report(
    result: Mapping[str, Any], before: Mapping[str, Any] | None, moved: Mapping[str, float]
) -> str:
    """Returns the table of figures, with what they were and by how much they moved."""
    rows = []
    for name, figure in result["figures"].items():
        old = before["figures"].get(name) if before else None
        rows.append(
            [
                name,
                f"{figure['value']:,.4g}",
                figure["unit"],
                f"{100 * figure['spread']:.0f}%",
                f"{old['value']:,.4g}" if old else "",
                f"{100 * moved[name]:+.0f}%" if name in moved else "",
            ]
        )
    return measure.table(["measurement", "now", "unit", "spread", "before", "change"], rows)


def noise(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Returns of each figure that both have the larger of the two spreads."""
    return {
        name: max(before[name]["spread"], now[name]["spread"]) for name in now if name in before
    }


def verdict(moved: Mapping[str, float], spreads: Mapping[str, float]) -> tuple[list[str], bool]:
    """Returns a line for each figure that moved too far, and whether one became slower for sure.

    Args:
      moved: by how much each figure moved.
      spreads: of each; a move that is not larger is said, but may be chance.
    """
    lines, slower = [], False
    for name, change in moved.items():
        if abs(change) > THRESHOLD:
            line = f"{name}: {'faster' if change > 0 else 'SLOWER'} by {100 * abs(change):.0f}%"
            by_chance = abs(change) <= spreads[name]
            lines.append(f"{line}, within its spread" if by_chance else line)
            slower |= change < 0 and not by_chance
    return lines, slower


def main() -> None:
    """Runs the command."""
    arguments = parse()
    stored = newest(arguments.results)
    result = run(arguments)
    measure.write_json(arguments.json, result)
    path, before = stored or (None, None)
    moved = changes(before["figures"], result["figures"]) if before else {}
    print(report(result, before, moved))
    if before:
        here, there = result["environment"], before["environment"]
        print(f"\nBefore: {path}, revision {there['revision']}, {there['date']}")
        if (here["cpu"], here["cores"]) != (there["cpu"], there["cores"]):
            print(f"Measured on another machine: {there['cores']} cores, {there['cpu']}")
    else:
        print(f"\nNo earlier result in {arguments.results}")
    lines, slower = verdict(moved, noise(before["figures"], result["figures"]) if before else {})
    print("\n".join(lines or ["No change of more than 10%"] if before else []))
    if arguments.store:
        print(f"Stored: {store(arguments.results, result)}")
    if slower:
        raise measure.BenchmarkError("slower than the stored result by more than 10%")


if __name__ == "__main__":
    measure.run(main)
