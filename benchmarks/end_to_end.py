"""Measures what the training command loses, with real input, against its own bare step.

Runs the real command on prepared data and takes the time between its reports in metrics.jsonl, the
first of which, with the start, is dropped: images a second of all the time that passes, so neither
evaluation nor saving may fall into it (--every, --reports). "Reported" is the command's own figure,
images_per_second, which counts only what it takes for training. In the same run, in turns, the bare
step of the same configuration is timed: the batch lies on the device, nothing is read, reported or
saved. The loss is 1 - (median of the command / median of the bare step).

  python -m benchmarks.end_to_end --experiment experiments/tiny_cpu.py --set data.directory=DATA

On two CPU cores: some 60 s a round (the command starts anew in each), with the defaults 4 minutes.
On a GPU: --platform gpu --experiment experiments/tiny.py --every 200 --reports 5
"""

import argparse
import copy
import itertools
import json
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

from benchmarks import command, measure, workers
from benchmarks.step_time import SHARED_GPU
from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.errors import ConfigError


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
        if name not in configs.flatten(values):
            raise ConfigError(configs.unknown_field(name))
        *groups, last = name.split(".")
        group = values
        for each in groups:
            group = group[each]
        group[last] = text if isinstance(group[last], str) else json.loads(text.lower())
    return configs.from_dict(values)


def command_rates(arguments: argparse.Namespace, batch_size: int) -> dict[str, list[float]]:
    """Returns images a second between the reports of one start of the command, less the first.

    Returns:
      "command": of all the time that passed; "reported": as the command says.
    """
    flags = [
        f"--platform={arguments.platform}",
        f"--config.log.every={arguments.every} steps",
        *command.overrides(arguments.set),
    ]
    with command.training(arguments.experiment, flags) as run:
        found = itertools.islice(run.reports(), arguments.reports + 1)
        reports = [report for _, report in found]
    rates: dict[str, list[float]] = {"command": [], "reported": []}
    for before, now in itertools.pairwise(reports):
        images = (now["step"] - before["step"]) * batch_size
        rates["command"].append(images / (now["seconds"] - before["seconds"]))
        rates["reported"].append(now["images_per_second"])
    return rates


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
    contender = workers.Contender(
        "bare step", "benchmarks.contenders.ours_step", settings, environment=SHARED_GPU
    )
    rates: dict[str, list[float]] = {"bare": [], "command": [], "reported": []}
    with workers.started([contender]) as (ready, absent):
        if absent:
            raise workers.ContenderError(absent[contender.name])
        for index in range(arguments.rounds):
            answer = ready[0].ask("train", seconds=arguments.seconds)
            rates["bare"].append(made.train.batch_size / answer["seconds"])
            for name, several in command_rates(arguments, made.train.batch_size).items():
                rates[name] += several
            measure.say(f"round {index + 1} of {arguments.rounds} done")
    medians = {name: measure.summarise(several).median for name, several in rates.items()}
    return {
        "benchmark": "end_to_end",
        "environment": measure.environment(),
        "settings": {"experiment": arguments.experiment, "config": settings["config"]},
        "results": {
            name: {**measure.summarise(several).to_dict(), "samples": several}
            for name, several in rates.items()
        },
        "loss": 1 - medians["command"] / medians["bare"],
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
        for name in found
    ]
    print(measure.table([arguments.experiment, "images/s", "low–high", "spread", "samples"], rows))
    print(f"\nThe command loses {100 * result['loss']:.1f}% of the bare step's speed")


if __name__ == "__main__":
    measure.run(main)
