r"""Measures the time from the training command to its first finished step, by phase.

Runs `python -m inception_jax.main` as a child process: cold, with an empty compilation cache, then
warm, with the cache of the cold start; several rounds, each with a new cache. The first step counts
as finished when its metrics are in metrics.jsonl; then the process is killed. The dataset must be
prepared (the digits are prepared immediately), because preparation is not measured.

The phases are measured in one more start of each kind, with `python -X importtime` and JAX's debug
log, which makes it a few percent slower:

  imports      importing modules, anywhere in the program
  compile      XLA compilation, or loading from the cache
  trace        tracing and lowering
  rest         reading the configuration and data, placing the state, running the first step, ...

Time in which two phases overlap, in two threads, counts toward the one listed first.

  python -m benchmarks.startup --experiment experiments/tiny_cpu.py \
      --set data.directory=DATA --rounds 3

On two CPU cores: about a minute per round for GoogLeNet, a third of that for the digits.
"""

import argparse
import itertools
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import command, measure
from inception_jax.console import markdown_table

Interval = tuple[float, float]

PHASES = ("imports", "compile", "trace")
# Reports until the process is killed, so that the cache is complete whenever it is written.
_REPORTS = 3
_IMPORT = re.compile(r"import time: +\d+ \| +(\d+) \| (\S+)$")
_LOGGED = {
    "compile": re.compile(r"Finished XLA compilation of .* in ([\d.e-]+) sec"),
    "trace": re.compile(r"Finished (?:tracing|jaxpr to MLIR).* in ([\d.e-]+) sec"),
}
_DEBUG = {"JAX_DEBUG_LOG_MODULES": "jax._src.dispatch"}


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--experiment", default="experiments/digits.py")
    parser.add_argument("--platform", default="cpu", help="--platform of the training command")
    parser.add_argument("--rounds", type=int, default=3)
    command.add_settings(parser)
    return parser.parse_args(argv)


def start(
    arguments: argparse.Namespace, cache: str, *, explained: bool = False
) -> tuple[float, list[tuple[float, str]]]:
    """Starts the command; returns the seconds to its first step, and its messages.

    Args:
      arguments: parsed command line.
      cache: directory of the compilation cache.
      explained: whether the messages should show the time of the phases.
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
    """Returns the seconds of each phase, which add up to `total`.

    Args:
      messages: time of arrival in seconds, and text, of each line.
      total: seconds until the first step was finished.
    """
    return attribute(intervals(messages), total)


def intervals(messages: Sequence[tuple[float, str]]) -> dict[str, list[Interval]]:
    """Returns the intervals of each phase, from messages logged at its end with its duration."""
    spans: dict[str, list[Interval]] = {phase: [] for phase in PHASES}
    for end, text in messages:
        # Modules not imported by another one are unindented; their time includes nested imports.
        if match := _IMPORT.match(text.rstrip("\n")):
            spans["imports"].append((end - int(match[1]) / 1e6, end))
        for phase, pattern in _LOGGED.items():
            if match := pattern.search(text):
                spans[phase].append((end - float(match[1]), end))
    return spans


def attribute(
    intervals_by_phase: Mapping[str, Sequence[Interval]], total: float
) -> dict[str, float]:
    """Attributes each second from 0 to `total` to the first active phase, or to "rest"."""
    ends = (end for spans in intervals_by_phase.values() for span in spans for end in span)
    cuts = sorted({0.0, total, *(end for end in ends if 0 < end < total)})
    seconds = dict.fromkeys([*intervals_by_phase, "rest"], 0.0)
    for begin, end in itertools.pairwise(cuts):
        middle = (begin + end) / 2
        active = [
            name
            for name, spans in intervals_by_phase.items()
            if any(a < middle < b for a, b in spans)
        ]
        seconds[active[0] if active else "rest"] += end - begin
    return seconds


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
    samples: dict[str, list[float]] = {"cold": [], "warm": []}
    for index in range(arguments.rounds):
        with tempfile.TemporaryDirectory(prefix="benchmark-cache-") as cache:
            for seconds in samples.values():
                seconds.append(start(arguments, cache)[0])
        measure.log(f"round {index + 1} of {arguments.rounds} done")
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
                "seconds": {**measure.summarize(seconds).to_dict(), "samples": seconds},
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
    return markdown_table(head, rows)


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print(f"{arguments.experiment}, {arguments.rounds} rounds\n")
    print(report(result["results"]))


if __name__ == "__main__":
    measure.run(main)
