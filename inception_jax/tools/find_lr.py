"""Finds a learning rate with a range test."""

from inception_jax.runtime import huge_pages

if __name__ == "__main__":
    huge_pages.use_huge_pages()  # Restarts; the imports below are the new process's.

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from inception_jax import cli, console

if TYPE_CHECKING:
    from inception_jax.training.lr_range_test import Point

USAGE = """
Find a learning rate: run a short training with an increasing rate and watch the loss.

  python -m inception_jax.tools.find_lr --config experiments/tiny.py --output DIR
  python -m inception_jax.tools.find_lr --config experiments/tiny.py --output DIR \\
      --low=1e-4 --high=3 --steps=400 --config.train.batch_size=512

Trains as the experiment does, from its first step, but with its own schedule and without mixing or
smoothing labels. Writes find_lr.png and find_lr.json, which has every step, to DIR. The proposed
peak rate is a third of the rate with the lowest smoothed loss, or the first rate at which the loss
has made 90% of its drop, whichever is lower. It is valid for this batch size, optimizer and model
only. If the curve allows no proposal, the message says why and what to change (exit code 2).
"""

_CONFIG = cli.define_config()
_OUTPUT = cli.define_path("output", "folder for find_lr.json and find_lr.png", required=True)
_LOW = flags.DEFINE_float("low", 1e-5, "first learning rate", lower_bound=1e-12)
_HIGH = flags.DEFINE_float(
    "high", 10.0, "last learning rate; must be greater than --low", upper_bound=1e6
)
_STEPS = flags.DEFINE_integer(
    "steps", 200, "number of steps; at least 30 for each factor of ten between the rates", 10
)
_PLATFORM = cli.define_platform()
cli.require("config")


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax import config as configs
    from inception_jax.errors import UserError
    from inception_jax.reporting import report
    from inception_jax.runtime import devices
    from inception_jax.storage import access
    from inception_jax.training import run
    from inception_jax.training.lr_range_test import (
        chance_loss,
        propose,
        range_test,
        record,
        reliability_warnings,
    )

    if configs.is_open(_CONFIG.value, "schedule.learning_rate"):
        _CONFIG.value.schedule.learning_rate = _LOW.value  # The test sets its own rates.
    configs.validate(_CONFIG.value)
    if _LOW.value >= _HIGH.value:
        raise UserError(
            f"--low={_LOW.value:g} and --high={_HIGH.value:g}: --low must be less than --high; "
            "omit both for 1e-05 and 10"
        )
    output = cli.given(_OUTPUT)
    access.check_output_folder(output, "output")
    devices.initialize(platform=_PLATFORM.value, log=console.log)
    this_run = run.assemble(_CONFIG.value, log=console.log)
    points = range_test(
        this_run,
        low=_LOW.value,
        high=_HIGH.value,
        steps=_STEPS.value,
        on_step=_log_progress,
    )
    proposal = propose(points)
    problems: list[str] = []
    if proposal:
        problems = reliability_warnings(
            points,
            proposal,
            steps=_STEPS.value,
            high=_HIGH.value,
            chance=chance_loss(this_run),
        )
    values = record(this_run.config, points, proposal, problems)
    files = report.write_range_test(output, values)
    for path in files:
        print(path)
    if proposal is None:
        raise UserError(
            f"the loss did not fall between the learning rates {points[0].rate:.3g} and "
            f"{points[-1].rate:.3g}, so none is proposed. Use a smaller --low, a larger --high or "
            "more --steps; if that does not help, check that the labels match the images"
        )
    if problems:
        raise UserError(
            f"the loss was lowest at the learning rate {proposal.least:.2g}, but none is "
            "proposed:\n  " + "\n  ".join(problems)
        )
    print(f"--config.schedule.learning_rate={proposal.rate:g}")


def _log_progress(point: "Point") -> None:
    """Logs the test's progress, about 20 times."""
    if point.step % max(1, _STEPS.value // 20) == 0:
        console.log(
            f"step {point.step}/{_STEPS.value}: rate {point.rate:.3g}, loss {point.loss:.4g}, "
            f"smoothed {point.smoothed_loss:.4g}"
        )


if __name__ == "__main__":
    cli.run(main, USAGE)
