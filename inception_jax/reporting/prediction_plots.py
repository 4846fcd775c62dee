"""The report's other plots as PNG files, for papers: classes, confusion, calibration, time."""

import pathlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from inception_jax.reporting import context, plots
from inception_jax.reporting.run_record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# As in plots.py.
_BLUE, _RED, _GREY = "#0072B2", "#D55E00", "#666666"
# A longer name would leave no room for what it names.
_NAME_LENGTH, _RUN_NAME_LENGTH = 26, 40


def plot_run(record: Record) -> list[pathlib.Path]:
    """Draws plots/classes.png, confusion.png, calibration.png and time.png in a run's folder.

    Returns:
      The files written; none of what the folder does not hold.

    Raises:
      UserError: if they cannot be written.
    """
    return plots.write_figures(record.folder / "plots", _figures(record))


def _figures(record: Record) -> "Iterator[tuple[str, Figure]]":
    name = plots.short(record.name, _RUN_NAME_LENGTH)
    title = name
    if record.evaluated is not None:
        step = record.evaluated.result["step"]
        role = record.role(step)
        title += f", step {step:,} ({role})" if role else f", step {step:,}"
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
    names = [plots.short(row["name"], _NAME_LENGTH) for row in rows]
    places = range(len(rows), 0, -1)
    bars = axes.barh(places, [row["accuracy"] for row in rows], color=_BLUE, height=0.7)
    axes.bar_label(bars, [f"{row['accuracy']:.1f}" for row in rows], padding=4, fontsize=11)
    axes.set_yticks(places, names)
    if len(rows) > count:
        axes.axhline(places[count] + 0.5, color=_GREY, linestyle=":")
    axes.set_xlim(0, 110)
    words = "best and worst classes" if len(rows) > count else "all classes"
    _finish(axes, f"{title}: accuracy of {words}", "accuracy, %", "")
    axes.grid(visible=False, axis="y")
    return figure


def _confusion(confusion: dict[str, Any], title: str) -> "Figure":
    """Returns the confusion matrix, coloured by the share of the true class."""
    names = [plots.short(name, _NAME_LENGTH) for name in confusion["names"]]
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
    _finish(axes, f"{title}: {words}, images", "guessed", "true")
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
    axes.bar(left, gap, bottom=least, color=_RED, alpha=0.5, label="gap to the confidence", **style)
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
    _finish(axes, f"{title}: where the time went", "minutes", "")
    axes.grid(visible=False, axis="y")
    return figure


def _canvas(*, width: float = 8, height: float) -> "tuple[Figure, Axes]":
    """Returns an empty figure, its size in inches."""
    # Imported late: a report without plots does without it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _finish(axes: "Axes", title: str, horizontal: str, vertical: str) -> None:
    """Adds what a reader needs, in the sizes of plots.py."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(horizontal, fontsize=12)
    axes.set_ylabel(vertical, fontsize=12)
    axes.tick_params(labelsize=11)
    # Some name classes, which are no formulas.
    for label in [*axes.get_xticklabels(), *axes.get_yticklabels()]:
        label.set_parse_math(False)
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
