r"""Trains recipes by name and draws their accuracy by the compute of their training.

Compute does not depend on the machine, so runs of any hardware are compared (docs/results.md says
how it is counted). A TOML file names the recipes, each with its experiment and settings, and the
published results of others. Each finished run is a row of a JSON file, from which the plot and the
printed table are made:

  python -m benchmarks.frontier --list
  nice -n 19 python -m benchmarks.frontier tiny-0.3 tiny-0.8 --seeds 0 1 2 --output runs/frontier \
      --set data.directory=DATA
  python -m benchmarks.frontier

The first command lists the recipes; the last only draws. A run may take several sittings: stopped
by Ctrl-C or SIGTERM, it saves, and the same command continues. Rows that exist are not trained
again. Rows of one recipe have the same settings: others are refused, also if a run was resumed with
them, and need a recipe of their own.

A finished run elsewhere becomes a row with --recorded FOLDER. Without config.json in it, its
settings are taken to be the recipe's.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tomllib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks import ablation, command, compute, measure
from inception_jax.console import markdown_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from inception_jax.config import Config, Record

_RECIPES = measure.ROOT / "benchmarks" / "frontier.toml"
_ROWS = measure.ROOT / "benchmarks" / "results" / "frontier.json"
_PLOT = measure.ROOT / "docs" / "frontier.png"
# Start of the paths of settings that do not change the accuracy of the last step, one image each.
_WITHOUT_EFFECT = (
    "name",
    "seed",
    "data.source",
    "data.directory",
    "data.cache",
    "data.workers",
    "data.on_change",
    "train.auto_size",
    "train.on_nonfinite",
    "train.nonfinite_limit",
    "evaluation.batch_size",
    "evaluation.every",
    "evaluation.flip_tta",
    "evaluation.metrics",
    "evaluation.train_eval_examples",
    "evaluations",
    "checkpoint.",
    "bucket.",
    "log.",
    "watch.",
    "expected.",
)
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "numpy")
# The Okabe-Ito palette, distinguishable with the common kinds of color blindness.
_OURS = "#D55E00"
_PEERS = ("#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#333333")
_MARKERS = ("s", "^", "D", "v", "P", "X")

# A row of the JSON file.
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe to train.

    Attributes:
      data: the data set, as in the plot.
      experiment: file of the experiment.
      aim: what a run is to show, named before it starts.
      settings: settings by path.
      classes, examples: of the data set.
    """

    data: str
    experiment: str
    aim: str
    settings: Mapping[str, Any]
    classes: int
    examples: int

    def config(self) -> "Config":
        """Returns the settings of a run.

        Raises:
          UserError: if a setting is unknown or invalid.
        """
        from inception_jax import load_config

        return load_config(measure.ROOT / self.experiment, self.settings)

    def flags(self) -> list[str]:
        """Returns the flags of the training command, as PATH=VALUE."""
        return [
            f"{path}={tuple(value) if isinstance(value, list) else value}"
            for path, value in self.settings.items()
        ]


@dataclasses.dataclass(frozen=True)
class Peer:
    """Published results of others.

    Attributes:
      name: in the legend.
      data: the data set, as for recipes.
      points: of compute, PFLOP, and top-1, percent.
      source: a public address, or a file of this repository.
      counted: how the compute was obtained.
    """

    name: str
    data: str
    points: Sequence[Sequence[float]]
    source: str
    counted: str


