"""Draws the curves of a run again."""

import pathlib
from collections.abc import Sequence

from inception_jax import cli

USAGE = """
Draw the curves of one or more runs from their metrics.jsonl into DIR/plots/.

  python -m inception_jax.tools.plot DIR [DIR …]

It may be called while the run is going on.
"""


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    from inception_jax.errors import UserError
    from inception_jax.evaluation import plots

    if not positional:
        raise UserError("give at least one run's folder: python -m inception_jax.tools.plot DIR")
    for folder in positional:
        for path in plots.plot_run(pathlib.Path(folder)):
            print(path)


if __name__ == "__main__":
    cli.run(main, USAGE)
