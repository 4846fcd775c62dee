"""A trained network as a file that other programs run: StableHLO, ONNX, and ONNX in 8 bits.

All of them take pixels, uint8 [batch, S, S, 3] in RGB, of images cut and resized as in evaluation,
and give logits, float32 [batch, classes]; the batch may have any size. Resizing to another size of
evaluation and the normalisation are inside. Logits, not probabilities: a softmax is one line
anywhere, and cannot be undone to the last digit. BatchNorm is folded into the convolutions, and all
is computed in float32 whatever the training computed in.
"""

import contextlib
import copy
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from inception_jax.datasets.dataset import Dataset
from inception_jax.datasets.splits import Split
from inception_jax.errors import ConfigError, RunError, UserError
from inception_jax.export import onnx_graph
from inception_jax.inference.predictor import Predictor
from inception_jax.models import networks
from inception_jax.models.layers import ConvUnit
from inception_jax.models.weights import Weights
from inception_jax.telemetry.writers import has_top5

PLATFORMS = ("cpu", "cuda", "tpu")
# Names of the arrays in an ONNX file, and of its entry in the metadata.
INPUT, OUTPUT, ABOUT = "pixels", "logits", "inception_jax"
_BATCH = 64
# Logits of trained networks are some tens; float32 in another order changes them by some 1e-5.
_TOLERANCE = 1e-2
# Points of accuracy that 8 bits may cost without a warning.
_MOST_LOST = 1.0

