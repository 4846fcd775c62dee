"""Compares the speed of this revision with a stored result of the same machine: `make bench`.

A short set of measurements: training and evaluation step of GoogLeNet (paper's stem, 64 px, batch
128) in float32 and bfloat16, reading of the decoded cache, and warm start of the training command
to its first step. The data are the embedded digits, so nothing is downloaded. To keep a busy
machine from looking like a change of the code, each rate is divided by that of a matrix product
measured in the same run and dtype (float32 for reading and start-up) before comparison.

Compares with the newest result in benchmarks/results/ of the same processor, number of cores,
Python and versions of libraries: others would show what those change, not what the code does. If
there is none, says how the newest differs. Prints changes of more than 10%, and exits with 1 if
something became slower by more than 10% and by more than the spread of its measurements.

  python -m benchmarks.regression                  compare
  python -m benchmarks.regression --store          and store the new result in benchmarks/results/
  python -m benchmarks.regression --against FILE   compare with this result, wherever it is from

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
from inception_jax.console import markdown_table

RESULTS = measure.ROOT / "benchmarks" / "results"
# Smaller relative changes are considered noise.
THRESHOLD = 0.10
# Entries of the environment that must be equal for a change to be one of the code. Results of
# earlier versions lack some, so it is unknown whether they are of the same processor.
_MACHINE = ("cpu", "cpu_model", "cpu_instructions", "cores", "python", "versions")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--store", action="store_true", help="add the result to --results")
    parser.add_argument(
        "--results", type=measure.local_path, default=RESULTS, help="directory of results"
    )
    parser.add_argument(
        "--against",
        type=measure.local_path,
        metavar="FILE",
        help="result to compare with, of any machine and versions",
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


def read_result(path: pathlib.Path) -> dict[str, Any]:
    """Returns a stored result.

    Raises:
      BenchmarkError: if it cannot be read.
    """
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if result["benchmark"] == "regression":
            return result
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise measure.BenchmarkError(f"{path}: cannot be read: {error}") from error
    raise measure.BenchmarkError(f"{path}: must be a result of benchmarks.regression")


def stored_results(folder: pathlib.Path) -> list[tuple[pathlib.Path, dict[str, Any]]]:
    """Returns the files and contents of the stored results, newest first."""
    results = [(path, read_result(path)) for path in folder.glob("regression-*.json")]
    return sorted(results, key=lambda each: each[1]["environment"]["date"], reverse=True)


def differences(here: Mapping[str, Any], stored: Mapping[str, Any], batch_size: int) -> list[str]:
    """Returns a line for each difference to a stored result that may affect speed.

    Args:
      here: environment of this measurement.
      stored: the result.
      batch_size: images of a step in this measurement.
    """
    there, lines = stored["environment"], []
    if stored["settings"]["batch_size"] != batch_size:
        lines.append(f"batch size: {batch_size} here, {stored['settings']['batch_size']} there")
    for name in _MACHINE:
        now, before = here.get(name), there.get(name)
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            lines += [
                f"{package} {now.get(package, 'missing')} here, {before.get(package, 'missing')} "
                "there"
                for package in sorted({*now, *before})
                if now.get(package) != before.get(package)
            ]
        elif now != before:
            lines.append(f"{name}: {_words(now)} here, {_words(before)} there")
    return lines


def _words(value: Any) -> str:
    if value is None:
        return "not recorded"
    return " ".join(value) if isinstance(value, list) else str(value)


def describe_machine(environment: Mapping[str, Any]) -> str:
    """Returns the processor of a result and its versions, in one line."""
    parts = [f"{environment['cores']} cores", environment["cpu"]]
    if environment.get("cpu_model"):
        parts[-1] += f" ({environment['cpu_model']})"
    parts.append(" ".join(environment.get("cpu_instructions", ())) or "instructions not recorded")
    parts.append(f"Python {environment['python']}, jax {environment['versions']['jax']}")
    return "; ".join(parts)


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
    return markdown_table(["measurement", "now", "unit", "spread", "before", "change"], rows)


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


def baseline(
    arguments: argparse.Namespace, here: Mapping[str, Any]
) -> tuple[pathlib.Path | None, dict[str, Any] | None, list[str]]:
    """Returns the result to compare with, its file, and lines about the choice.

    Args:
      arguments: parsed command line.
      here: environment of this measurement.

    Raises:
      BenchmarkError: if --against cannot be read.
    """
    if arguments.against:
        chosen = read_result(arguments.against)
        others = differences(here, chosen, arguments.batch_size)
        warning = ["Measured under other conditions, so a change may not be one of the code:"]
        return arguments.against, chosen, warning + others if others else []
    results = stored_results(arguments.results)
    for path, each in results:
        if not differences(here, each, arguments.batch_size):
            return path, each, []
    if not results:
        return None, None, [f"No earlier result in {arguments.results}"]
    path, newest = results[0]
    return (
        None,
        None,
        [
            f"No result of this machine and these versions in {arguments.results}; store one with "
            "--store",
            f"The newest, {path.name}, is not compared (--against={path} would):",
            *differences(here, newest, arguments.batch_size),
        ],
    )


def main() -> None:
    """Runs the command."""
    arguments = parse()
    here = measure.environment()
    # Before the minutes of the measurement, for a wrong --against.
    path, before, notes = baseline(arguments, here)
    result = run(arguments)
    measure.write_json(arguments.json, result)
    moved = changes(before["figures"], result["figures"]) if before else {}
    print(report(result, before, moved))
    print(f"\nNow: revision {here['revision']}, {describe_machine(here)}")
    if before:
        there = before["environment"]
        print(f"Before: {path}, revision {there['revision']}, {there['date']}")
        print(f"  {describe_machine(there)}")
    print("\n".join(notes))
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
