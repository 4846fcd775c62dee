"""Writes the report of a run again, or compares several runs."""

import pathlib
from collections.abc import Sequence

from inception_jax import cli

USAGE = """
Write the report of a run, a page for any browser that needs no network:

  python -m inception_jax.tools.report DIR

or a page that compares several runs:

  python -m inception_jax.tools.report DIR DIR [DIR …] [--output=FILE]

Only the folders are read: neither data set nor checkpoint is needed. It may be called while a run
is going on; training refreshes DIR/report.html itself, at each evaluation.
"""

_OUTPUT = cli.define_path(
    "output",
    "the file to write; default: DIR/report.html, of several runs report.html in this folder",
)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    from inception_jax.errors import UserError
    from inception_jax.reporting import report
    from inception_jax.storage.workdir import Workdir

    if not positional:
        raise UserError("give at least one run's folder: python -m inception_jax.tools.report DIR")
    folders, output = cli.local_paths(positional), _OUTPUT.value
    if len(folders) == 1:
        print(report.write_page(folders[0], output))
    else:
        page = output or Workdir(pathlib.Path()).report
        print(report.write_comparison(folders, page))


if __name__ == "__main__":
    cli.run(main, USAGE)
