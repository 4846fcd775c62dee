"""The rows, table and plot of the frontier, and the runs trained for it."""

import json
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from PIL import Image

from benchmarks import command, compute, frontier, measure
from inception_jax import config as configs
from inception_jax import load_config
from tests import experiments

RECIPES = """
[data.digits]
classes = 10
examples = 1_437

[recipes.small]
data = "digits"
experiment = "experiments/digits.py"
aim = "that the command works"
[recipes.small.settings]
model.width = 0.25
train.duration = "6 steps"
train.image_sizes = [8, 16]
train.image_size_boundaries = ["4 steps"]
schedule.warmup = "1 step"
evaluation.every = "6 steps"
log.every = "2 steps"

[recipes.longer]
data = "digits"
experiment = "experiments/digits.py"
extends = "small"
aim = "the same"
[recipes.longer.settings]
train.duration = "8 steps"
evaluation.every = "8 steps"

[[peers]]
name = "someone"
data = "digits"
points = [[0.1, 97.0], [1.0, 98.5]]
source = "https://example.org/some/where/else"
counted = "as stated there"
"""
RESULT = {
    "name": "digits",
    "step": 6,
    "split": "test",
    "top1": 61.5,
    "top5": 91.25,
    "loss": 1.5,
    "count": 360,
    "evaluations": {"flip": {"top1": 62.25}},
    "seconds": 90.0,
    "environment": {
        "date": "2026-11-27T00:00:00+00:00",
        "revision": "0123456789ab",
        "python": "3.12.1",
        "packages": dict.fromkeys(("jax", "jaxlib", "flax", "optax", "numpy"), "1.0"),
        "cpu": "a processor",
        "cpu_count": 2,
        "device": "cpu",
        "device_count": 1,
    },
}
# Runs the command for this file of recipes.
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def recipes(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "recipes.toml"
    path.write_text(RECIPES)
    return path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Replaces the training command by one that records its flags and writes a result."""
    calls: list[Sequence[str]] = []

    def train(name: str, flags: Sequence[str]) -> None:
        calls.append(flags)
        folder = pathlib.Path(
            next(flag for flag in flags if flag.startswith("--workdir=")).partition("=")[2]
        )
        config = experiments.load([flag for flag in flags if flag.startswith("--config")])
        dataset = {"classes": 10, "training examples": 1437}
        write_run(folder, config, dataset, top1=61.5 + config.seed)

    monkeypatch.setattr(command, "train", train)
    return calls


def write_run(
    folder: pathlib.Path, config: configs.Config, dataset: dict[str, Any], **result: Any
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": configs.to_dict(config), "dataset": dataset, "changes": []}
    (folder / "config.json").write_text(json.dumps(record))
    steps = configs.Timeline(config.train.batch_size, 1437).steps(config.train.duration)
    (folder / "result.json").write_text(json.dumps({**RESULT, "step": steps, **result}))


@pytest.fixture
def run(recipes: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Returns a function that runs the command with some arguments and returns all rows."""

    def call(*arguments: str) -> list[dict[str, Any]]:
        files = [f"--recipes={recipes}", f"--json={tmp_path / 'rows.json'}"]
        out = [f"--plot={tmp_path / 'plot.png'}", f"--output={tmp_path / 'runs'}"]
        monkeypatch.setattr("sys.argv", ["frontier", *files, *out, *arguments])
        frontier.main()
        return frontier.read_rows(tmp_path / "rows.json")

    return call


def test_a_row_says_what_was_reached_with_what(run: Run, trained: list[Sequence[str]]) -> None:
    (row,) = run("small", "--set", "data.directory=elsewhere", "--platform=cpu")
    assert {"--platform=cpu", "--config.data.directory=elsewhere"} <= set(trained[0])
    assert (row["top1"], row["top5"], row["flip_top1"]) == (61.5, 91.25, 62.25)
    assert (row["recipe"], row["seed"], row["minutes"], row["images"]) == ("small", 0, 1.5, 192)
    assert [(each["image_size"], each["images"]) for each in row["phases"]] == [(8, 128), (16, 64)]
    work = sum(6 * each["images"] * each["multiply_adds"] for each in row["phases"])
    assert row["pflop"] == pytest.approx(work / 1e15)
    assert row["phases"][1]["multiply_adds"] > 3 * row["phases"][0]["multiply_adds"] > 0
    assert row["hardware"]["cpu"] == "a processor" and row["versions"]["python"] == "3.12.1"
    assert row["revision"] == "0123456789ab" and row["date"].startswith("2026-11-27")
    assert row["settings"]["model.width"] == 0.25
    assert not {"data.directory", "log.every", "seed"} & set(row["settings"])


def test_finished_runs_are_not_trained_again(run: Run, trained: list[Sequence[str]]) -> None:
    assert len(run("small", "longer", "--seeds", "0", "1")) == 4
    rows = run("longer", "small", "--seeds", "1", "0", "2")
    assert len(trained) == 6
    assert [(row["recipe"], row["seed"]) for row in rows] == [
        (name, seed) for name in ("small", "longer") for seed in range(3)
    ]


def test_a_run_whose_row_is_missing_is_not_trained_again(
    run: Run, trained: list[Sequence[str]], tmp_path: pathlib.Path
) -> None:
    rows = run("small")
    (tmp_path / "rows.json").unlink()
    assert run("small") == rows
    assert len(trained) == 1


def test_table_and_plot_have_means_over_seeds(
    run: Run,
    trained: list[Sequence[str]],
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("small", "--seeds", "0", "1", "2", "--note", "of JPEGs")
    lines = capsys.readouterr().out.splitlines()
    assert lines[5] == (
        "| someone | digits | 97.00, 98.50 | 0.1, 1 | as stated there | "
        "[some/where](https://example.org/some/where/else) |"
    )
    line = lines[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:4] == ["small", "digits, of JPEGs", "62.50% ± 1.00", "91.25%"]
    assert cells[5:] == ["3", "1.5"]
    with Image.open(tmp_path / "plot.png") as plot:
        assert len(plot.convert("L").getcolors()) > 20


def test_the_second_gradient_of_sam_counts() -> None:
    experiment = measure.ROOT / "experiments/digits.py"
    plain, twice = (
        compute.pflop(
            compute.phases(load_config(experiment, each), examples=1437, classes=10, steps=3)
        )
        for each in ({}, {"optimizer.sam_rho": 0.05})
    )
    assert twice == pytest.approx(2 * plain)


@pytest.mark.parametrize(
    ("steps", "images"),
    [(1000, [256_000]), (1600, [380_160, 29_440]), (0, [380_160, 199_936, 59_904])],
)
def test_phases_end_with_the_finished_steps(steps: int, images: list[int]) -> None:
    config = load_config(measure.ROOT / "experiments/tiny_cpu.py", {})
    found = compute.phases(config, examples=100_000, classes=200, steps=steps)
    assert [phase.images for phase in found] == images


def test_the_frontier_leaves_out_what_a_cheaper_run_exceeds() -> None:
    def point(pflop: float, top1: float) -> frontier.Point:
        return frontier.Point("x", "digits", "", pflop, 1.0, top1, None, None, 1)

    found = [point(1, 50), point(2, 49), point(3, 55), point(3, 54), point(0.5, 40)]
    assert [each.top1 for each in frontier.frontier(found)] == [40, 50, 55]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--set", "schedule.learning_rate=0.5"], r"--set schedule.learning_rate=0.5: affects"),
        (["--note", "other data"], r"note = 'other data' in the run of seed 1; must be ''"),
    ],
)
def test_rows_of_other_settings_or_data_are_refused(
    run: Run, trained: list[Sequence[str]], arguments: list[str], problem: str
) -> None:
    rows = run("small")
    with pytest.raises(measure.BenchmarkError, match=problem):
        run("small", "--seeds", "1", *arguments)
    assert len(trained) == 1 and run() == rows


