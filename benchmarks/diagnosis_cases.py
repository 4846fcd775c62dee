r"""Tests the diagnosis on runs with known faults, and the effect of following its advice.

Each case trains a small network in seconds with one fault: a learning rate that is far off, too few
steps, a network too narrow, shuffled labels, … The diagnosis is recorded, its advice is followed
once in a new workdir, and both results are compared. A case fails if its verdict is not one of the
true ones, or if the advice made the evaluation worse.

  python -m benchmarks.diagnosis_cases --output runs/diagnosis \
      --json benchmarks/results/diagnosis_cases.json

Finished cases in --output are not trained again.
"""

import argparse
import copy
import dataclasses
import importlib
import json
import math
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import measure
from inception_jax import config as configs
from inception_jax.config import Config
from inception_jax.console import markdown_table

if TYPE_CHECKING:
    from inception_jax.reporting.diagnosis import Diagnosis

# A validation loss higher by this fraction counts as worse, unless accuracy is better.
WORSE_LOSS = 0.05


@dataclasses.dataclass(frozen=True)
class Case:
    """A run with a known fault.

    Attributes:
      fault: description of the fault.
      verdicts: the true verdicts.
      settings: changed settings, by dotted path.
      experiment: module of experiments/ to start from, also the key in SHARED.
      data: writes the images below a directory; None: the embedded digits.
      stop: step after which the run is interrupted; 0: not interrupted.
      frozen: whether evaluation uses the initial BatchNorm statistics.
    """

    fault: str
    verdicts: Sequence[str]
    settings: Mapping[str, Any]
    experiment: str = "digits"
    data: Callable[[pathlib.Path], None] | None = None
    stop: int = 0
    frozen: bool = False


# The digits at their native size, on which a narrow network trains in seconds.
SHARED: dict[str, dict[str, Any]] = {
    "digits": {
        "data.image_size": 8,
        "model.width": 0.125,
        "model.dropout": 0.2,
        "train.batch_size": 64,
        "evaluation.train_eval_examples": 360,
        "evaluation.every": "2 epochs",
        "checkpoint.every": "100 epochs",
        "log.every": "20 steps",
    },
    "image_folder": {
        "data.image_size": 32,
        "model.width": 0.125,
        "model.name": "mini_googlenet",
        "model.stem": "paper",
        "evaluation.train_eval_examples": 480,
        "checkpoint.every": "100 epochs",
    },
}
RATE = 0.05


def write_striped_images(
    folder: pathlib.Path, *, counts: Sequence[int], size: int, noise: float, shuffled: bool = False
) -> None:
    """Writes noisy images of stripes, whose angle depends on the class, as CLASS/NUMBER.png.

    Args:
      folder: output directory.
      counts: number of images of each class.
      size: side, pixels.
      noise: standard deviation of a pixel relative to the amplitude of the stripes.
      shuffled: whether labels are independent of the images.
    """
    from PIL import Image

    random = np.random.default_rng(0)
    down, across = np.mgrid[:size, :size]
    labels = np.repeat(np.arange(len(counts)), counts)
    drawn = random.permutation(labels) if shuffled else labels
    for number, (label, kind) in enumerate(zip(labels, drawn, strict=True)):
        # Within a quarter turn, because training mirrors half of the images.
        angle = math.pi / 2 * (kind / (len(counts) - 1) + random.normal(scale=0.05))
        wave = across * math.cos(angle) + down * math.sin(angle)
        stripes = np.sin(0.9 * wave + random.uniform(0, 2 * math.pi))
        pixels = stripes[..., None] + noise * random.normal(size=(size, size, 3))
        path = folder / f"class_{label}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(np.clip(128 + 40 * pixels, 0, 255))).save(path)


def _striped_images(**settings: Any) -> Callable[[pathlib.Path], None]:
    return lambda folder: write_striped_images(folder, **settings)


