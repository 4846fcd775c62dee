"""The files of experiments/: they load, build, and do what their docstrings say."""

import ast
import dataclasses
import pathlib
import re
import shlex

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inception_jax import config as configs
from inception_jax.config import Config, auto_settings
from inception_jax.models import networks
from inception_jax.training import optimizers, schedules
from tests.experiments import load

ROOT = pathlib.Path(__file__).parents[1]
PATHS = {path.stem: path for path in sorted((ROOT / "experiments").glob("*.py"))}
# Training examples and classes; those of a user's own folder are made up.
SIZES = {
    "tiny_imagenet": (100_000, 200),
    "digits": (1_437, 10),
    "cifar10": (50_000, 10),
    "imagenet2012": (1_281_167, 1000),
    "image_folder": (2_000, 5),
}
PEERS = ("tiny_adam", "tiny_deeper", "tiny_paper", "tiny_steps")
# A setting in a docstring, quoted where a shell needs it; and those that stand in a row.
FLAG = r"(?:--config\.[\w.]+='[^']+'|--config\.[\w.]+=[^\s;)]*[^\s;).,])"
FLAGS = re.compile(rf"{FLAG}(?:\s+{FLAG})*")


def experiment(name: str) -> Config:
    config = load([f"--config={PATHS[name]}"])
    examples = SIZES[config.data.name][0]
    return auto_settings.resolve(
        config, train_examples=examples, eval_examples=examples // 4, devices=1, dtype="float32"
    )


@pytest.mark.parametrize("name", ["tiny_cpu", "cifar10_mini", "image_folder"])
def test_experiments_for_cpus_compute_in_what_the_hardware_multiplies(name: str) -> None:
    assert load([f"--config={PATHS[name]}"]).model.dtype == "auto"


def docstring(name: str) -> str:
    return ast.get_docstring(ast.parse(PATHS[name].read_text(encoding="utf-8"))) or ""


def commands(name: str, after: str = "") -> list[list[str]]:
    """Returns the arguments of the commands in an experiment's docstring, those after a word."""
    text = docstring(name).partition(after)[2] if after else docstring(name)
    found = re.findall(r"python -m inception_jax\.main (.*)", text.replace("\\\n", " "))
    # The file is given as one flag, so that flags can be told from their values.
    return [shlex.split(each.replace("--config ", "--config=")) for each in found]


def timeline_of(config: Config) -> configs.Timeline:
    return configs.Timeline(config.train.batch_size, SIZES[config.data.name][0])


def rates(config: Config, epochs: np.ndarray) -> np.ndarray:
    """Returns the learning rate of the updates that start at the given times."""
    timeline = timeline_of(config)
    total = timeline.steps(config.train.duration)
    rate = schedules.make_schedule(config.schedule, timeline=timeline, total_steps=total)
    steps = np.floor(epochs * timeline.train_examples / timeline.batch_size)
    return np.asarray(rate(steps.astype(np.int32)))


# Optax's Adam mixes its step count with floats.
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("name", PATHS)
def test_every_experiment_builds(name: str) -> None:
    config = experiment(name)
    assert config.name == name
    model = networks.create(config.model, SIZES[config.data.name][1])
    timeline = timeline_of(config)
    schedule = schedules.make_schedule(
        config.schedule, timeline=timeline, total_steps=timeline.steps(config.train.duration)
    )
    optimizer = optimizers.make_optimizer(config.optimizer, schedule, model)
    side = config.data.image_size
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    state = jax.eval_shape(optimizer.init, params)
    updates, _ = jax.eval_shape(optimizer.update, params, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)


@pytest.mark.parametrize("name", PATHS)
def test_commands_in_docstrings_are_valid(name: str) -> None:
    found = commands(name)
    assert found or name == "tiny_base"
    # A line of flags after one without a backslash would not be read, here or by a shell.
    assert not re.search(r"-m inception_jax\.main (.*\\\n)*.*[^\\\n]\n +'?--", docstring(name))
    for arguments in found:
        assert arguments[0] == f"--config=experiments/{name}.py"
        load([f"--config={PATHS[name]}", *arguments[1:]])


