"""Converts the forward pass of a network to an ONNX graph.

Supports the operations that convolutional networks usually consist of. jax2onnx 0.17.1, which
supports many more, was tried: its orbax-export requires an older Orbax than this package, its
patched operations reject the modules' branches and resizing under a free batch size, and its
general max pool has four axes, which ONNX Runtime does not support.

Images stay channels-first, as ONNX requires, so nothing is transposed between layers. The program
is traced for one image; none of its operations depends on the batch size.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.image
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

from inception_jax.models import introspect

# Old enough for most runtimes; opset 17 belongs to IR version 8.
_OPSET, _IR_VERSION = 17, 8
_UNARY_OPS = {
    "abs": "Abs",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
}
_BINARY_OPS = {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "max": "Max",
    "min": "Min",
    "pow": "Pow",
}
# Operations of BatchNorm on its statistics and parameters.
_CONSTANT_OPS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sqrt": np.sqrt,
}
# Positions of the axes of [B, H, W, C] in [B, C, H, W].
_NCHW_AXES = (0, 2, 3, 1)

# The name of a tensor that depends on the image, or the value of a constant.
Value = str | np.ndarray


def convert(
    network: Callable[[jax.Array], jax.Array],
    *,
    name: str,
    size: int,
    resized: int,
    resize_kernel: str,
    mean: np.ndarray,
    std: np.ndarray,
    names: tuple[str, str],
) -> Any:
    """Returns an ONNX model of a network and its preprocessing.

    Args:
      network: maps normalized images, float32 [1, resized, resized, 3], to float32 [1, classes].
      name: of the graph.
      size: height and width of the input, pixels.
      resized: height and width after resizing, pixels.
      resize_kernel: as in `augment.resize`.
      mean, std: float32 [3], of the normalization (pixel / 255 - mean) / std.
      names: of input and output, uint8 [batch, size, size, 3] and float32 [batch, classes].

    Returns:
      A checked `onnx.ModelProto`.

    Raises:
      ImportError: if the package onnx is not installed.
      NotImplementedError: naming an unsupported operation of the network.
    """
    import onnx
    from onnx import TensorProto, helper

    graph = _Graph()
    x = graph.add("Cast", names[0], to=TensorProto.FLOAT)
    x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
    if resized != size:
        matrix = _resize_matrix(size, resized, resize_kernel)
        x = graph.add("MatMul", graph.add("MatMul", matrix, x), matrix.T)
    # (x / 255 - mean) / std.
    x = graph.add("Mul", x, (1 / (255 * std)).astype(np.float32).reshape(1, 3, 1, 1))
    x = graph.add("Sub", x, (mean / std).astype(np.float32).reshape(1, 3, 1, 1))
    program = jax.make_jaxpr(network)(jax.ShapeDtypeStruct((1, resized, resized, 3), jnp.float32))
    (logits,) = graph.add_program(program.jaxpr, [x], program.consts)
    assert isinstance(logits, str)  # They depend on the image.
    graph.nodes.append(helper.make_node("Identity", [logits], [names[1]]))
    shape = ["batch", program.out_avals[0].shape[1]]
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            name,
            [helper.make_tensor_value_info(names[0], TensorProto.UINT8, ["batch", size, size, 3])],
            [helper.make_tensor_value_info(names[1], TensorProto.FLOAT, shape)],
            [onnx.numpy_helper.from_array(value, key) for key, value in graph.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
    )
    onnx.checker.check_model(model)
    return model


def _resize_matrix(size: int, resized: int, kernel: str) -> np.ndarray:
    """Returns the matrix, float32 [resized, size], by which `augment.resize` resizes one axis."""
    identity = jnp.eye(size, dtype=jnp.float32)
    return np.asarray(jax.image.resize(identity, (resized, size), kernel, antialias=True))


class _Graph:
    """An ONNX graph under construction.

    Attributes:
      nodes: the `onnx.NodeProto`s added so far.
      constants: arrays by name.
    """

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operation: str, *inputs: Value, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        from onnx import helper

        result = f"{operation.lower()}_{len(self.nodes)}"
        given = [self._name(value) for value in inputs]
        self.nodes.append(helper.make_node(operation, given, [result], **attributes))
        return result

    def _name(self, value: Value) -> str:
        if isinstance(value, str):
            return value
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.ascontiguousarray(value)
        return name

    def add_program(
        self, program: Jaxpr, inputs: Sequence[Value], constants: Sequence[Any] = ()
    ) -> list[Value]:
        """Adds the operations of a program and returns its outputs."""
        values: dict[Any, Value] = dict(zip(program.invars, inputs, strict=True))
        values |= zip(program.constvars, map(np.asarray, constants), strict=True)

        def value(atom: Any) -> Value:
            return np.asarray(atom.val) if isinstance(atom, Literal) else values[atom]

        for equation in program.eqns:
            given = [value(atom) for atom in equation.invars]
            if (inner := introspect.called_jaxpr(equation)) is not None:
                results = self.add_program(inner, given, getattr(inner, "consts", ()))
            else:
                results = [self._add_operation(equation, given)]
            values |= zip(equation.outvars, results, strict=True)
        return [value(atom) for atom in program.outvars]

    def _add_operation(self, equation: Any, inputs: Sequence[Value]) -> Value:
        """Adds an operation and returns its output."""
        primitive, params = equation.primitive.name, equation.params
        if not inputs:
            raise _unsupported(primitive)
        x = inputs[0]
        if all(isinstance(given, np.ndarray) for given in inputs):
            return _evaluate_constant(equation, list(map(np.asarray, inputs)))
        if primitive in _UNARY_OPS:
            return self.add(_UNARY_OPS[primitive], x)
        if primitive in _BINARY_OPS:
            return self._binary(primitive, inputs)
        if primitive == "integer_pow":
            return self.add("Pow", x, np.array(params["y"], np.float32))
        if primitive == "erfc":
            return self.add("Sub", np.array(1, np.float32), self.add("Erf", x))
        if primitive == "square":
            return self.add("Mul", x, x)
        image = equation.invars[0].aval
        if primitive == "reshape" and image.ndim == 4 and params["new_sizes"] == (1, image.size):
            # Flattens: 0 keeps the number of images.
            x = self.add("Transpose", x, perm=[0, 2, 3, 1])
            return self.add("Reshape", x, np.array([0, -1], np.int64))
        if primitive == "convert_element_type" and params["new_dtype"] == jnp.float32:
            return x  # Everything is computed in float32.
        if primitive == "copy":
            return x
        if primitive == "concatenate":
            if any(isinstance(each, np.ndarray) for each in inputs):
                raise _unsupported("concatenate of constants")
            axis = params["dimension"]
            return self.add("Concat", *inputs, axis=_NCHW_AXES[axis] if image.ndim == 4 else axis)
        if primitive == "reduce_sum" and image.ndim == 4:
            axes = np.array([_NCHW_AXES[axis] for axis in params["axes"]], np.int64)
            return self.add("ReduceSum", x, axes, keepdims=0)
        if primitive == "dot_general" and params["dimension_numbers"] == (((1,), (0,)), ((), ())):
            return self.add("MatMul", *inputs)
        if primitive == "conv_general_dilated" and set(params["lhs_dilation"]) == {1}:
            return self.add(
                "Conv",
                x,
                np.asarray(inputs[1]).transpose(3, 2, 0, 1),
                strides=list(params["window_strides"]),
                pads=_pads(params["padding"]),
                dilations=list(params["rhs_dilation"]),
                group=params["feature_group_count"],
            )
        if primitive.startswith("reduce_window_") and params["window_dimensions"][3] == 1:
            pool = {
                "kernel_shape": list(params["window_dimensions"][1:3]),
                "strides": list(params["window_strides"][1:3]),
                "pads": _pads(params["padding"][1:3]),
            }
            if primitive == "reduce_window_max":
                return self.add("MaxPool", x, **pool)
            mean = self.add("AveragePool", x, count_include_pad=1, **pool)
            return self.add("Mul", mean, np.array(np.prod(pool["kernel_shape"]), np.float32))
        if primitive == "reduce_window_sum" and params["window_dimensions"][:3] == (1, 1, 1):
            return self._channel_sum(x, equation)
        raise _unsupported(primitive)

    def _binary(self, primitive: str, inputs: Sequence[Value]) -> str:
        """Adds an elementwise operation, with constants made channels-first."""
        if primitive == "max" and isinstance(inputs[1], np.ndarray) and not inputs[1].any():
            return self.add("Relu", inputs[0])
        return self.add(_BINARY_OPS[primitive], *map(_to_channels_first, inputs))

    def _channel_sum(self, x: Value, equation: Any) -> str:
        """Adds sums over neighboring channels: a 1x1 convolution with a matrix of 0s and 1s."""
        channels = equation.invars[0].aval.shape[3]
        window = equation.params["window_dimensions"][3]
        before = equation.params["padding"][3][0]
        distance = np.arange(channels)[None, :] - np.arange(channels)[:, None] + before
        band = ((distance >= 0) & (distance < window)).astype(np.float32)
        return self.add("Conv", x, band[:, :, None, None])


def _unsupported(primitive: str) -> NotImplementedError:
    return NotImplementedError(f"the operation {primitive} cannot be converted to ONNX")


def _to_channels_first(value: Value) -> Value:
    """Returns a constant operand of an elementwise operation in ONNX's layout."""
    if isinstance(value, str):
        return value
    if value.ndim == 4:
        return value.transpose(0, 3, 1, 2)
    return value[0] if value.ndim == 2 else value  # A bias has one axis.


def _evaluate_constant(equation: Any, values: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the output of an operation that does not depend on the image.

    Broadcast axes get size 1, since every operation that reads the output broadcasts.
    """
    primitive, params, value = equation.primitive.name, equation.params, values[0]
    if primitive == "broadcast_in_dim":
        shape = [1] * len(params["shape"])
        for axis, target in enumerate(params["broadcast_dimensions"]):
            shape[target] = value.shape[axis]
        return value.reshape(shape)
    if primitive in ("reshape", "squeeze"):
        return value.reshape(equation.outvars[0].aval.shape)
    if primitive == "convert_element_type":
        return value.astype(params["new_dtype"])
    if primitive in ("copy", "copy_p"):
        return value
    if primitive in _CONSTANT_OPS:
        return np.asarray(_CONSTANT_OPS[primitive](*values), np.float32)
    raise NotImplementedError(f"the operation {primitive} of constants cannot be converted to ONNX")


def _pads(paddings: Sequence[tuple[int, int]]) -> list[int]:
    """Returns paddings in ONNX's order: all begins, then all ends."""
    return [pad[0] for pad in paddings] + [pad[1] for pad in paddings]
