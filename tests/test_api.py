"""The Python API: training, evaluation and use of weights without the command line."""

import contextlib
import copy
import dataclasses
import importlib
import inspect
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging

import inception_jax
from inception_jax import api, registry
from inception_jax.config import Config, Data, Log
from inception_jax.errors import CheckpointError, ConfigError, UserError
from inception_jax.evaluation.evaluate import evaluate_checkpoint
from inception_jax.input import augment
from inception_jax.models.weights import save as save_weights
from inception_jax.reporting import report
from inception_jax.runtime import devices, preemption
from inception_jax.storage.workdir import Workdir
from inception_jax.training import run
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.state import abstract_state
from tests import command, small

DIGITS = command.ROOT / "experiments" / "digits.py"


@pytest.fixture(scope="module")
def finished(
    data_directory: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[run.Run, Workdir]:
    return small.finished(small.config(data_directory), tmp_path_factory.mktemp("run"))


def test_weights_of_a_network_given_as_an_object_are_evaluated_with_it(
    finished: tuple[run.Run, Workdir],
) -> None:
    this, folder = finished
    network, split = small.Linear(), this.dataset.evaluation
    weights = dataclasses.replace(
        inception_jax.load_weights(folder.path),
        variables={"batch_stats": {}} | small.random_variables(network, 8),
        module=network,
    )
    logits = inception_jax.Predictor(weights).logits(split.read(np.arange(len(split))))
    top1 = inception_jax.evaluate(weights, this.config)["top1"]
    assert top1 == pytest.approx(100 * (logits.argmax(-1) == split.labels).mean())


def test_weights_evaluate_like_the_checkpoint(finished: tuple[run.Run, Workdir]) -> None:
    this, folder = finished
    weights = inception_jax.load_weights(folder.path, "last")
    expected = evaluate_checkpoint(this, folder, "last")
    assert inception_jax.evaluate(weights, this.config) == expected


def test_images_are_resized_with_the_kernel_of_the_run(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(data_directory)
    config.data.resize_kernel, config.evaluation.image_size = "lanczos3", 12
    this, folder = small.finished(config, tmp_path)
    weights = inception_jax.load_weights(folder.path, "last")
    expected = evaluate_checkpoint(this, folder, "last")
    assert inception_jax.evaluate(weights, config) == expected

    pixels = this.dataset.evaluation.read(np.arange(6))
    images = augment.normalize(augment.resize(pixels, 12, "lanczos3"), weights.mean, weights.std)
    network, variables = inception_jax.load_model(weights)
    logits = inception_jax.Predictor(weights).logits(pixels)
    np.testing.assert_allclose(
        logits, network.apply(variables, images, train=False).logits, atol=1e-5
    )


def test_evaluation_refuses_invalid_settings(finished: tuple[run.Run, Workdir]) -> None:
    weights = inception_jax.load_weights(finished[1].path)
    invalid = copy.deepcopy(finished[0].config)
    invalid.evaluation.batch_size = 0
    with pytest.raises(UserError, match=r"config\.evaluation\.batch_size = 0: "):
        inception_jax.evaluate(weights, invalid)


def test_loading_data_refuses_invalid_settings() -> None:
    invalid = Config(data=Data(name="digits", image_size=17, eval_crop_pct=0.5))
    with pytest.raises(UserError, match=r"config\.data\.eval_crop_pct = 0\.5: must be 1"):
        inception_jax.load_dataset(invalid)


def test_predictor_returns_the_logits_of_the_network(finished: tuple[run.Run, Workdir]) -> None:
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
        actual = [each.probability for each in predictions]
        np.testing.assert_allclose(actual, np.sort(row)[:-4:-1], rtol=1e-5)


def test_load_config_applies_overrides() -> None:
    config = inception_jax.load_config(DIGITS, {"train.batch_size": 32, "seed": 3})
    assert (config.name, config.train.batch_size, config.seed) == ("digits", 32, 3)
    with pytest.raises(ConfigError, match="batch_size"):
        inception_jax.load_config(DIGITS, {"train.batch_sice": 32})
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        inception_jax.load_config(DIGITS, {"train.batch_size": -1})


def test_invalid_experiments_and_workdirs_are_rejected(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="file not found"):
        inception_jax.load_config(tmp_path / "none.py")
    other = tmp_path / "other.py"
    other.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"get_config\(\)"):
        inception_jax.load_config(other)
    with pytest.raises(CheckpointError, match="no run found here"):
        inception_jax.load_weights(tmp_path)


def test_arguments_of_the_wrong_type_are_rejected(finished: tuple[run.Run, Workdir]) -> None:
    this, folder = finished
    weights = inception_jax.load_weights(str(folder.path), 11)
    assert (weights.step, weights.checkpoint) == (11, "best and last")
    for call, words in (
        (lambda: inception_jax.load_weights(this.config), "path: must be the path .* got Config"),
        (lambda: inception_jax.load_model(folder.path), "weights: must be Weights, got PosixPath"),
        (lambda: inception_jax.load_dataset(str(DIGITS)), "config: must be a Config, got str"),
        (lambda: inception_jax.evaluate(this.config, weights), "weights: must be Weights, got Con"),
        (lambda: inception_jax.evaluate(weights, DIGITS), "config: must be a Config, got PosixPa"),
        (lambda: inception_jax.create_state(this.config), "run: must be a Run .* got Config"),
        (lambda: inception_jax.make_train_step(this.config), "run: must be a Run .* got Config"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_exported_names_exist_and_are_documented() -> None:
    for name in inception_jax.__all__:
        assert inspect.getdoc(getattr(inception_jax, name))
        assert name in dir(inception_jax)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        inception_jax.nothing  # noqa: B018


def test_package_import_is_light() -> None:
    script = "import sys, inception_jax; print('jax' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=command.ROOT
    )
    assert done.stdout.split() == ["False", "False"]


FIFTEEN_LINES = """
import flax.linen as nn
import inception_jax as ij
from sklearn.datasets import load_digits

class Net(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.relu(nn.Conv(8, (3, 3))(images))
        return nn.Dense(10)(x.reshape(len(x), -1))

digits = load_digits()
images = (digits.images[..., None] * [15, 15, 15]).astype("uint8")
config = ij.load_config("experiments/digits.py", {"train.duration": "2 epochs"})
result = ij.train(config, "runs/mine", dataset=(images, digits.target), model=Net())
"""


def global_state() -> list[Any]:
    """Returns the global state that a call in a notebook must not change."""
    jax_settings = [
        getattr(jax.config, name) for name in ("jax_enable_x64", "jax_default_prng_impl")
    ]
    return [
        signal.getsignal(signal.SIGINT),
        signal.getsignal(signal.SIGTERM),
        list(sys.path),
        warnings.showwarning,
        list(warnings.filters),
        logging.get_verbosity(),
        *jax_settings,
    ]


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, dict[str, Any]]:
    """The folder of a run with a custom network and arrays, and the variables of its program."""
    folder, names = tmp_path_factory.mktemp("notebook"), {"__name__": "notebook"}
    importlib.import_module("sklearn.datasets")  # SciPy emits a warning on import.
    with contextlib.chdir(folder):
        before = global_state()
        exec(FIFTEEN_LINES, names)
        assert global_state() == before
    return folder / "runs" / "mine", names


def again(mine: tuple[pathlib.Path, dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Calls train again in the same folder."""
    folder, names = mine
    objects: dict[str, Any] = {
        "dataset": (names["images"], names["digits"].target),
        "model": names["Net"](),
    }
    return inception_jax.train(names["config"], folder, **(objects | changes))


def test_custom_network_trains_on_arrays_in_15_lines(
    mine: tuple[pathlib.Path, dict[str, Any]],
) -> None:
    folder, names = mine
    assert len([line for line in FIFTEEN_LINES.splitlines() if line]) <= 15
    assert names["result"]["top1"] > 60 and names["result"]["count"] > 300
    assert {"report.html", "metrics.jsonl", "result.json"} <= {p.name for p in folder.iterdir()}
    record = json.loads((folder / "config.json").read_text())
    assert record["own"] == {"dataset": "Dataset", "model": "Net"}
    # The parameters have the network's own names.
    setup = inception_jax.assemble(
        names["config"], (names["images"], names["digits"].target), names["Net"]()
    )
    assert set(inception_jax.create_state(setup).params) == {"Conv_0", "Dense_0"}


def test_second_call_resumes_the_run(
    mine: tuple[pathlib.Path, dict[str, Any]],
) -> None:
    result = again(mine)
    for name in ("step", "loss", "top1"):
        assert result[name] == mine[1]["result"][name]
    assert result["seconds_by_phase"]["train"] == mine[1]["result"]["seconds_by_phase"]["train"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, r"objects passed by its program: model \(Net\)"),
        ({"dataset": None, "model": None}, r"dataset \(Dataset\), model \(Net\)"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer: as configured → GradientTransformation"),
    ],
)
def test_run_with_custom_objects_requires_them_again(
    changes: dict[str, Any], words: str, mine: tuple[pathlib.Path, dict[str, Any]]
) -> None:
    with pytest.raises(CheckpointError, match=words):
        again(mine, **changes)


def test_weights_of_a_custom_network_are_usable_with_it(
    mine: tuple[pathlib.Path, dict[str, Any]], tmp_path: pathlib.Path
) -> None:
    folder, names = mine
    weights = inception_jax.load_weights(folder, "last", model=names["Net"]())
    assert str(weights).startswith("Net, 10 classes, step ")
    images = names["images"][:300]
    labels = [best.label for best, *_ in inception_jax.Predictor(weights).predict(images)]
    assert np.mean(np.array(labels) == names["digits"].target[:300]) > 0.6
    with pytest.raises(UserError, match=r"given as an object \(Net\); register it"):
        save_weights(tmp_path / "x.safetensors", weights)


def test_commands_report_missing_custom_objects(
    mine: tuple[pathlib.Path, dict[str, Any]],
) -> None:
    with pytest.raises(
        CheckpointError, match=r"an object passed by a program \(Net\).*register_mod"
    ):
        inception_jax.load_weights(mine[0])
    done = subprocess.run(
        [sys.executable, "-m", "inception_jax.main", f"--workdir={mine[0]}"],
        capture_output=True,
        text=True,
        cwd=command.ROOT,
    )
    assert done.returncode == 2
    assert (
        "this run uses objects passed by its program: dataset (Dataset), model (Net)" in done.stderr
    )


def test_own_data_are_not_mistaken_for_the_configured_data(
    data_directory: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), np.uint8)
    own, config = (images, [0, 1, 2] * 20), small.config(data_directory)
    config.train.batch_size, config.train.duration = 16, "4 steps"
    folder = tmp_path / "run"
    inception_jax.train(config, folder, dataset=own)
    weights = tmp_path / "own.safetensors"
    save_weights(weights, inception_jax.load_weights(folder, "last"))
    assert inception_jax.load_weights(weights).dataset == "arrays"
    for arguments in (
        ["tools.predict", f"--workdir={folder}", "--split=test"],
        ["tools.export", f"--workdir={folder}", "--to=onnx", "--quantize=int8", "--output=x.onnx"],
    ):
        done = command.run(*arguments)
        assert done.returncode == 2
        assert "its data set is an object passed by a program" in done.stderr
    capsys.readouterr()
    inception_jax.load_config(folder / "config.json")
    assert "not these settings: dataset (Dataset)" in capsys.readouterr().err

    config.data.holdout = 6
    with pytest.raises(ConfigError, match=r"config\.data\.holdout = 6: must be 0 with a data set"):
        inception_jax.assemble(config, own)


def test_own_data_determine_the_image_size(data_directory: pathlib.Path) -> None:
    images = np.zeros((60, 8, 8, 3), np.uint8)
    config = small.config(data_directory)
    config.data.image_size, config.augment.crop, config.augment.pad = 64, "pad", 20
    with pytest.raises(ConfigError, match=r"augment\.pad = 20: must be less than .*image_size = 8"):
        inception_jax.assemble(config, (images, [0, 1, 2] * 20))


def test_custom_loop_gives_the_same_state(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(data_directory, log=Log(every="30 steps"))
    config.train.duration = "20 steps"
    objects = {"model": small.Network(), "optimizer": optax.sgd(0.05, momentum=0.9)}
    result = inception_jax.train(config, tmp_path, **objects)

    setup = inception_jax.assemble(config, **objects)
    state, step = inception_jax.create_state(setup), inception_jax.make_train_step(setup)
    for batch in inception_jax.train_batches(setup, start=0, stop=20):
        state, output = step(state, batch)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as saved:
        expected, _ = saved.restore(20, abstract_state(setup))
    for part in ("step", "params", "batch_stats", "average", "opt_state"):
        one, other = (jax.tree.leaves(getattr(each, part)) for each in (state, expected))
        assert len(one) == len(other) > 0, part
        for left, right in zip(one, other, strict=True):
            assert np.asarray(left).tobytes() == np.asarray(right).tobytes(), part
    metrics = inception_jax.evaluate(setup, state)
    assert metrics == {name: result[name] for name in metrics}
    assert float(output.loss) == pytest.approx(output.metrics.compute()["loss"])
    # The state was not donated.
    step(state, batch)


def test_custom_loss_and_augmentation_are_used(data_directory: pathlib.Path) -> None:
    setup = inception_jax.assemble(small.config(data_directory), model=small.Linear())
    batch = next(iter(inception_jax.train_batches(setup)))

    def augment(key: Any, images: Any, labels: Any) -> Any:
        return jnp.zeros(images.shape, jnp.float32), jax.nn.one_hot(labels, 10)

    def loss(output: Any, targets: Any) -> Any:
        return 3 * optax.softmax_cross_entropy(output.logits, targets)

    step = inception_jax.make_train_step(setup, loss=loss, augment=augment)
    _, output = step(inception_jax.create_state(setup), batch)
    assert float(output.loss) == pytest.approx(3 * np.log(10), rel=1e-5)


def net(call: Any) -> nn.Module:
    return type("Net", (nn.Module,), {"__call__": nn.compact(call)})()


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        (
            {"model": small.Linear},
            "model: must be an instance of a flax.linen.Module, got the class Linear",
        ),
        ({"model": "mini"}, "model: must be an instance .* got str"),
        (
            {"model": net(lambda self, x, train=False: nn.Dense(7)(x.mean((1, 2))))},
            r"Net.* returned .*\[2, 7\].*\[2, 10\]",
        ),
        (
            {"model": net(lambda self, x, train=False: [nn.Dense(10)(x.mean((1, 2)))])},
            "Net.* returned ",
        ),
        (
            {"optimizer": "adam"},
            "optimizer: must be an optax.GradientTransformation such as .* got str",
        ),
        ({"dataset": "digits"}, "dataset: must be an .*Dataset, got str"),
        ({"dataset": (np.zeros((4, 8, 8, 3), np.uint8),)}, r"pair \(images, labels\), got 1"),
        ({"dataset": (np.zeros((4, 8, 8, 3)), np.arange(4))}, "images: .*float64"),
        ({"dataset": (np.zeros((4, 8, 8, 3), np.uint8), np.arange(3))}, "labels: "),
    ],
)
def test_custom_objects_of_the_wrong_type_are_rejected(
    objects: dict[str, Any], words: str, data_directory: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=words):
        inception_jax.assemble(small.config(data_directory), **objects)


def test_network_without_train_argument(data_directory: pathlib.Path) -> None:
    model = net(lambda self, x: nn.Dense(10)(x.mean((1, 2))))
    setup = inception_jax.assemble(small.config(data_directory), model=model)
    assert set(inception_jax.create_state(setup).params) == {"Dense_0"}


def test_invalid_arguments_of_train_are_rejected(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = small.config(data_directory)
    setup = inception_jax.assemble(config, model=small.Linear())
    for call, words in (
        (lambda: inception_jax.train(str(DIGITS), tmp_path), "config: must be a Config, got str"),
        (lambda: inception_jax.train(config, None), "workdir: must be the path of a run's folder"),
        (lambda: inception_jax.load_config(config), "path: must be the path of an experiment"),
        (
            lambda: inception_jax.evaluate(setup, config),
            "state: must be a TrainState .* got Config",
        ),
    ):
        with pytest.raises(UserError, match=words):
            call()
    config.train.batch_size = -1
    with pytest.raises(ConfigError, match=r"config\.train\.batch_size = -1"):
        inception_jax.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Installs Python's handler, because shells make background jobs ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupt_saves_the_run(data_directory: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = small.config(data_directory, log=Log(every="1 step"))
    config.train.duration = config.evaluation.every = config.checkpoint.every = "5000 steps"
    objects = {"model": small.Linear()}

    def interrupt() -> None:
        metrics = tmp_path / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    before = global_state()
    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt, match="the state is saved"):
        inception_jax.train(config, tmp_path, **objects)
    assert global_state() == before
    (step,) = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    assert 5 < step < 5000
    config.train.duration = f"{step + 2} steps"
    assert inception_jax.train(config, tmp_path, **objects)["step"] == step + 2


@pytest.mark.usefixtures("interruptible")
def test_interrupt_after_the_last_step_is_not_lost(
    data_directory: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It also stops the program that would train the next run."""

    def interrupt(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(report, "finish", interrupt)
    config = small.config(data_directory)
    with pytest.raises(KeyboardInterrupt, match=r"after the last step; .* is complete"):
        inception_jax.train(config, tmp_path, model=small.Linear())
    assert (tmp_path / "result.json").exists()


def test_custom_loop_in_64_bits_is_refused(data_directory: pathlib.Path) -> None:
    with jax.enable_x64(True), pytest.raises(UserError, match=r"jax_enable_x64 is set, .* first"):
        inception_jax.assemble(small.config(data_directory))


def test_jax_settings_are_restored_after_a_run() -> None:
    logged: list[str] = []
    jax.config.update("jax_enable_x64", True)
    try:
        with devices.run_settings(logged.append):
            assert jnp.arange(3).dtype == jnp.int32
        assert jnp.arange(3).dtype == jnp.int64
    finally:
        jax.config.update("jax_enable_x64", False)
    assert logged == ["JAX_ENABLE_X64=True: ignored; this program always uses False"]


@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_stops_immediately() -> None:
    logged: list[str] = []
    with preemption.save_on_interrupt(logged.append) as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not stop(1)
        signal.raise_signal(signal.SIGINT)
        assert stop(2) and len(logged) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_documented_examples_run(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one program, with small settings and the data in a temporary folder."""
    text = (command.ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    public = {name for name in inception_jax.__all__ if not name.startswith("register_")}
    # Another page has this one, which needs the compiler of a TPU or GPU.
    assert public - {"compile_for"} <= set(re.findall(r"ij\.(\w+)", code))
    monkeypatch.chdir(tmp_path)
    load_config = api.load_config

    def small_config(path: str, overrides: dict[str, Any] | None = None) -> Any:
        less = {"train.duration": "0.1 epochs", "schedule.warmup": "", "model.width": 0.125}
        if path.endswith(".json"):
            return load_config(path, overrides)
        return load_config(path, (overrides or {}) | less | {"data.directory": str(tmp_path)})

    monkeypatch.setattr("inception_jax.experiment.load_config", small_config)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["metrics"]["count"] == 360
    assert len(names["predictions"]) == 8
    assert names["get_config"]().data.source == "photos"


OWN_EXPERIMENT = """
import flax.linen as nn
import inception_jax as ij

@ij.register_model("test_net", options={"width": 8})
def test_net(settings, num_classes):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, images, train=False):
            x = nn.relu(nn.Dense(settings.options["width"])(images.reshape(len(images), -1)))
            return nn.Dense(num_classes)(x)
    return Net()

def get_config():
    changes = {"model.name": "test_net", "model.dropout": 0.0, "data.image_size": 8}
    return ij.load_config("experiments/digits.py", changes | {"train.duration": "2 epochs"})
"""


def test_run_of_a_registered_network_needs_only_its_folder(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    before = dict(registry.MODELS._parts)
    path = tmp_path / "mine.py"
    path.write_text(OWN_EXPERIMENT)
    config = inception_jax.load_config(path, {"data.directory": str(data_directory)})
    result = inception_jax.train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["parts"] == [
        {"kind": "model", "name": "test_net", "file": str(path)}
    ]
    registry.MODELS._parts = dict(before)
    assert "test_net" not in registry.MODELS
    metrics = inception_jax.evaluate(inception_jax.load_weights(tmp_path / "run", "last"), config)
    assert metrics["loss"] == pytest.approx(result["loss"])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "inception_jax.main",
            f"--workdir={tmp_path / 'run'}",
            "--mode=eval",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(command.ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == result["step"]
    assert f"running {path}, which registers the model 'test_net' of this run" in done.stderr
    path.unlink()
    registry.MODELS._parts = dict(before)
    with pytest.raises(CheckpointError, match=rf"{path}, which does not exist\. Give the file"):
        inception_jax.load_weights(tmp_path / "run")


def test_weights_are_read_before_data_are_prepared(tmp_path: pathlib.Path) -> None:
    done = command.run(
        "main",
        "--config=experiments/digits.py",
        f"--config.data.directory={tmp_path / 'data'}",
        f"--weights={tmp_path / 'none.safetensors'}",
        "--mode=eval",
    )
    assert done.returncode == 2 and "none.safetensors" in done.stderr
    assert not (tmp_path / "data").exists()
