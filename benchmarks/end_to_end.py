"""Measures what the training command loses, with real input, against its own bare step.

Runs the real command on prepared data and takes images a second from its reports in metrics.jsonl;
the first report, which contains the start, is dropped. In the same run, in turns, the bare step of
the same configuration is timed: the batch lies on the device, nothing is read, reported or saved.
The loss is 1 - (median of the command / median of the bare step).

  python -m benchmarks.end_to_end --experiment experiments/tiny_cpu.py --set data.directory=DATA

On two CPU cores: some 60 s a round (the command starts anew in each), with the defaults 4 minutes.
On a GPU: --platform gpu --experiment experiments/tiny.py --every 200 --reports 5
"""

import argparse
import copy
import json
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

from benchmarks import command, measure, workers
from benchmarks.step_time import SHARED_GPU
from inception_jax import config as configs
from inception_jax.config import Config


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Returns the settings of the command line."""
    parser = measure.parser(__doc__)
    parser.add_argument("--experiment", default="experiments/tiny_cpu.py")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each")
    parser.add_argument("--every", type=int, default=10, help="steps of a report")
    parser.add_argument("--reports", type=int, default=3, help="reports a round that count")
    parser.add_argument("--seconds", type=float, default=10.0, help="of the bare step, a round")
    parser.add_argument("--classes", type=int, default=200, help="of the data set")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="PATH=VALUE", help="as --config.PATH=VALUE"
    )
    return parser.parse_args(argv)


def experiment(path: str, settings: Sequence[str]) -> Config:
    """Returns an experiment's configuration with settings given as PATH=VALUE.

    Raises:
      ConfigError: if a setting is not valid.
    """
    made: Config = copy.deepcopy(runpy.run_path(path)["get_config"]())
    values = configs.to_dict(made)
    for setting in settings:
        name, _, text = setting.partition("=")
        *groups, last = name.split(".")
        group = values
        for each in groups:
            group = group[each]
        group[last] = text if isinstance(group[last], str) else json.loads(text.lower())
    return configs.from_dict(values)


def command_rates(arguments: argparse.Namespace) -> list[float]:
    """Returns images a second of each report of one start of the command, less the first."""
    flags = [
        f"--platform={arguments.platform}",
        f"--config.log.every.steps={arguments.every}",
        *command.overrides(arguments.set),
    ]
    rates: list[float] = []
    with command.training(arguments.experiment, flags) as run:
        for _, report in run.reports():
            rates.append(report["images_per_second"])
            if len(rates) > arguments.reports:
                break
    return rates[1:]


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures, and returns what the JSON file holds."""
    made = experiment(arguments.experiment, arguments.set)
    settings = {
        "platform": arguments.platform,
        "config": configs.to_dict(made),
        "image_size": made.data.image_size,
        "batch_size": made.train.batch_size,
        "classes": arguments.classes,
        "modes": ["train"],
    }
    contender = workers.Contender("bare step", "ours_step", settings, environment=SHARED_GPU)
    bare: list[float] = []
    whole: list[float] = []
    with workers.started([contender]) as (ready, absent):
        if absent:
            raise workers.ContenderError(absent[contender.name])
        for index in range(arguments.rounds):
            answer = ready[0].ask("train", seconds=arguments.seconds)
            bare.append(made.train.batch_size / answer["seconds"])
            whole += command_rates(arguments)
            measure.say(f"round {index + 1} of {arguments.rounds} done")
    loss = 1 - measure.summarise(whole).median / measure.summarise(bare).median
    return {
        "benchmark": "end_to_end",
        "environment": measure.environment(),
        "settings": {"experiment": arguments.experiment, "config": settings["config"]},
        "results": {
            "bare": {**measure.summarise(bare).to_dict(), "samples": bare},
            "command": {**measure.summarise(whole).to_dict(), "samples": whole},
            "loss": loss,
        },
    }


def main() -> None:
    """Runs the command."""
    arguments = parse()
    if not pathlib.Path(arguments.experiment).is_file():
        raise measure.BenchmarkError(f"--experiment={arguments.experiment}: there is no such file")
    result = run(arguments)
    measure.write_json(arguments.json, result)
    found = result["results"]
    rows = [
        [
            name,
            f"{found[name]['median']:,.1f}",
            f"{found[name]['low']:,.1f}–{found[name]['high']:,.1f}",
            f"{100 * found[name]['spread']:.0f}%",
            f"{found[name]['count']}",
        ]
        for name in ("bare", "command")
    ]
    print(measure.table([arguments.experiment, "images/s", "low–high", "spread", "samples"], rows))
    print(f"\nThe command loses {100 * found['loss']:.1f}% of the bare step's speed")


if __name__ == "__main__":
    measure.run(main)
