"""Networks, optimizers, schedules and augmentations from files outside the package."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from inception_jax import config as configs
from inception_jax import registry
from inception_jax.config import (
    Augment,
    Config,
    Model,
    Optimizer,
    Schedule,
    Timeline,
    Train,
)
from inception_jax.errors import ConfigError
from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.export import onnx, stablehlo
from inception_jax.inference.gradcam import Explainer
from inception_jax.inference.predictor import Predictor
from inception_jax.input import augment, pipeline
from inception_jax.inspection import structure
from inception_jax.models import protocol
from inception_jax.models.layers import ModelOutput
from inception_jax.models.weights import Weights, flatten
from inception_jax.training import optimizers, run, schedules, state, step
from tests import small
from tests.extension import own_parts

# Flax's pools and BatchNorm mix types.
pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def standard_promotion() -> Any:
    with jax.numpy_dtype_promotion("standard"):
        yield


def custom_config(directory: pathlib.Path, **changes: Any) -> Config:
    groups: dict[str, Any] = {
        "model": Model(name="inception_bn", options={"width": 4}),
        "optimizer": Optimizer(name="my_lion", weight_decay=0.1, clip_norm=1.0),
        "schedule": Schedule(
            name="triangle",
            learning_rate=0.01,
            warmup="2 steps",
            options={"top": 0.25},
        ),
        "train": Train(batch_size=64, duration="40 steps"),
        "augment": Augment(crop="none", extra=("blur",), options={"probability": 1.0}),
    }
    return small.config(directory, **(groups | changes))


def trained(config: Config) -> tuple[run.Run, Any, list[float]]:
    """Returns a run, its state after all steps, and the losses."""
    configs.validate(config)
    this = run.assemble(config, log=lambda _: None)
    make = step.make_train_step(this, this.dataset.image_size)
    now, losses = state.create(this), []
    for batch in pipeline.train_batches(
        this.dataset.train,
        batch_size=config.train.batch_size,
        seed=config.seed,
        start=0,
        stop=this.total_steps,
        mesh=this.mesh,
    ):
        now, output = make(now, batch)
        losses.append(float(output.loss))
    return this, now, losses


@pytest.fixture(scope="module")
def finished(data_directory: pathlib.Path) -> tuple[run.Run, Any, list[float]]:
    with jax.numpy_dtype_promotion("standard"):
        return trained(custom_config(data_directory))


def weights_of(this: run.Run, now: Any) -> Weights:
    dataset = this.dataset
    return Weights(
        variables=jax.device_get(now.eval_variables()),
        model=this.config.model,
        image_size=this.config.data.image_size,
        class_names=dataset.class_names,
        mean=dataset.mean,
        std=dataset.std,
    )


def test_custom_network_learns_and_evaluates(finished: Any) -> None:
    this, now, losses = finished
    assert np.mean(losses[-3:]) < 0.9 * losses[0]
    metrics = Evaluator(this)(now.eval_variables())["test"].metrics
    assert metrics["count"] == len(this.dataset.evaluation)
    assert metrics["top1"] > 20  # Chance is 10.
    # Variables have the same paths as outside the package.
    own = own_parts.InceptionBN(10, 4).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    assert set(flatten(own["params"])) == set(flatten(now.params))


@pytest.mark.parametrize("form", ["stablehlo", "onnx"])
def test_custom_network_is_exported(form: str, finished: Any) -> None:
    weights = weights_of(*finished[:2])
    if form == "stablehlo":
        classify = stablehlo.load(stablehlo.export(weights))
    else:
        classify = onnx.load(onnx.export(weights))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
    expected = Predictor(weights).logits(pixels)
    np.testing.assert_allclose(classify(pixels), expected, rtol=1e-4, atol=1e-4)


def test_custom_network_is_inspected(finished: Any) -> None:
    weights = weights_of(*finished[:2])
    assert Explainer(Predictor(weights)).layer == "Module_2"
    description = structure.analyze(finished[0].model, 8)
    assert [block.name for block in description.blocks()][:3] == ["Unit_0", "Module_0", "Module_1"]
    params = finished[1].params
    assert sum(layer.parameters for layer in description.layers) == sum(
        leaf.size for leaf in jax.tree.leaves(params)
    )


def test_network_without_train_argument(data_directory: pathlib.Path) -> None:
    config = custom_config(
        data_directory,
        model=Model(name="linear"),
        optimizer=Optimizer(name="whole_sgd", weight_decay=1e-3),
        schedule=Schedule(name="constant", learning_rate=0.05),
    )
    this, now, losses = trained(config)
    assert losses[-1] < losses[0]
    assert Evaluator(this)(now.eval_variables())["test"].metrics["top1"] > 30
    with pytest.raises(ConfigError, match="linear: no module returns a feature map"):
        Explainer(Predictor(weights_of(this, now)))


def test_missing_protocol_attribute_is_named(finished: Any) -> None:
    this, now, _ = finished
    muon = optimizers.make_optimizer(Optimizer(name="muon"), this.schedule, this.model)
    words = r"'muon' needs the network's attribute 'first_conv', which InceptionBN does not have"
    with pytest.raises(ConfigError, match=words):
        muon.init(now.params)
    with pytest.raises(ConfigError, match="'classifiers', which InceptionBN does not"):
        protocol.num_classes(this.model, now.params)


def test_kernels_of_custom_networks_decay(finished: Any) -> None:
    mask = protocol.decay_mask(finished[0].model)(finished[1].params)
    decaying = {
        jax.tree_util.keystr(path[-1:], simple=True)
        for path, decays in jax.tree_util.tree_leaves_with_path(mask)
        if decays
    }
    assert decaying == {"kernel"}

    class Picky(nn.Module):
        def decays(self, path: str, leaf: Any) -> bool:
            return path == "a/kernel"

    params = {"a": {"kernel": np.ones((1, 1))}, "b": {"kernel": np.ones((1, 1))}}
    assert protocol.decay_mask(Picky())(params) == {"a": {"kernel": True}, "b": {"kernel": False}}
    assert protocol.decay_mask(None)(params | {"c": {"kernel": np.ones(1)}})["c"] == {
        "kernel": False
    }


def test_custom_schedule_follows_warmup() -> None:
    settings = Schedule(name="triangle", learning_rate=2.0, warmup="4 steps", options={"top": 0.25})
    rate = schedules.make_schedule(settings, timeline=Timeline(1, 100), total_steps=12)
    expected = [0, 0.5, 1, 1.5, 0, 1, 2, 5 / 3, 4 / 3, 1, 2 / 3, 1 / 3, 0]
    np.testing.assert_allclose([rate(t) for t in range(13)], expected, rtol=1e-5, atol=1e-6)


def varied(settings: Augment, image: np.ndarray) -> np.ndarray:
    labels = np.zeros(len(image), np.int32)
    images, _ = augment.augment(
        jax.random.key(3),
        jnp.asarray(image),
        labels,
        settings=settings,
        mean=np.zeros(3, np.float32),
        std=np.ones(3, np.float32),
        num_classes=2,
    )
    return np.asarray(images)


def test_custom_augmentation_does_not_change_random_draws_of_others() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    plain = Augment(crop="pad", flip=True, cutout=3)
    without = varied(plain, images)
    never = dataclasses.replace(plain, extra=("blur",), options={"probability": 0.0})
    np.testing.assert_allclose(varied(never, images), without, atol=1e-6)
    blurred = varied(dataclasses.replace(never, options={}), images)
    changed = (np.abs(blurred - without) > 1e-3).any((1, 2, 3))
    assert 0 < changed.sum() < 6

    @registry.register_augmentation("darker")
    def darker(key: jax.Array, images: jax.Array) -> jax.Array:
        return images / 2

    both = dataclasses.replace(never, extra=("darker", "blur"), options={"probability": 0.5})
    np.testing.assert_allclose(varied(both, images), blurred / 2, atol=1e-6)


def test_custom_augmentation_can_be_the_policy() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    settings = Augment(crop="none", flip=False, policy="blur", options={"probability": 1.0})
    levels = 255 * varied(settings, images)
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    assert not np.array_equal(levels, images)


def registered(kind: Callable[..., Any], **facts: Any) -> Callable[[Any], str]:
    """Returns a decorator that registers a function under an unused name."""

    def register(function: Any) -> str:
        kind("broken", **facts)(function)
        return "broken"

    return register


@pytest.fixture
def temporary_registry() -> Any:
    """Restores the registries after a test."""
    # Built-in parts are registered on first use.
    before = {
        known.kind: {name: known.get(name) for name in known.names()}
        for known in registry.REGISTRIES.values()
    }
    yield
    for known in registry.REGISTRIES.values():
        known._parts = before[known.kind]


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(7)(x.mean((1, 2)))


class Texts(nn.Module):
    def __call__(self, x: jax.Array) -> Any:
        return {"logits": "none"}


class Caching(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> ModelOutput:
        self.variable("cache", "seen", jnp.zeros, (1,))
        return ModelOutput(nn.Dense(10)(x.mean((1, 2))))


@pytest.mark.usefixtures("temporary_registry")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda s, n: "net", r"model 'broken' returned 'net', a str; it must return a flax"),
        (lambda s, n: Wide(), r"returned float32 \[2, 7\] for 2 images of 8 px; .*\[2, 10\]"),
        (lambda s, n: Texts(), r"returned no logits .*float \[2, 10\], or a ModelOutput"),
        (
            lambda s, n: Caching(),
            r"has the variable collections cache, which training does not keep",
        ),
    ],
)
def test_network_without_logits_is_named(
    build: Any, words: str, data_directory: pathlib.Path
) -> None:
    name = registered(registry.register_model)(build)
    with pytest.raises(ConfigError, match=rf"{pathlib.Path(__file__).name}, line \d+: .*{words}"):
        run.assemble(custom_config(data_directory, model=Model(name=name)), log=lambda _: None)


@pytest.mark.usefixtures("temporary_registry")
def test_images_too_small_for_custom_network_are_rejected(data_directory: pathlib.Path) -> None:
    name = registered(registry.register_model, min_image_size=9)(lambda s, n: Wide())
    with pytest.raises(
        ConfigError, match=r"data\.image_size = 8: must be at least 9 px for broken"
    ):
        run.assemble(custom_config(data_directory, model=Model(name=name)), log=lambda _: None)


@pytest.mark.usefixtures("temporary_registry")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda s, n: 0.1, "schedule 'broken' returned 0.1; it must return a function"),
        (lambda s, n: lambda t: jnp.stack([t, t]), r"returns int32 \[2\]; it must return"),
        (lambda s, n: lambda t: t, r"returns int32 \[\]; it must return"),
    ],
)
def test_schedule_without_rate_is_named(build: Any, words: str) -> None:
    name = registered(registry.register_schedule)(build)
    with pytest.raises(ConfigError, match=words):
        schedules.make_schedule(Schedule(name=name), timeline=Timeline(1, 9), total_steps=9)


@pytest.mark.usefixtures("temporary_registry")
def test_invalid_optimizer_is_named() -> None:
    name = registered(registry.register_optimizer)(lambda s, rate: optax.sgd)
    with pytest.raises(ConfigError, match=r"'broken' returned <function sgd.*GradientTransform"):
        optimizers.make_optimizer(Optimizer(name=name), optax.constant_schedule(0.1))
    with pytest.raises(ConfigError, match="decay must be 'own', 'l2' or 'decoupled'"):
        registry.register_optimizer("other", decay="L2")


@pytest.mark.usefixtures("temporary_registry")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda key, images: images[:, 1:], r"returned float32 \[2, 7, 8, 3\]; .*\[2, 8, 8, 3\]"),
        (lambda key, images: images > 0, r"returned bool \[2, 8, 8, 3\]; must return"),
        (lambda key, images: None, r"returned None; must return images"),
    ],
)
def test_augmentation_without_images_is_named(
    build: Any, words: str, data_directory: pathlib.Path
) -> None:
    name = registered(registry.register_augmentation)(build)
    config = custom_config(data_directory, augment=Augment(crop="none", extra=(name,)))
    with pytest.raises(ConfigError, match=f"augmentation 'broken' {words}"):
        run.assemble(config, log=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": Model(name="inception_nb")}, "Did you mean inception_bn"),
        ({"optimizer": Optimizer(name="lyon")}, "Did you mean lion"),
        ({"schedule": Schedule(name="triangel")}, "Did you mean triangle"),
        ({"augment": Augment(extra=("blurr",))}, "Did you mean blur"),
        ({"model": Model(name="inception_bn", options={"depth": 1})}, "Options: width"),
        ({"model": Model(name="inception_bn", width=0.5)}, "not used by 'inception_bn'"),
        ({"optimizer": Optimizer(name="sgd", beta1=0.5)}, "not used by 'sgd'"),
        ({"optimizer": Optimizer(name="my_lion", epsilon=0.5)}, "not used by 'my_lion'"),
    ],
)
def test_unknown_name_option_or_setting_is_rejected(
    changes: dict[str, Any], words: str, data_directory: pathlib.Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        configs.validate(custom_config(data_directory, **changes))


def test_builtin_names_cannot_be_registered_again() -> None:
    with pytest.raises(ConfigError, match=r"'googlenet' is already registered by .*networks\.py"):
        registry.register_model("googlenet")(lambda settings, num_classes: Wide())
