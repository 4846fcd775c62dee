"""ONNX files in 8 bits, and what that costs."""

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
# Points of accuracy that 8 bits may cost without a warning.
_MAX_ACCURACY_DROP = 1.0


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How a precision of a network does on a split.

    Attributes:
      precision: what was measured.
      megabytes: size of its file.
      top1, top5: percent; top5 is None for so few classes that it says nothing.
      count: images of the split.
      images_per_second: of one pass over them, reading included.
    """

    precision: str
    megabytes: float
    top1: float
    top5: float | None
    count: int
    images_per_second: float


def quantize(data: bytes, calibration: np.ndarray, *, float_ends: bool = False) -> bytes:
    """Returns an ONNX file whose convolutions and products compute in 8 bits.

    Static: the ranges of activations are those that they have on the calibration images. Weights
    are int8 with a scale for each output channel, activations uint8. Its metadata are still those
    of the float32 file: see `onnx.with_description`.

    Args:
      data: an ONNX file by `onnx.export`.
      calibration: uint8 [N, S, S, 3], as many as possible from the training.
      float_ends: whether the first convolution and the classifier stay in float32, whose rounding
        costs the most accuracy and which are a small part of the computation.

    Raises:
      UserError: if the packages for it are not installed.
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
        # Fuses what the runtime would fuse, which it cannot any more once it is quantized.
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


def measure_accuracy(
    precision: str, classify: LogitsFunction, split: Split, *, size: int
) -> Accuracy:
    """Measures a precision of a network on every image of a split.

    Args:
      precision: its name.
      classify: its logits of pixels.
      split: the images.
      size: of its file, bytes.
    """
    correct = np.zeros(2, np.int64)
    start = time.perf_counter()
    for first in range(0, len(split), _BATCH_SIZE):
        indices = np.arange(first, min(first + _BATCH_SIZE, len(split)))
        logits, labels = classify(split.read(indices)), split.labels[indices]
        # How many classes are rated higher than the correct one; of equal ones the lower is first.
        true_logit = logits[np.arange(len(labels)), labels][:, None]
        ahead = np.arange(logits.shape[1]) < labels[:, None]
        rank = ((logits > true_logit) | ((logits == true_logit) & ahead)).sum(1)
        correct += (rank < 1).sum(), (rank < 5).sum()
    seconds = time.perf_counter() - start
    top1, top5 = (100 * correct / len(split)).tolist()
    top5 = top5 if logits.shape[1] >= METRICS.get("top5").min_classes else None
    return Accuracy(precision, size / 1e6, top1, top5, len(split), len(split) / seconds)


def accuracy_warning(before: Accuracy, after: Accuracy, remedies: Sequence[str]) -> str:
    """Returns a warning if 8 bits cost more than a point of top-1 accuracy, else ''.

    Args:
      before, after: accuracy in float32 and in 8 bits.
      remedies: what is left to try.
    """
    lost = before.top1 - after.top1
    if lost <= _MAX_ACCURACY_DROP:
        return ""
    return (
        f"warning: int8 costs {lost:.2f} points of top-1 accuracy ({after.top1:.2f}%, float32 "
        f"{before.top1:.2f}%). Try {' or '.join(remedies)}"
    )
