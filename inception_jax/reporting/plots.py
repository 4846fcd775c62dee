"""Draws the plots of a run as PNG files: curves, classes, confusion, calibration, time.

They show the same values as the page; both come from `context`.
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
from inception_jax.storage import atomic, paths

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The Okabe-Ito palette, distinguishable with the common kinds of color blindness, by the names that
# `context.curves` returns.
_COLORS = {
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
_BLUE, _RED, _GRAY = "#0072B2", "#D55E00", "#666666"
# For comparisons of runs; more runs repeat the colors with other line styles.
_RUN_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_LINE_STYLES = ("-", "--", "-.", ":")

# Longer names, in characters, would leave no room for the plot.
_MAX_NAME_LENGTH, _MAX_CLASS_LENGTH = 40, 26

# Up to this many points, each has a marker; more markers would hide the line.
_MAX_MARKED_POINTS = 70


def plot_run(record: RunRecord) -> list[str]:
    """Draws all plots of a run into the directory plots/ of its workdir.

    Returns:
      The names of the files written: loss, accuracy, one per further metric, classes, confusion,
      calibration and time, except for those without data.

    Raises:
      UserError: if the files cannot be written.
    """
    named_figures = [*_curve_figures(record), *_prediction_figures(record)]
    return [path.name for path in write_figures(record.workdir.plots, named_figures)]


def plot_comparison(records: Sequence[RunRecord], directory: paths.Path) -> list[paths.Path]:
    """Draws a plot of each metric, such as loss.png and top1.png, with a curve for each run.

    The curves are those of evaluations, because the training loss is that of the objective, which
    may differ between runs. Metrics that only training reports, such as the learning rate, are
    drawn too.

    Args:
      records: the runs.
      directory: output directory, local or in a bucket; created if missing.

    Returns:
      The files written.

    Raises:
      UserError: if the files cannot be written.
    """
    runs = context.curves(records, all_splits=False)["runs"]
    metrics = context.metrics([row for record in records for row in record.rows])
    return write_figures(directory, ((m.name, _comparison_figure(runs, m)) for m in metrics))


def write_figures(
    directory: paths.Path, named_figures: "Iterable[tuple[str, Figure]]"
) -> list[paths.Path]:
    """Writes figures as PNG files and returns their paths.

    Args:
      directory: output directory, local or in a bucket; created if missing.
      named_figures: pairs of a name and a figure.

    Raises:
      UserError: if the files cannot be written.
    """
    written: list[paths.Path] = []
    try:
        if paths.is_local(directory):
            atomic.make_output_folder(directory)
        for name, figure in named_figures:
            # A metric can have any name, even that of another plot.
            stem = re.sub(r"[^\w.-]", "_", name)
            stems = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
            files = (directory / f"{each}.png" for each in stems)
            written.append(next(file for file in files if file not in written))
            with atomic.replacing(written[-1]) as temporary:
                figures.save(figure, temporary)
    except OSError as error:
        raise UserError(
            f"{directory}: cannot write plots: {error}. Free disk space or make the directory "
            "writable"
        ) from error
    return written


def _curve_figures(record: RunRecord) -> "Iterator[tuple[str, Figure]]":
    """Yields a plot of each metric; top-1 and top-5 are drawn together."""
    (run,) = context.curves([record])["runs"]
    title = _title(record)
    # A custom metric may be named "accuracy" too.
    groups: dict[tuple[bool, str], list[Metric]] = {}
    for metric in context.metrics(record.rows):
        is_top = metric.name in ("top1", "top5")
        groups.setdefault((is_top, "accuracy" if is_top else metric.name), []).append(metric)
    for (is_top, name), metrics in groups.items():
        label = "accuracy, %" if is_top else metrics[0].label
        yield name, _split_curves_figure(run["splits"], metrics, title=title, label=label)


def _title(record: RunRecord) -> str:
    """Returns the run's name with its last and best evaluation accuracy."""
    name = figures.truncate(record.name, _MAX_NAME_LENGTH)
    result = context.result(record)
    if result is None:
        return name
    last, best = result["last"], result["best"]
    title = f"{name}: {last['split']} top-1 {last['top1']:.2f}% at epoch {last['epoch']:.4g} (last)"
    if best:
        title += f", {best['top1']:.2f}% at epoch {best['epoch']:.4g} (best)"
    return title


