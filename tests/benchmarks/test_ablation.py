"""The table of an ablation, and the runs trained for it."""

import json
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from benchmarks import ablation, command, measure
from tests.experiments import load

PLAN = """
experiment = "experiments/digits.py"
shared = ["train.duration=2 epochs"]
seeds = [0, 1]

[variants]
base = []
"no flip, 2 px" = ["augment.flip=False", "augment.pad=2"]
"""


@pytest.fixture
def plan(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "plan.toml"
    path.write_text(PLAN)
    return path


def test_each_variant_is_trained_once(
    plan: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    called: list[Sequence[str]] = []

    def train(name: str, flags: Sequence[str]) -> None:
        called.append(flags)
        (folder,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--workdir="))
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        result = {"top1": 40.0 + 2 * len(called), "loss": 2.5, "seconds": 90.0}
        (pathlib.Path(folder) / "result.json").write_text(json.dumps(result))

    table = tmp_path / "table.json"
    arguments = [str(plan), f"--output={tmp_path / 'out'}", "--json", str(table)]
    monkeypatch.setattr("sys.argv", ["ablation", *arguments])
    monkeypatch.setattr(command, "train", train)
    ablation.main()
    ablation.main()
    assert len(called) == 4, "finished variants are not trained again"
    assert called[3][-4:] == [
        "--config.train.duration=2 epochs",
        "--config.augment.flip=False",
        "--config.augment.pad=2",
        "--config.seed=1",
    ]
    text = plan.read_text()
    plan.write_text(re.sub(r'experiment = ".*"', 'experiment = "experiments/other.py"', text))
    with pytest.raises(measure.BenchmarkError, match="trained with other settings"):
        ablation.main()
    plan.write_text(text)
    monkeypatch.setattr("sys.argv", [*sys.argv, "--set", "seed=7"])
    with pytest.raises(measure.BenchmarkError, match="trained with other settings"):
        ablation.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split("|")[1:6] == [
        " base          ",
        "   43.00 ",
        "      +0.00 ",
        " 0.00 ",
        " 42.00–44.00 ",
    ]
    assert [cell.strip() for cell in lines[3].split("|")[2:5]] == ["47.00", "+4.00", "0.00"]
    results = json.loads(table.read_text())["results"]
    assert [run["top1"] for run in results["no flip, 2 px"]] == [46.0, 48.0]


def test_differences_are_of_runs_with_the_same_seed() -> None:
    def run(top1: float, **others: float) -> dict[str, Any]:
        averages = {name: {"top1": each} for name, each in others.items()}
        more = {"evaluations": averages} if averages else {}
        return {"top1": top1, "loss": 2.0, "seconds": 60.0, **more}

    results = {
        "base": [run(40, flip=41), run(43, flip=45), run(41, flip=42)],
        "better": [run(41.5, shifted=44), run(44, shifted=45), run(42.5, shifted=46)],
        "interrupted": [{**run(39), "flip_top1": 40.0}],
    }
    head, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in ablation.table(results).splitlines()
    )
    assert head[2:7] == ["difference", "±", "low–high", "flip top-1 %", "shifted top-1 %"]
    assert rows[0][1:7] == ["41.33", "+0.00", "0.00", "40.00–43.00", "42.67", ""]
    # Differences of 1.5, 1 and 1.5, whose deviation is 0.289.
    assert rows[1][1:7] == ["42.67", "+1.33", "0.17", "41.50–44.00", "", "45.00"]
    assert rows[2][1:7] == ["39.00", "-1.00", "", "", "40.00", ""]


@pytest.mark.parametrize("text", ["", "experiment = 1", "[variants]", PLAN + "[more]\n"])
def test_invalid_plan_is_rejected(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(measure.BenchmarkError, match=r"plan\.toml: "):
        ablation.read_plan(path)


def test_variant_replaces_a_shared_tuple() -> None:
    shared = ["train.image_sizes=(32,48)", "train.image_size_boundaries=('0.75 epochs',)"]
    variant = ["train.image_sizes=(48,)", "train.image_size_boundaries=()"]
    flags = command.overrides([*shared, *variant])
    config = load([f"--config={measure.ROOT / 'experiments' / 'tiny_cpu.py'}", *flags])
    assert config.train.image_sizes == (48,)
    assert config.train.image_size_boundaries == ()


def test_all_stored_plans_are_valid() -> None:
    plans = sorted((measure.ROOT / "benchmarks" / "ablations").glob("*.toml"))
    assert plans
    for path in plans:
        plan = ablation.read_plan(path)
        assert len(plan.seeds) >= 3 or "techniques" not in path.name
        for variant in plan.variants.values():
            flags = command.overrides([*plan.shared, *variant])
            load([f"--config={measure.ROOT / plan.experiment}", *flags])
