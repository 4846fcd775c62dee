"""Measures how much slower the training command, with real input, is than its bare step.

Runs the training command on prepared data and measures the time between its reports in
metrics.jsonl, without the first report, which includes the start: images per second of wall time,
so no evaluation or save may fall into it (--every, --reports). "reported" is the command's own
images_per_second, which counts training time only. In the same benchmark, in turns, the bare step
of the same configuration is timed: the batch is on the device, nothing is read, reported or saved.
The loss is 1 - (median of the command / median of the bare step).

  python -m benchmarks.end_to_end --experiment experiments/tiny_cpu.py --set data.directory=DATA

On two CPU cores: about 60 s per round, which restarts the command; 4 minutes with the defaults.
On a GPU: --platform gpu --experiment experiments/tiny.py --every 200 --reports 5
"""

import argparse
import ast
import contextlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

from benchmarks import command, measure, workers
from benchmarks.step_time import SHARED_GPU
from inception_jax import cli, load_config
from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.console import markdown_table


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument("--experiment", default="experiments/tiny_cpu.py")
    parser.add_argument("--platform", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds; both take one turn per round"
    )
    parser.add_argument("--every", type=int, default=10, help="steps per report")
    parser.add_argument("--reports", type=int, default=3, help="reports counted per round")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="seconds of the bare step per round"
    )
    parser.add_argument("--classes", type=int, default=200, help="classes of the dataset")
    command.add_settings(parser)
    return parser.parse_args(argv)


def load_experiment(path: str, settings: Sequence[str]) -> Config:
    """Loads an experiment's configuration and applies settings given as PATH=VALUE.

    Raises:
      ConfigError: if a setting is not valid.
    """
    words = {name for name, kind, _ in configs.leaves() if kind is str}
    values: dict[str, Any] = {}
    for argument in cli.with_tuples(command.overrides(settings)):
        name, _, text = argument.removeprefix("--config.").partition("=")
        values[name] = text
        if name not in words:
            with contextlib.suppress(ValueError, SyntaxError):  # Refused for its type.
                is_boolean = text.lower() in ("true", "false")
                values[name] = ast.literal_eval(text.title() if is_boolean else text)
    return load_config(measure.ROOT / path, values)


def command_rates(arguments: argparse.Namespace, batch_size: int) -> dict[str, list[float]]:
    """Returns images per second between the reports of one start of the command.

    Returns:
      "command": over wall time; "reported": by the command itself.
    """
    flags = [
        f"--platform={arguments.platform}",
        f"--config.log.every={arguments.every} steps",
        *command.overrides(arguments.set),
    ]
    with command.training(arguments.experiment, flags) as run:
        first = itertools.islice(run.reports(), arguments.reports + 1)
        reports = [report for _, report in first]
    rates: dict[str, list[float]] = {"command": [], "reported": []}
    for before, after in itertools.pairwise(reports):
        images = (after["step"] - before["step"]) * batch_size
        rates["command"].append(images / (after["seconds"] - before["seconds"]))
        rates["reported"].append(after["images_per_second"])
    return rates


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the benchmark and returns the contents of the JSON file."""
    made = load_experiment(arguments.experiment, arguments.set)
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
    with workers.running([contender]) as (ready, absent):
        if absent:
            raise workers.ContenderError(absent[contender.name])
        for index in range(arguments.rounds):
            answer = ready[0].ask("train", seconds=arguments.seconds)
            rates["bare"].append(made.train.batch_size / answer["seconds"])
            for name, several in command_rates(arguments, made.train.batch_size).items():
                rates[name] += several
            measure.log(f"round {index + 1} of {arguments.rounds} done")
    medians = {name: measure.summarize(several).median for name, several in rates.items()}
    return {
        "benchmark": "end_to_end",
        "environment": measure.environment(),
        "settings": {"experiment": arguments.experiment, "config": settings["config"]},
        "results": {
            name: {**measure.summarize(several).to_dict(), "samples": several}
            for name, several in rates.items()
        },
        "loss": 1 - medians["command"] / medians["bare"],
    }


def main() -> None:
    """Runs the command."""
    arguments = parse()
    if not pathlib.Path(arguments.experiment).is_file():
        raise measure.BenchmarkError(f"--experiment={arguments.experiment}: file not found")
    result = run(arguments)
    measure.write_json(arguments.json, result)
    results = result["results"]
    rows = [
        [
            name,
            f"{results[name]['median']:,.1f}",
            f"{results[name]['low']:,.1f}–{results[name]['high']:,.1f}",
            f"{100 * results[name]['spread']:.0f}%",
            f"{results[name]['count']}",
        ]
        for name in results
    ]
    print(markdown_table([arguments.experiment, "images/s", "low–high", "spread", "samples"], rows))
    print(f"\nThe command is {100 * result['loss']:.1f}% slower than the bare step")


if __name__ == "__main__":
    measure.run(main)
