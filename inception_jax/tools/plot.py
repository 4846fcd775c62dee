"""Redraws the plots of a run, or plots the curves of several runs together."""

from collections.abc import Sequence

from inception_jax import cli

USAGE = """
Plot the curves of one or more runs into DIR/plots/:

  python -m inception_jax.tools.plot DIR [DIR …]

and, if an evaluation has saved predictions, the accuracy by class, the confusion matrix, the
calibration and the time spent.

With --output, plot the curves of all runs together into that folder instead:

  python -m inception_jax.tools.plot DIR DIR [DIR …] --output=FOLDER

Also works while a run is training.
"""

_OUTPUT = cli.define_path("output", "folder for plots that compare the runs")


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    from inception_jax.errors import UserError
    from inception_jax.reporting import report

    if not positional:
        raise UserError("no workdir given; run python -m inception_jax.tools.plot DIR")
    folders = cli.positional_paths(positional)
    if _OUTPUT.value is not None:
        for path in report.plot_comparison(folders, _OUTPUT.value):
            print(path)
        return
    for folder in folders:
        for path in report.plot(folder):
            print(path)


if __name__ == "__main__":
    cli.run(main, USAGE)
