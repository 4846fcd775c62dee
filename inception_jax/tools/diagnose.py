"""Says what the evaluations of a run mean."""

from collections.abc import Sequence

from inception_jax import cli

USAGE = """
Judge one or more runs by their evaluations: did it learn, was it long enough, does it overfit or
underfit, is evaluation what training says? With the setting to try next, if there is one.

  python -m inception_jax.tools.diagnose DIR [DIR …]

It reads metrics.jsonl and config.json, writes diagnosis.json, and may be called while a run is
going on. The rules and their thresholds are in inception_jax/reporting/diagnosis.py.
"""


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    from inception_jax.errors import UserError
    from inception_jax.reporting import report

    if not positional:
        raise UserError(
            "give at least one run's folder: python -m inception_jax.tools.diagnose DIR"
        )
    folders = cli.local_paths(positional)
    for folder in folders:
        if len(folders) > 1:
            print(folder)
        for line in report.write_diagnosis(folder).lines():
            print(line)


if __name__ == "__main__":
    cli.run(main, USAGE)