NEWCOMER = _striped_images(counts=(200, 200, 200), size=32, noise=2.0)
RECIPE = {"train.batch_size": 32, "schedule.learning_rate": 0.025}

FINE, HARDLY, SHORT = "no fault found", "hardly learned", "too short to judge"
OVER, UNDER, APART = "overfitting", "underfitting", "evaluation differs from training"

CASES = {
    "rate x 0.01": Case("rate", [HARDLY], {"schedule.learning_rate": RATE / 100}),
    "rate x 0.1": Case("rate", [UNDER], {"schedule.learning_rate": RATE / 10}),
    "rate x 1": Case("nothing", [FINE], {}),
    # This works too, thanks to BatchNorm.
    "rate x 10": Case("rate", [FINE], {"schedule.learning_rate": RATE * 10}),
    "rate x 100": Case("rate", [HARDLY], {"schedule.learning_rate": RATE * 100}),
    "no rate": Case("rate", [HARDLY], {"schedule.learning_rate": 1e-12}),
    "2 of 12 epochs": Case("length", [SHORT], {"train.duration": "2 epochs"}),
    "3 of 12 epochs": Case("length", [SHORT], {"train.duration": "3 epochs"}),
    "interrupted": Case("length", [SHORT], {}, stop=100),
    "few images": Case(
        "100 images",
        [OVER],
        {
            "data.holdout": 1340,
            "augment.crop": "none",
            "model.dropout": 0.0,
            "optimizer.weight_decay": 0.0,
            "train.duration": "100 epochs",
            "evaluation.every": "20 epochs",
        },
    ),
    "thin": Case("width", [UNDER, HARDLY], {"model.width": 0.015}),
    "statistics": Case("statistics of the start", [APART], {}, frozen=True),
    "momentum": Case("BatchNorm's momentum", [APART], {"model.norm_momentum": 0.999}),
    "mixing": Case(
        "mixing, smoothing, dropout",
        [UNDER, HARDLY],
        {"augment.mixup": 5.0, "train.label_smoothing": 0.6, "model.dropout": 0.9},
    ),
    "shuffled": Case(
        "labels",
        [OVER, HARDLY],
        {},
        "image_folder",
        _striped_images(counts=(200, 200, 200), size=32, noise=1.0, shuffled=True),
    ),
    "newcomer": Case(
        "10 of 60 epochs",
        [SHORT],
        RECIPE | {"train.duration": "10 epochs"},
        "image_folder",
        NEWCOMER,
    ),
}


def case_config(case: Case) -> tuple[Config, dict[str, Any]]:
    """Returns a case's configuration, and the experiment's values of the changed settings."""
    config = importlib.import_module(f"experiments.{case.experiment}").get_config()
    for path, value in SHARED[case.experiment].items():
        configs.put(config, path, value)
    own = {path: configs.get(config, path) for path in case.settings}
    for path, value in case.settings.items():
        configs.put(config, path, value)
    return config, own


def train(
    config: Config,
    folder: pathlib.Path,
    *,
    own: Mapping[str, Any],
    stop: int = 0,
    frozen: bool = False,
) -> "Diagnosis":
    """Trains a run to its end or to step `stop`, unless done before, and diagnoses it."""
    import jax
    import jax.numpy as jnp

    from inception_jax import session
    from inception_jax.errors import Preempted, RunError
    from inception_jax.evaluation.evaluate import Evaluator
    from inception_jax.reporting import report
    from inception_jax.storage.workdir import Workdir
    from inception_jax.training import run
    from inception_jax.training.workdir import load_previous_run

    done = folder / f"trained-{stop}"
    if not done.exists():
        folder.mkdir(parents=True, exist_ok=True)
        this = run.assemble(config, log=measure.log)
        evaluator = Evaluator(this)

        def evaluate(variables: Any, names: Any) -> Any:
            if frozen:
                start = {"mean": jnp.zeros_like, "var": jnp.ones_like}
                stats = jax.tree_util.tree_map_with_path(
                    lambda path, leaf: start[path[-1].key](leaf), variables["batch_stats"]
                )
                variables = {**variables, "batch_stats": stats}
            return evaluator(variables, names)

        workdir = Workdir(folder)
        try:
            session.train_run(
                this,
                load_previous_run(workdir),
                evaluate,
                experiment={"file": config.name, "own": own},
                on_evaluation=lambda result, evaluated: report.publish(
                    workdir, result, evaluated.predictions, this.dataset.evaluation
                ),
                stop=lambda step: step == stop,
            )
        except (Preempted, RunError) as error:
            measure.log(str(error))
        # Each run compiles a different step.
        jax.clear_caches()
        done.touch()
    return report.write_diagnosis(folder)


