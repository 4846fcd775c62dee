"""Trains or evaluates: flags, then one call into the package."""

import json
from collections.abc import Sequence

from absl import flags

from inception_jax import cli
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
cli.require_one("workdir", "weights", message="give --workdir=DIR or --weights=FILE")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval"], "what to do: train or eval")
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "eval: best, last or the number of a step")
_PROCESSES = cli.define_processes()
cli.require("config")


def main(positional: Sequence[str]) -> None:
    """Runs the command; imports late, so that --help and mistakes in flags are answered at once."""
    cli.refuse_positional(positional)
    from inception_jax import config as configs
    from inception_jax.evaluation import evaluate
    from inception_jax.models import weights
    from inception_jax.reporting import report
    from inception_jax.runtime import devices, environment, preemption
    from inception_jax.training import loop, run, workdir

    folder = None if _WORKDIR.value is None else workdir.Workdir(_WORKDIR.value)
    origin = workdir.recall(folder, _CONFIG.value, cli.experiment(), cli.overrides(), cli.say_once)
    run.check_settings(_CONFIG.value, workdir.recorded_settings(folder), cli.say)
    config = workdir.with_recorded(folder, _CONFIG.value) if folder else _CONFIG.value
    changed = workdir.check_owner(folder, config) if folder else []
    if _MODE.value == "train":
        workdir.check_writable(workdir.needed(folder))
    tell_all = devices.initialize(
        **_PROCESSES(),
        silence=config.watch.host_silence,
        facts=lambda: environment.software() | configs.shared(config) | cli.command(),
        log=cli.say,
    )
    stop = preemption.Preemption(tell_all).requested
    if _MODE.value == "train":
        workdir.check_shared(workdir.needed(folder))
    this_run = run.build(config, log=cli.say, experiment=origin)
    if folder is None:
        result = evaluate.evaluate_weights(this_run, weights.load(cli.given(_WEIGHTS), cli.say))
    else:
        workdir.check_dataset(folder, this_run.dataset_identity())
        if _MODE.value == "eval":
            result = evaluate.evaluate_checkpoint(this_run, folder, _CHECKPOINT.value, cli.say)
        else:
            evaluator = evaluate.Evaluator(this_run)
            refresh = report.refresher(this_run, folder.path, evaluator)
            result = loop.train(
                this_run, folder, evaluator, changed=changed, on_evaluation=refresh, stop=stop
            )
            if this_run.is_lead:
                report.finish(folder.path, log=cli.say)
    if this_run.is_lead:
        print(json.dumps(result))


if __name__ == "__main__":
    huge_pages.use_huge_pages()
    cli.run(main, USAGE, settings_of="workdir")
