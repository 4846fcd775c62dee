"""Tests the command summarize with a config and with a weights file."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from inception_jax import experiment
from inception_jax.config import Model
from inception_jax.models import weights
from tests import command, random_weights

DIGITS = ["tools.summarize", "--config=experiments/digits.py"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("trained") / "weights.safetensors"
    weights.save(path, random_weights.make())
    return path


def test_config_is_drawn_and_counted(tmp_path: pathlib.Path) -> None:
    printed = command.check(*DIGITS, f"--output={tmp_path}").splitlines()
    total = next(line for line in printed if line.startswith("| total"))
    assert "1,651,114" in total
    files = [pathlib.Path(line) for line in printed if line.startswith(str(tmp_path))]
    assert {"architecture.md", "architecture.csv", "architecture.dot"} <= {f.name for f in files}
    assert all(file.stat().st_size > 500 for file in files)
    assert {file.name for file in tmp_path.glob("[!.]*")} == {file.name for file in files}


def test_weights_show_filters_and_activations(
    trained: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    picture = tmp_path / "picture.png"
    Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)).save(picture)
    output = tmp_path / "view"
    printed = command.check(
        "tools.summarize", f"--weights={trained}", f"--output={output}", f"--image={picture}"
    )
    for name in ("filters.png", "activations.png"):
        assert str(output / name) in printed.splitlines()
        with Image.open(output / name) as image:
            assert min(image.size) > 500


def test_first_layer_of_a_network_without_modules_is_drawn(tmp_path: pathlib.Path) -> None:
    parts = tmp_path / "plain.py"
    parts.write_text(
        "import flax.linen as nn, inception_jax as ij\n"
        "@ij.register_model('plain')\n"
        "def plain(settings, num_classes):\n"
        "    return nn.Sequential(\n"
        "        [nn.Conv(8, (3, 3)), lambda x: x.mean((1, 2)), nn.Dense(num_classes)]\n"
        "    )\n"
    )
    experiment.register_parts(parts, "--parts=")
    saved, picture = tmp_path / "plain.safetensors", tmp_path / "picture.png"
    weights.save(saved, random_weights.make(Model(name="plain")))
    Image.new("RGB", (20, 20), "orange").save(picture)
    flags = [f"--weights={saved}", f"--parts={parts}", f"--image={picture}"]
    printed = command.check("tools.summarize", *flags, f"--output={tmp_path}")
    assert str(tmp_path / "activations.png") in printed.splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tools.summarize"], "give one of --config=FILE, --workdir=DIR or --weights=FILE"),
        ([*DIGITS, "--image=x.png"], "--image: activations need trained weights"),
        (
            ["tools.summarize", "--config=experiments/image_folder.py"],
            "number of classes of image_folder depends on its source; set --classes=N",
        ),
        (
            ["tools.summarize", "--config=experiments/imagenet.py", "--config.data.image_size=8"],
            "must be at least 31 x 31 px",
        ),
        ([*DIGITS, "--classes=5"], "classes = 5: digits has 10; leave it out"),
        ([*DIGITS, "--layer=conv1"], "--layer=conv1: requires --image"),
        (["tools.summarize", "--weights=x", "--classes=3"], "--classes=3: requires --config"),
        ([*DIGITS, "--output=/proc/no"], "--output=/proc/no: cannot be written to"),
    ],
)
def test_usage_error_exits_with_2(arguments: list[str], message: str) -> None:
    done = command.run(*arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
