"""Tests the analysis of networks against variables, outputs and arithmetic."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from inception_jax.config import Model
from inception_jax.errors import ConfigError
from inception_jax.inspection import structure, table
from inception_jax.models import networks, protocol
from tests import small
from tests.small import Linear

NETWORKS = [
    (Model(norm="lrn", aux_heads=True), 224),
    (Model(stem="s16", conv5x5="two_3x3", width=0.3), 64),
    (Model(stem="s32", norm="none", dtype="bfloat16"), 65),
    (Model(name="googlenet_torchvision", aux_heads=True), 96),
    (Model(name="deeper_googlenet"), 64),
    (Model(name="eight_module_googlenet"), 64),
    (Model(name="mini_googlenet"), 33),
]


def shapes(model: Model, size: int) -> tuple[dict[tuple, Any], dict[tuple, Any]]:
    """Returns the shapes of a network's parameters and module outputs by path."""
    network = networks.create(model, 10)

    def call(images: jax.Array) -> tuple[Any, Any]:
        variables = network.init(jax.random.key(0), images)
        _, changed = network.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            capture_intermediates=True,
            mutable=["intermediates", "batch_stats"],
        )
        return variables["params"], changed["intermediates"]

    params, results = jax.eval_shape(call, jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32))
    results = {
        path[:-1]: leaf[0]
        for path, leaf in traverse_util.flatten_dict(results).items()
        if path[-1] == "__call__"
    }
    return traverse_util.flatten_dict(params), results


@pytest.mark.parametrize(("model", "size"), NETWORKS)
def test_costs_and_shapes_match_variables_and_outputs(model: Model, size: int) -> None:
    """Independent of the traced operations: each kernel is used once at each position."""
    params, results = shapes(model, size)
    analyzed = structure.analyze(networks.create(model, 10), size)
    layers = {layer.name: layer for layer in analyzed.layers}
    assert len(layers) == len(analyzed.layers)
    multiply_adds = 0
    for path, leaf in params.items():
        if path[-1] == "kernel":
            positions = math.prod(results[path[:-1]].shape[:-1])
            multiply_adds += leaf.size * positions
            assert any("/".join(path).startswith(f"{name}/") for name in layers), path
    assert sum(layer.multiply_adds for layer in analyzed.layers) == multiply_adds
    assert sum(layer.parameters for layer in analyzed.layers) == sum(
        p.size for p in params.values()
    )
    for path, result in results.items():
        layer = layers.get("/".join(path))
        if layer is not None:
            assert (1, *layer.shape) == result.shape, path
    for block in analyzed.blocks():
        if (block.name,) in results:
            assert (1, *block.shape) == results[block.name,].shape


def test_totals_match_known_values() -> None:
    """Those of other networks: tests/test_pages.py compares the table in docs/models.md."""
    blocks = structure.analyze(networks.create(Model(norm="lrn"), 1000), 224).blocks()
    assert sum(block.parameters for block in blocks) == 6_998_552
    assert round(sum(block.multiply_adds for block in blocks) / 1e9, 2) == 1.58


def test_auxiliary_heads_are_identified() -> None:
    model = Model(name="googlenet_torchvision", aux_heads=True)
    analyzed = structure.analyze(networks.create(model, 1000), 224)
    blocks = analyzed.blocks()
    assert [block.name for block in blocks if block.is_auxiliary] == ["aux_4a", "aux_4d"]
    assert sum(block.parameters for block in blocks) == 13_004_888
    assert sum(block.parameters for block in blocks if not block.is_auxiliary) == 6_624_904
    names = [analyzed.layers[index].name for index in analyzed.outputs]
    assert names == ["classifier", "aux_4a/classifier", "aux_4d/classifier"]


