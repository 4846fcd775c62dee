"""Trains or evaluates: flags, then one call into the package."""

import functools
import json
from collections.abc import Sequence

from absl import flags

from inception_jax import cli
from inception_jax.errors import UserError
from inception_jax.runtime import huge_pages

USAGE = """
Train a network, or evaluate a checkpoint of it.

  python -m inception_jax.main --config experiments/tiny.py --workdir DIR [--config.a.b=value ...]
  python -m inception_jax.main --workdir DIR [--mode=eval] [--config.a.b=value ...]
  python -m inception_jax.main --config experiments/tiny.py --weights FILE --mode=eval

A setting is what --config.a.b says; else, with the run's own --config or without any, what the run
in DIR has; else what --config says. Exit code 0: done; 1: failed; 2: usage error, the message says
how to fix it; 75: saved on TERM, INT, HUP, USR1, USR2 or XCPU, run it again to resume.
"""

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path("workdir", "folder of the run: checkpoints, metrics, plots")
_WEIGHTS = cli.define_path("weights", "eval: file of weights, instead of --workdir")
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "print every setting the run would use and where it comes from, and exit"
)
cli.require_one(
    "workdir", "weights", message="give --workdir=DIR or --weights=FILE", unless="print_config"
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do: train or eval")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "eval: best, last or the number of a step")
_PROCESSES = cli.define_processes()
cli.require("config")


def main(positional: Sequence[str]) -> None:
    """Runs the command; imports late, so that --help and mistakes in flags are answered at once."""
    cli.refuse_positional(positional)
    if _PRINT_CONFIG.value:
        from inception_jax import session

        origin = session.Origin(cli.experiment(), cli.overrides())
        print(session.settings_in_use(_CONFIG.value, _WORKDIR.value, origin=origin))
        return
    if _MODE.value == "train" and _WORKDIR.value is None:
        raise UserError(
            "--mode=train needs --workdir=DIR; to start from a file of weights, give it as "
            "--config.init.pretrained=FILE instead of --weights"
        )
    import jax

    from inception_jax import session

    join = functools.partial(session.join_processes, processes=_PROCESSES(), command=cli.command())
    origin = session.Origin(cli.experiment(), cli.overrides())
    if _WORKDIR.value is None:
        result = session.evaluate_weights(_CONFIG.value, cli.given(_WEIGHTS), join=join)
    elif _MODE.value == "train":
        result = session.train_and_evaluate(_CONFIG.value, _WORKDIR.value, origin=origin, join=join)
    else:
        result = session.evaluate_checkpoint(
            _CONFIG.value, _WORKDIR.value, _CHECKPOINT.value, origin=origin, join=join
        )
    if jax.process_index() == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    huge_pages.use_huge_pages()
    cli.run(main, USAGE, settings_of="workdir")
