"""Exported networks against the network itself."""

import dataclasses
import json
import sys

import jax
import jax.export
import numpy as np
import onnx
import pytest

from inception_jax.config import Model
from inception_jax.datasets.splits import Split
from inception_jax.errors import ConfigError, RunError, UserError
from inception_jax.export import formats
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
    return formats.onnx_file(weights)


def test_the_program_gives_the_logits_of_the_network(weights: Weights) -> None:
    pixels = noise(3)
    found = jax.jit(formats.program(weights))(pixels)
    np.testing.assert_allclose(found, expected(weights, pixels), rtol=1e-4, atol=1e-4)
    assert np.ptp(found) > 0.1


def test_the_program_has_nothing_of_one_backend(weights: Weights) -> None:
    program = str(jax.make_jaxpr(formats.program(weights))(noise(1)))
    assert "custom_vjp" not in program and "optimization_barrier" not in program
    assert "rsqrt" not in program, "BatchNorm is folded into the kernels"


def test_stablehlo_runs_on_any_batch_and_platform(weights: Weights) -> None:
    data = formats.stablehlo(weights)
    exported = jax.export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    call = formats.load_stablehlo(data)
    for count in (1, 5):
        pixels = noise(count)
        np.testing.assert_allclose(call(pixels), expected(weights, pixels), rtol=1e-4, atol=1e-4)
    assert formats.largest_difference(weights, call) < 1e-3


def test_another_size_of_evaluation_is_inside() -> None:
    weights = random_weights.make(evaluated=12)
    pixels = noise(2)
    found = formats.load_stablehlo(formats.stablehlo(weights))(pixels)
    np.testing.assert_allclose(found, expected(weights, pixels), rtol=1e-4, atol=1e-4)


def test_what_was_trained_in_bfloat16_is_exported_in_float32(weights: Weights) -> None:
    rough = random_weights.make(Model(name="mini_googlenet", width=0.1, dtype="bfloat16"))
    pixels = noise(3)
    found = np.asarray(jax.jit(formats.program(rough))(pixels))
    np.testing.assert_allclose(found, expected(weights, pixels), rtol=1e-4, atol=1e-4)
    assert rough.config.model.dtype == "bfloat16", "the caller's settings stay"


def test_a_network_that_is_not_the_same_is_refused(weights: Weights) -> None:
    right = formats.load_stablehlo(formats.stablehlo(weights))
    with pytest.raises(RunError, match=r"logits differ by up to 0\.1"):
        formats.largest_difference(weights, lambda pixels: right(pixels) + 0.1)
    with pytest.raises(RunError, match="logits differ by up to nan"):
        formats.largest_difference(weights, lambda pixels: right(pixels) * np.nan)


def test_onnx_runtime_gives_the_logits_of_the_network(weights: Weights, onnx_data: bytes) -> None:
    call = formats.load_onnx(onnx_data)
    for count in (1, 5):
        pixels = noise(count)
        np.testing.assert_allclose(call(pixels), expected(weights, pixels), rtol=1e-4, atol=1e-4)


def test_an_onnx_file_resizes_inside() -> None:
    weights = random_weights.make(evaluated=12)
    pixels = noise(2)
    found = formats.load_onnx(formats.onnx_file(weights))(pixels)
    np.testing.assert_allclose(found, expected(weights, pixels), rtol=1e-4, atol=1e-4)


def test_an_onnx_file_describes_itself(weights: Weights, onnx_data: bytes) -> None:
    model = onnx.load_from_string(onnx_data)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(about["inception_jax"]) == formats.describe(weights)
    (given,), (result,) = model.graph.input, model.graph.output
    assert (given.name, result.name) == ("pixels", "logits")
    dimensions = given.type.tensor_type.shape.dim
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert dimensions[0].dim_param and [d.dim_value for d in dimensions][1:] == [SIZE, SIZE, 3]
    operations = {node.op_type for node in model.graph.node}
    assert {"Conv", "MaxPool", "Concat"} <= operations
    assert "BatchNormalization" not in operations


def test_eight_bits_are_smaller_and_nearly_the_same(weights: Weights, int8_data: bytes) -> None:
    small = int8_data
    weights_of = {t.name: t.data_type for t in onnx.load_from_string(small).graph.initializer}
    assert onnx.TensorProto.INT8 in weights_of.values()
    pixels = noise(100)
    before, after = expected(weights, pixels), formats.load_onnx(small)(pixels)
    assert not np.array_equal(before, after)
    assert np.abs(after - before).mean() < 0.2 * before.std(0).mean()


@pytest.fixture(scope="module")
def int8_data(onnx_data: bytes) -> bytes:
    return formats.quantised(onnx_data, noise(64))


def test_files_are_for_old_runtimes_too(onnx_data: bytes, int8_data: bytes) -> None:
    """ONNX Runtime 1.16 takes IR version 9, opset 19 of ONNX, and 3 of ai.onnx.ml at most."""
    for data in (onnx_data, int8_data):
        model = onnx.load_from_string(data)
        assert model.ir_version <= 9
        assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
        assert {node.domain for node in model.graph.node} == {""}