Classify = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How a form of a network does on a split.

    Attributes:
      form: what was measured.
      megabytes: size of its file.
      top1, top5: percent; top5 is None for so few classes that it says nothing.
      count: images of the split.
      images_per_second: of one pass over them, reading included.
    """

    form: str
    megabytes: float
    top1: float
    top5: float | None
    count: int
    images_per_second: float


def program(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """Returns the network as a function of pixels alone, traced the same on every backend.

    Args:
      weights: of the network; their variables become constants.

    Returns:
      A pure function of uint8 [B, S, S, 3] that gives float32 [B, classes].
    """
    network, predictor = _network(weights), Predictor(weights)
    return lambda pixels: network(predictor.prepared(pixels))


def _network(weights: Weights) -> Callable[[jax.Array], jax.Array]:
    """Returns the network as a function of float32 [B, H, W, 3], resized and normalised."""
    settings = _in_float32(weights).config.model
    model = networks.create(settings, weights.num_classes, rewrite=False)

    def logits(images: jax.Array) -> jax.Array:
        with nn.intercept_methods(_folded):
            output: Any = model.apply(weights.variables, images, train=False)
        return output.logits

    return logits


def _in_float32(weights: Weights) -> Weights:
    """Returns weights whose network computes in float32."""
    config = copy.deepcopy(weights.config)
    config.model.dtype = "float32"
    return dataclasses.replace(weights, config=config)


def describe(weights: Weights, *, precision: str = "float32") -> dict[str, Any]:
    """Returns what a user of an exported file has to know, for JSON.

    Args:
      weights: of the network, with the metrics of the file.
      precision: what the file computes in, "float32" or "int8".
    """
    size = weights.image_size
    return {
        "model": str(weights),
        "precision": precision,
        "input": {
            "name": INPUT,
            "dtype": "uint8",
            "shape": ["batch", size, size, 3],
            "meaning": "RGB; normalisation is inside",
            "prepared": "the centred square, resized by PIL's bicubic filter",
            "crop": weights.config.data.eval_crop,
        },
        "output": {
            "name": OUTPUT,
            "dtype": "float32",
            "shape": ["batch", weights.num_classes],
            "meaning": "logits; their softmax gives probabilities",
        },
        "class_names": list(weights.class_names),
        "checkpoint": {
            "name": weights.checkpoint,
            "step": weights.step,
            "epoch": weights.epoch,
            "is_average": weights.is_average,
        },
        "metrics": dict(weights.metrics),
        "version": weights.version,
        "revision": weights.revision,
    }


def stablehlo(weights: Weights) -> bytes:
    """Returns a network as `jax.export` serialises it, for CPUs, CUDA GPUs and TPUs in one."""
    size = weights.image_size
    (batch,) = jax.export.symbolic_shape("batch")
    pixels = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.uint8)
    exported = jax.export.export(jax.jit(program(weights)), platforms=PLATFORMS)(pixels)
    return bytes(exported.serialize())


def load_stablehlo(data: bytes) -> Classify:
    """Returns an exported network as a function of NumPy arrays."""
    call = jax.jit(jax.export.deserialize(bytearray(data)).call)
    return lambda pixels: np.asarray(call(pixels))


def onnx_file(weights: Weights) -> bytes:
    """Returns a network as an ONNX file, its metadata holding `describe` as JSON under `ABOUT`.

    Raises:
      UserError: if the packages for it are not installed.
    """
    with _needs_onnx():
        import onnx
    config = weights.config
    model = onnx_graph.convert(
        _network(weights),
        name=config.model.name,
        size=weights.image_size,
        resized=config.evaluation.image_size or weights.image_size,
        mean=weights.mean,
        std=weights.std,
        names=(INPUT, OUTPUT),
    )
    onnx.helper.set_model_props(model, {ABOUT: json.dumps(describe(weights))})
    return model.SerializeToString()


def load_onnx(data: bytes) -> Classify:
    """Returns an ONNX file as a function of NumPy arrays, run by ONNX Runtime on the CPU.

    Raises:
      UserError: if ONNX Runtime is not installed.
    """
    with _needs_onnx():
        import onnxruntime
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run([OUTPUT], {INPUT: pixels})[0]


def quantised(data: bytes, calibration: np.ndarray, *, float_ends: bool = False) -> bytes:
    """Returns an ONNX file whose convolutions and products compute in 8 bits.

    Static: the ranges of activations are those that they have on the calibration images. Weights
    are int8 with a scale for each output channel, activations uint8. Its metadata are still those
    of the float32 file: see `described`.

    Args:
      data: an ONNX file by `onnx_file`.
      calibration: uint8 [N, S, S, 3], as many as possible from the training.
      float_ends: whether the first convolution and the classifier stay in float32, whose rounding
        costs the most accuracy and which are a small part of the computation.

    Raises:
      UserError: if the packages for it are not installed.
    """
    with _needs_onnx():
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            starts = range(0, len(calibration), _BATCH)
            self._batches = iter([calibration[start : start + _BATCH] for start in starts])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        plain, prepared, result = (folder / f"{stage}.onnx" for stage in ("a", "b", "c"))
        plain.write_bytes(data)
        # Fuses what the runtime would fuse, which it cannot any more once it is quantised.
        shape_inference.quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantization.quantize_static(
            str(prepared),
            str(result),
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=_name_ends(prepared) if float_ends else [],
        )
        model = onnx.load(result)
    # The quantizer names every domain it knows, in versions that older runtimes refuse.
    used = {node.domain for node in model.graph.node}
    imports = [each for each in model.opset_import if each.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _name_ends(path: pathlib.Path) -> list[str]:
    """Names the first convolution and the last product of an ONNX file, and returns the names."""
    import onnx

    model = onnx.load(path)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    ends = [*convolutions[:1], *products[-1:]]
    for number, node in enumerate(ends):
        node.name = f"float_{number}"
    onnx.save(model, path)
    return [node.name for node in ends]


def described(data: bytes, weights: Weights, *, precision: str) -> bytes:
    """Returns an ONNX file with a description of its own in the metadata.

    Args:
      data: the file.
      weights, precision: as of `describe`.
    """
    import onnx

    model = onnx.load_from_string(data)
    props = {ABOUT: json.dumps(describe(weights, precision=precision))}
    onnx.helper.set_model_props(model, props)
    return model.SerializeToString()


def largest_difference(weights: Weights, classify: Classify) -> float:
    """Returns how much an exported network's logits differ from its own, on images of noise.

    In batches of two sizes, so that the free batch size is tried too.

    Raises:
      RunError: if it is more than rounding gives.
    """
    shape = (3, weights.image_size, weights.image_size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    expected = Predictor(_in_float32(weights), batch_size=3).logits(pixels)
    found = np.concatenate([classify(pixels[:1]), classify(pixels[1:])])
    difference = float(np.abs(found - expected).max())
    if not difference <= _TOLERANCE:
        raise RunError(
            f"the exported network is not the same: logits differ by up to {difference:.3g}. This "
            "is a fault of this program or of the converter; please report it"
        )
    return difference


def accuracy(form: str, classify: Classify, split: Split, *, size: int) -> Accuracy:
    """Measures a form of a network on every image of a split.

    Args:
      form: its name.
      classify: its logits of pixels.
      split: the images.
      size: of its file, bytes.
    """
    right = np.zeros(2, np.int64)
    start = time.perf_counter()
    for first in range(0, len(split), _BATCH):
        indices = np.arange(first, min(first + _BATCH, len(split)))
        logits, labels = classify(split.read(indices)), split.labels[indices]
        # How many classes are rated higher than the right one; of equal ones the lower is first.
        own = logits[np.arange(len(labels)), labels][:, None]
        ahead = np.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & ahead)).sum(1)
        right += (rank < 1).sum(), (rank < 5).sum()
    seconds = time.perf_counter() - start
    top1, top5 = (100 * right / len(split)).tolist()
    top5 = top5 if has_top5(logits.shape[1]) else None
    return Accuracy(form, size / 1e6, top1, top5, len(split), len(split) / seconds)


def quantisation_warning(before: Accuracy, after: Accuracy, remedies: Sequence[str]) -> str:
    """Returns a warning if 8 bits cost more than a point of top-1 accuracy, else ''.

    Args:
      before, after: accuracy in float32 and in 8 bits.
      remedies: what is left to try.
    """
    lost = before.top1 - after.top1
    if lost <= _MOST_LOST:
        return ""
    return (
        f"warning: int8 costs {lost:.2f} points of top-1 accuracy ({after.top1:.2f}%, float32 "
        f"{before.top1:.2f}%). Try {' or '.join(remedies)}"
    )


def check_data(dataset: Dataset, weights: Weights) -> None:
    """Checks that a data set has the classes and the size of images of a network.

    Raises:
      ConfigError: if it has others.
    """
    if dataset.image_size != weights.image_size or (
        dataset.class_names != weights.class_names
        if weights.class_names
        else dataset.num_classes != weights.num_classes
    ):
        raise ConfigError(
            f"{dataset.name} has {dataset.num_classes} classes and images of {dataset.image_size} "
            f"px; the weights are of {weights.num_classes} classes and {weights.image_size} px, or "
            "of classes of other names. Give the experiment that they were trained by: --config"
        )


@contextlib.contextmanager
def _needs_onnx() -> Iterator[None]:
    """Turns a failed import of an optional package into the way to get it."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"--to=onnx needs packages that are not installed ({error.name}): pip install "
            "'inception-jax[onnx]', or in a checkout pip install -e '.[onnx]'"
        ) from error


