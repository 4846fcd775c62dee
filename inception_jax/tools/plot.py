"""Draws the plots of a run again, or the curves of several runs together."""

from collections.abc import Sequence

from inception_jax import cli

USAGE = """
Draw the curves of one or more runs into DIR/plots/; and, where an evaluation has left its
predictions there, the accuracy by class, the confusion matrix, the calibration and the time spent.

  python -m inception_jax.tools.plot DIR [DIR …]

With --output the curves of all of them are drawn together instead, into that folder:

  python -m inception_jax.tools.plot DIR DIR [DIR …] --output=FOLDER

It may be called while the run is going on.
"""

_OUTPUT = cli.define_path("output", "folder for plots with a curve of each run")


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    from inception_jax.errors import UserError
    from inception_jax.reporting import report

    if not positional:
        raise UserError("give at least one run's folder: python -m inception_jax.tools.plot DIR")
    folders = cli.local_paths(positional)
    if _OUTPUT.value is not None:
        for path in report.plot_comparison(folders, _OUTPUT.value):
            print(path)
        return
    for folder in folders:
        for path in report.plot(folder):
            print(path)


if __name__ == "__main__":
    cli.run(main, USAGE)
