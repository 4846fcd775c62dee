"""Tests the command export, and the snippets in docs/export.md that use its files."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import onnx
import pytest
from PIL import Image

from inception_jax.inference.predictor import Predictor
from inception_jax.models import weights
from tests import command, random_weights, small

SNIPPETS = re.findall(r"```python\n(.*?)```", (command.ROOT / "docs/export.md").read_text(), re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with the files used in the documentation."""
    folder = tmp_path_factory.mktemp("export")
    trained = folder / "trained.safetensors"
    weights.save(trained, random_weights.make())
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    for form, name in (
        ("savedweights", "model.safetensors"),
        ("stablehlo", "model.stablehlo"),
        ("onnx", "model.onnx"),
    ):
        printed = command.check(
            "tools.export", f"--to={form}", f"--weights={trained}", f"--output={folder / name}"
        )
        assert f"{folder / name}: " in printed and "mini_googlenet, 7 classes" in printed
    return folder


def test_documentation_has_a_snippet_for_each_format() -> None:
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["stablehlo", "onnx", "safetensors", "package"])
def test_documentation_snippets_run(snippet: str, folder: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", snippet],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(command.ROOT), *sys.path[1:]])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "load_file" in snippet:
        assert "params/conv1/conv/kernel (3, 3, 3, 10)" in done.stdout
    else:
        predictor = Predictor(random_weights.make())
        pixels = predictor.read((folder / "image.png").read_bytes(), "")
        best = predictor.predict(pixels[None])[0]
        assert done.stdout.splitlines() == [f"{g.probability:6.1%}  {g.name}" for g in best]


def test_description_is_written_next_to_stablehlo(folder: pathlib.Path) -> None:
    about = json.loads((folder / "model.stablehlo.json").read_text())
    assert about["output"]["shape"] == ["batch", 7]


def test_int8_has_its_own_accuracy(data_directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    run = tmp_path / "run"
    small.finished(small.config(data_directory), run)
    output = tmp_path / "new" / "folder" / "small.onnx"
    done = command.run(
        "tools.export",
        "--to=onnx",
        "--quantize=int8",
        "--calibration=4",
        f"--workdir={run}",
        f"--output={output}",
        "--config.data.storage=records",
        "--config.data.eval_crop_pct=0.75",
    )
    assert done.returncode == 0, done.stderr
    assert "config.data.eval_crop_pct is 0.75; recorded with the weights: 1.0" in done.stderr
    before, after = (
        float(re.findall(rf"\| {form} .*? \| +([\d.]+)% \|", done.stdout)[0])
        for form in ("float32", "int8")
    )
    closing = done.stdout.splitlines()[-1]
    assert "onnx, int8; mini_googlenet" in closing and f"top-1 {after:.2f}%" in closing
    assert "step 11" in closing and "best and last checkpoint" in closing
    (entry,) = onnx.load(output).metadata_props
    about = json.loads(entry.value)
    assert about["precision"] == "int8"
    assert about["metrics"]["top1"] == pytest.approx(after, abs=0.01)
    assert ("warning: int8 costs" in done.stderr) == (before - after > 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=onnx", "--dtype=bfloat16"], "--dtype=bfloat16: requires --to=savedweights"),
        (["--to=stablehlo", "--quantize=int8"], "--quantize=int8: requires --to=onnx"),
        (["--to=onnx", "--float_ends"], "--float_ends: requires --quantize=int8"),
        (["--to=onnx", "--calibration=9"], "--calibration=9: requires --quantize=int8"),
        (["--to=onnx", "--quantize=int8"], "also give its experiment: --config=FILE"),
        (
            ["--to=onnx", "--quantize=int8", "--config=experiments/digits.py"],
            "config.data.image_size = 16: must be 17, the network's image size",
        ),
        (["--to=tflite"], "--to"),
        (
            ["--to=onnx", "--config=experiments/digits.py", "--config.evaluation.image_size=20"],
            "--config.evaluation.image_size: has no effect without --quantize=int8",
        ),
    ],
)
def test_usage_error_exits_with_2(
    arguments: list[str], message: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = command.run(
        "tools.export",
        *arguments,
        f"--weights={folder / 'trained.safetensors'}",
        f"--output={tmp_path / 'file'}",
    )
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
