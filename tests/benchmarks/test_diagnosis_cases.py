"""The runs whose fault is known, as they were measured: what is said of them today."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import diagnosis_cases, measure
from benchmarks.diagnosis_cases import CASES
from inception_jax import config as configs
from inception_jax.reporting.diagnosis import diagnose
from inception_jax.reporting.evidence import gather

STORED = measure.ROOT / "benchmarks" / "results" / "diagnosis_cases.json"
RESULTS: dict[str, Any] = json.loads(STORED.read_text())["results"]


def under_todays_names(settings: dict[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted path as of today, from those that an older version recorded."""
    config, _ = configs.read_settings(settings)
    # The unit of a duration was the last part of its path.
    paths = (path.removesuffix(".epochs").removesuffix(".steps") for path in settings)
    return {path: configs.get(config, path) for path in map(configs.current_path, paths)}


def test_every_case_was_measured_and_can_be_again() -> None:
    assert list(RESULTS) == list(CASES)
    assert len(CASES) >= 12
    for case in CASES.values():
        configs.validate(diagnosis_cases.settings(case)[0])


@pytest.mark.parametrize("name", CASES)
def test_a_measured_run_gets_a_true_verdict_and_the_advice_that_was_followed(name: str) -> None:
    case, stored = CASES[name], RESULTS[name]
    recorded = dict(stored["recorded"])
    config = configs.from_dict(recorded.pop("config"))
    lines = [json.loads(line) for line in recorded.pop("lines")]
    recorded["own_settings"] = under_todays_names(recorded["own_settings"])
    found = diagnose(gather(lines, config, **recorded), config)
    assert found.verdict in case.verdicts, found.lines()
    # What was tried is what is advised today, so that its effect is known.
    advice = found.advice and {found.advice.setting: found.advice.value}
    if advice:
        assert under_todays_names(stored["followed"]) == advice
    assert found.reason == stored["first"]["reason"]


@pytest.mark.parametrize("name", CASES)
def test_advice_that_was_followed_made_nothing_worse(name: str) -> None:
    stored = RESULTS[name]
    assert not stored["worse"]
    if "followed" in stored:
        assert not diagnosis_cases.is_worse(stored["first"], stored["after"])


@pytest.mark.parametrize(
    ("top1", "loss", "worse"),
    [
        (50.0, 1.04, False),
        (50.0, 1.06, True),
        (47.9, 0.5, True),
        (48.1, 1.0, False),
        (52.1, 2.0, False),
    ],
)
def test_worse_is_less_accurate_or_has_a_higher_loss(top1: float, loss: float, worse: bool) -> None:
    before = {"top1": 50.0, "loss": 1.0, "noise": 2.0}
    assert diagnosis_cases.is_worse(before, {"top1": top1, "loss": loss, "noise": 2.0}) == worse


def test_pictures_are_the_same_each_time_and_labels_can_be_shuffled(tmp_path: pathlib.Path) -> None:
    folders = {}
    for name, shuffled in (("one", False), ("same", False), ("other", True)):
        folder = tmp_path / name
        diagnosis_cases.pictures(folder, counts=(3, 2), size=8, noise=1.0, shuffled=shuffled)
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
        folders[name] = {path: np.asarray(Image.open(folder / path)) for path in paths}
    assert [path.parts[0] for path in folders["one"]] == ["class_0"] * 3 + ["class_1"] * 2
    for path, pixels in folders["one"].items():
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_array_equal(folders["same"][path], pixels)
    assert any((folders["other"][path] != pixels).any() for path, pixels in folders["one"].items())
