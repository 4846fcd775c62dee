"""The names for notebooks: a run's weights, evaluated and used, without the command line."""

import inspect
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from PIL import Image

import inception_jax
from inception_jax import api
from inception_jax.errors import CheckpointError, ConfigError, UserError
from inception_jax.evaluation.evaluate import evaluate_checkpoint
from inception_jax.training import run
from inception_jax.training.workdir import Workdir
from tests import command, small

DIGITS = command.ROOT / "experiments" / "digits.py"


@pytest.fixture(scope="module")
def finished(
    data_directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[run.Run, Workdir]:
    return small.finished(small.config(data_directory), tmp_path_factory.mktemp("run"))


def test_weights_of_a_run_evaluate_as_its_checkpoint(finished: tuple[run.Run, Workdir]) -> None:
    this, folder = finished
    weights = inception_jax.load_weights(folder.path, "last")
    expected = evaluate_checkpoint(this, folder, "last")
    assert inception_jax.evaluate(weights, this.config) == expected


def test_a_predictor_gives_the_logits_of_the_network(finished: tuple[run.Run, Workdir]) -> None:
    weights = inception_jax.load_weights(finished[1].path)
    predictor = inception_jax.Predictor(weights, batch_size=4)
    dataset = inception_jax.load_dataset(finished[0].config)
    pixels = dataset.evaluation.read(np.arange(6))

    network, variables = inception_jax.load_model(weights)
    images = (pixels / np.float32(255) - weights.mean) / weights.std
    expected = np.asarray(network.apply(variables, images, train=False).logits)
    np.testing.assert_allclose(predictor.logits(pixels), expected, atol=1e-5)

    probabilities = np.exp(expected) / np.exp(expected).sum(axis=1, keepdims=True)
    for row, predictions in zip(probabilities, predictor.predict(pixels, 3), strict=True):
        assert [each.label for each in predictions] == list(np.argsort(-row)[:3])
        assert predictions[0].name == dataset.class_names[predictions[0].label]
        found = [each.probability for each in predictions]
        np.testing.assert_allclose(found, np.sort(row)[:-4:-1], rtol=1e-5)


def test_an_experiment_is_loaded_with_changed_settings() -> None:
    config = inception_jax.load_config(DIGITS, {"train.batch_size": 32, "seed": 3})
    assert (config.name, config.train.batch_size, config.seed) == ("digits", 32, 3)
    with pytest.raises(ConfigError, match="batch_size"):
        inception_jax.load_config(DIGITS, {"train.batch_sice": 32})
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        inception_jax.load_config(DIGITS, {"train.batch_size": -1})


def test_what_is_no_experiment_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        inception_jax.load_config(tmp_path / "none.py")
    other = tmp_path / "other.py"
    other.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"get_config\(\)"):
        inception_jax.load_config(other)
    with pytest.raises(CheckpointError, match="no run here"):
        inception_jax.load_weights(tmp_path)


def test_arguments_of_another_kind_are_answered(finished: tuple[run.Run, Workdir]) -> None:
    this, folder = finished
    weights = inception_jax.load_weights(str(folder.path), 11)
    assert (weights.step, weights.checkpoint) == (11, "best and last")
    for call, words in (
        (lambda: inception_jax.load_weights(this.config), "path: must be the path .* got Config"),
        (lambda: inception_jax.load_model(folder.path), "weights: must be Weights, got PosixPath"),
        (lambda: inception_jax.load_dataset(str(DIGITS)), "config: must be a Config, got str"),
        (lambda: inception_jax.evaluate(this.config, weights), "weights: must be Weights, got Con"),
        (lambda: inception_jax.evaluate(weights, DIGITS), "config: must be a Config, got PosixPa"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_every_name_is_there_and_documented() -> None:
    for name in inception_jax.__all__:
        assert inspect.getdoc(getattr(inception_jax, name))
        assert name in dir(inception_jax)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        inception_jax.nothing  # noqa: B018


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = "import sys, inception_jax; print('jax' in sys.modules, 'numpy' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=command.ROOT
    )
    assert found.stdout.split() == ["False", "False"]


def test_the_documented_example_runs_as_it_stands(
    finished: tuple[run.Run, Workdir], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    this, folder = finished
    places = {"experiments": None, "runs": None, "runs/tiny": folder.path}
    for name, target in (places | {"data": this.config.data.directory}).items():
        (tmp_path / name).symlink_to(target) if target else (tmp_path / name).mkdir()
    (tmp_path / "experiments" / "tiny.py").write_text(
        "import pathlib\nfrom tests import small\n"
        "def get_config():\n    return small.config(pathlib.Path())\n"
    )
    Image.new("RGB", (40, 30), "red").save(tmp_path / "cat.jpg")
    monkeypatch.chdir(tmp_path)

    text = (inspect.getdoc(api) or "").partition("::\n")[2]
    code = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    names: dict[str, Any] = {}
    exec(textwrap.dedent(code), names)
    assert set(inception_jax.__all__) <= set(re.findall(r"inception_jax\.(\w+)", code))
    assert names["metrics"]["count"] == 360
    assert len(names["predictions"][0]) == 5
