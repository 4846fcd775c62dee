"""Tests that every registered network builds, has the right size and runs."""

import functools
from collections.abc import Iterator
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Jaxpr

from inception_jax import config
from inception_jax.errors import ConfigError
from inception_jax.models import introspect, networks, ops, protocol
from inception_jax.models.googlenet import GoogLeNet
from inception_jax.registry import MODELS


def abstract_variables(model: config.Model, size: int, num_classes: int) -> Any:
    module = networks.create(model, num_classes)
    images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return jax.eval_shape(module.init, jax.random.key(0), images)


def parameter_count(model: config.Model, size: int, num_classes: int) -> int:
    params = abstract_variables(model, size, num_classes)["params"]
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", [part.name for part in MODELS if part.is_builtin])
def test_settings_reach_the_network(name: str) -> None:
    settings: dict[str, Any] = {
        "width": 0.5,
        "norm_momentum": 0.75,
        "norm_epsilon": 1e-2,
        "norm_group_size": 4,
        "dropout": 0.1,
    }
    if name.startswith("googlenet"):
        settings |= {"aux_heads": True, "aux_dropout": 0.2}
    if name == "googlenet":
        settings |= {"stem": "s32", "conv5x5": "two_3x3", "norm": "none"}
    module = networks.create(config.Model(name=name, dtype="bfloat16", **settings), 7)
    assert {setting: getattr(module, setting) for setting in settings} == settings
    assert module.dtype == jnp.bfloat16
    assert module.num_classes == 7


@pytest.mark.parametrize(("name", "saved"), [("googlenet", 9 * 3), ("mini_googlenet", 8)])
def test_branches_are_joined_first_where_that_is_faster(name: str, saved: int) -> None:
    settings = config.Model(name=name, width=0.05)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)

    def program(rewrite: ops.Rewrite) -> str:
        network = networks.create(settings, 3, rewrite=rewrite)
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        call = functools.partial(network.init, rngs, train=True)
        return str(jax.make_jaxpr(call)(images))

    # One ReLU for all branches of a module.
    relus = {rewrite: program(rewrite).count(" max ") for rewrite in get_args(ops.Rewrite)}
    assert relus[""] == relus["gpu"]
    assert relus[""] - relus["tpu"] == relus[""] - relus["tpu_padded"] == saved


def operations(jaxpr: Jaxpr, outer: str = "") -> Iterator[str]:
    """Yields the paths of all operations in a traced program."""
    for equation in jaxpr.eqns:
        path = f"{outer}/{equation.source_info.name_stack}"
        yield f"{path}/{equation.primitive.name}"
        if (inner := introspect.called_jaxpr(equation)) is not None:
            yield from operations(inner, path)


@pytest.mark.parametrize(
    ("rewrite", "scope"), [("tpu", "/inception_3a/norm/"), ("gpu", "/inception_3a/max_pool/")]
)
def test_programs_name_what_their_equivalents_do(rewrite: ops.Rewrite, scope: str) -> None:
    """Tables of compiled programs show these names."""
    network = networks.create(config.Model(name="googlenet", width=0.05), 3, rewrite=rewrite)
    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    program = jax.make_jaxpr(functools.partial(network.init, rngs, train=True))(images)
    assert any(scope in path for path in operations(program.jaxpr))


@pytest.mark.parametrize("name", ["googlenet", "mini_googlenet"])
def test_groups_of_images_are_normalized_apart(name: str) -> None:
    settings = config.Model(name=name, width=0.05, dropout=0.0, norm_epsilon=0.1)
    whole = networks.create(settings, 3, rewrite="")
    settings.norm_group_size = 2
    grouped = networks.create(settings, 3, rewrite="")
    images = np.random.default_rng(0).normal(size=(4, 40, 40, 3)).astype(np.float32)
    # A batch of any size gives the variables their shapes.
    variables = jax.jit(functools.partial(grouped.init, train=True))(jax.random.key(0), images[:1])

    @functools.partial(jax.jit, static_argnums=0)
    def train(network: Any, images: jax.Array) -> Any:
        return network.apply(variables, images, train=True, mutable=["batch_stats"])

    output, updated = train(grouped, images)
    parts = [train(whole, images[:2]), train(whole, images[2:])]
    logits = np.concatenate([part[0].logits for part in parts])
    np.testing.assert_allclose(output.logits, logits, rtol=1e-3, atol=1e-3)
    mean = jax.tree.map(lambda *each: np.mean(each, axis=0), *(part[1] for part in parts))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), updated, mean)
    # Evaluation uses the running statistics, in batches of any size.
    evaluated = [jax.jit(each.apply)(variables, images[:3]).logits for each in (grouped, whole)]
    np.testing.assert_array_equal(*evaluated)
    with pytest.raises(ConfigError, match="norm_group_size = 2: must divide the 3 images"):
        train(grouped, images[:3])