def test_layers_have_kinds_and_inputs() -> None:
    analyzed = structure.analyze(networks.create(Model(norm="lrn", aux_heads=True), 10), 224)
    layers = {layer.name: layer for layer in analyzed.layers}

    def sources(name: str) -> list[tuple[str, tuple[int, ...]]]:
        return [
            ("image" if edge.source is None else analyzed.layers[edge.source].name, edge.shape)
            for edge in layers[name].inputs
        ]

    assert sources("conv1") == [("image", (224, 224, 3))]
    assert sources("local_response_norm") == [("max_pool", (56, 56, 64))]
    assert sources("conv2_reduce") == [("local_response_norm", (56, 56, 64))]
    assert sources("inception_3a/concatenation") == [
        ("inception_3a/conv_1x1", (28, 28, 64)),
        ("inception_3a/conv_3x3", (28, 28, 128)),
        ("inception_3a/conv_5x5", (28, 28, 32)),
        ("inception_3a/pool_proj", (28, 28, 32)),
    ]
    assert sources("inception_3a/pool_proj") == [("inception_3a/max_pool", (28, 28, 192))]
    assert sources("aux_4a/average_pool") == [("inception_4a/concatenation", (14, 14, 512))]
    assert sources("aux_4a/hidden") == [("aux_4a/conv", (4 * 4 * 128,))]
    assert sources("mean") == [("inception_5b/concatenation", (7, 7, 1024))]
    first = layers["conv1"]
    assert (first.kind, first.window, first.stride) == ("convolution", (7, 7), 2)
    assert first.extras == ["bias", "ReLU"]
    assert layers["classifier"].extras == ["dropout 40%", "bias"]
    pool = layers["aux_4a/average_pool"]
    assert (pool.kind, pool.window, pool.stride) == ("average pool", (5, 5), 3)
    assert [block.kind for block in analyzed.blocks()][:3] == [
        "convolution",
        "max pool",
        "local response norm",
    ]


def test_module_with_several_operations_contains_layers() -> None:
    analyzed = structure.analyze(networks.create(Model(name="mini_googlenet"), 10), 32)
    blocks = {block.name: block for block in analyzed.blocks()}
    assert blocks["inception_2a"].kind == "mini inception"
    assert [layer.name for layer in blocks["downsample_2c"].layers] == [
        "downsample_2c/conv_3x3",
        "downsample_2c/max_pool",
        "downsample_2c/concatenation",
    ]
    assert blocks["downsample_2c"].layers[0].extras == ["BatchNorm", "ReLU"]
    assert next(iter(blocks)) == "conv1" and list(blocks)[-2:] == ["mean", "classifier"]


def test_adaptive_pooling_is_one_layer() -> None:
    model = Model(name="googlenet_torchvision", aux_heads=True)
    analyzed = structure.analyze(networks.create(model, 10), 224)
    head = next(block for block in analyzed.blocks() if block.name == "aux_4a")
    kinds = [layer.kind for layer in head.layers]
    assert kinds == ["average pool", "convolution", "linear", "linear"]
    assert head.layers[0].multiply_adds == 0
    assert head.receptive_field is None


def test_receptive_fields_of_googlenet() -> None:
    """Computed from windows and strides; Araujo et al. 2019 list 907 for its last pool."""
    blocks = structure.analyze(networks.create(Model(), 10), 224).blocks()
    seen = {block.name: (block.receptive_field, block.jump) for block in blocks}
    assert [seen[name] for name in ("conv1", "max_pool", "conv2", "max_pool_2")] == [
        (7, 2),
        (11, 4),
        (19, 4),
        (27, 8),
    ]
    assert seen["inception_3b"] == (27 + 2 * 4 * 8, 8)
    assert seen["inception_4e"] == (107 + 5 * 4 * 16, 16)
    assert seen["inception_5b"] == (459 + 2 * 4 * 32, 32)
    assert seen["mean"] == seen["classifier"] == (715 + 6 * 32, None)


