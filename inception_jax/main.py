"""Trains or evaluates a network: parses flags, then makes one call into the package."""

from inception_jax.runtime import huge_pages

if __name__ == "__main__":
    huge_pages.use_huge_pages()  # Restarts; the imports below are the new process's.

import functools
import json
from collections.abc import Sequence

from absl import flags

from inception_jax import cli
from inception_jax.errors import UserError

USAGE = """
Train a network, resume a run, or evaluate a checkpoint.

  python -m inception_jax.main --config FILE --workdir DIR [--config.a.b=value ...]
  python -m inception_jax.main --workdir DIR [--mode=eval] [--config.a.b=value ...]
  python -m inception_jax.main --config FILE --weights FILE --mode=eval

A setting comes from the command line (--config.a.b=value) if given there, otherwise from the run in
DIR if it was given when that run started, otherwise from --config; --print_config shows the result.
Exit codes: 0 = done; 1 = failed; 2 = usage error; 75 = stopped by a signal (TERM, INT, HUP, USR1,
USR2 or XCPU) after saving a checkpoint; run the same command to resume.
"""

_CONFIG = cli.define_config()
_WORKDIR = cli.define_path("workdir", "folder of the run, for its checkpoints, metrics and plots")
_WEIGHTS = cli.define_path("weights", "with --mode=eval: file to evaluate instead of --workdir")
_PRINT_CONFIG = flags.DEFINE_bool(
    "print_config", False, "print every setting of the run and where it comes from, then exit"
)
cli.require_one(
    "workdir", "weights", message="give --workdir=DIR or --weights=FILE", unless="print_config"
)
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do")
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", "best", "with --mode=eval: best, last or a step number"
)
cli.require_with("checkpoint", "mode", "eval")
cli.require_with("checkpoint", "workdir")
_PROCESSES = cli.define_processes()
cli.require("config")


def main(positional: Sequence[str]) -> None:
    """Runs the command; imports late, so that --help and usage errors are answered immediately."""
    cli.refuse_positional(positional)
    if _MODE.value == "train" and _WORKDIR.value is None and not _PRINT_CONFIG.value:
        raise UserError(
            "--mode=train needs --workdir=DIR; to start from a weights file, use "
            "--config.init.pretrained=FILE instead of --weights"
        )
    import jax

    from inception_jax import session

    join = functools.partial(session.join_processes, processes=_PROCESSES(), command=cli.command())
    origin = session.Origin(cli.experiment(), cli.overrides())
    if _PRINT_CONFIG.value:
        print(session.settings_in_use(_CONFIG.value, _WORKDIR.value, origin=origin))
        return
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
    cli.run(main, USAGE, settings_of="workdir")