@pytest.mark.parametrize(
    ("model", "size", "num_classes", "expected"),
    [
        ({"norm": "lrn"}, 224, 1000, 6_998_552),
        ({"norm": "none"}, 224, 1000, 6_998_552),
        ({}, 224, 1000, 7_005_832),
        ({}, 64, 200, 6_185_832),
        ({"name": "googlenet_torchvision"}, 224, 1000, 6_624_904),
        ({"name": "googlenet_torchvision", "aux_heads": True}, 224, 1000, 13_004_888),
        ({"name": "deeper_googlenet"}, 64, 200, 3_653_000),
        ({"name": "eight_module_googlenet"}, 64, 200, 10_716_744),
        ({"name": "mini_googlenet"}, 32, 10, 1_651_114),
    ],
)
def test_parameter_counts(
    model: dict[str, Any], size: int, num_classes: int, expected: int
) -> None:
    assert parameter_count(config.Model(**model), size, num_classes) == expected


def test_auxiliary_heads_have_the_size_in_the_paper() -> None:
    without = parameter_count(config.Model(norm="lrn"), 224, 1000)
    added = parameter_count(config.Model(norm="lrn", aux_heads=True), 224, 1000) - without
    # For each head: 1x1 convolution to 128, 4x4 grid to 1024, 1024 to 1000 classes; with biases.
    dense = (4 * 4 * 128 + 1) * 1024 + (1024 + 1) * 1000
    assert added == (512 + 1) * 128 + (528 + 1) * 128 + 2 * dense


# A Latin square: every pair of values occurs.
@pytest.mark.parametrize(
    ("stem", "conv5x5", "norm"),
    [
        (stem, conv5x5, config.NORMS[(row + column) % len(config.NORMS)])
        for row, stem in enumerate(config.STEMS)
        for column, conv5x5 in enumerate(config.CONV5X5)
    ],
)
def test_every_pair_of_choices_builds(stem: str, conv5x5: str, norm: str) -> None:
    # The network with heads contains the one without.
    model = config.Model(stem=stem, conv5x5=conv5x5, norm=norm, aux_heads=True, width=0.1)
    variables = abstract_variables(model, 64, 10)
    heads = {name for name in variables["params"] if name.startswith("aux")}
    assert heads == {"aux_4a", "aux_4d"}
    assert ("batch_stats" in variables) is (norm == "batch")


# Flax's BatchNorm mixes bfloat16 with its float32 statistics.
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("name", [part.name for part in MODELS if part.is_builtin])
def test_outputs_parameters_and_statistics_are_float32_for_any_compute_dtype(name: str) -> None:
    aux_heads = name.startswith("googlenet")
    model = config.Model(name=name, dtype="bfloat16", width=0.1, aux_heads=aux_heads)
    module = networks.create(model, 7)
    variables = abstract_variables(model, 64, 7)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    images = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32)
    for train in (False, True):
        program = jax.make_jaxpr(
            lambda variables, images, train=train: module.apply(
                variables,
                images,
                train=train,
                rngs={"dropout": jax.random.key(0)},
                mutable=["batch_stats"],
            ),
            return_shape=True,
        )
        jaxpr, (output, _) = program(variables, images)
        shapes = [(each.shape, each.dtype) for each in (output.logits, *output.aux)]
        assert shapes == [((2, 7), jnp.float32)] * (3 if aux_heads and train else 1)
        assert "bf16[2,64,64,3]" in str(jaxpr), "the convolutions compute in bfloat16"


