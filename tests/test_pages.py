"""The user pages: figures, code and names in README.md and docs/ agree with what they describe."""

import json
import pathlib
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageOps

import inception_jax as ij
from benchmarks import compute
from inception_jax import config as configs
from inception_jax.config import other_names
from inception_jax.inspection import structure
from inception_jax.models import networks
from tests import command

ROOT = command.ROOT
DOCS = ROOT / "docs"
PRETRAINED = ROOT / "results/pretrained/googlenet-s16-tiny-imagenet.safetensors"


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def rows(page: str) -> list[list[str]]:
    """Returns the cells of each table row of a page."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]


def row(page: str, *parts: str) -> list[str]:
    """Returns the first row whose line contains all of some texts."""
    return next(cells for cells in rows(page) if all(part in "|".join(cells) for part in parts))


class Recorded(NamedTuple):
    """A run whose figures the pages give: its experiment, and what its command overrode."""

    experiment: str
    result: str
    examples: int
    classes: int
    overrides: Mapping[str, Any] = types.MappingProxyType({})


SIXTEEN_EPOCHS = {
    "train.duration": "16 epochs",
    "train.image_size_boundaries": ("9 epochs", "14.5 epochs"),
    "evaluation.every": "15.5 epochs",
}
CIFAR10 = {
    "train.duration": "16 epochs",
    "train.batch_size": 256,
    "train.image_sizes": (16, 24, 32),
    "train.image_size_boundaries": ("6.5 epochs", "14 epochs"),
}
ANTS_BEES = {"train.batch_size": 32, "data.source": "images"}
RUNS = {
    "[tiny_cpu_long](": Recorded(
        "tiny_cpu", "tiny_cpu_long/result.json", 100_000, 200, SIXTEEN_EPOCHS
    ),
    "[tiny_cpu](": Recorded("tiny_cpu", "tiny_cpu/result.json", 100_000, 200),
    "[cifar10_mini_cpu](": Recorded(
        "cifar10_mini", "cifar10_mini_cpu/result.json", 50_000, 10, CIFAR10
    ),
    "image_folder.py`, pretrained": Recorded(
        "image_folder", "image_folder/ants_bees/result.json", 245, 2, ANTS_BEES
    ),
    "image_folder.py`, from scratch": Recorded(
        "image_folder", "image_folder/ants_bees/scratch_result.json", 245, 2, ANTS_BEES
    ),
    "[tiny_adam](": Recorded("tiny_adam", "tiny_adam/result.json", 100_000, 200),
    "[tiny_deeper](": Recorded("tiny_deeper", "tiny_deeper/result.json", 100_000, 200),
    "[tiny_steps](": Recorded("tiny_steps", "tiny_steps/result.json", 100_000, 200),
    "[tiny_paper](": Recorded("tiny_paper", "tiny_paper/result.json", 100_000, 200),
}
# What whole recipes would take, in the order of the page.
WHOLE = {
    "tiny": (100_000, 200),
    "cifar10_mini": (50_000, 10),
    "imagenet": (1_281_167, 1000),
    "tiny_adam": (100_000, 200),
    "tiny_deeper": (100_000, 200),
    "tiny_steps": (100_000, 200),
    "tiny_paper": (100_000, 200),
}


def load(experiment: str, overrides: Mapping[str, Any] | None = None) -> configs.Config:
    return ij.load_config(ROOT / "experiments" / f"{experiment}.py", dict(overrides or {}))


def pflop(config: configs.Config, examples: int, classes: int, steps: int = 0) -> float:
    """Returns the compute of training for some steps, or for the whole duration."""
    return compute.pflop(compute.phases(config, examples=examples, classes=classes, steps=steps))


@pytest.mark.parametrize("name", RUNS)
def test_the_results_are_those_recorded(name: str) -> None:
    recorded = RUNS[name]
    result = json.loads((ROOT / "results" / recorded.result).read_text())
    config = load(recorded.experiment, recorded.overrides)
    found = pflop(config, recorded.examples, recorded.classes, result["step"])
    cells = row("docs/results.md", name, "](../results/")
    assert f"{result['top1']:.2f}%" in cells
    assert "top5" not in result or f"{result['top5']:.2f}%" in cells
    assert f"{found:.3g}" in cells
    if "tiny_cpu" in name or "cifar10" in name or "pretrained" in name:
        cells = row("README.md", name, "](results/")
        assert f"{result['top1']:.2f}%" in cells and f"{found:.3g}" in cells


@pytest.mark.parametrize("experiment", WHOLE)
def test_the_compute_of_whole_recipes_is_counted(experiment: str) -> None:
    found = pflop(load(experiment), *WHOLE[experiment])
    cells = [
        cell
        for cells in rows("docs/results.md")
        if cells[0] == f"`{experiment}.py`"
        for cell in cells
    ]
    assert f"{found:.3g}" in cells or f"{found:.1f}" in cells


def test_the_sum_over_image_sizes_is_right() -> None:
    lines = [cells for cells in rows("docs/results.md") if cells[0] in ("32", "48", "64")]
    total = 0.0
    for size, images, macs, cell in lines:
        counted = compute.multiply_adds(load("tiny_cpu").model, int(size), 200)
        assert macs == f"{counted / 1e6:.1f} M"
        found = compute.pflop([compute.Phase(int(size), int(images.replace(",", "")), counted)])
        assert cell == f"{found:.3f}"
        total += found
    assert f"{total:.3g}" == row("docs/results.md", "1,600,000")[-1] == "1.99"


@pytest.mark.parametrize(
    "cells",
    [
        cells
        for cells in rows("docs/models.md")
        if re.fullmatch(r"\d+", cells[min(2, len(cells) - 1)])
    ],
    ids=lambda cells: "-".join(cells[:3]).replace("`", ""),
)
def test_the_table_of_networks_is_that_of_the_networks(cells: list[str]) -> None:
    name, stem, size, macs, parameters, megabytes, _ = (cell.strip("`") for cell in cells)
    classes = {"224": 1000, "32": 10, "16": 10}.get(size, 200)
    settings = configs.Model(name=name, stem=stem or "paper")
    network = networks.create(settings, classes, rewrite="")
    found = structure.analyze(network, int(size)).blocks()
    assert macs == f"{sum(block.multiply_adds for block in found) / 1e6:,.1f} M"
    count = sum(block.parameters for block in found)
    assert parameters == f"{count / 1e6:.2f} M"
    assert megabytes == f"{4 * count / 1e6:.1f}"


def prepared(width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns an RGBA image of noise, and what ImageOps.fit makes of it."""
    rgba = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    image = Image.fromarray(np.ascontiguousarray(rgba[..., :3]))
    return rgba, np.asarray(ImageOps.fit(image, (64, 64), Image.Resampling.BICUBIC))


