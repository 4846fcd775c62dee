"""Curves of a run, drawn from its metrics.jsonl: loss, accuracy and learning rate by epoch.

They are drawn from the file, so that a run can be plotted while it goes on, or on another machine.
"""

import json
import math
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inception_jax.datasets.builders import folders
from inception_jax.errors import UserError
from inception_jax.storage import atomic
from inception_jax.telemetry.writers import informative, read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from inception_jax.training.lr_range_test import Point, Proposal

Line = dict[str, Any]

# From the palette of Okabe and Ito, which the common kinds of colour blindness can tell apart.
_COLOURS = {
    "train": "#0072B2",
    "train_eval": "#56B4E9",
    "validation": "#D55E00",
    "test": "#009E73",
    "holdout": "#CC79A7",
}
_OTHER_COLOUR = "#333333"
# The same palette, for runs side by side; more of them repeat it in other styles.
_RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
_RUN_STYLES = ("-", "--", "-.", ":")

# A longer name would leave no room for what it names.
_NAME_LENGTH = 40

# Below this many points each gets a marker; above, they would hide the line.
_MARKED_POINTS = 70


def plot_run(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Draws plots/loss.png, plots/accuracy.png and plots/learning_rate.png in a workdir.

    Args:
      workdir: folder of a run, with metrics.jsonl and, for the title, config.json.

    Returns:
      The files written; without one whose metric is in no line.

    Raises:
      UserError: if there are no metrics, or the files cannot be read or written.
    """
    lines = read_metrics(workdir / "metrics.jsonl")
    title = _title(workdir, lines)
    figures = {
        "loss": _figure(lines, ["loss"], title=title, label="loss"),
        "accuracy": _figure(lines, ["top1", "top5"], title=title, label="accuracy, %"),
        "learning_rate": _figure(lines, ["learning_rate"], title=title, label="learning rate"),
    }
    return write_figures(workdir / "plots", figures.items())


def write_figures(
    folder: pathlib.Path, figures: "Iterable[tuple[str, Figure | None]]"
) -> list[pathlib.Path]:
    """Writes figures as PNG files, and returns those written.

    Args:
      folder: where to; made if it is missing.
      figures: by name; None is left out.

    Raises:
      UserError: if they cannot be written.
    """
    written = []
    try:
        atomic.make_output_folder(folder)
        for name, figure in figures:
            if figure is not None:
                save(figure, folder / f"{name}.png")
                written.append(folder / f"{name}.png")
    except OSError as error:
        raise UserError(
            f"Cannot write plots to {folder}: {error}. Make the folder writable, with space left."
        ) from error
    return written


def save(figure: "Figure", path: pathlib.Path, *, dpi: int = 150) -> None:
    """Writes a figure as a PNG file, with all names in it as they are.

    A class, a run or a file may be called $x$, which is no formula here. Only the ticks of an axis
    keep theirs, such as powers of ten.

    Raises:
      OSError: if the file cannot be written.
    """
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    in_axes = {text for axis in figure.findobj(Axis) for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        if text not in in_axes:
            text.set_parse_math(False)
    with warnings.catch_warnings():
        # A letter of a class's name that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=dpi)


def short(name: str, length: int) -> str:
    """Returns a name as text of one line of at most so many characters, for a plot."""
    name = folders.shown(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def plot_comparison(runs: Mapping[str, Sequence[Line]], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws loss.png, top1.png, top5.png and learning_rate.png with a curve of each run.

    Loss and accuracy are those of the evaluations: the training loss is of the objective, which
    may differ between runs.

    Args:
      runs: the lines of each run's metrics.jsonl, by its name.
      folder: where to; made if it is missing.

    Returns:
      The files written; without one whose metric no run has.

    Raises:
      UserError: if they cannot be written.
    """
    labels = {
        "loss": "loss",
        "top1": "top-1 accuracy, %",
        "top5": "top-5 accuracy, %",
        "learning_rate": "learning rate",
    }
    figures = ((name, _comparison(runs, name, label=label)) for name, label in labels.items())
    return write_figures(folder, figures)


def _comparison(runs: Mapping[str, Sequence[Line]], metric: str, *, label: str) -> "Figure | None":
    """Returns one metric's curve of each run, or None if no run has any."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for number, (name, lines) in enumerate(runs.items()):
        training = metric == "learning_rate"
        points = [
            line
            for line in lines
            if metric in line and line["split"].startswith("train") == training
        ]
        if points:
            style = _RUN_STYLES[number // len(_RUN_COLOURS) % len(_RUN_STYLES)]
            colour = _RUN_COLOURS[number % len(_RUN_COLOURS)]
            _curve(axes, points, metric, name=name, style=style, colour=colour)
    if not axes.lines:
        return None
    _finish(axes, title=f"{label} of {len(runs)} runs", horizontal="epoch", label=label)
    axes.set_xlim(left=0)
    return figure


def plot_range_test(
    path: pathlib.Path, points: "Sequence[Point]", proposal: "Proposal | None", *, title: str
) -> None:
    """Draws the loss of a learning-rate range test over the rate, with the proposed rate marked.

    Args:
      path: of the PNG file.
      points: the steps of the test; what is not finite is left out.
      proposal: what to mark, if anything.
      title: above the plot.

    Raises:
      OSError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    finite = [point for point in points if math.isfinite(point.smoothed_loss)]
    axes.plot([p.rate for p in finite], [p.loss for p in finite], color="#AAAAAA", label="loss")
    axes.plot(
        [p.smoothed_rate for p in finite],
        [p.smoothed_loss for p in finite],
        color=_COLOURS["train"],
        linewidth=1.8,
        label="smoothed",
    )
    if proposal is not None:
        for rate, words, colour in (
            (proposal.rate, "proposed", _COLOURS["validation"]),
            (proposal.least, "least loss", _OTHER_COLOUR),
        ):
            axes.axvline(rate, color=colour, linestyle="--", label=f"{words}, {rate:.2g}")
    # The last losses of a test that diverged would flatten all that matters.
    if finite:
        axes.set_ylim(0, 1.5 * max(p.smoothed_loss for p in finite[: len(finite) // 2 + 1]))
    _finish(axes, title=title, horizontal="learning rate", label="loss")
    save(figure, path)


def read_metrics(path: pathlib.Path) -> list[Line]:
    """Returns the lines of a metrics.jsonl, at least one.

    Without top-5 where config.json beside it has no more than five classes: older runs wrote it.

    Raises:
      UserError: if there are none, or the file cannot be read.
    """
    try:
        lines = read_lines(path)
    except OSError as error:
        raise UserError(
            f"Cannot read {path}: {error.strerror}. Give the --workdir of a run that has started."
        ) from error
    if not lines:
        raise UserError(
            f"{path} has no metrics yet. Wait for the run's first report (config.log.every)."
        )
    classes = _recorded(path.parent, "dataset", "classes")
    return lines if classes is None else [informative(line, classes) for line in lines]


def _title(workdir: pathlib.Path, lines: Sequence[Line]) -> str:
    """Returns the experiment's name, with its last and its best accuracy outside training."""
    name = short(_recorded(workdir, "config", "name") or workdir.resolve().name, _NAME_LENGTH)
    found = [line for line in lines if not line["split"].startswith("train")]
    found = [line for line in found if line.get("top1") is not None]
    if not found:
        return name
    last, best = found[-1], max(found, key=lambda line: line["top1"])
    title = f"{name}: {last['split']} top-1 {last['top1']:.2f}% at epoch {last['epoch']:.4g} (last)"
    if best["top1"] > last["top1"]:
        title += f", {best['top1']:.2f}% at epoch {best['epoch']:.4g} (best)"
    return title


def _recorded(workdir: pathlib.Path, *keys: str) -> Any:
    """Returns an entry of a run's config.json, None where it cannot be had.

    That is no reason to refuse a plot: metrics.jsonl may have been copied alone.
    """
    try:
        found = json.loads((workdir / "config.json").read_text())
        for key in keys:
            found = found[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def _figure(
    lines: Sequence[Line], metrics: Sequence[str], *, title: str, label: str
) -> "Figure | None":
    """Returns curves of some metrics for each split, or None if no line has any of them.

    Args:
      lines: of metrics.jsonl.
      metrics: keys of the lines; the first is drawn solid, the second dashed.
      title: above the plot.
      label: of the vertical axis.
    """
    # Imported late: evaluation without plots does without it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    splits = sorted({line["split"] for line in lines}, key=lambda split: (split != "train", split))
    for split in splits:
        for metric, style in zip(metrics, ("-", "--"), strict=False):
            points = [line for line in lines if line["split"] == split and metric in line]
            name = split if len(metrics) == 1 else f"{split} {metric.replace('top', 'top-')}"
            if points:
                colour = _COLOURS.get(split, _OTHER_COLOUR)
                _curve(axes, points, metric, name=name, style=style, colour=colour)
    if not axes.lines:
        return None
    _finish(axes, title=title, horizontal="epoch", label=label)
    axes.set_xlim(left=0)
    return figure


def _curve(
    axes: "Axes", points: Sequence[Line], metric: str, *, name: str, style: str, colour: str
) -> None:
    """Draws one curve; a null, which was not finite, leaves a gap."""
    values = [float("nan") if line[metric] is None else line[metric] for line in points]
    dense = len(points) > _MARKED_POINTS
    axes.plot(
        [line["epoch"] for line in points],
        values,
        style,
        color=colour,
        linewidth=1 if dense else 1.8,
        marker="" if dense else "o",
        markersize=5,
        markerfacecolor="white" if style == "--" else None,
        label=f"{short(name, _NAME_LENGTH)}, last {values[-1]:.4g}",
    )


def _finish(axes: "Axes", *, title: str, horizontal: str, label: str) -> None:
    """Adds what a reader needs: labels, grid, legend, and no box around it all."""
    axes.set_title(title, fontsize=13)
    axes.set_xlabel(horizontal, fontsize=12)
    axes.set_ylabel(label, fontsize=12)
    axes.tick_params(labelsize=11)
    axes.grid(color="#DDDDDD")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.lines, [str(line.get_label()) for line in axes.lines]
    legend = axes.legend(handles, [" "] * len(handles), fontsize=11, handlelength=3)
    # Set afterwards, as matplotlib leaves out a label that begins with an underscore.
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)
