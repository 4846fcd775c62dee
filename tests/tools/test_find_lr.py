"""Tests the command find_lr with a narrow network on the digits."""

import json
import pathlib

import pytest
from PIL import Image

from tests import command


def arguments(data: pathlib.Path, output: pathlib.Path) -> list[str]:
    return [
        "tools.find_lr",
        "--config=experiments/digits.py",
        f"--config.data.directory={data}",
        "--config.data.image_size=8",
        "--config.model.width=0.125",
        "--config.model.dropout=0",
        f"--output={output}",
        "--steps=140",
    ]


@pytest.mark.slow
def test_writes_plot_points_and_rate(data_directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    output = tmp_path / "a" / "output"
    printed = command.check(*arguments(data_directory, output), "--low=1e-3", "--high=30")
    results = json.loads((output / "find_lr.json").read_text())
    rate = results["proposal"]["rate"]
    assert printed.splitlines() == [
        str(output / "find_lr.json"),
        str(output / "find_lr.png"),
        f"--config.schedule.learning_rate={rate:g}",
    ]
    assert 1e-3 < rate < 1
    points = results["points"]
    assert points[0]["rate"] == pytest.approx(1e-3)
    assert points[-1]["rate"] <= 30.001
    assert min(point["loss"] for point in points) < points[0]["loss"]
    assert results["config"]["model"]["width"] == 0.125
    with Image.open(output / "find_lr.png") as image:
        assert min(image.size) > 300


def test_unreliable_curve_prints_no_rate(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Too few steps, in a range that ends long before the loss diverges."""
    settings = [*arguments(data_directory, tmp_path), "--low=1e-3", "--high=0.05", "--steps=40"]
    done = command.run(*settings)
    assert done.returncode == 2, done.stderr
    assert "learning_rate=" not in done.stdout
    assert "but none is proposed:" in done.stderr
    assert "--steps=51" in done.stderr
    assert "Use a larger --high" in done.stderr
    results = json.loads((tmp_path / "find_lr.json").read_text())
    assert results["proposal"] is None
    assert len(results["doubts"]) >= 2
    assert len(results["points"]) == 40


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("--low=1", "--low=1 and --high=0.5: --low must be less"),
        ("--steps=1", "--steps"),
        ("--output=/proc/no/such", "--output=/proc/no/such: cannot be written to"),
        ("stray", "'stray'"),
    ],
)
def test_usage_error_exits_with_2(mistake: str, message: str, tmp_path: pathlib.Path) -> None:
    done = command.run(*arguments(tmp_path, tmp_path / "out"), "--high=0.5", mistake)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