def test_receptive_fields_match_actual_dependence() -> None:
    """A NaN in an image column reaches exactly the pixels whose receptive field contains it."""
    network = networks.create(Model(name="mini_googlenet", width=0.02), 10)
    size = 64
    blocks = structure.analyze(network, size).blocks()
    images = np.zeros((size, size, size, 3), np.float32)
    images[np.arange(size), :, np.arange(size)] = np.nan
    variables = small.random_variables(network, size)

    def call(images: jax.Array) -> Any:
        _, captured = network.apply(
            variables,
            images,
            capture_intermediates=lambda module, _: len(module.path) == 1,
            mutable=["intermediates"],
        )
        return captured["intermediates"]

    results = jax.jit(call)(images)
    for block in blocks:
        if block.jump is not None:
            result = np.asarray(results[block.name]["__call__"][0])
            middle = result.shape[1] // 2
            reached = np.isnan(result[:, middle, middle]).any(-1)
            assert reached.sum() == block.receptive_field, block.name


def test_custom_network_is_analyzed() -> None:
    analyzed = structure.analyze(Linear(), 8)
    (layer,) = analyzed.layers
    assert (layer.name, layer.kind, layer.shape) == ("classifier", "linear", (10,))
    assert layer.multiply_adds == 8 * 8 * 3 * 10
    assert layer.inputs == [structure.Edge(None, (8 * 8 * 3,))]


class Factorized(nn.Module):
    """With the asymmetric convolutions of Szegedy et al. 2016 (Inception-v3)."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = nn.Conv(4, (1, 7), (1, 2), name="row")(x)
        x = nn.Conv(4, (7, 1), (2, 1), name="column")(x)
        x = nn.Dense(6, name="pixelwise")(x)
        mixing = self.param("mixing", nn.initializers.ones, (6, 5))
        return nn.Dense(10, name="classifier")((x @ mixing).max((1, 2)))


def test_layers_differ_by_axis_and_act_on_pixels_or_on_the_whole_map() -> None:
    analyzed = structure.analyze(protocol.adapt(Factorized(), name="net", place=""), 32)
    assert [
        (layer.name, table.layer_text(layer), layer.shape, layer.receptive_field, layer.jump)
        for layer in analyzed.layers
    ] == [
        ("row", "convolution 1×7/2", (32, 16, 4), 7, 2),
        ("column", "convolution 7×1/2", (16, 16, 4), 7, 2),
        ("pixelwise", "linear", (16, 16, 6), 7, 2),
        ("linear", "linear", (16, 16, 5), 7, 2),
        ("max_pool", "max pool", (5,), 7 + 15 * 2, None),
        ("classifier", "linear", (10,), 7 + 15 * 2, None),
    ]
    assert [layer.multiply_adds for layer in analyzed.layers] == [
        32 * 16 * 7 * 3 * 4,
        16 * 16 * 7 * 4 * 4,
        16 * 16 * 4 * 6,
        16 * 16 * 6 * 5,
        0,
        5 * 10,
    ]


def test_parameters_of_no_layer_are_counted() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = nn.BatchNorm(not train)(nn.Conv(4, (3, 3), use_bias=False)(x))
            return nn.Dense(10)(x.mean((1, 2)))

    analyzed = structure.analyze(protocol.adapt(Net(), name="net", place=""), 8)
    assert analyzed.other_parameters == 2 * 4
    others, total = table.make_table(analyzed).lines[-2:]
    assert (others[0], others[3]) == ("others", 8)
    assert (total[0], total[3]) == ("total", 9 * 3 * 4 + 8 + 4 * 10 + 10)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return nn.Conv(3, (3, 3))(x), None


class Repeated(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        steps = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = steps()(x, None)
        return nn.Dense(10)(x.mean((1, 2)))


class Scaled(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1) * self.param("scale", nn.initializers.ones, (1, 1))


@pytest.mark.parametrize(
    ("network", "message"),
    [(Repeated(), "inside the operation scan"), (Scaled(), "no convolution, pooling or product")],
)
def test_network_whose_layers_cannot_be_listed_is_refused(network: nn.Module, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        structure.analyze(protocol.adapt(network, name="net", place=""), 8)


def test_too_small_image_is_rejected() -> None:
    with pytest.raises(ConfigError, match="must be at least 31 x 31 px"):
        structure.analyze(networks.create(Model(), 10), 8)
