"""Diagnoses a run from its evaluations."""

from collections.abc import Sequence

from inception_jax import cli

USAGE = """
Diagnose one or more runs from their evaluations.

  python -m inception_jax.tools.diagnose DIR [DIR …]

Reports whether a run learned, trained long enough, overfits or underfits, and whether evaluation
agrees with training, and names the setting to try next. Reads metrics.jsonl and config.json and
writes diagnosis.json; also works while a run is training. The rules and their thresholds are in
inception_jax/reporting/diagnosis.py.
"""


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    from inception_jax.errors import UserError
    from inception_jax.reporting import report

    if not positional:
        raise UserError("no workdir given; run python -m inception_jax.tools.diagnose DIR")
    folders = cli.positional_paths(positional)
    for folder in folders:
        if len(folders) > 1:
            print(folder)
        for line in report.write_diagnosis(folder).lines():
            print(line)


if __name__ == "__main__":
    cli.run(main, USAGE)