@pytest.mark.parametrize(
    ("model", "least"),
    [
        ({}, 31),
        ({"stem": "s16"}, 16),
        ({"stem": "s32"}, 8),
        ({"name": "googlenet_torchvision"}, 15),
        ({"name": "deeper_googlenet"}, 16),
        ({"name": "eight_module_googlenet"}, 16),
        ({"name": "mini_googlenet"}, 4),
    ],
)
def test_min_image_size_works_and_one_less_is_rejected(model: dict[str, Any], least: int) -> None:
    settings = config.Model(**model, width=0.1)
    abstract_variables(settings, least, 2)
    with pytest.raises(ConfigError, match=f"{least - 1} x {least - 1} px.*at least {least} x"):
        abstract_variables(settings, least - 1, 2)


@pytest.mark.slow
def test_a_network_without_batch_norm_learns() -> None:
    model = config.Model(norm="lrn", stem="s16", width=0.25, dropout=0.0)
    # The plain operations compile in half the time of the CPU equivalents, which have the same
    # values and gradients (test_ops.py).
    module = networks.create(model, 4, rewrite="")
    rng = np.random.default_rng(0)
    labels = np.arange(16) % 4
    tints = rng.normal(size=(4, 1, 1, 3))
    images = jnp.asarray(tints[labels] + 0.3 * rng.normal(size=(16, 16, 16, 3)), jnp.float32)
    # At full optimization, LLVM would take most of the test's time.
    compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    params = compiled(module.init)(jax.random.key(0), images)["params"]

    def loss(params: Any) -> jax.Array:
        logits = module.apply({"params": params}, images).logits
        return -jnp.mean(jax.nn.log_softmax(logits)[np.arange(16), labels])

    @compiled
    def step(params: Any) -> tuple[Any, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.05 * g, params, gradient), value

    params, first = step(params)
    for _ in range(30):
        params, last = step(params)
    assert 0.5 < float(first) < 10, "the signal neither vanishes nor explodes"
    assert float(last) < 0.5 * float(first)


class Flat(nn.Module):
    """A custom network that only fits one image size, and declares its layers."""

    first_conv = "Conv_0"
    classifiers = ("Dense_0",)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (3, 3), strides=4)(images)
        return nn.Dense(5)(x.reshape(len(x), -1))


def check_flat(image_sizes: tuple[int, ...] = (), **declared: Any) -> None:
    network = type("Declared", (Flat,), declared)()
    train = config.Train(image_sizes=image_sizes)
    settings = config.Config(data=config.Data(image_size=32), train=train)
    networks.check(protocol.adapt(network, name="flat", place="here"), settings, 5)


def test_layers_that_an_instance_does_not_have_may_be_declared() -> None:
    """As of a GoogLeNet without auxiliary heads and BatchNorm."""
    network = GoogLeNet(10, stem="s16", width=0.05, norm="none")
    settings = config.Config(data=config.Data(image_size=32))
    networks.check(protocol.adapt(network, name="own", place="here"), settings, 10)
    check_flat(heads=("Head",), classifiers=("Dense_0", "Head/dense"))
    check_flat(first_conv=None)


def test_network_for_one_size_is_refused_before_training() -> None:
    check_flat()
    with pytest.raises(ConfigError, match=r"config\.train\.image_sizes: .*flat.* of 16 px"):
        check_flat(image_sizes=(16, 32))


def test_declared_layers_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"no parameter head/kernel; .* Conv_0, Dense_0"):
        check_flat(classifiers=("head",))
    with pytest.raises(ConfigError, match="'Conv_0' as a classifier, but it computes 4 values"):
        check_flat(classifiers=("Conv_0",))


@pytest.mark.parametrize(
    ("attribute", "value", "kind"),
    [
        ("classifiers", "Dense_0", "a tuple of paths"),
        ("heads", 8, "a tuple"),
        ("first_conv", 64, "a path"),
    ],
)
def test_attributes_with_another_meaning_are_named(attribute: str, value: Any, kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"has {attribute} = {value!r}; must be {kind}.*rename"):
        check_flat(**{attribute: value})
