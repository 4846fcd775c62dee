"""Measures what it costs the training step to say of itself what is finite.

The step is step_time's, compiled twice: as it is, and with constants in the place of the flags for
loss and gradients (`training.nonfinite.finite_flags`). The two take turns, a step each.

  python -m benchmarks.finite_flags --dtype bfloat16 --json benchmarks/results/finite_flags.json

On two CPU cores: a minute to compile, then two steps a turn, with the defaults 3 minutes in all.
"""

import argparse
from collections.abc import Sequence
from typing import Any
from unittest import mock

from benchmarks import measure, step_time


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    step_time.add_network_flags(parser)
    parser.add_argument("--dtype", choices=step_time.DTYPES, default="float32")
    parser.add_argument("--turns", type=int, default=120, help="turns of each variant")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns what the JSON file holds."""
    import jax.numpy as jnp

    from benchmarks.contenders import ours_step
    from inception_jax.runtime import devices
    from inception_jax.training import nonfinite

    devices.initialize(platform=arguments.platform)
    made = ours_step.make_run({**step_time.network_settings(arguments), "dtype": arguments.dtype})
    steps = {"with": ours_step.repeated_step(made)[1]}
    with mock.patch.object(nonfinite, "finite_flags", lambda loss, grads: jnp.ones(2, bool)):
        steps["without"] = ours_step.repeated_step(made)[1]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(arguments.turns):
        for name in sorted(steps, reverse=bool(turn % 2)):
            seconds[name].append(steps[name].timed(1))
    found = {name: measure.summarise(values) for name, values in seconds.items()}
    return {
        "benchmark": "finite_flags",
        "environment": measure.environment(),
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "results": {
            "seconds": {name: summary.to_dict() for name, summary in found.items()},
            "ratio": found["with"].median / found["without"].median,
        },
    }


def report(results: dict[str, Any]) -> str:
    """Returns the table, and the ratio."""
    rows = [
        [name, *(f"{1e3 * each[key]:.1f}" for key in ("median", "low", "high"))]
        for name, each in results["seconds"].items()
    ]
    table = measure.table(["flags", "ms/step", "lowest", "highest"], rows)
    return f"{table}\n\nratio of medians: {results['ratio']:.4f}"


def main() -> None:
    """Runs the command."""
    arguments = parse()
    result = run(arguments)
    measure.write_json(arguments.json, result)
    print(report(result["results"]))


if __name__ == "__main__":
    measure.run(main)
