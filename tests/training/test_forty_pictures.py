"""A newcomer's first try: image_folder.py as it stands, on forty pictures of two colors."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from inception_jax.config import Config
from inception_jax.evaluation.evaluate import Evaluator, evaluate_checkpoint
from inception_jax.telemetry.writers import read_lines
from inception_jax.training import loop, run, workdir
from tests import small
from tests.experiments import load

EXPERIMENT = pathlib.Path(__file__).parents[2] / "experiments" / "image_folder.py"
IMAGES = 20  # Of each class.


@pytest.fixture
def settings(tmp_path: pathlib.Path) -> Config:
    """The experiment with no settings but where the pictures are, at a size that is fast."""
    random = np.random.default_rng(0)
    for name, channel in (("red", 0), ("blue", 2)):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for number in range(IMAGES):
            pixels = random.integers(0, 90, (16, 16, 3)).astype(np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / f"{number}.png")
    return load(
        [
            f"--config={EXPERIMENT}",
            f"--config.data.source={tmp_path / 'pictures'}",
            f"--config.data.directory={tmp_path / 'data'}",
            "--config.data.image_size=16",
        ]
    )


def test_forty_pictures_are_told_apart(settings: Config, tmp_path: pathlib.Path) -> None:
    whole = run.build(settings, log=lambda _: None)
    this = dataclasses.replace(whole, model=small.Network(settings.model.dropout, classes=2))
    folder = workdir.Workdir(tmp_path / "run")
    result = loop.train(this, folder, Evaluator(this), changed=[])
    assert (result["step"], result["count"], result["top1"]) == (120, 8, 100)

    lines = read_lines(folder.path / "metrics.jsonl")
    validation = [line["top1"] for line in lines if line["split"] == "validation"]
    assert len(validation) == 5
    assert validation[2:] == [100] * 3
    # Training pictures, too, are evaluated as others are: the diagnosis compares.
    sample = [line for line in lines if line["split"] == "train_eval"]
    assert [line["count"] for line in sample] == [32] * 5
    assert sample[-1]["top1"] == 100
    assert evaluate_checkpoint(this, folder, "last")["loss"] == pytest.approx(result["loss"])

    # What was chosen is recorded; without flags it is the same run again.
    recorded = json.loads(folder.config.read_text())["config"]
    assert recorded["train"]["batch_size"] == 8
    again = workdir.with_recorded(folder, settings)
    assert workdir.check_owner(folder, again) == []
    assert again == this.config