def proposed_rate(config: Config, folder: pathlib.Path) -> float | None:
    """Returns the rate proposed by a range test with the defaults of find_lr; None if none."""
    from inception_jax.reporting import report
    from inception_jax.training import lr_range_test, run

    stored = folder / "find_lr.json"
    if not stored.exists():
        this = run.assemble(config, log=measure.log)
        steps, high = 200, 10.0
        points = lr_range_test.range_test(this, low=1e-5, high=high, steps=steps)
        proposal, doubts = lr_range_test.propose(points), []
        if proposal:
            chance = lr_range_test.chance_loss(this)
            doubts = lr_range_test.reliability_warnings(
                points, proposal, steps=steps, high=high, chance=chance
            )
        values = lr_range_test.record(config, points, proposal, doubts)
        report.write_range_test(folder, values)
    proposed = json.loads(stored.read_text())["proposal"]
    return proposed and proposed["rate"]


def advised_changes(config: Config, diagnosis: "Diagnosis", folder: pathlib.Path) -> dict[str, Any]:
    """Returns the settings that a diagnosis advises to change; empty if none."""
    if diagnosis.advice:
        return {diagnosis.advice.setting: diagnosis.advice.value}
    if any("tools.find_lr" in note for note in diagnosis.notes) and (
        rate := proposed_rate(config, folder)
    ):
        return {"schedule.learning_rate": rate}
    return {}


def outcome(diagnosis: "Diagnosis") -> dict[str, Any]:
    """Returns the JSON form of a diagnosis."""
    stats = diagnosis.evidence
    numbers = {name: getattr(stats, name) for name in ("loss", "top1", "train_top1", "noise")}
    return {
        "verdict": diagnosis.verdict,
        "reason": diagnosis.reason,
        "notes": list(diagnosis.notes),
        "advice": diagnosis.advice and dataclasses.asdict(diagnosis.advice),
        **{name: round(value, 4) for name, value in numbers.items() if math.isfinite(value)},
    }


def changed_settings(config: Config) -> dict[str, Any]:
    """Returns the settings that differ from the defaults, except for the location of the data."""
    return {
        path: configs.get(config, path)
        for path, _, _ in configs.leaves()
        if configs.get(config, path) != configs.get(Config(), path)
        and path not in ("data.source", "data.directory")
    }


def recorded_evidence(folder: pathlib.Path) -> dict[str, Any]:
    """Returns the data from which a run's diagnosis can be recomputed."""
    from inception_jax.reporting import run_record
    from inception_jax.storage.workdir import Workdir

    run = run_record.read(Workdir(folder))
    keys = ("step", "epoch", "split", "loss", "top1", "count")
    lines = [{key: row[key] for key in keys if key in row} for row in run.rows]
    assert run.config is not None
    return {
        "config": changed_settings(run.config),
        "own_settings": (run.experiment or {}).get("own", {}),
        "classes": run.dataset["classes"],
        "train_examples": run.dataset["training examples"],
        "label_counts": run.label_counts,
        # As in metrics.jsonl.
        "lines": [json.dumps(line) for line in lines],
    }


