r"""Measures the time from the training command to its first finished step, and where it goes.

Runs the real command, `python -m inception_jax.main`, as a child: cold, with an empty compilation
cache, then warm, with the cache that the cold start left; several rounds, each with a new cache.
The first step counts as finished when its metrics are in metrics.jsonl; then the child is killed.
The data set must be prepared (digits are, at once); preparing is not what is measured.

Where the time goes is read from one more start of each kind, which runs with `python -X importtime`
and JAX's debug log and is therefore slower by some percent:

  imports      importing modules, anywhere in the program
  compile      XLA, or reading its result from the cache
  trace        tracing and lowering
  rest         reading the configuration and data, placing the state, running the first step, ...

A second in which two of them go on at once, in two threads, counts for the upper one.

  python -m benchmarks.startup --experiment experiments/tiny_cpu.py \
      --set data.directory=DATA --rounds 3

On two CPU cores: about a minute a round for GoogLeNet, a third of it for the digits.
"""

import argparse
import itertools
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import command, measure

Interval = tuple[float, float]

PHASES = ("imports", "compile", "trace")
# The child lives until this report, for the cache to be whole whenever it is written.
_REPORTS = 3
_IMPORT = re.compile(r"import time: +\d+ \| +(\d+) \| (\S+)$")
_LOGGED = {
    "compile": re.compile(r"Finished XLA compilation of .* in ([\d.e-]+) sec"),
    "trace": re.compile(r"Finished (?:tracing|jaxpr to MLIR).* in ([\d.e-]+) sec"),
}
_DEBUG = {"JAX_DEBUG_LOG_MODULES": "jax._src.dispatch"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--experiment", default="experiments/digits.py")
    parser.add_argument("--platform", default="cpu", help="as the training command's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="PATH=VALUE",
        help="as --config.PATH=VALUE",
    )
    return parser.parse_args(argv)


def start(
    arguments: argparse.Namespace, cache: str, *, explained: bool = False
) -> tuple[float, list[tuple[float, str]]]:
    """Starts the command with a compilation cache; returns seconds to its first step, and messages.

    Args:
      arguments: of the command line.
      cache: folder of compiled programs.
      explained: whether the messages shall tell where the time went.
    """
    flags = [
        f"--platform={arguments.platform}",
        "--config.log.every=1 step",
        *command.overrides(arguments.set),
    ]
    environment = {"JAX_COMPILATION_CACHE_DIR": cache, **(_DEBUG if explained else {})}
    interpreter = ["-X", "importtime"] if explained else []
    with command.training(
        arguments.experiment, flags, environment=environment, interpreter=interpreter
    ) as run:
        seconds = [elapsed for elapsed, _ in itertools.islice(run.reports(), _REPORTS)]
        return seconds[0], run.messages


def phases(messages: Sequence[tuple[float, str]], total: float) -> dict[str, float]:
    """Returns the seconds of each phase until `total`, which they add up to.

    Args:
      messages: when each line arrived, in seconds, and its text.
      total: seconds until the first step was finished.
    """
    return attribute(intervals(messages), total)


def intervals(messages: Sequence[tuple[float, str]]) -> dict[str, list[Interval]]:
    """Returns when each phase went on, from messages that come at the end and say how long."""
    found: dict[str, list[Interval]] = {phase: [] for phase in PHASES}
    for end, text in messages:
        # Only a module that no other one imported is not indented; its time includes the others'.
        if match := _IMPORT.match(text.rstrip("\n")):
            found["imports"].append((end - int(match[1]) / 1e6, end))
        for phase, pattern in _LOGGED.items():
            if match := pattern.search(text):
                found[phase].append((end - float(match[1]), end))
    return found


def attribute(found: Mapping[str, Sequence[Interval]], total: float) -> dict[str, float]:
    """Gives each second of 0 to `total` to the first phase that went on then, or to "rest"."""
    ends = (end for spans in found.values() for span in spans for end in span)
    cuts = sorted({0.0, total, *(end for end in ends if 0 < end < total)})
    seconds = dict.fromkeys([*found, "rest"], 0.0)
    for begin, end in itertools.pairwise(cuts):
        middle = (begin + end) / 2
        active = [name for name, spans in found.items() if any(a < middle < b for a, b in spans)]
        seconds[active[0] if active else "rest"] += end - begin
    return seconds


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns what the JSON file holds."""
    samples: dict[str, list[float]] = {"cold": [], "warm": []}
    for index in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
            for seconds in samples.values():
                seconds.append(start(arguments, cache)[0])
        measure.say(f"round {index + 1} of {arguments.rounds} done")
    anatomy = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
        for kind in samples:
            total, messages = start(arguments, cache, explained=True)
            anatomy[kind] = {"total": total, **phases(messages, total)}
    return {
        "benchmark": "startup",
        "environment": measure.environment(),
        "settings": {"experiment": arguments.experiment, "set": arguments.set},
        "results": {
            kind: {
                "seconds": {**measure.summarise(seconds).to_dict(), "samples": seconds},
                "explained": anatomy[kind],
            }
            for kind, seconds in samples.items()
        },
    }


def report(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the table."""
    rows = []
    for kind, result in results.items():
        seconds, explained = result["seconds"], result["explained"]
        rows.append(
            [
                kind,
                f"{seconds['median']:.1f}",
                f"{seconds['low']:.1f}–{seconds['high']:.1f}",
                *(f"{explained[name]:.1f}" for name in ("total", *PHASES, "rest")),
            ]
        )
    head = ["start", "s to first step", "low–high", "explained: total", *PHASES, "rest"]
    return measure.table(head, rows)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print(f"{arguments.experiment}, {arguments.rounds} rounds\n")
    print(report(result["results"]))


if __name__ == "__main__":
    measure.run(main)
