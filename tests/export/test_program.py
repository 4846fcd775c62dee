"""Tests exported networks against the network itself."""

import dataclasses
import json
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from inception_jax.config import Model
from inception_jax.errors import RunError, UserError
from inception_jax.export import onnx as onnx_files
from inception_jax.export import program, quantization, stablehlo
from inception_jax.inference.predictor import Predictor
from inception_jax.models.weights import Weights
from tests import random_weights

SIZE = random_weights.SIZE


def noise(count: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, size, size, 3), np.uint8)


def expected(weights: Weights, pixels: np.ndarray) -> np.ndarray:
    return Predictor(weights, batch_size=len(pixels)).logits(pixels)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights.make()


@pytest.fixture(scope="module")
def onnx_data(weights: Weights) -> bytes:
    return onnx_files.export(weights)


def test_program_matches_network(weights: Weights) -> None:
    pixels = noise(3)
    logits = jax.jit(program.pixels_to_logits(weights))(pixels)
    np.testing.assert_allclose(logits, expected(weights, pixels), rtol=1e-4, atol=1e-4)
    assert np.ptp(logits) > 0.1


def test_program_is_backend_independent(weights: Weights) -> None:
    text = str(jax.make_jaxpr(program.pixels_to_logits(weights))(noise(1)))
    assert "custom_vjp" not in text and "optimization_barrier" not in text
    assert "rsqrt" not in text, "BatchNorm is folded into the kernels"


def test_stablehlo_runs_on_any_batch_and_platform(weights: Weights) -> None:
    data = stablehlo.export(weights)
    exported = jax.export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    call = stablehlo.load(data)
    for count in (1, 5):
        pixels = noise(count)
        np.testing.assert_allclose(call(pixels), expected(weights, pixels), rtol=1e-4, atol=1e-4)
    assert program.max_logit_difference(weights, call) < 1e-3


@pytest.mark.parametrize("kernel", ["linear", "lanczos3"])
def test_program_resizes_to_evaluation_size(kernel: str) -> None:
    weights = dataclasses.replace(random_weights.make(evaluated=12), resize_kernel=kernel)
    pixels = noise(2)
    logits = stablehlo.load(stablehlo.export(weights))(pixels)
    np.testing.assert_allclose(logits, expected(weights, pixels), rtol=1e-4, atol=1e-4)


def test_bfloat16_network_is_exported_in_float32(weights: Weights) -> None:
    rough = random_weights.make(Model(name="mini_googlenet", width=0.1, dtype="bfloat16"))
    pixels = noise(3)
    logits = np.asarray(jax.jit(program.pixels_to_logits(rough))(pixels))
    np.testing.assert_allclose(logits, expected(weights, pixels), rtol=1e-4, atol=1e-4)
    assert rough.model.dtype == "bfloat16", "the caller's settings are unchanged"


def test_different_network_is_rejected(weights: Weights) -> None:
    right = stablehlo.load(stablehlo.export(weights))
    with pytest.raises(RunError, match=r"logits differ by up to 0\.1"):
        program.max_logit_difference(weights, lambda pixels: right(pixels) + 0.1)
    with pytest.raises(RunError, match="logits differ by up to nan"):
        program.max_logit_difference(weights, lambda pixels: right(pixels) * np.nan)


