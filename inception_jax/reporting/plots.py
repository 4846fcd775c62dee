"""The plots of a run as PNG files, for papers: curves, classes, confusion, calibration, time.

They show what the page shows: both take it from `context`.
"""

import itertools
import math
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inception_jax import figures
from inception_jax.errors import UserError
from inception_jax.reporting import context
from inception_jax.reporting.context import Metric
from inception_jax.reporting.run_record import RunRecord
from inception_jax.storage import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From the palette of Okabe and Ito, which the common kinds of colour blindness can tell apart, by
# the names that `context.curves` gives.
_COLOURS = {
    "train": "#0072B2",
    "train_eval": "#56B4E9",
    "validation": "#D55E00",
    "test": "#009E73",
    "holdout": "#CC79A7",
    "run3": "#B3578F",
    "run4": "#8A6D00",
    "run5": "#5B4BB5",
    "run6": "#2C7D8C",
    "run7": "#333333",
}
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#666666"
# For runs side by side; more of them repeat it in other styles.
_RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_STYLES = ("-", "--", "-.", ":")

# A longer name would leave no room for what it names.
_NAME_LENGTH, _CLASS_LENGTH = 40, 26

# Below this many points each gets a marker; above, they would hide the line.
_MARKED_POINTS = 70


def plot_run(record: RunRecord) -> list[pathlib.Path]:
    """Draws all plots of a run into its folder's plots/.

    Returns:
      The files written: loss, accuracy, one for each further metric, classes, confusion,
      calibration and time, without those of which the folder holds nothing.

    Raises:
      UserError: if they cannot be written.
    """
    drawn = [*_run_curves(record), *_predictions(record)]
    return write_figures(record.workdir.plots, drawn)


