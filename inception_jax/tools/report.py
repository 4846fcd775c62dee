"""Rewrites the report of a run, or compares several runs."""

import pathlib
from collections.abc import Sequence

from inception_jax import cli

USAGE = """
Write the report of a run, a self-contained HTML page:

  python -m inception_jax.tools.report DIR

or a page that compares several runs:

  python -m inception_jax.tools.report DIR DIR [DIR …] [--output=FILE]

Reads only the workdirs; needs neither the data set nor a checkpoint. Also works while a run is
training; training itself updates DIR/report.html at each evaluation.
"""

_OUTPUT = cli.define_path(
    "output",
    "file to write; default: DIR/report.html, for several runs report.html in this folder",
)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    from inception_jax.errors import UserError
    from inception_jax.reporting import report
    from inception_jax.storage.workdir import Workdir

    if not positional:
        raise UserError("no workdir given; run python -m inception_jax.tools.report DIR")
    folders, output = cli.positional_paths(positional), _OUTPUT.value
    if len(folders) == 1:
        print(report.write_page(folders[0], output))
    else:
        page = output or Workdir(pathlib.Path()).report
        print(report.write_comparison(folders, page))


if __name__ == "__main__":
    cli.run(main, USAGE)