def _split_curves_figure(
    splits: Mapping[str, Any], metrics: Sequence[Metric], *, title: str, label: str
) -> "Figure":
    """Returns the curves of metrics for each split, with a different line style per metric."""
    figure, axes = _new_figure(height=5)
    for split in splits.values():
        for metric, style in zip(metrics, itertools.cycle(_LINE_STYLES), strict=False):
            name = split["label"] if len(metrics) == 1 else f"{split['label']} {metric.label}"
            _plot_curve(axes, split, metric, name=name, style=style, color=_COLORS[split["color"]])
    _style_curve_axes(axes, title, "epoch", label)
    axes.set_xlim(left=0)
    return figure


def _comparison_figure(runs: Sequence[Mapping[str, Any]], metric: Metric) -> "Figure":
    """Returns one metric's curve for each run that has it."""
    figure, axes = _new_figure(height=5)
    splits = {
        n for run in runs for n, each in run["splits"].items() if metric.name in each["metrics"]
    }
    evaluated = sorted(name for name in splits if not name.startswith("train"))
    for number, run in enumerate(runs):
        style = _LINE_STYLES[number // len(_RUN_COLORS) % len(_LINE_STYLES)]
        color = _RUN_COLORS[number % len(_RUN_COLORS)]
        for name in evaluated or ["train"]:
            if split := run["splits"].get(name):
                _plot_curve(axes, split, metric, name=run["name"], style=style, color=color)
    label = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
    name = figures.truncate(runs[0]["name"], _MAX_NAME_LENGTH)
    of = f"{len(runs)} runs" if len(runs) > 1 else name
    _style_curve_axes(axes, f"{metric.title} of {of}", "epoch", label)
    axes.set_xlim(left=0)
    return figure


def plot_range_test(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Draws the loss of a learning-rate range test over the rate and marks the proposed rate.

    Args:
      path: path of the PNG file.
      values: contents of find_lr.json; points with a non-finite loss are skipped.

    Raises:
      OSError: if the file cannot be written.
    """
    figure, axes = _new_figure(height=5)
    axes.set_xscale("log")
    proposal = values["proposal"]
    points = [point for point in values["points"] if point["smoothed_loss"] is not None]
    losses = [math.nan if point["loss"] is None else point["loss"] for point in points]
    axes.plot([p["rate"] for p in points], losses, color="#AAAAAA", label="loss")
    smoothed = [point["smoothed_loss"] for point in points]
    rates = [point["smoothed_rate"] for point in points]
    axes.plot(rates, smoothed, color=_BLUE, linewidth=1.8, label="smoothed")
    if proposal is not None:
        for rate, label, color in (
            (proposal["rate"], "proposed", _RED),
            (proposal["least"], "lowest loss", _COLORS["run7"]),
        ):
            axes.axvline(rate, color=color, linestyle="--", label=f"{label}, {rate:.2g}")
    # The last losses of a test that diverged would flatten the relevant part.
    if points:
        axes.set_ylim(0, 1.5 * max(smoothed[: len(points) // 2 + 1]))
    result = f"proposed rate {proposal['rate']:g}" if proposal else "no proposed rate"
    title = f"{figures.truncate(values['config']['name'], _MAX_NAME_LENGTH)}: {result}"
    _style_curve_axes(axes, title, "learning rate", "loss")
    figures.save(figure, path)


def _prediction_figures(record: RunRecord) -> "Iterator[tuple[str, Figure]]":
    name = figures.truncate(record.name, _MAX_NAME_LENGTH)
    title = name
    if evaluated := context.evaluation_info(record):
        title += f", step {evaluated['step']:,}"
        title += f" ({evaluated['role']})" if evaluated["role"] else ""
    if classes := context.class_accuracy(record):
        yield "classes", _class_figure(classes, title)
    confusion = context.confusion(record)
    if confusion and confusion["pairs"]:
        yield "confusion", _confusion_figure(confusion, title)
    if calibration := context.reliability(record):
        yield "calibration", _calibration_figure(calibration, title)
    if time := context.time_by_phase(record):
        yield "time", _time_figure(time, name)


def _class_figure(classes: dict[str, Any], title: str) -> "Figure":
    """Returns a bar chart of the accuracy of the best and worst classes, or of all."""
    rows = [row for _, group in classes["groups"] for row in group]
    count = len(classes["groups"][0][1])
    # The context lists the worst class first; the plot is sorted from best to worst.
    rows = rows[:count] + rows[count:][::-1]
    figure, axes = _new_figure(height=1.6 + 0.32 * len(rows))
    names = [figures.truncate(row["name"], _MAX_CLASS_LENGTH) for row in rows]
    places = range(len(rows), 0, -1)
    bars = axes.barh(places, [row["accuracy"] for row in rows], color=_BLUE, height=0.7)
    axes.bar_label(bars, [f"{row['accuracy']:.1f}" for row in rows], padding=4, fontsize=11)
    axes.set_yticks(places, names)
    if len(rows) > count:
        axes.axhline(places[count] + 0.5, color=_GRAY, linestyle=":")
    axes.set_xlim(0, 110)
    subject = "best and worst classes" if len(rows) > count else "all classes"
    _style_axes(axes, f"{title}: accuracy of {subject}", "accuracy, %", "", classes=True)
    axes.grid(visible=False, axis="y")
    return figure


def _confusion_figure(confusion: dict[str, Any], title: str) -> "Figure":
    """Returns the confusion matrix, colored by the fraction of the true class."""
    names = [figures.truncate(name, _MAX_CLASS_LENGTH) for name in confusion["names"]]
    side = 3.0 + 0.5 * len(names)
    figure, axes = _new_figure(width=side + 1, height=side)
    fractions = [[cell["fraction"] for cell in row["cells"]] for row in confusion["rows"]]
    axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    for y, row in enumerate(confusion["rows"]):
        for x, cell in enumerate(row["cells"]):
            color = "white" if cell["fraction"] > 0.55 else "black"
            axes.text(x, y, cell["count"] or "", ha="center", va="center", color=color)
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set_yticks(range(len(names)), names)
    subject = "all classes" if confusion["complete"] else "most confused classes"
    _style_axes(axes, f"{title}: {subject}, number of images", "predicted", "true", classes=True)
    axes.grid(visible=False)
    return figure


def _calibration_figure(calibration: dict[str, Any], title: str) -> "Figure":
    """Returns the reliability diagram (Guo et al. 2017, figure 1)."""
    figure, axes = _new_figure(width=6.4, height=6)
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
    subject = f"expected calibration error {calibration['error']:.2f}%"
    _style_axes(axes, f"{title}: {subject}", "confidence, %", "accuracy, %")
    axes.legend(fontsize=11, loc="upper left")
    return figure


def _time_figure(time: dict[str, Any], title: str) -> "Figure":
    """Returns a bar chart of the time in each phase."""
    phases = time["phases"][::-1]
    figure, axes = _new_figure(height=1.6 + 0.4 * len(phases))
    bars = axes.barh(
        [phase["name"] for phase in phases],
        [phase["seconds"] / 60 for phase in phases],
        color=_BLUE,
        height=0.7,
    )
    axes.bar_label(bars, [f"{phase['fraction']:.1%}" for phase in phases], padding=4, fontsize=11)
    axes.set_xlim(0, 1.15 * time["phases"][0]["seconds"] / 60)
    _style_axes(axes, f"{title}: time by phase", "minutes", "")
    axes.grid(visible=False, axis="y")
    return figure


def _new_figure(*, width: float = 8, height: float) -> "tuple[Figure, Axes]":
    """Returns an empty figure and its axes; sizes are in inches."""
    # Imported here because reports without plots do not need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _plot_curve(
    axes: "Axes",
    split: Mapping[str, Any],
    metric: Metric,
    *,
    name: str,
    style: str,
    color: str,
) -> None:
    """Draws a curve if the split has the metric; null (a non-finite value) leaves a gap."""
    if metric.name not in split["metrics"]:
        return
    values = [math.nan if each is None else each for each in split["metrics"][metric.name]]
    last = next((value for value in reversed(values) if not math.isnan(value)), math.nan)
    dense = len(values) > _MAX_MARKED_POINTS
    axes.plot(
        split["epoch"],
        values,
        style,
        color=color,
        linewidth=1 if dense else 1.8,
        marker="" if dense else "o",
        markersize=5,
        markerfacecolor="white" if style == "--" else None,
        label=f"{figures.truncate(name, _MAX_NAME_LENGTH)}, last {last:.4g}",
    )


def _style_axes(
    axes: "Axes", title: str, horizontal: str, vertical: str, *, classes: bool = False
) -> None:
    """Sets title and axis labels, adds a grid, and removes the top and right spines.

    Args:
      axes: the axes to style.
      title, horizontal, vertical: title and axis labels.
      classes: whether tick labels are class names, which must not be parsed as math.
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


def _style_curve_axes(axes: "Axes", title: str, horizontal: str, vertical: str) -> None:
    """Styles the axes as above and adds a legend of all curves."""
    _style_axes(axes, title, horizontal, vertical)
    handles, labels = axes.lines, [str(line.get_label()) for line in axes.lines]
    legend = axes.legend(handles, [" "] * len(handles), fontsize=11, handlelength=3)
    # Set afterwards, because matplotlib skips labels that start with an underscore.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