def try_case(name: str, case: Case, output: pathlib.Path) -> dict[str, Any]:
    """Trains and diagnoses a case, and follows the advice once."""
    folder = output / name.replace(" ", "_")
    config, own = case_config(case)
    config.data.directory = str(output / "data")
    if case.data:
        images_folder = folder / "pictures"
        if not images_folder.exists():
            case.data(images_folder)
        config.data.source, config.data.directory = str(images_folder), str(folder / "data")
    configs.validate(config)
    runs, frozen = folder / "runs", case.frozen
    diagnosis = train(config, runs / "first", own=own, stop=case.stop, frozen=frozen)
    first = outcome(diagnosis)
    result: dict[str, Any] = {
        "fault": case.fault,
        "settings": dict(case.settings),
        "first": first,
        "recorded": recorded_evidence(runs / "first"),
    }
    after: dict[str, Any] | None = None
    if case.stop:
        result["followed"] = {"resumed": "the same command"}
        if not (runs / "resumed").exists():
            shutil.copytree(runs / "first", runs / "resumed")
        after = outcome(train(config, runs / "resumed", own=own))
    elif changes := advised_changes(config, diagnosis, runs / "first"):
        result["followed"] = changes
        changed = copy.deepcopy(config)
        for path, value in changes.items():
            configs.put(changed, path, value)
        own |= {path: configs.get(config, path) for path in changes if path not in own}
        name = " ".join(f"{path}={value}" for path, value in changes.items())
        after = outcome(train(changed, runs / name, own=own, frozen=frozen))
    result |= {
        "after": after,
        "true verdict": first["verdict"] in case.verdicts,
        "worse": after is not None and is_worse(first, after),
    }
    return result


def is_worse(first: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Returns whether an evaluation became worse: less accurate, or with a higher loss."""
    if "loss" not in first or "loss" not in after:
        return "loss" in first
    noise = first["noise"]
    if abs(after["top1"] - first["top1"]) > noise:
        return after["top1"] < first["top1"]
    return after["loss"] > (1 + WORSE_LOSS) * first["loss"]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = measure.make_parser(__doc__)
    parser.add_argument(
        "--output", type=measure.local_path, required=True, help="directory for the runs"
    )
    parser.add_argument("--only", nargs="+", default=list(CASES), metavar="CASE", choices=CASES)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the cases and returns the contents of the JSON file."""
    from inception_jax.runtime import devices

    devices.initialize()
    results = {}
    for name in arguments.only:
        results[name] = try_case(name, CASES[name], arguments.output)
        measure.log(report({"results": {name: results[name]}}))
    return {
        "benchmark": "diagnosis_cases",
        "environment": measure.environment(),
        "results": results,
    }


def report(results: Mapping[str, Any]) -> str:
    """Returns the table."""
    rows = []
    for name, each in results["results"].items():
        first, after = each["first"], each["after"]
        changes = " ".join(f"{path}={value}" for path, value in each.get("followed", {}).items())
        rows.append(
            [
                name,
                each["fault"],
                first["verdict"] + ("" if each["true verdict"] else " (WRONG)"),
                changes or "–",
                _figures(first),
                _figures(after) + (" (WORSE)" if each["worse"] else ""),
            ]
        )
    head = ["run", "fault", "verdict", "advice followed", "top-1 and loss", "afterwards"]
    return markdown_table(head, rows)


def _figures(each: Mapping[str, Any] | None) -> str:
    if each is None or "loss" not in each:
        return "–"
    return f"{each['top1']:.1f}%, {each['loss']:.3f}"


def main() -> None:
    """Runs the command."""
    arguments = parse()
    results = run(arguments)
    print(report(results))
    measure.write_json(arguments.json, results)
    wrong = [
        name
        for name, each in results["results"].items()
        if each["worse"] or not each["true verdict"]
    ]
    if wrong:
        raise measure.BenchmarkError(
            f"wrong verdict, or advice made the run worse: {', '.join(wrong)}"
        )


if __name__ == "__main__":
    measure.run(main)