def _folded(function: Any, args: Sequence[Any], kwargs: Any, context: Any) -> Any:
    """Computes a `ConvUnit` as one convolution with a bias, and ReLU; an interceptor of flax.

    In evaluation BatchNorm is a factor and an offset for each channel, which the kernel and a bias
    take. The convolution is flax's own, which converters know.
    """
    unit = context.module
    if not isinstance(unit, ConvUnit) or context.method_name != "__call__":
        return function(*args, **kwargs)
    params = unit.variables["params"]
    kernel = np.asarray(params["conv"]["kernel"])
    if unit.batch_norm:
        norm, running = params["norm"], unit.variables["batch_stats"]["norm"]
        factor = np.asarray(norm["scale"]) / np.sqrt(np.asarray(running["var"]) + unit.epsilon)
        kernel = kernel * factor.astype(np.float32)
        bias = np.asarray(norm["bias"]) - np.asarray(running["mean"]) * factor
    else:
        bias = np.asarray(params["conv"]["bias"])
    half = unit.kernel_size // 2
    conv = nn.Conv(
        unit.features,
        (unit.kernel_size, unit.kernel_size),
        (unit.stride, unit.stride),
        padding=unit.paddings or ((half, half), (half, half)),
        parent=None,
    )
    weights = {"params": {"kernel": kernel, "bias": bias.astype(np.float32)}}
    result: Any = conv.apply(weights, args[0])
    return nn.relu(result)
