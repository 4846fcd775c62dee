"""Quantizes ONNX files to 8 bits and measures the cost in accuracy."""

import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Sequence

import numpy as np

from inception_jax.datasets.splits import Split
from inception_jax.export.onnx import require_onnx
from inception_jax.export.program import INPUT, LogitsFunction
from inception_jax.registry import METRICS

_BATCH_SIZE = 64
# Percentage points of top-1 accuracy that int8 may cost without a warning.
_MAX_ACCURACY_DROP = 1.0


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Accuracy of an exported network on a split.

    Attributes:
      precision: "float32" or "int8".
      megabytes: size of the file.
      top1, top5: percent; top5 is None if there are too few classes for it to be meaningful.
      count: number of images.
      images_per_second: throughput of one pass over them, reading included.
    """

    precision: str
    megabytes: float
    top1: float
    top5: float | None
    count: int
    images_per_second: float


def quantize(data: bytes, calibration: np.ndarray, *, float_ends: bool = False) -> bytes:
    """Returns an ONNX file whose convolutions and products compute in 8 bits.

    Quantization is static: activation ranges come from the calibration images. Weights are int8
    with a scale per output channel, activations uint8. The metadata still describe the float32
    file; see `onnx.with_description`.

    Args:
      data: an ONNX file from `onnx.export`.
      calibration: training images, uint8 [N, S, S, 3]; the more, the better.
      float_ends: whether to keep the first convolution and the classifier in float32: quantizing
        them costs the most accuracy, and they are a small part of the computation.

    Raises:
      UserError: if the required packages are not installed.
    """
    with require_onnx():
        import onnx
        from onnxruntime import quantization
        from onnxruntime.quantization import shape_inference

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            starts = range(0, len(calibration), _BATCH_SIZE)
            self._batches = iter([calibration[start : start + _BATCH_SIZE] for start in starts])

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {INPUT: batch}

    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        plain, prepared, result = (folder / f"{stage}.onnx" for stage in ("a", "b", "c"))
        plain.write_bytes(data)
        # Fuses what the runtime would fuse, which is no longer possible after quantization.
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
    # The quantizer imports every domain it knows, in versions that older runtimes reject.
    used = {node.domain for node in model.graph.node}
    imports = [each for each in model.opset_import if each.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(imports)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _name_ends(path: pathlib.Path) -> list[str]:
    """Names the first convolution and last product in an ONNX file, and returns the names."""
    import onnx

    model = onnx.load(path)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
    ends = [*convolutions[:1], *products[-1:]]
    for number, node in enumerate(ends):
        node.name = f"float_{number}"
    onnx.save(model, path)
    return [node.name for node in ends]


def measure_accuracy(
    precision: str, classify: LogitsFunction, split: Split, *, size: int
) -> Accuracy:
    """Measures an exported network on every image of a split.

    Args:
      precision: "float32" or "int8".
      classify: the network.
      split: the images.
      size: of the network's file, bytes.
    """
    correct = np.zeros(2, np.int64)
    start = time.perf_counter()
    for first in range(0, len(split), _BATCH_SIZE):
        indices = np.arange(first, min(first + _BATCH_SIZE, len(split)))
        logits, labels = classify(split.read(indices)), split.labels[indices]
        # The number of classes ranked above the true one; among equal logits the lower label wins.
        true_logit = logits[np.arange(len(labels)), labels][:, None]
        ahead = np.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > true_logit) | ((logits == true_logit) & ahead) | np.isnan(logits)).sum(1)
        correct += (rank < 1).sum(), (rank < 5).sum()
    seconds = time.perf_counter() - start
    top1, top5 = (100 * correct / len(split)).tolist()
    top5 = top5 if logits.shape[1] >= METRICS.get("top5").min_classes else None
    return Accuracy(precision, size / 1e6, top1, top5, len(split), len(split) / seconds)


def accuracy_warning(before: Accuracy, after: Accuracy, remedies: Sequence[str]) -> str:
    """Returns a warning if int8 costs more than one point of top-1 accuracy, else ''.

    Args:
      before, after: accuracy in float32 and in int8.
      remedies: to suggest.
    """
    lost = before.top1 - after.top1
    if lost <= _MAX_ACCURACY_DROP:
        return ""
    return (
        f"warning: int8 costs {lost:.2f} points of top-1 accuracy ({after.top1:.2f}%, float32 "
        f"{before.top1:.2f}%). Try {' or '.join(remedies)}"
    )