def test_onnx_runtime_matches_network(weights: Weights, onnx_data: bytes) -> None:
    call = onnx_files.load(onnx_data)
    for count in (1, 5):
        pixels = noise(count)
        np.testing.assert_allclose(call(pixels), expected(weights, pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", ["linear", "lanczos3"])
def test_onnx_file_resizes_to_evaluation_size(kernel: str) -> None:
    weights = dataclasses.replace(random_weights.make(evaluated=12), resize_kernel=kernel)
    pixels = noise(2)
    logits = onnx_files.load(onnx_files.export(weights))(pixels)
    np.testing.assert_allclose(logits, expected(weights, pixels), rtol=1e-4, atol=1e-4)


def weights_of(network: nn.Module) -> Weights:
    """Returns random weights of a network without BatchNorm, given as an object."""
    variables = network.init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    return dataclasses.replace(
        random_weights.make(), variables={**variables, "batch_stats": {}}, module=network
    )


def test_operation_that_onnx_lacks_is_named_with_a_remedy() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(7)(jnp.cos(x).mean((1, 2)))

    with pytest.raises(UserError, match=r"the operation cos cannot .*; StableHLO \(--to=stablehlo"):
        onnx_files.export(weights_of(Net()))


def test_maps_of_constants_are_refused_by_onnx() -> None:
    class Positions(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = jnp.concatenate([x, np.zeros((*x.shape[:3], 1), np.float32)], -1)
            return nn.Dense(7)(nn.Conv(4, (3, 3))(x).mean((1, 2)))

    with pytest.raises(UserError, match=r"the operation concatenate of constants cannot"):
        onnx_files.export(weights_of(Positions()))


def test_onnx_file_contains_its_description(weights: Weights, onnx_data: bytes) -> None:
    model = onnx.load_from_string(onnx_data)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["inception_jax"]) == program.export_metadata(weights)
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("pixels", "logits")
    dimensions = given.type.tensor_type.shape.dim
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert dimensions[0].dim_param and [d.dim_value for d in dimensions][1:] == [SIZE, SIZE, 3]
    operations = {node.op_type for node in model.graph.node}
    assert {"Conv", "MaxPool", "Concat"} <= operations
    assert "BatchNormalization" not in operations


def test_int8_is_close_to_float32(weights: Weights, int8_data: bytes) -> None:
    small = int8_data
    weights_of = {t.name: t.data_type for t in onnx.load_from_string(small).graph.initializer}
    assert onnx.TensorProto.INT8 in weights_of.values()
    pixels = noise(100)
    before, after = expected(weights, pixels), onnx_files.load(small)(pixels)
    assert not np.array_equal(before, after)
    assert np.abs(after - before).mean() < 0.2 * before.std(0).mean()


@pytest.fixture(scope="module")
def int8_data(onnx_data: bytes) -> bytes:
    return quantization.quantize(onnx_data, noise(64))


def test_files_support_old_runtimes(onnx_data: bytes, int8_data: bytes) -> None:
    """ONNX Runtime 1.16 supports at most IR version 9, ONNX opset 19 and ai.onnx.ml opset 3."""
    for data in (onnx_data, int8_data):
        model = onnx.load_from_string(data)
        assert model.ir_version <= 9
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
        assert {node.domain for node in model.graph.node} == {""}


def test_int8_file_has_its_own_metrics(weights: Weights, int8_data: bytes) -> None:
    measured = dataclasses.replace(weights, metrics={"top1": 41.5}, step=7, epoch=1.5)
    data = onnx_files.with_description(int8_data, measured, precision="int8")
    (entry,) = onnx.load_from_string(data).metadata_props
    about = json.loads(entry.value)
    assert (about["precision"], about["metrics"]) == ("int8", {"top1": 41.5})
    assert "top-1 41.50%" in about["model"] and about["checkpoint"]["step"] == 7
    pixels = noise(5)
    np.testing.assert_array_equal(onnx_files.load(data)(pixels), onnx_files.load(int8_data)(pixels))


def test_both_ends_can_stay_in_float32(
    weights: Weights, onnx_data: bytes, int8_data: bytes
) -> None:
    mixed = quantization.quantize(onnx_data, noise(64), float_ends=True)
    pixels = noise(100)
    exact = expected(weights, pixels)

    def is_quantized(data: bytes) -> list[bool]:
        graph = onnx.load_from_string(data).graph
        scaled = {out for n in graph.node if n.op_type == "DequantizeLinear" for out in n.output}
        products = [n for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
        return [node.input[1] in scaled for node in products]

    assert all(is_quantized(int8_data))
    first, *middle, last = is_quantized(mixed)
    assert all(middle) and not first and not last
    errors = [np.abs(onnx_files.load(d)(pixels) - exact).mean() for d in (mixed, int8_data)]
    assert errors[0] < errors[1]


def test_missing_package_is_named(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"not installed \(onnx\); run pip install .*\[onnx\]"):
        onnx_files.export(weights)


def test_metadata_is_json_serializable(weights: Weights) -> None:
    about = json.loads(json.dumps(program.export_metadata(weights)))
    assert about["class_names"] == list("abcdefg")
    assert about["input"]["shape"] == ["batch", SIZE, SIZE, 3]
