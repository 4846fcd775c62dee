"""Measures the cost of checking loss and gradients for non-finite values in the training step.

The step of step_time is compiled twice: unchanged, and with constants in place of the flags for
loss and gradients (`training.nonfinite.finite_flags`). The variants take turns, one step each.

  python -m benchmarks.finite_flags --dtype bfloat16 --json benchmarks/results/finite_flags.json

On two CPU cores: a minute to compile, then two steps per turn; 3 minutes with the defaults.
"""

import argparse
from collections.abc import Sequence
from typing import Any
from unittest import mock

from benchmarks import measure, step_time
from inception_jax.console import markdown_table


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    step_time.add_network_flags(parser)
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="float32")
    parser.add_argument("--turns", type=int, default=120, help="turns of each variant")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
    import jax.numpy as jnp

    from benchmarks.contenders import ours_step
    from inception_jax.runtime import devices
    from inception_jax.training import nonfinite

    devices.initialize(platform=arguments.platform)
    built_run = ours_step.make_run(
        {**step_time.network_settings(arguments), "dtype": arguments.dtype}
    )
    steps = {"with": ours_step.timed_step(built_run)[1]}
    with mock.patch.object(nonfinite, "finite_flags", lambda loss, grads: jnp.ones(2, bool)):
        steps["without"] = ours_step.timed_step(built_run)[1]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.turns):
        for name in sorted(steps, reverse=bool(turn % 2)):
            seconds[name].append(steps[name].timed(1))
    summaries = {name: measure.summarize(values) for name, values in seconds.items()}
    return {
        "benchmark": "finite_flags",
        "environment": measure.environment(),
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "results": {
            "seconds": {name: summary.to_dict() for name, summary in summaries.items()},
            "ratio": summaries["with"].median / summaries["without"].median,
        },
    }


def report(results: dict[str, Any]) -> str:
    """Returns the table and the ratio."""
    rows = [
        [name, *(f"{1e3 * each[key]:.1f}" for key in ("median", "low", "high"))]
        for name, each in results["seconds"].items()
    ]
    table = markdown_table(["flags", "ms/step", "lowest", "highest"], rows)
    return f"{table}\n\nratio of medians: {results['ratio']:.4f}"


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print(report(result["results"]))


if __name__ == "__main__":
    measure.run(main)