def plot_comparison(records: Sequence[RunRecord], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws a plot of each metric, such as loss.png and top1.png, with a curve of each run.

    They are those of the evaluations: the training loss is of the objective, which may differ
    between runs. What only training reports, such as the learning rate, is drawn too.

    Args:
      records: of the runs.
      folder: where to; made if it is missing.

    Returns:
      The files written.

    Raises:
      UserError: if they cannot be written.
    """
    runs = context.curves(records)["runs"]
    metrics = context.metrics([row for record in records for row in record.rows])
    return write_figures(folder, ((m.name, _comparison(runs, m)) for m in metrics))


def write_figures(
    folder: pathlib.Path, drawn: "Iterable[tuple[str, Figure]]"
) -> list[pathlib.Path]:
    """Writes figures, by name, as PNG files, and returns those.

    Args:
      folder: where to; made if it is missing.
      drawn: what to write.

    Raises:
      UserError: if they cannot be written.
    """
    written = []
    try:
        atomic.make_output_folder(folder)
        for name, figure in drawn:
            # A metric may be called anything, and like one of the other plots.
            stem = re.sub(r"[^\w.-]", "_", name)
            stem += "-2" * (folder / f"{stem}.png" in written)
            written.append(folder / f"{stem}.png")
            figures.save(figure, written[-1])
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write plots: {error}. Free disk space or make the directory writable"
        ) from error
    return written


def _run_curves(record: RunRecord) -> "Iterator[tuple[str, Figure]]":
    """Yields a plot of each metric; top-1 and top-5 share one."""
    (run,) = context.curves([record])["runs"]
    title = _title(record)
    together: dict[str, list[Metric]] = {}
    for metric in context.metrics(record.rows):
        name = "accuracy" if metric.name in ("top1", "top5") else metric.name
        together.setdefault(name, []).append(metric)
    for name, metrics in together.items():
        label = "accuracy, %" if name == "accuracy" else metrics[0].label
        yield name, _curves_of(run["splits"], metrics, title=title, label=label)


def _title(record: RunRecord) -> str:
    """Returns the experiment's name, with its last and its best accuracy outside training."""
    name = figures.short(record.name, _NAME_LENGTH)
    result = context.result(record)
    if result is None:
        return name
    last, best = result["last"], result["best"]
    title = f"{name}: {last['split']} top-1 {last['top1']:.2f}% at epoch {last['epoch']:.4g} (last)"
    if best:
        title += f", {best['top1']:.2f}% at epoch {best['epoch']:.4g} (best)"
    return title


def _curves_of(
    splits: Mapping[str, Any], metrics: Sequence[Metric], *, title: str, label: str
) -> "Figure":
    """Returns curves of some metrics, each in a style of its own, for each split."""
    figure, axes = _canvas(height=5)
    for split in splits.values():
        for metric, style in zip(metrics, itertools.cycle(_STYLES), strict=False):
            name = split["label"] if len(metrics) == 1 else f"{split['label']} {metric.label}"
            _curve(axes, split, metric, name=name, style=style, colour=_COLOURS[split["colour"]])
    _finish_curves(axes, title, "epoch", label)
    axes.set_xlim(left=0)
    return figure


def _comparison(runs: Sequence[Mapping[str, Any]], metric: Metric) -> "Figure":
    """Returns one metric's curve of each run that has it."""
    figure, axes = _canvas(height=5)
    having = {
        n for run in runs for n, each in run["splits"].items() if metric.name in each["metrics"]
    }
    evaluated = sorted(name for name in having if not name.startswith("train"))
    for number, run in enumerate(runs):
        style = _STYLES[number // len(_RUN_COLOURS) % len(_STYLES)]
        colour = _RUN_COLOURS[number % len(_RUN_COLOURS)]
        for name in evaluated or ["train"]:
            if split := run["splits"].get(name):
                _curve(axes, split, metric, name=run["name"], style=style, colour=colour)
    label = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
    _finish_curves(axes, f"{metric.title} of {len(runs)} runs", "epoch", label)
    axes.set_xlim(left=0)
    return figure


def plot_range_test(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Draws the loss of a learning-rate range test over the rate, with the proposed rate marked.

    Args:
      path: of the PNG file.
      values: what find_lr.json holds; points whose loss is not finite are left out.

    Raises:
      OSError: if the file cannot be written.
    """
    figure, axes = _canvas(height=5)
    axes.set_xscale("log")
    proposal = values["proposal"]
    points = [point for point in values["points"] if point["smoothed_loss"] is not None]
    losses = [math.nan if point["loss"] is None else point["loss"] for point in points]
    axes.plot([p["rate"] for p in points], losses, color="#AAAAAA", label="loss")
    smoothed = [point["smoothed_loss"] for point in points]
    rates = [point["smoothed_rate"] for point in points]
    axes.plot(rates, smoothed, color=_BLUE, linewidth=1.8, label="smoothed")
    if proposal is not None:
        for rate, words, colour in (
            (proposal["rate"], "proposed", _RED),
            (proposal["least"], "lowest loss", _COLOURS["run7"]),
        ):
            axes.axvline(rate, color=colour, linestyle="--", label=f"{words}, {rate:.2g}")
    # The last losses of a test that diverged would flatten all that matters.
    if points:
        axes.set_ylim(0, 1.5 * max(smoothed[: len(points) // 2 + 1]))
    found = f"proposed rate {proposal['rate']:g}" if proposal else "no proposed rate"
    title = f"{figures.short(values['config']['name'], _NAME_LENGTH)}: {found}"
    _finish_curves(axes, title, "learning rate", "loss")
    figures.save(figure, path)


def _predictions(record: RunRecord) -> "Iterator[tuple[str, Figure]]":
    name = figures.short(record.name, _NAME_LENGTH)
    title = name
    if evaluated := context.evaluated(record):
        title += f", step {evaluated['step']:,}"
        title += f" ({evaluated['role']})" if evaluated["role"] else ""
    if classes := context.classes(record):
        yield "classes", _classes(classes, title)
    confusion = context.confusion(record)
    if confusion and confusion["pairs"]:
        yield "confusion", _confusion(confusion, title)
    if calibration := context.reliability(record):
        yield "calibration", _calibration(calibration, title)
    if time := context.time(record):
        yield "time", _time(time, name)


def _classes(classes: dict[str, Any], title: str) -> "Figure":
    """Returns bars of the best and the worst classes' accuracy, or of all classes."""
    rows = [row for _, group in classes["groups"] for row in group]
    count = len(classes["groups"][0][1])
    # The worst are listed from the worst on; the plot has all from the best on.
    rows = rows[:count] + rows[count:][::-1]
    figure, axes = _canvas(height=1.6 + 0.32 * len(rows))
    names = [figures.short(row["name"], _CLASS_LENGTH) for row in rows]
    places = range(len(rows), 0, -1)
    bars = axes.barh(places, [row["accuracy"] for row in rows], color=_BLUE, height=0.7)
    axes.bar_label(bars, [f"{row['accuracy']:.1f}" for row in rows], padding=4, fontsize=11)
    axes.set_yticks(places, names)
    if len(rows) > count:
        axes.axhline(places[count] + 0.5, color=_GREY, linestyle=":")
    axes.set_xlim(0, 110)
    words = "best and worst classes" if len(rows) > count else "all classes"
    _finish(axes, f"{title}: accuracy of {words}", "accuracy, %", "", classes=True)
    axes.grid(visible=False, axis="y")
    return figure


def _confusion(confusion: dict[str, Any], title: str) -> "Figure":
    """Returns the confusion matrix, coloured by the share of the true class."""
    names = [figures.short(name, _CLASS_LENGTH) for name in confusion["names"]]
    side = 3.0 + 0.5 * len(names)
    figure, axes = _canvas(width=side + 1, height=side)
    shares = [[cell["share"] for cell in row["cells"]] for row in confusion["rows"]]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(confusion["rows"]):
        for x, cell in enumerate(row["cells"]):
            colour = "white" if cell["share"] > 0.55 else "black"
            axes.text(x, y, cell["count"] or "", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    words = "all classes" if confusion["whole"] else "most confused classes"
    _finish(axes, f"{title}: {words}, number of images", "predicted", "true", classes=True)
    axes.grid(visible=False)
    return figure


def _calibration(calibration: dict[str, Any], title: str) -> "Figure":
    """Returns the reliability diagram (Guo et al. 2017, figure 1)."""
    figure, axes = _canvas(width=6.4, height=6)
    bins = [each for each in calibration["bins"] if each["count"]]
    left = [each["low"] for each in bins]
    width = bins[0]["high"] - bins[0]["low"]
    accuracy = [each["accuracy"] for each in bins]
    least = [min(each["confidence"], each["accuracy"]) for each in bins]
    gap = [abs(each["confidence"] - each["accuracy"]) for each in bins]
    style = {"width": width, "align": "edge", "edgecolor": "white"}
    axes.bar(left, least, color=_BLUE, **style)
    axes.bar(left, gap, bottom=least, color=_RED, alpha=0.5, label="gap to confidence", **style)
    axes.hlines(
        accuracy,
        left,
        [each["high"] for each in bins],
        color=_BLUE,
        linewidth=3,
        label="accuracy",
    )
    axes.plot([0, 100], [0, 100], color="black", linestyle="--", label="ideal")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 100)
    words = f"expected calibration error {calibration['error']:.2f}%"
    _finish(axes, f"{title}: {words}", "confidence, %", "accuracy, %")
    axes.legend(fontsize=11, loc="upper left")
    return figure


def _time(time: dict[str, Any], title: str) -> "Figure":
    """Returns bars of the time in each phase."""
    phases = time["phases"][::-1]
    figure, axes = _canvas(height=1.6 + 0.4 * len(phases))
    bars = axes.barh(
        [phase["name"] for phase in phases],
        [phase["seconds"] / 60 for phase in phases],
        color=_BLUE,
        height=0.7,
    )
    axes.bar_label(bars, [f"{phase['share']:.1%}" for phase in phases], padding=4, fontsize=11)
    axes.set_xlim(0, 1.15 * time["phases"][0]["seconds"] / 60)
    _finish(axes, f"{title}: time by phase", "minutes", "")
    axes.grid(visible=False, axis="y")
    return figure


def _canvas(*, width: float = 8, height: float) -> "tuple[Figure, Axes]":
    """Returns an empty figure, its size in inches."""
    # Imported late: a report without plots does without it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _curve(
    axes: "Axes",
    split: Mapping[str, Any],
    metric: Metric,
    *,
    name: str,
    style: str,
    colour: str,
) -> None:
    """Draws one curve, if there is one; a null, which was not finite, leaves a gap."""
    if metric.name not in split["metrics"]:
        return
    values = [math.nan if each is None else each for each in split["metrics"][metric.name]]
    last = next((value for value in reversed(values) if not math.isnan(value)), math.nan)
    dense = len(values) > _MARKED_POINTS
    axes.plot(
        split["epoch"],
        values,
        style,
        color=colour,
        linewidth=1 if dense else 1.8,
        marker="" if dense else "o",
        markersize=5,
        markerfacecolor="white" if style == "--" else None,
        label=f"{figures.short(name, _NAME_LENGTH)}, last {last:.4g}",
    )


def _finish(
    axes: "Axes", title: str, horizontal: str, vertical: str, *, classes: bool = False
) -> None:
    """Adds what a reader needs: labels, grid, and no box around it all.

    Args:
      axes: to add them to.
      title, horizontal, vertical: the texts.
      classes: whether the ticks are names of classes, which are no formulas.
    """
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(horizontal, fontsize=12)
    axes.set_ylabel(vertical, fontsize=12)
    axes.tick_params(labelsize=11)
    for text in [*axes.get_xticklabels(), *axes.get_yticklabels()] if classes else []:
        text.set_parse_math(False)
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _finish_curves(axes: "Axes", title: str, horizontal: str, vertical: str) -> None:
    """Does the same, and adds a legend that names each curve."""
    _finish(axes, title, horizontal, vertical)
    handles, labels = axes.lines, [str(line.get_label()) for line in axes.lines]
    legend = axes.legend(handles, [" "] * len(handles), fontsize=11, handlelength=3)
    # Set afterwards, as matplotlib leaves out a label that begins with an underscore.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