@pytest.mark.parametrize("name", PATHS)
def test_settings_in_docstrings_are_valid(name: str) -> None:
    text = docstring(name).replace("\\\n", " ")
    found = [shlex.split(row) for row in FLAGS.findall(text)]
    assert sum(map(len, found)) == len(re.findall(r"--config\.[\w.]+=", text))
    for settings in found:
        load([f"--config={PATHS[name]}", *settings])


@pytest.mark.parametrize("name", [*PEERS, "tiny", "tiny_cpu"])
def test_experiment_states_its_changes_to_the_base(name: str) -> None:
    base, derived = experiment("tiny_base"), experiment(name)
    differing = {
        field.name
        for field in dataclasses.fields(Config)
        if getattr(base, field.name) != getattr(derived, field.name)
    }
    named = re.search(r"^Changes to tiny_base: (.*)\.$", docstring(name), re.MULTILINE)
    assert named
    assert differing == {"name", *named[1].split(", ")}


def epochs_of(duration: str) -> float:
    length = configs.parse_duration(duration)
    assert length is None or length.unit == "epochs"
    return length.amount if length else 0.0


@pytest.mark.parametrize("name", PEERS)
def test_stated_cost_matches_the_run(name: str) -> None:
    config = experiment(name)
    train, steps = config.train, timeline_of(config).steps(config.train.duration)
    cost = f"Cost: {steps:,} steps of {train.batch_size}, {train.duration}"
    assert cost in docstring(name)


# The last epoch that has each rate, as the sources put it.
STEPS = {
    "tiny_adam": {120: 1e-3},
    "tiny_steps": {26: 1e-3, 40: 1e-4, 52: 1e-5, 60: 1e-6},
    "tiny_deeper": {40: 1e-3, 45: 1e-4, 65: 1e-5},
    "tiny_paper": {8 * (period + 1): 0.01 * 0.96**period for period in range(8)},
}


@pytest.mark.parametrize("name", PEERS)
def test_learning_rate_matches_the_source_in_every_epoch(name: str) -> None:
    config = experiment(name)
    length = int(epochs_of(config.train.duration))
    assert length == max(STEPS[name])
    expected = [
        next(r for last, r in STEPS[name].items() if epoch < last) for epoch in range(length)
    ]
    # Shortly after each epoch's start: a boundary takes effect with the first whole step after it.
    for part in (0.01, 0.5, 0.99):
        np.testing.assert_allclose(rates(config, np.arange(length) + part), expected, rtol=1e-5)


@pytest.mark.parametrize("name", PEERS)
def test_short_command_scales_the_schedule(name: str) -> None:
    (arguments,) = commands(name, after="Short:")
    config, short = experiment(name), load([f"--config={PATHS[name]}", *arguments[1:]])
    length, less = (epochs_of(each.train.duration) for each in (config, short))
    assert less <= length / 20
    parts = (np.arange(256) + 0.5) / 256
    np.testing.assert_allclose(rates(short, parts * less), rates(config, parts * length), rtol=1e-5)
    assert epochs_of(short.train.ema) == epochs_of(config.train.ema) * less / length
    # What is not a time stays as it is.
    for changed in (config, short):
        changed.train.duration = changed.train.ema = ""
        changed.schedule.decay_period = ""
        changed.schedule.boundaries = ()
    assert short == config


def test_recipes_match_their_sources() -> None:
    """What the sources state, apart from the rates."""
    adam, steps = experiment("tiny_adam"), experiment("tiny_steps")
    deeper, paper = experiment("tiny_deeper"), experiment("tiny_paper")
    assert {each.optimizer.name for each in (adam, steps, deeper)} == {"adam"}
    batches = [each.train.batch_size for each in (adam, steps, deeper, paper)]
    assert batches == [32, 64, 64, 32]
    assert [each.model.dropout for each in (adam, steps, deeper, paper)] == [0.4, 0.3, 0.4, 0.4]
    # Keras's l2(r) is 2 r.
    assert (steps.optimizer.weight_decay, deeper.optimizer.weight_decay) == (2 * 3e-4, 2 * 5e-4)
    assert (paper.optimizer.name, paper.optimizer.momentum) == ("sgd", 0.9)
    assert (paper.model.norm, paper.model.aux_heads, paper.train.aux_weight) == ("lrn", True, 0.3)
    assert paper.train.ema