@pytest.mark.parametrize("size", [(128, 96), (513, 770), (40, 33), (64, 64)])
def test_the_javascript_prepares_images_as_pillow_does(
    size: tuple[int, int], tmp_path: pathlib.Path
) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs Node.js")
    rgba, expected = prepared(*size)
    (tmp_path / "rgba.bin").write_bytes(rgba.tobytes())
    (code,) = blocks("docs/phones_and_browsers.md", "javascript")
    driver = (
        'const fs = require("fs"), data = fs.readFileSync("rgba.bin");'
        f"const image = {{ data, width: {size[0]}, height: {size[1]} }};"
        'fs.writeFileSync("pixels.bin", preprocess(image, 64));'
    )
    subprocess.run([node, "-e", code + driver], cwd=tmp_path, check=True)
    found = np.frombuffer((tmp_path / "pixels.bin").read_bytes(), np.uint8).reshape(64, 64, 3)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.001


def test_the_numbers_to_check_a_port_by_are_right(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    model = tmp_path / "model.onnx"
    command.check("tools.export", "--to=onnx", f"--weights={PRETRAINED}", f"--output={model}")
    (code,) = blocks("docs/phones_and_browsers.md", "python")
    # In a process of its own, as for a user: its threads are not JAX's.
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (shown,) = blocks("docs/phones_and_browsers.md", "text")
    found, expected = done.stdout.splitlines(), shown.splitlines()
    assert found[:-3] == expected[:-3]
    for line, wanted in zip(found[-3:], expected[-3:], strict=True):
        assert line.split()[0] == wanted.split()[0]
        assert float(line.split()[1]) == pytest.approx(float(wanted.split()[1]), abs=0.01)


def test_the_names_of_other_trainers_are_answered_as_the_faq_says() -> None:
    lines = (DOCS / "faq.md").read_text(encoding="utf-8").partition("## Names of settings")[2]
    table = [line[1:-1].split("|") for line in lines.splitlines() if line.startswith("| `")]
    assert len(table) > 20
    for theirs, ours in table:
        here = re.findall(r"`([^`]+)`", ours)
        names = re.findall(r"`(\w+)`", theirs)
        for name in names:
            answer = other_names.SETTING_OF.get(name, other_names.ANSWER_TO.get(name, ""))
            fields = [path for path, _, _ in configs.leaves() if path.endswith(f".{name}")]
            assert any(each in (answer, *fields) or each in answer for each in here), name


def test_the_network_of_the_readme_makes_logits(tmp_path: pathlib.Path) -> None:
    (code,) = blocks("README.md", "python")
    assert code.startswith("# my_net.py\n")
    (tmp_path / "my_net.py").write_text(code)
    done = command.run(
        "tools.summarize", f"--config={tmp_path / 'my_net.py'}", f"--output={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    assert "total" in done.stdout
