"""Reads and writes ONNX files, for ONNX Runtime and others."""

import contextlib
import json
from collections.abc import Iterator

from inception_jax.errors import UserError
from inception_jax.export import onnx_graph
from inception_jax.export.program import (
    INPUT,
    OUTPUT,
    LogitsFunction,
    export_metadata,
    images_to_logits,
)
from inception_jax.models.weights import Weights

# The metadata key of a file's description.
METADATA_KEY = "inception_jax"


def export(weights: Weights) -> bytes:
    """Returns a network as an ONNX file, described by `export_metadata` under `METADATA_KEY`.

    Raises:
      UserError: if the required packages are not installed, or the network has an operation that
        cannot be converted.
    """
    with require_onnx():
        import onnx
    try:
        model = onnx_graph.convert(
            images_to_logits(weights),
            name=weights.model.name,
            size=weights.image_size,
            resized=weights.eval_image_size or weights.image_size,
            resize_kernel=weights.resize_kernel,
            mean=weights.mean,
            std=weights.std,
            names=(INPUT, OUTPUT),
        )
    except NotImplementedError as error:
        raise UserError(
            f"{weights.model.name}: {error}; StableHLO (--to=stablehlo) has no such limit"
        ) from error
    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(export_metadata(weights))})
    return model.SerializeToString()


def load(data: bytes) -> LogitsFunction:
    """Returns an ONNX file as a function of NumPy arrays that ONNX Runtime runs on the CPU.

    Raises:
      UserError: if ONNX Runtime is not installed.
    """
    with require_onnx():
        import onnxruntime
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda pixels: session.run([OUTPUT], {INPUT: pixels})[0]


def with_description(data: bytes, weights: Weights, *, precision: str) -> bytes:
    """Returns an ONNX file with a new description in its metadata.

    Args:
      data: the file.
      weights, precision: see `export_metadata`.
    """
    import onnx

    model = onnx.load_from_string(data)
    props = {METADATA_KEY: json.dumps(export_metadata(weights, precision=precision))}
    onnx.helper.set_model_props(model, props)
    return model.SerializeToString()


@contextlib.contextmanager
def require_onnx() -> Iterator[None]:
    """Turns a failed import of an optional package into a UserError that says how to install it."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"--to=onnx: requires packages that are not installed ({error.name}); run pip install "
            "'inception-jax[onnx]', or in a checkout pip install -e '.[onnx]'"
        ) from error
