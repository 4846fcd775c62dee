import json
import pathlib
import re
import warnings
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from inception_jax.errors import UserError
from inception_jax.reporting import context, report
from tests import run_folders

_TRAIN: list[dict[str, Any]] = [
    {"step": s, "epoch": s / 10, "split": "train", "loss": 5 / s, "top1": s, "top5": 2.0 * s}
    | {"learning_rate": 0.1 / s}
    for s in range(1, 31)
]
_VALIDATION: list[dict[str, Any]] = [
    {"step": s, "epoch": s / 10, "split": "validation", "loss": 6 / s, "top1": 0.9 * s, "top5": s}
    for s in (10, 20, 30)
]


def _workdir(
    folder: pathlib.Path, lines: list[dict], name: str = "", classes: int = 0
) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if name or classes:
        record = {
            "config": {"name": name},
            "dataset": {"classes": classes or 10, "training examples": 100},
        }
        (folder / "config.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The axes of each figure that is saved, by file name."""
    saved = {}
    save = Figure.savefig

    def spy(self: Figure, path: pathlib.Path, **kwargs: Any) -> None:
        saved[path.stem.removeprefix(".")] = self.axes[0]  # At first, it is called .NAME.PROCESS.
        save(self, path, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def test_curves_match_the_metrics(tmp_path: pathlib.Path, axes: dict[str, Any]) -> None:
    paths = report.plot(_workdir(tmp_path, _TRAIN + _VALIDATION, name="digits_small"))
    names = ["loss.png", "accuracy.png", "learning_rate.png"]
    assert paths == [tmp_path / "plots" / name for name in names]
    curves = {
        (name, line.get_label()): line.get_xydata().tolist()
        for name, figure_axes in axes.items()
        for line in figure_axes.lines
    }
    train, validation = np.arange(1, 31), np.array([10, 20, 30])
    expected = {
        ("loss.png", "training, last 0.1667"): (train, 5 / train),
        ("loss.png", "validation, last 0.2"): (validation, 6 / validation),
        ("accuracy.png", "training top-1, last 30"): (train, train),
        ("accuracy.png", "training top-5, last 60"): (train, 2 * train),
        ("accuracy.png", "validation top-1, last 27"): (validation, 0.9 * validation),
        ("accuracy.png", "validation top-5, last 30"): (validation, validation),
        ("learning_rate.png", "training, last 0.003333"): (train, 0.1 / train),
    }
    assert curves.keys() == expected.keys()
    for key, (steps, values) in expected.items():
        np.testing.assert_allclose(curves[key], np.stack([steps / 10, values], 1), rtol=1e-5)
    assert axes["loss.png"].get_title() == (
        "digits_small: validation top-1 27.00% at epoch 3 (last)"
    )


def test_plots_have_both_colors(tmp_path: pathlib.Path) -> None:
    loss, accuracy, _ = report.plot(_workdir(tmp_path, _TRAIN + _VALIDATION))
    for path in (loss, accuracy):
        pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
        assert len(pixels) == 1200 * 750
        for color in ([0x00, 0x72, 0xB2], [0xD5, 0x5E, 0x00]):
            assert (pixels == color).all(axis=1).sum() > 100


@pytest.mark.parametrize("line", [_TRAIN[0], _VALIDATION[0]])
def test_single_point_is_visible(
    tmp_path: pathlib.Path, axes: dict[str, Any], line: dict[str, Any]
) -> None:
    report.plot(_workdir(tmp_path, [line]))
    (curve,) = axes["loss.png"].lines
    assert curve.get_marker() == "o"
    assert ("learning_rate.png" in axes) == ("learning_rate" in line)


def test_nonfinite_value_leaves_a_gap(tmp_path: pathlib.Path, axes: dict[str, Any]) -> None:
    lines = [dict(line) for line in _TRAIN + _VALIDATION]
    lines[3]["loss"] = lines[-1]["top1"] = None
    report.plot(_workdir(tmp_path, lines))
    values = axes["loss.png"].lines[0].get_ydata()
    assert np.flatnonzero(np.isnan(values)).tolist() == [3]
    # The title shows the last evaluation with a finite value.
    assert axes["loss.png"].get_title().endswith("validation top-1 18.00% at epoch 2 (last)")


def test_title_names_the_best_evaluation(tmp_path: pathlib.Path, axes: dict[str, Any]) -> None:
    lines = [line | {"top1": 30 - line["step"]} for line in _VALIDATION]
    report.plot(_workdir(tmp_path, lines, name="x"))
    assert axes["accuracy.png"].get_title() == (
        "x: validation top-1 0.00% at epoch 3 (last), 20.00% at epoch 1 (best)"
    )


def test_last_of_equally_good_evaluations_is_the_best(
    tmp_path: pathlib.Path, axes: dict[str, Any]
) -> None:
    """As for --checkpoint=best."""
    lines = [line | {"top1": min(90.0, 150 - 3 * line["step"])} for line in _VALIDATION]
    assert [line["top1"] for line in lines] == [90, 90, 60]
    report.plot(_workdir(tmp_path, lines, name="x"))
    assert axes["accuracy.png"].get_title().endswith("90.00% at epoch 2 (best)")


@pytest.mark.parametrize(("classes", "shown"), [(5, False), (6, True)])
def test_top5_of_older_runs_is_omitted_for_few_classes(
    classes: int, shown: bool, tmp_path: pathlib.Path, axes: dict[str, Any]
) -> None:
    report.plot(_workdir(tmp_path, _TRAIN + _VALIDATION, classes=classes))
    labels = [curve.get_label() for curve in axes["accuracy.png"].lines]
    assert any("top-5" in label for label in labels) == shown


def test_all_nonfinite_values_can_be_plotted(tmp_path: pathlib.Path) -> None:
    line = {"step": 1, "epoch": 0.1, "split": "train", "loss": None, "top1": None, "top5": None}
    assert len(report.plot(_workdir(tmp_path, [line]))) == 2


def test_incomplete_last_line_is_skipped(tmp_path: pathlib.Path, axes: dict[str, Any]) -> None:
    workdir = _workdir(tmp_path, _TRAIN)
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "ep')
    report.plot(workdir)
    assert len(axes["loss.png"].lines[0].get_xdata()) == 30


def test_runs_are_drawn_together(tmp_path: pathlib.Path, axes: dict[str, Any]) -> None:
    longer = [line | {"epoch": 2 * line["epoch"]} for line in _TRAIN + _VALIDATION]
    # Other splits and views are only shown in each run's own report.
    short = [*_TRAIN, *_VALIDATION, _VALIDATION[0] | {"split": "other"}]
    runs = [_workdir(tmp_path / f"run {n}", longer if n == 8 else short) for n in range(9)]
    paths = report.plot_comparison(runs, tmp_path / "new" / "plots")
    assert [path.name for path in paths] == [
        "loss.png",
        "top1.png",
        "top5.png",
        "learning_rate.png",
    ]
    curves = axes["top1.png"].lines
    assert [curve.get_label() for curve in curves][:2] == ["run 0, last 27", "run 1, last 27"]
    np.testing.assert_allclose(curves[8].get_xdata(), [2, 4, 6])
    np.testing.assert_allclose(curves[8].get_ydata(), [9, 18, 27])
    assert len({(curve.get_color(), curve.get_linestyle()) for curve in curves}) == 9
    assert len(axes["learning_rate.png"].lines[0].get_xdata()) == 30
    one = _workdir(tmp_path / "one", short)
    assert len(report.plot_comparison([one], tmp_path)) == 4
    (curve,) = axes["loss.png"].lines
    assert curve.get_label() == "one, last 0.2"
    assert axes["loss.png"].get_title() == "Loss of one"
    odd = _workdir(tmp_path / "two", short, name="caf\udce9" + "x" * 300)
    assert len(report.plot_comparison([odd], tmp_path)) == 4


def test_unusual_run_names_can_be_plotted(
    tmp_path: pathlib.Path, axes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = _workdir(tmp_path / "run", _TRAIN + _VALIDATION)
        monkeypatch.setattr(context, "display_names", lambda records: run_folders.ODD_NAMES)
        report.plot_comparison([run] * len(run_folders.ODD_NAMES), tmp_path / "all")
        monkeypatch.undo()
        shown = [text.get_text() for text in axes["top1.png"].get_legend().get_texts()]
        assert len(shown) == len(run_folders.ODD_NAMES)
        for name, text in zip(run_folders.ODD_NAMES, shown, strict=True):
            assert text.endswith(", last 27") and len(text) < 60
            assert text.startswith(name[:1])
        assert shown[1] == r"$\frac{$, last 27"


@pytest.mark.parametrize("name", [r"$\frac{$", "x" * 300, "caf\udce9"])
def test_unusual_run_names_are_in_the_title(
    name: str, tmp_path: pathlib.Path, axes: dict[str, Any]
) -> None:
    report.plot(_workdir(tmp_path, _TRAIN + _VALIDATION, name=name))
    assert axes["loss.png"].get_title().endswith("top-1 27.00% at epoch 3 (last)")


def test_custom_metrics_are_plotted(tmp_path: pathlib.Path, axes: dict[str, Any]) -> None:
    more = {"macro accuracy/2": 1.0, "macro accuracy:2": 2.0}
    lines = [line | more | {"macro accuracy/2": line["top1"]} for line in _VALIDATION]
    paths = report.plot(_workdir(tmp_path, _TRAIN + lines, name="x"))
    names = ["loss", "accuracy", "learning_rate", "macro_accuracy_2", "macro_accuracy_2-2"]
    assert [path.stem for path in paths] == names
    (curve,) = axes["macro_accuracy_2.png"].lines
    assert curve.get_label() == "validation, last 27"
    np.testing.assert_allclose(curve.get_ydata(), [9, 18, 27])


def test_custom_metrics_do_not_replace_other_plots(
    tmp_path: pathlib.Path, axes: dict[str, Any]
) -> None:
    more = {"accuracy": 0.5, "a/b": 1.0, "a:b": 2.0, "a b": 3.0}
    paths = report.plot(_workdir(tmp_path, [line | more for line in _VALIDATION]))
    assert [path.stem for path in paths] == [
        *("loss", "accuracy", "accuracy-2", "a_b", "a_b-2", "a_b-3"),
    ]
    (curve,) = axes["accuracy-2.png"].lines
    assert curve.get_label() == "validation, last 0.5"


def test_missing_or_empty_metrics_are_user_errors(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(str(tmp_path))}: not a run with metrics"):
        report.plot(tmp_path)
    with pytest.raises(UserError, match="contains no metrics yet"):
        report.plot(_workdir(tmp_path, []))


def test_unwritable_directory_is_a_user_error(tmp_path: pathlib.Path) -> None:
    workdir = _workdir(tmp_path, _TRAIN)
    (workdir / "plots").write_text("")
    with pytest.raises(UserError, match="cannot write plots"):
        report.plot(workdir)