def test_eight_bits_are_described_by_their_own_figures(weights: Weights, int8_data: bytes) -> None:
    measured = dataclasses.replace(weights, metrics={"top1": 41.5}, step=7, epoch=1.5)
    data = formats.described(int8_data, measured, precision="int8")
    (entry,) = onnx.load_from_string(data).metadata_props
    about = json.loads(entry.value)
    assert (about["precision"], about["metrics"]) == ("int8", {"top1": 41.5})
    assert "top-1 41.50%" in about["model"] and about["checkpoint"]["step"] == 7
    pixels = noise(5)
    np.testing.assert_array_equal(
        formats.load_onnx(data)(pixels), formats.load_onnx(int8_data)(pixels)
    )


def test_both_ends_can_stay_in_float(weights: Weights, onnx_data: bytes, int8_data: bytes) -> None:
    mixed = formats.quantised(onnx_data, noise(64), float_ends=True)
    pixels = noise(100)
    exact = expected(weights, pixels)

    def is_quantised(data: bytes) -> list[bool]:
        graph = onnx.load_from_string(data).graph
        scaled = {out for n in graph.node if n.op_type == "DequantizeLinear" for out in n.output}
        products = [n for n in graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
        return [node.input[1] in scaled for node in products]

    assert all(is_quantised(int8_data))
    first, *middle, last = is_quantised(mixed)
    assert all(middle) and not first and not last
    errors = [np.abs(formats.load_onnx(d)(pixels) - exact).mean() for d in (mixed, int8_data)]
    assert errors[0] < errors[1]


def test_what_is_not_installed_is_named(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"not installed \(onnx\): pip install .*\[onnx\]"):
        formats.onnx_file(weights)


class Fixed(Split):
    """A split whose images are their numbers."""

    @property
    def threads(self) -> int:
        return 1

    def read(self, indices: np.ndarray) -> np.ndarray:
        return indices.astype(np.uint8).reshape(-1, 1, 1, 1)


def test_accuracy_counts_every_image_once() -> None:
    """7 classes; image i is rated i, i + 1, …: right at first, or at fifth place, or not at all."""
    labels = np.array([i % 7 if i % 2 else (i + 4) % 7 for i in range(150)] + [3], np.int32)
    labels[0] = 5
    split = Fixed(labels, 1)

    def classify(pixels: np.ndarray) -> np.ndarray:
        places = (np.arange(7) - pixels.reshape(-1, 1) % 7) % 7
        return -places.astype(np.float32)

    found = formats.accuracy("form", classify, split, size=2_500_000)
    assert (found.form, found.megabytes, found.count) == ("form", 2.5, 151)
    # 75 odd ones; image 150 is rated 3 first; of the 75 even ones image 0 is not among the five.
    assert found.top1 == pytest.approx(100 * 76 / 151)
    assert found.top5 == pytest.approx(100 * 150 / 151)


def test_equal_logits_count_as_the_lower_label() -> None:
    split = Fixed(np.array([0, 1, 4, 5], np.int32), 1)
    found = formats.accuracy("", lambda pixels: np.zeros((len(pixels), 7)), split, size=0)
    assert (found.top1, found.top5) == (25, 75)


@pytest.mark.parametrize(("top1", "warned"), [(55.0, True), (59.0, False), (61.0, False)])
def test_a_loss_of_more_than_a_point_is_warned_of(top1: float, warned: bool) -> None:
    before, after = (
        formats.Accuracy(form, 1.0, top1=percent, top5=None, count=9, images_per_second=1.0)
        for form, percent in (("float32", 60.0), ("int8", top1))
    )
    found = formats.quantisation_warning(before, after, ["--float_ends", "--calibration=2048"])
    assert bool(found) == warned
    if warned:
        assert "costs 5.00 points of top-1 accuracy (55.00%, float32 60.00%)" in found
        assert found.endswith("Try --float_ends or --calibration=2048")


def test_top_5_of_five_classes_is_left_out() -> None:
    split = Fixed(np.array([0, 1, 4], np.int32), 1)
    found = formats.accuracy("", lambda pixels: np.zeros((len(pixels), 5)), split, size=0)
    assert found.top5 is None


def test_a_description_can_be_written_as_json(weights: Weights) -> None:
    about = json.loads(json.dumps(formats.describe(weights)))
    assert about["class_names"] == list("abcdefg")
    assert about["input"]["shape"] == ["batch", SIZE, SIZE, 3]


def test_data_of_other_classes_are_refused(weights: Weights) -> None:
    class Data:
        name, image_size, num_classes, class_names = "other", SIZE, 7, tuple("abcdefh")

    with pytest.raises(ConfigError, match="--config"):
        formats.check_data(Data(), weights)
    Data.class_names = weights.class_names
    formats.check_data(Data(), weights)
