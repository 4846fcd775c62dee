"""The current diagnosis of the recorded runs with known faults."""

import json
import pathlib
import re
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
FIGURE = re.compile(r"\d[\d.]*\b")


def read(settings: dict[str, Any]) -> configs.Config:
    """Returns settings recorded by dotted path, possibly under the names of older versions."""
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *groups, name = path.split(".")
        group = nested
        for each in groups:
            group = group.setdefault(each, {})
        group[name] = value
    return configs.from_dict(nested)


def test_all_cases_are_measured_and_valid() -> None:
    assert list(RESULTS) == list(CASES)
    assert len(CASES) >= 12
    for case in CASES.values():
        configs.validate(diagnosis_cases.case_config(case)[0])


@pytest.mark.parametrize("name", CASES)
def test_measured_run_gets_a_true_verdict_and_the_followed_advice(name: str) -> None:
    case, stored = CASES[name], RESULTS[name]
    recorded = dict(stored["recorded"])
    settings = recorded.pop("config")
    config, recipe = read(settings), read(settings | recorded.pop("own_settings"))
    own = {path: configs.get(recipe, path) for path, _, _ in configs.leaves()}
    own = {path: value for path, value in own.items() if value != configs.get(config, path)}
    lines = [json.loads(line) for line in recorded.pop("lines")]
    diagnosis = diagnose(gather(lines, config, recipe_settings=own, **recorded), config)
    assert diagnosis.verdict in case.verdicts, diagnosis.lines()
    # The advice given today is the one that was tried, so its effect is known.
    if advice := diagnosis.advice:
        followed = read(settings | stored["followed"])
        assert configs.get(followed, advice.setting) == advice.value
    # The wording may change, the figures may not.
    assert FIGURE.findall(diagnosis.reason) == FIGURE.findall(stored["first"]["reason"])


@pytest.mark.parametrize("name", CASES)
def test_followed_advice_did_not_make_runs_worse(name: str) -> None:
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


def test_striped_images_are_deterministic_and_labels_can_be_shuffled(
    tmp_path: pathlib.Path,
) -> None:
    folders = {}
    for name, shuffled in (("one", False), ("same", False), ("other", True)):
        folder = tmp_path / name
        diagnosis_cases.write_striped_images(
            folder, counts=(3, 2), size=8, noise=1.0, shuffled=shuffled
        )
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
        folders[name] = {path: np.asarray(Image.open(folder / path)) for path in paths}
    assert [path.parts[0] for path in folders["one"]] == ["class_0"] * 3 + ["class_1"] * 2
    for path, pixels in folders["one"].items():
        assert pixels.shape == (8, 8, 3)
        np.testing.assert_array_equal(folders["same"][path], pixels)
    assert any((folders["other"][path] != pixels).any() for path, pixels in folders["one"].items())
