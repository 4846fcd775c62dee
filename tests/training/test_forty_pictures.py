"""A new user's first try: image_folder.py unchanged, on forty images of two colors."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from inception_jax.config import Config
from inception_jax.evaluation.evaluate import Evaluator, evaluate_checkpoint
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import read_metrics
from inception_jax.training import run, workdir
from tests import small
from tests.experiments import load

EXPERIMENT = pathlib.Path(__file__).parents[2] / "experiments" / "image_folder.py"


def settings(folder: pathlib.Path, red: int, blue: int) -> Config:
    """Returns the experiment with only the source of the images set, at a size that is fast."""
    random = np.random.default_rng(0)
    for name, channel, images in (("red", 0, red), ("blue", 2, blue)):
        (folder / "pictures" / name).mkdir(parents=True)
        for number in range(images):
            pixels = random.integers(0, 90, (16, 16, 3)).astype(np.uint8)
            pixels[..., channel] += 150
            Image.fromarray(pixels).save(folder / "pictures" / name / f"{number}.png")
    return load(
        [
            f"--config={EXPERIMENT}",
            f"--config.data.source={folder / 'pictures'}",
            f"--config.data.directory={folder / 'data'}",
            "--config.data.image_size=16",
            "--config.model.dtype=float32",  # The same on every machine, and cacheable.
        ]
    )


@pytest.mark.slow
# The last one has fewer training images than a batch, and two evaluation images.
@pytest.mark.parametrize(("red", "blue"), [(20, 20), (5, 35), (3, 3)])
def test_forty_images_are_classified(red: int, blue: int, tmp_path: pathlib.Path) -> None:
    given = settings(tmp_path, red, blue)
    configured = run.assemble(given, log=lambda _: None)
    this = dataclasses.replace(configured, model=small.Network(given.model.dropout, classes=2))
    folder = Workdir(tmp_path / "run")
    result = small.train(this, folder, Evaluator(this), changed=[])
    assert (result["step"], result["top1"]) == (120, 100)

    lines = read_metrics(folder.path / "metrics.jsonl")
    validation = [line["top1"] for line in lines if line["split"] == "validation"]
    assert 5 <= len(validation) <= 6
    assert set(validation[len(validation) // 2 :]) == {100}
    # Training images are also evaluated, for the diagnosis to compare.
    sample = [line for line in lines if line["split"] == "train_eval"]
    assert [line["count"] for line in sample] == [len(this.dataset.train)] * len(validation)
    assert sample[-1]["top1"] == 100
    assert evaluate_checkpoint(this, folder, "last")["loss"] == pytest.approx(result["loss"])

    # Automatic settings are recorded; without flags it is the same run again.
    recorded = json.loads(folder.config.read_text())["config"]
    assert recorded["train"]["batch_size"] == 8
    again = workdir.with_recorded_auto_settings(workdir.load_previous_run(folder), given)
    assert workdir.check_compatible(workdir.load_previous_run(folder), again) == []
    assert again == this.config
