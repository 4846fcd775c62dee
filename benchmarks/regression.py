"""Compares the speed of this revision with the last stored result: `make bench`.

A short set of measurements: training and evaluation step of GoogLeNet (paper's stem, 64 px, batch
128) in float32 and bfloat16, reading of the decoded cache, and warm start of the training command
to its first step. The data are the embedded digits, so nothing is downloaded. To keep another or a
busy machine from looking like a change of the code, each rate is divided by that of a matrix
product measured in the same run and dtype (float32 for reading and start-up) before comparison.

Prints changes of more than 10%, and exits with 1 if something became slower by more than 10% and by
more than the spread of its measurements.

  python -m benchmarks.regression            compare with the newest result in benchmarks/results/
  python -m benchmarks.regression --store    and store the new result there

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
# Smaller relative changes are considered noise.
THRESHOLD = 0.10


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--store", action="store_true", help="add the result to --results")
    parser.add_argument(
        "--results", type=measure.local_path, default=RESULTS, help="directory of results"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=3.0, help="seconds per measurement of a step"
    )
    parser.add_argument("--batch-size", type=int, default=128)
    return parser.parse_args(argv)


def measure_steps(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns images per second of the steps, and operations per second of the matrix product."""
    flags = ["--contenders=ours", f"--rounds={arguments.rounds}", f"--seconds={arguments.seconds}"]
    settings = step_time.parse([*flags, f"--batch-size={arguments.batch_size}"])
    with workers.running(step_time.contenders(settings)) as (ready, absent):
        if absent:
            raise workers.ContenderError("; ".join(absent.values()))
        numbers = workers.take_turns(ready, step_time.commands(settings), rounds=arguments.rounds)
    figures = {}
    for (name, mode), rounds in numbers.items():
        dtype = name.rsplit(" ", 1)[1]
        work = 2 * settings.matmul_size**3 if mode == "matmul" else settings.batch_size
        rates = [work / each["seconds"] for each in rounds]
        figures[f"{mode} {dtype}"] = {
            "value": measure.summarize(rates).median,
            "unit": "operations/s" if mode == "matmul" else "images/s",
            "dtype": dtype,
            "spread": measure.summarize(rates).spread,
        }
    return figures


def measure_reading(arguments: argparse.Namespace, data_directory: str) -> dict[str, Any]:
    """Returns images per second read into host memory."""
    settings = input_pipeline.parse(
        [
            "--contenders=ours",
            "--dataset=digits",
            f"--data-directory={data_directory}",
            f"--rounds={arguments.rounds}",
            "--seconds=2",
        ]
    )
    results = input_pipeline.run(settings)["results"]
    rate = next(each["images_per_second"] for each in results if each["mode"] == "host")
    return {
        "value": rate["median"],
        "unit": "images/s",
        "dtype": "float32",
        "spread": rate["spread"],
    }


def measure_startup(arguments: argparse.Namespace, data_directory: str) -> dict[str, Any]:
    """Returns warm starts per second: the inverse of the seconds from command to first step."""
    settings = startup.parse(["--set", f"data.directory={data_directory}"])
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
        startup.start(settings, cache)
        rates = [1 / startup.start(settings, cache)[0] for _ in range(arguments.rounds)]
    return {
        "value": measure.summarize(rates).median,
        "unit": "starts/s",
        "dtype": "float32",
        "spread": measure.summarize(rates).spread,
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
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


def relative_rates(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Returns each rate divided by that of the matrix product of the same dtype."""
    return {
        name: figure["value"] / figures[f"matmul {figure['dtype']}"]["value"]
        for name, figure in figures.items()
        if not name.startswith("matmul")
    }


def changes(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Returns the relative change of each rate in both results, relative to the matrix product.

    0.2 means 20% faster.
    """
    old, new = relative_rates(before), relative_rates(now)
    return {name: new[name] / old[name] - 1 for name in new if name in old}


def newest_result(folder: pathlib.Path) -> tuple[pathlib.Path, dict[str, Any]] | None:
    """Returns the file and contents of the latest stored result, or None."""
    results = [
        (path, json.loads(path.read_text(encoding="utf-8")))
        for path in folder.glob("regression-*.json")
    ]
    return max(results, key=lambda each: each[1]["environment"]["date"], default=None)


def store(folder: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """Writes a result to a file named after its date and revision, and returns the file."""
    environment = result["environment"]
    moment = environment["date"][:19].replace(":", "").replace("-", "")
    path = folder / f"regression-{moment}-{environment['revision'].rstrip('+') or 'unknown'}.json"
    measure.write_json(path, result)
    return path


def report(
    result: Mapping[str, Any], before: Mapping[str, Any] | None, moved: Mapping[str, float]
) -> str:
    """Returns the table of rates, earlier rates and changes."""
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
    return measure.markdown_table(
        ["measurement", "now", "unit", "spread", "before", "change"], rows
    )


def max_spreads(
    before: Mapping[str, Mapping[str, Any]], now: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """Returns the larger spread of each rate in both results."""
    return {
        name: max(before[name]["spread"], now[name]["spread"]) for name in now if name in before
    }


def verdict(moved: Mapping[str, float], spreads: Mapping[str, float]) -> tuple[list[str], bool]:
    """Returns a line per rate that changed too much, and whether one is significantly slower.

    Args:
      moved: relative change of each rate.
      spreads: spread of each rate; changes within it are reported but may be chance.
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
    stored = newest_result(arguments.results)
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
    lines, slower = verdict(
        moved, max_spreads(before["figures"], result["figures"]) if before else {}
    )
    print("\n".join(lines or ["No change of more than 10%"] if before else []))
    if arguments.store:
        print(f"Stored: {store(arguments.results, result)}")
    if slower:
        raise measure.BenchmarkError("slower than the stored result by more than 10%")


if __name__ == "__main__":
    measure.run(main)