def read_recipes(path: pathlib.Path) -> tuple[dict[str, Recipe], list[Peer]]:
    """Reads a file of recipes by name, and of peers.

    Raises:
      BenchmarkError: if it cannot be read.
    """
    from inception_jax import config as configs

    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        shared = values["data"]
        recipes: dict[str, Recipe] = {}
        for name, given in values["recipes"].items():
            base = recipes[extended].settings if (extended := given.pop("extends", "")) else {}
            settings = {**base, **configs.flatten(given.pop("settings", {}))}
            recipes[name] = Recipe(**shared[given["data"]], **given, settings=settings)
        return recipes, [Peer(**each) for each in values.get("peers", ())]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise measure.BenchmarkError(
            f"{path}: cannot be read as a file of recipes: {problem}"
        ) from error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    local = measure.local_path
    parser.add_argument("names", nargs="*", metavar="RECIPE", help="recipes to train, in order")
    parser.add_argument("--list", action="store_true", help="list the recipes and exit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=local, help="directory for the workdirs")
    parser.add_argument("--platform", default="", help="--platform of the training command")
    command.add_settings(parser)
    parser.add_argument("--note", default="", help="about the data, such as: lossy JPEG copies")
    parser.add_argument(
        "--recorded", type=local, metavar="FOLDER", help="a finished run, instead of training"
    )
    parser.add_argument("--recipes", type=local, default=_RECIPES, metavar="FILE")
    parser.add_argument("--json", type=local, default=_ROWS, metavar="FILE", help="the rows")
    parser.add_argument("--plot", type=local, default=_PLOT, metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.names and not (arguments.output or arguments.recorded):
        parser.error("training needs --output")
    if arguments.recorded and len(arguments.names) * len(arguments.seeds) != 1:
        parser.error("--recorded needs one recipe and one seed")
    return arguments


def read_rows(path: pathlib.Path) -> list[Row]:
    """Returns the rows of a file; none if it does not exist."""
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def relevant(config: "Config") -> dict[str, Any]:
    """Returns the settings that affect the accuracy and differ from their defaults, by path."""
    from inception_jax import config as configs

    values = configs.flatten(configs.plain(config))
    defaults = configs.flatten(configs.plain(configs.Config()))
    return {
        path: value
        for path, value in values.items()
        if not path.startswith(_WITHOUT_EFFECT) and value != defaults.get(path)
    }


def check_equal(name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Checks that settings are those of a recipe or of its other rows.

    Raises:
      BenchmarkError: naming the first difference.
    """
    for path in dict.fromkeys([*found, *wanted]):
        if found.get(path, "default") != wanted.get(path, "default"):
            raise measure.BenchmarkError(
                f"{name}: {path} = {found.get(path, 'default')!r} in {where}; must be "
                f"{wanted.get(path, 'default')!r}. Add a recipe of another name for these settings"
            )


def check_row(row: Row, others: Sequence[Row], *, open_paths: Collection[str] = ()) -> None:
    """Checks that a row can stand beside the rows of its recipe.

    Args:
      row: the row; before its run, with its planned settings.
      others: existing rows of any recipe.
      open_paths: settings that are not compared, since the run chooses them at its start.

    Raises:
      BenchmarkError: if settings or note differ.
    """
    for other in others:
        if other["recipe"] == row["recipe"]:
            mine, theirs = (
                {path: value for path, value in each["settings"].items() if path not in open_paths}
                for each in (row, other)
            )
            where = f"the run of seed {row['seed']}"
            check_equal(row["recipe"], mine, theirs, where)
            check_equal(row["recipe"], {"note": row["note"]}, {"note": other["note"]}, where)


def recorded_settings(
    name: str, recipe: Recipe, folder: pathlib.Path
) -> "tuple[Config, Record | None]":
    """Returns the settings that a finished run used, and its record; None: it has none.

    Raises:
      BenchmarkError: if they are not those of the recipe, or were changed during the run.
    """
    from inception_jax import config as configs

    planned = recipe.config()
    try:
        record = configs.read_record(folder / "config.json")
    except FileNotFoundError:
        return planned, None
    used = record.config
    planned = configs.fill_open(planned, {path: configs.get(used, path) for path in configs.OPEN})
    check_equal(name, relevant(used), relevant(planned), str(folder))
    lines = [line for change in record.changes for line in change["settings"]]
    changed = [each.removeprefix("config.") for each in lines]
    if affecting := [each for each in changed if not each.startswith(_WITHOUT_EFFECT)]:
        raise measure.BenchmarkError(
            f"{name}: settings were changed while {folder} was trained ({affecting[0]}); remove "
            "the folder to train it again"
        )
    return used, record


def make_row(name: str, recipe: Recipe, seed: int, folder: pathlib.Path, note: str) -> Row:
    """Returns the row of a finished run.

    Raises:
      BenchmarkError: if the run is not finished, or is not one of the recipe.
    """
    try:
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise measure.BenchmarkError(
            f"{folder}: result.json not found; a run has it once it is finished"
        ) from error
    config, record = recorded_settings(name, recipe, folder)
    dataset = record.dataset if record else {}
    for key, count in (("classes", recipe.classes), ("training examples", recipe.examples)):
        check_equal(name, {key: dataset.get(key, count)}, {key: count}, str(folder))
    phases = compute.phases(config, examples=recipe.examples, classes=recipe.classes)
    images = sum(phase.images for phase in phases)
    trained = result["step"] * config.train.batch_size
    check_equal(name, {"images trained on": trained}, {"images trained on": images}, str(folder))
    check_equal(name, {"seed": config.seed if record else seed}, {"seed": seed}, str(folder))
    machine = result["environment"]
    top5 = {"top5": result["top5"]} if "top5" in result else {}
    flipped = ablation.other_top1(result).get("flip")
    return {
        "recipe": name,
        "data": recipe.data,
        "note": note,
        "seed": seed,
        "top1": result["top1"],
        **top5,
        **({} if flipped is None else {"flip_top1": flipped}),
        "pflop": compute.pflop(phases),
        "images": images,
        "phases": [phase._asdict() for phase in phases],
        "minutes": round(result["seconds"] / 60, 1),
        "hardware": {
            "cpu": machine["cpu"],
            "cores": machine["cpu_count"],
            "device": machine["device"],
            "devices": machine["device_count"],
        },
        "versions": {"python": machine["python"]}
        | {name: version for name, version in machine["packages"].items() if name in _VERSIONS},
        "revision": machine["revision"],
        "date": machine["date"],
        "evaluated": {"split": result["split"], "images": result["count"]},
        "settings": relevant(config),
    }


def train(name: str, recipe: Recipe, seed: int, arguments: argparse.Namespace) -> pathlib.Path:
    """Trains a recipe to its end, from where an earlier run stopped; returns the workdir.

    Raises:
      BenchmarkError: if the workdir has other settings, or the training command fails.
    """
    folder: pathlib.Path = arguments.output.resolve() / f"{name}-{seed}"
    recorded_settings(name, recipe, folder)
    if not (folder / "result.json").exists():
        measure.log(f"=== {name}, seed {seed}: {recipe.aim}")
        flags = [
            f"--config={recipe.experiment}",
            f"--workdir={folder}",
            f"--platform={arguments.platform}",
            *command.overrides([*recipe.flags(), *arguments.set, f"seed={seed}"]),
        ]
        command.train(f"{name}, seed {seed}", flags)
    return folder


def add_run(name: str, recipe: Recipe, seed: int, arguments: argparse.Namespace) -> None:
    """Adds the row of a run to the file, after training it, unless the file has it.

    Raises:
      BenchmarkError: if the row would not be one of the recipe, or the training command fails.
    """
    from inception_jax import config as configs

    config = recipe.config()
    plan = {"recipe": name, "seed": seed, "note": arguments.note, "settings": relevant(config)}
    rows = read_rows(arguments.json)
    open_paths = [path for path in configs.OPEN if configs.is_open(config, path)]
    check_row(plan, rows, open_paths=open_paths)
    if any((row["recipe"], row["seed"]) == (name, seed) for row in rows):
        measure.log(f"{name}, seed {seed}: already in {arguments.json.name}")
        return
    folder = arguments.recorded or train(name, recipe, seed, arguments)
    row = make_row(name, recipe, seed, folder, arguments.note)
    if arguments.recorded and folder.resolve().is_relative_to(measure.ROOT):
        row["source"] = folder.resolve().relative_to(measure.ROOT).as_posix()
    # Read again: another command may have added rows during the training.
    rows = read_rows(arguments.json)
    check_row(row, rows)
    rows = sorted(
        [*rows, row], key=lambda row: (row["data"], row["pflop"], row["recipe"], row["seed"])
    )
    # Of this call; each row has that of its run.
    environment = measure.environment()
    measure.write_json(
        arguments.json, {"benchmark": "frontier", "environment": environment, "rows": rows}
    )


@dataclasses.dataclass(frozen=True)
class Point:
    """All runs of a recipe: means over seeds.

    Attributes:
      recipe, data, note: as in the rows.
      pflop, minutes, top1: means; `top1` in percent.
      top5: mean; None: not recorded for all.
      deviation: standard deviation of top-1 between seeds; None: one seed.
      count: number of seeds.
    """

    recipe: str
    data: str
    note: str
    pflop: float
    minutes: float
    top1: float
    top5: float | None
    deviation: float | None
    count: int


def points(rows: Sequence[Row]) -> list[Point]:
    """Returns a point for each recipe, by data set and compute."""
    by_recipe: dict[str, list[Row]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(row)

    def mean(each: Sequence[Row], name: str) -> float:
        return statistics.fmean(row[name] for row in each)

    found = [
        Point(
            recipe=recipe,
            data=each[0]["data"],
            note=each[0]["note"],
            pflop=mean(each, "pflop"),
            minutes=mean(each, "minutes"),
            top1=mean(each, "top1"),
            top5=mean(each, "top5") if all("top5" in row for row in each) else None,
            deviation=statistics.stdev(row["top1"] for row in each) if each[1:] else None,
            count=len(each),
        )
        for recipe, each in by_recipe.items()
    ]
    return sorted(found, key=lambda point: (point.data, point.pflop))


def frontier(found: Sequence[Point]) -> list[Point]:
    """Returns the points that no cheaper one, or one of equal compute, exceeds in top-1."""
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (point.pflop, -point.top1)):
        if not best or point.top1 > best[-1].top1:
            best.append(point)
    return best


def table(found: Sequence[Point]) -> str:
    """Returns the table of recipes in Markdown, as in docs/results.md."""
    rows = []
    for point in found:
        deviation = "" if point.deviation is None else f" ± {point.deviation:.2f}"
        note = f", {point.note}" if point.note else ""
        rows.append(
            [
                point.recipe,
                f"{point.data}{note}",
                f"{point.top1:.2f}%{deviation}",
                "–" if point.top5 is None else f"{point.top5:.2f}%",
                f"{point.pflop:.3g}",
                str(point.count),
                f"{point.minutes:.1f}",
            ]
        )
    head = ["Recipe", "Data", "Top-1", "Top-5", "PFLOP", "Seeds", "Minutes"]
    return markdown_table(head, rows)


def peer_table(peers: Sequence[Peer]) -> str:
    """Returns the table of peers in Markdown, as in docs/results.md."""
    lines = [
        "| Network | Data | Top-1, % | PFLOP | How it was counted | Source |",
        "| --- | --- | --: | --: | --- | --- |",
    ]
    for peer in peers:
        compute_cell = ", ".join(f"{step:.3g}" for step, _ in peer.points)
        top1 = ", ".join(f"{each:.2f}" for _, each in peer.points)
        if peer.source.startswith("https://"):
            link = f"[{'/'.join(peer.source.split('/')[3:5])}]({peer.source})"
        else:
            link = f"[{peer.source.rpartition('/')[0]}](../{peer.source})"
        cells = [peer.name, peer.data, top1, compute_cell, peer.counted, link]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: Sequence[Point], peers: Sequence[Peer], path: pathlib.Path) -> None:
    """Draws top-1 by compute, a panel for each data set, as a PNG file."""
    from matplotlib.figure import Figure

    from inception_jax import figures

    names = list(dict.fromkeys(point.data for point in found))[::-1]
    figure = Figure(figsize=(6.5 * len(names), 6), layout="constrained")
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(1, len(names), number)
        ours = [point for point in found if point.data == name]
        _draw_panel(axes, ours, [peer for peer in peers if peer.data == name])
        axes.set_title(name, fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figure, path, dpi=110)


def _draw_panel(axes: "Axes", ours: Sequence[Point], peers: Sequence[Peer]) -> None:
    for peer, color, marker in zip(peers, _PEERS, _MARKERS, strict=False):
        steps, top1 = zip(*peer.points, strict=True)
        axes.plot(steps, top1, ":", color=color, marker=marker, label=peer.name)
    best = frontier(ours)
    axes.plot([p.pflop for p in best], [p.top1 for p in best], color=_OURS, linewidth=1.8)
    axes.errorbar(
        [point.pflop for point in ours],
        [point.top1 for point in ours],
        yerr=[point.deviation or 0 for point in ours],
        fmt="o",
        color=_OURS,
        label="this project",
    )
    for point in ours:
        note = f" ({point.note})" if point.note else ""
        axes.annotate(
            f"{point.top1:.1f}{note}",
            (point.pflop, point.top1),
            xytext=(-4, 7),
            textcoords="offset points",
            ha="right",
            color=_OURS,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("training compute, PFLOP", fontsize=12)
    axes.set_ylabel("top-1, %", fontsize=12)
    axes.margins(0.12)
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Below the plot: inside, it would hide points.
    axes.legend(fontsize=10, loc="upper left", bbox_to_anchor=(0, -0.13), frameon=False)


def main() -> None:
    """Runs the command."""
    import jax

    arguments = parse()
    recipes, peers = read_recipes(arguments.recipes)
    # Only traces networks here; the training command may use an accelerator.
    jax.config.update("jax_platforms", "cpu")
    if arguments.list:
        head = ["recipe", "data", "PFLOP", "aim"]
        print(markdown_table(head, [_listed(*each) for each in recipes.items()]))
        return
    if unknown := set(arguments.names) - set(recipes):
        raise measure.BenchmarkError(
            f"unknown recipes: {', '.join(sorted(unknown))}; {arguments.recipes.name} has "
            f"{', '.join(recipes)}"
        )
    for setting in arguments.set:
        if not setting.startswith(_WITHOUT_EFFECT):
            raise measure.BenchmarkError(
                f"--set {setting}: affects the result; add a recipe of another name instead"
            )
    for name in arguments.names:
        for seed in arguments.seeds:
            add_run(name, recipes[name], seed, arguments)
            draw(points(read_rows(arguments.json)), peers, arguments.plot)
    found = points(read_rows(arguments.json))
    draw(found, peers, arguments.plot)
    print(table(found))
    print(peer_table(peers))


def _listed(name: str, recipe: Recipe) -> list[str]:
    phases = compute.phases(recipe.config(), examples=recipe.examples, classes=recipe.classes)
    return [name, recipe.data, f"{compute.pflop(phases):.3g}", recipe.aim]


if __name__ == "__main__":
    measure.run(main)