def test_a_workdir_of_other_settings_is_refused(
    run: Run, trained: list[Sequence[str]], tmp_path: pathlib.Path
) -> None:
    run("small")
    (tmp_path / "runs/small-0").rename(tmp_path / "runs/longer-0")
    with pytest.raises(measure.BenchmarkError, match=r"train.duration = '6 steps' in .*longer-0"):
        run("longer")
    assert len(trained) == 1


def test_a_changed_recipe_is_refused_before_training(
    run: Run, trained: list[Sequence[str]], recipes: pathlib.Path
) -> None:
    run("small")
    recipes.write_text(RECIPES.replace("model.width = 0.25", "model.width = 0.5"))
    with pytest.raises(measure.BenchmarkError, match=r"model.width = 0.5 .*; must be 0.25"):
        run("small", "--seeds", "1")
    assert len(trained) == 1


def test_a_run_resumed_with_other_settings_is_refused(
    run: Run, trained: list[Sequence[str]], tmp_path: pathlib.Path
) -> None:
    run("small")
    (tmp_path / "rows.json").unlink()
    path = tmp_path / "runs/small-0/config.json"
    record = json.loads(path.read_text())
    for line, refused in (("log.every: 2 → 3", False), ("schedule.warmup: 1 → 2", True)):
        change = {"step": 2, "date": "", "settings": [f"config.{line}"]}
        path.write_text(json.dumps({**record, "changes": [change]}))
        if refused:
            with pytest.raises(measure.BenchmarkError, match="settings were changed while"):
                run("small")
        else:
            assert len(run("small")) == 1
            (tmp_path / "rows.json").unlink()


