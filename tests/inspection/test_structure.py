"""What is found of a network against its variables, its results and arithmetic."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from inception_jax.config import Model
from inception_jax.errors import ConfigError
from inception_jax.inspection import structure
from inception_jax.models import networks
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
    """Returns a network's parameters and the results of its modules, as shapes by path."""
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
def test_costs_and_shapes_are_those_of_parameters_and_results(model: Model, size: int) -> None:
    """Independent of the program's operations: each kernel is used once at each place."""
    params, results = shapes(model, size)
    found = structure.describe(networks.create(model, 10), size)
    layers = {layer.name: layer for layer in found.layers}
    assert len(layers) == len(found.layers)
    multiply_adds = 0
    for path, leaf in params.items():
        if path[-1] == "kernel":
            places = math.prod(results[path[:-1]].shape[:-1])
            multiply_adds += leaf.size * places
            assert any("/".join(path).startswith(f"{name}/") for name in layers), path
    assert sum(layer.multiply_adds for layer in found.layers) == multiply_adds
    assert sum(layer.parameters for layer in found.layers) == sum(p.size for p in params.values())
    for path, result in results.items():
        layer = layers.get("/".join(path))
        if layer is not None:
            assert (1, *layer.shape) == result.shape, path
    for block in found.blocks():
        if (block.name,) in results:
            assert (1, *block.shape) == results[block.name,].shape


@pytest.mark.parametrize(
    ("model", "size", "classes", "parameters", "giga"),
    [
        (Model(norm="lrn"), 224, 1000, 6_998_552, 1.58),
        (Model(), 224, 1000, 7_005_832, 1.58),
        (Model(name="googlenet_torchvision"), 224, 1000, 6_624_904, 1.50),
        (Model(stem="s16"), 64, 200, 6_185_832 - 40 * 3 * 64, 0.49),
        (Model(stem="s32"), 64, 200, 6_185_832 - 40 * 3 * 64, 1.57),
        (Model(name="eight_module_googlenet"), 64, 200, 10_716_744, 0.91),
    ],
)
def test_the_totals_are_the_known_ones(
    model: Model, size: int, classes: int, parameters: int, giga: float
) -> None:
    blocks = structure.describe(networks.create(model, classes), size).blocks()
    assert sum(block.parameters for block in blocks) == parameters
    assert round(sum(block.multiply_adds for block in blocks) / 1e9, 2) == giga


def test_auxiliary_heads_are_told_from_the_rest() -> None:
    model = Model(name="googlenet_torchvision", aux_heads=True)
    found = structure.describe(networks.create(model, 1000), 224)
    blocks = found.blocks()
    assert [block.name for block in blocks if block.is_auxiliary] == ["aux_4a", "aux_4d"]
    assert sum(block.parameters for block in blocks) == 13_004_888
    assert sum(block.parameters for block in blocks if not block.is_auxiliary) == 6_624_904
    names = [found.layers[index].name for index in found.outputs]
    assert names == ["classifier", "aux_4a/classifier", "aux_4d/classifier"]


def test_layers_say_what_they_are_and_what_they_read() -> None:
    found = structure.describe(networks.create(Model(norm="lrn", aux_heads=True), 10), 224)
    layers = {layer.name: layer for layer in found.layers}

    def sources(name: str) -> list[tuple[str, tuple[int, ...]]]:
        return [
            ("image" if edge.source is None else found.layers[edge.source].name, edge.shape)
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
    assert (first.kind, first.window, first.stride) == ("convolution", 7, 2)
    assert first.extras == ["bias", "ReLU"]
    assert layers["classifier"].extras == ["dropout 40%", "bias"]
    pool = layers["aux_4a/average_pool"]
    assert (pool.kind, pool.window, pool.stride) == ("average pool", 5, 3)
    assert [block.kind for block in found.blocks()][:3] == [
        "convolution",
        "max pool",
        "local response norm",
    ]


def test_a_module_with_an_operation_beside_its_convolution_holds_layers() -> None:
    found = structure.describe(networks.create(Model(name="mini_googlenet"), 10), 32)
    blocks = {block.name: block for block in found.blocks()}
    assert blocks["inception_2a"].kind == "mini inception"
    assert [layer.name for layer in blocks["downsample_2c"].layers] == [
        "downsample_2c/conv_3x3",
        "downsample_2c/max_pool",
        "downsample_2c/concatenation",
    ]
    assert blocks["downsample_2c"].layers[0].extras == ["BatchNorm", "ReLU"]
    assert next(iter(blocks)) == "conv1" and list(blocks)[-2:] == ["mean", "classifier"]


def test_pooling_to_a_given_size_is_one_layer() -> None:
    model = Model(name="googlenet_torchvision", aux_heads=True)
    found = structure.describe(networks.create(model, 10), 224)
    head = next(block for block in found.blocks() if block.name == "aux_4a")
    kinds = [layer.kind for layer in head.layers]
    assert kinds == ["average pool", "convolution", "linear", "linear"]
    assert head.layers[0].multiply_adds == 0
    assert head.receptive_field is None


def test_receptive_fields_of_the_paper_s_network() -> None:
    """Arithmetic on windows and strides: Araujo et al. 2019 list 907 for its last pool."""
    blocks = structure.describe(networks.create(Model(), 10), 224).blocks()
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


def test_a_receptive_field_is_what_a_pixel_depends_on() -> None:
    """A NaN in a column of the image reaches exactly the pixels whose field it is in."""
    network = networks.create(Model(name="mini_googlenet", width=0.02), 10)
    size = 64
    blocks = structure.describe(network, size).blocks()
    images = np.zeros((size, size, size, 3), np.float32)
    images[np.arange(size), :, np.arange(size)] = np.nan
    variables = small.draw(network, size)

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


def test_any_network_with_the_same_call_is_described() -> None:
    found = structure.describe(Linear(), 8)
    (layer,) = found.layers
    assert (layer.name, layer.kind, layer.shape) == ("classifier", "linear", (10,))
    assert layer.multiply_adds == 8 * 8 * 3 * 10
    assert layer.inputs == [structure.Edge(None, (8 * 8 * 3,))]


def test_an_image_that_is_too_small_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        structure.describe(networks.create(Model(), 10), 8)