def test_recorded_runs_are_added_without_training(
    run: Run, trained: list[Sequence[str]], tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    with pytest.raises(measure.BenchmarkError, match=r"result\.json not found"):
        run("small", f"--recorded={folder}")
    # Older results have no config.json in their folder.
    (folder / "result.json").write_text(json.dumps({**RESULT, "top1": 70.0}))
    (row,) = run("small", f"--recorded={folder}")
    assert row["top1"] == 70 and row["settings"]["model.width"] == 0.25 and not trained
    (folder / "result.json").write_text(json.dumps({**RESULT, "step": 5}))
    with pytest.raises(measure.BenchmarkError, match=r"images trained on = 160 in .*; must be 256"):
        run("longer", f"--recorded={folder}")


@pytest.mark.parametrize(
    "text", ["", "[recipes.x]", RECIPES + "[more", RECIPES.replace("aim =", "goal =")]
)
def test_invalid_recipes_are_rejected(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "recipes.toml"
    path.write_text(text)
    with pytest.raises(measure.BenchmarkError, match=r"recipes\.toml: cannot be read"):
        frontier.read_recipes(path)


def test_unknown_recipes_are_rejected(run: Run) -> None:
    with pytest.raises(measure.BenchmarkError, match=r"unknown recipes: big; .* has small, longer"):
        run("big")


@pytest.mark.slow
def test_stored_recipes_take_the_compute_in_their_names() -> None:
    recipes, peers = frontier.read_recipes(measure.ROOT / "benchmarks/frontier.toml")
    for name, recipe in recipes.items():
        config = recipe.config()
        flags = [f"--config={measure.ROOT / recipe.experiment}"]
        assert experiments.load([*flags, *command.overrides(recipe.flags())]) == config
        phases = compute.phases(config, examples=recipe.examples, classes=recipe.classes)
        assert compute.pflop(phases) == pytest.approx(float(name.rpartition("-")[2]), rel=0.1)
    for peer in peers:
        assert peer.source.startswith("https://") or (measure.ROOT / peer.source).is_file()


def test_stored_rows_of_a_recipe_have_the_same_settings() -> None:
    recipes, _ = frontier.read_recipes(measure.ROOT / "benchmarks/frontier.toml")
    rows = frontier.read_rows(measure.ROOT / "benchmarks/results/frontier.json")
    assert {"tiny-0.8", "tiny-2"} <= {row["recipe"] for row in rows} <= set(recipes)
    for row in rows:
        frontier.check_row(row, rows)
        phases = [compute.Phase(**phase) for phase in row["phases"]]
        assert row["pflop"] == pytest.approx(compute.pflop(phases))
        if "source" in row:
            result = json.loads((measure.ROOT / row["source"] / "result.json").read_text())
            assert (row["top1"], row["top5"]) == (result["top1"], result["top5"])


def test_the_page_has_the_stored_rows_and_peers() -> None:
    _, peers = frontier.read_recipes(measure.ROOT / "benchmarks/frontier.toml")
    rows = frontier.read_rows(measure.ROOT / "benchmarks/results/frontier.json")
    page = (measure.ROOT / "docs/results.md").read_text(encoding="utf-8")
    remedy = "paste what python -m benchmarks.frontier prints"
    assert frontier.table(frontier.points(rows)) in page, remedy
    assert frontier.peer_table(peers) in page, remedy


@pytest.mark.slow
def test_a_stopped_run_continues_with_the_same_command(
    recipes: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    called = [
        *(sys.executable, "-m", "benchmarks.frontier", "longer", f"--recipes={recipes}"),
        *(f"--json={tmp_path / 'rows.json'}", f"--plot={tmp_path / 'plot.png'}"),
        *(f"--output={tmp_path / 'runs'}", "--platform=cpu"),
        *("--set", f"data.directory={tmp_path / 'data'}", "log.every=1 step"),
    ]
    recipes.write_text(RECIPES.replace("8 steps", "400 steps"))
    metrics = tmp_path / "runs/longer-0/metrics.jsonl"
    # Not a pipe, which would fill up and stop the training.
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(called, cwd=measure.ROOT, stderr=file)
    try:
        while not (metrics.exists() and len(metrics.read_text().splitlines()) > 6):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    checkpoints = tmp_path / "runs/longer-0/checkpoints"
    assert any(each.name.isdigit() for each in checkpoints.iterdir()), "it was saved"
    assert not (tmp_path / "rows.json").exists()
    done = subprocess.run(called, cwd=measure.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resum" in done.stderr
    (row,) = frontier.read_rows(tmp_path / "rows.json")
    assert row["images"] == 400 * 32 and row["top1"] > 50 and row["pflop"] > 0
    assert f"{row['top1']:.2f}%" in done.stdout and (tmp_path / "plot.png").exists()
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == sorted(steps) and len(set(steps)) == 400
