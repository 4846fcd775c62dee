"""Analyzes a network by tracing it: its layers, their inputs and their cost.

No network is special-cased. Flax labels each operation of a traced program with the module that
called it; operations are grouped into layers by these labels, and the rest follows from their
shapes. So the analysis cannot differ from what is computed.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.extend.core import Jaxpr, JaxprEqn, Literal, jaxprs_in_params

from inception_jax.errors import ConfigError
from inception_jax.models import introspect, protocol

# A module's path in the network: ("inception_3a", "conv_3x3").
Path = tuple[str, ...]
Shape = tuple[int, ...]
# Along the rows and along the columns of the image.
Pair = tuple[int, int]

CONVOLUTION = "convolution"
LINEAR = "linear"
MAX_POOL = "max pool"
AVERAGE_POOL = "average pool"
RESPONSE_NORM = "local response norm"
CONCATENATION = "concatenation"
MEAN = "mean"

# A module with at most one of these is a layer; one with more contains layers.
_OPERATIONS = {
    "conv_general_dilated": CONVOLUTION,
    "dot_general": LINEAR,
    "reduce_window_max": MAX_POOL,
    "reduce_window_sum": AVERAGE_POOL,
    "concatenate": CONCATENATION,
}
# Over the whole feature map.
_REDUCTIONS = {"reduce_sum": MEAN, "reduce_max": MAX_POOL}


class Edge(NamedTuple):
    """An input of a layer.

    Attributes:
      source: index of the layer that computes it; None: the image.
      shape: for one image, without the batch axis.
    """

    source: int | None
    shape: Shape


@dataclasses.dataclass
class Layer:
    """One operation over the image, with the elementwise operations that follow it.

    Attributes:
      name: slash-separated path in the network: "inception_3a/conv_3x3". Operations without a
        module are named after their kind: "inception_3a/max_pool".
      kind: one of the constants of this file.
      window: height and width of the kernel or pooling window, pixels; (0, 0): none, or the whole
        feature map.
      stride: distance between windows, pixels; the larger one if rows and columns differ.
      extras: further parts: "BatchNorm", "bias", "ReLU", "dropout 40%".
      inputs: of the layer.
      shape: of its output for one image: (H, W, C), or (features,).
      parameters: number of all its parameters.
      weights: number of its parameters that multiply activations.
      multiply_adds: for one image.
      receptive_field: longer side of the image rectangle that one output pixel depends on, pixels
        (Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks"); it may
        exceed the image. None: not uniform.
      jump: distance in the image between neighboring output pixels, pixels; the larger one if rows
        and columns differ. None: there are no neighbors, or their distances differ.
    """

    name: str
    kind: str = ""
    window: Pair = (0, 0)
    stride: int = 1
    extras: list[str] = dataclasses.field(default_factory=list)
    inputs: list[Edge] = dataclasses.field(default_factory=list)
    shape: Shape = ()
    parameters: int = 0
    weights: int = 0
    multiply_adds: int = 0
    receptive_field: int | None = 1
    jump: int | None = 1

    @property
    def module(self) -> str:
        """Slash-separated path of the module that contains it; "" for the network."""
        return self.name.rpartition("/")[0]


@dataclasses.dataclass(frozen=True)
class Block:
    """A row of the table: a module of the network, or an operation between modules.

    Attributes:
      name: of the module.
      kind: of its only layer, or the words of the module's class name: "inception".
      layers: its layers, in order of computation.
      shape: of its output.
      receptive_field, jump: of its output, as for a layer.
      is_auxiliary: whether the logits do not depend on it, so that only training computes it.
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    shape: Shape
    receptive_field: int | None
    jump: int | None
    is_auxiliary: bool

    @property
    def parameters(self) -> int:
        """Number of all its parameters."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def weights(self) -> int:
        """Number of its parameters that multiply activations."""
        return sum(layer.weights for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        """For one image."""
        return sum(layer.multiply_adds for layer in self.layers)


@dataclasses.dataclass(frozen=True)
class Structure:
    """A network at one image size, as training computes it.

    Attributes:
      image: shape of an image, (H, W, C).
      layers: in order of computation.
      outputs: indices of the layers that compute the logits, then those of auxiliary heads.
      module_classes: the name of each module's class, by slash-separated path.
      other_parameters: number of parameters of no layer, such as those of a BatchNorm on its own.
    """

    image: Shape
    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]
    module_classes: Mapping[str, str]
    other_parameters: int

    def blocks(self) -> list[Block]:
        """Returns the network's blocks in order of computation."""
        needed = self._needed_for_logits()
        groups: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            groups.setdefault(layer.name.partition("/")[0], []).append(index)
        return [self._block(name, group, needed) for name, group in groups.items()]

    def _block(self, name: str, group: Sequence[int], needed: set[int]) -> Block:
        layers = tuple(self.layers[index] for index in group)
        only = layers[0].kind if len(layers) == 1 else ""
        last = layers[-1]
        return Block(
            name=name,
            kind=only or split_camel_case(self.module_classes[name]),
            layers=layers,
            shape=last.shape,
            receptive_field=last.receptive_field,
            jump=last.jump,
            is_auxiliary=not needed & set(group),
        )

    def _needed_for_logits(self) -> set[int]:
        """Returns the indices of the layers that the logits depend on."""
        needed: set[int] = set()
        pending: list[int | None] = [self.outputs[0]]
        while pending:
            index = pending.pop()
            if index is not None and index not in needed:
                needed.add(index)
                pending += [edge.source for edge in self.layers[index].inputs]
        return needed


def split_camel_case(name: str) -> str:
    """Returns a class name as words.

    >>> split_camel_case("MiniInception")
    'mini inception'
    """
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


def analyze(network: nn.Module, image_size: int) -> Structure:
    """Returns the structure of a network.

    Only traces it, so it takes a second or two at any size.

    Args:
      network: as `networks.create` returns it.
      image_size: height and width of its images, pixels.

    Raises:
      ConfigError: if the images are too small for the network, or its operations are not supported.
    """
    network = protocol.with_plain_ops(network)
    image = (image_size, image_size, 3)
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    modules: dict[Path, nn.Module] = {}

    def record(module: nn.Module, path: str, result: Any) -> Any:
        # A custom network is called inside an adapter with the same path.
        modules.setdefault(tuple(path.split("/")) if path else (), module)
        return result

    def initialize(images: jax.Array) -> Any:
        return network.init(jax.random.key(0), images)

    def call(images: jax.Array, variables: Any) -> Any:
        # In training mode, since only that computes the auxiliary heads.
        output, _ = network.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return output

    variables = jax.eval_shape(initialize, images)
    with introspect.intercept_outputs(record):
        program = jax.make_jaxpr(call)(images, variables)
    collector = _LayerCollector(program.jaxpr, modules, variables)
    outputs = collector.collect()
    return Structure(
        image=image,
        layers=tuple(collector.layers),
        outputs=tuple(outputs),
        module_classes={"/".join(path): type(module).__name__ for path, module in modules.items()},
        other_parameters=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
        - sum(layer.parameters for layer in collector.layers),
    )


class _TracedArray(NamedTuple):
    """An array of the program that depends on the image.

    Attributes:
      source: index of the layer that computes it; None: it is the image.
      receptive_field, jump: as for a layer, along rows and columns.
    """

    source: int | None
    receptive_field: Pair | None
    jump: Pair | None


class _LayerCollector:
    """Walks through a traced program, grouping its operations into layers.

    Attributes:
      layers: collected so far.

    Args:
      program: of a call whose first argument is the images.
      modules: by path, in the order they finish.
      variables: shapes of the network's variables.
    """

    def __init__(
        self, program: Jaxpr, modules: Mapping[Path, nn.Module], variables: Mapping[str, Any]
    ) -> None:
        self.layers: list[Layer] = []
        self._program = program
        self._modules = modules
        self._params = traverse_util.flatten_dict(variables["params"])
        self._normalized = set(traverse_util.flatten_dict(variables.get("batch_stats", {})))
        self._operations = collections.Counter(
            path[:depth] for path in self._paths(program) for depth in range(1, len(path) + 1)
        )
        self._of_module: dict[Path, int] = {}

    def collect(self) -> list[int]:
        """Fills `layers` and returns the indices of those that compute the program's outputs.

        Raises:
          ConfigError: if the program has operations that are not supported.
        """
        inputs: list[_TracedArray | None] = [None] * len(self._program.invars)
        inputs[0] = _TracedArray(None, (1, 1), (1, 1))
        outputs = []
        values = self._walk(self._program, inputs, ())
        for value in values:
            if value is None or value.source is None:
                raise ConfigError(
                    "the network's layers cannot be listed: no convolution, pooling or product "
                    "computes its output"
                )
            outputs.append(value.source)
        return outputs

    def _paths(self, program: Jaxpr, outer: Path = ()) -> Iterator[Path]:
        """Yields the module of each operation that defines a layer."""
        for equation in program.eqns:
            path = outer or self._path(equation)
            if equation.primitive.name in _OPERATIONS:
                yield path
            elif (inner := introspect.called_jaxpr(equation)) is not None:
                yield from self._paths(inner, path)

    def _path(self, equation: JaxprEqn) -> Path:
        """Returns the path of the module that called an operation.

        Scopes are the network's class, then modules; but "GoogLeNet._stem" is a method, and some
        scopes belong to no module, such as those of jnp.einsum's products.
        """
        scopes = str(equation.source_info.name_stack).split("/")[1:]
        path: Path = ()
        for scope in scopes:
            if (*path, scope) in self._modules:
                path = (*path, scope)
        return path

    def _layer_of(self, path: Path) -> Path | None:
        """Returns the outermost module around `path` that is a single layer, or None."""
        prefixes = (path[:depth] for depth in range(1, len(path) + 1))
        return next((prefix for prefix in prefixes if self._operations[prefix] == 1), None)

    def _walk(
        self, program: Jaxpr, inputs: Sequence[_TracedArray | None], outer: Path
    ) -> list[_TracedArray | None]:
        """Follows the image through a program; values that do not depend on it are None."""
        values = dict(zip(program.invars, inputs, strict=True))

        def value(atom: Any) -> _TracedArray | None:
            return None if isinstance(atom, Literal) else values.get(atom)

        for equation in program.eqns:
            given = [value(atom) for atom in equation.invars]
            path = outer or self._path(equation)
            if (inner := introspect.called_jaxpr(equation)) is not None:
                results = self._walk(inner, given, path)
            elif any(given):
                for inner in jaxprs_in_params(equation.params):
                    if next(self._paths(inner), None) is not None:
                        raise ConfigError(
                            "the network's layers cannot be listed: some are inside the operation "
                            f"{equation.primitive.name}"
                        )
                results = [self._operation(equation, given, path)] * len(equation.outvars)
            else:
                results = [None] * len(equation.outvars)
            values.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in program.outvars]

    def _operation(
        self, equation: JaxprEqn, inputs: Sequence[_TracedArray | None], path: Path
    ) -> _TracedArray:
        """Adds an operation to its layer, which may be new, and returns its output."""
        index = self._index(equation, inputs, path)
        result = _propagate_receptive_field(equation, inputs)
        if index is None:  # The image itself, in another dtype or shape.
            return result
        layer = self.layers[index]
        for value, atom in zip(inputs, equation.invars, strict=True):
            if value is None or value.source == index:
                continue
            edge = Edge(value.source, _array(atom).shape[1:])
            if edge not in layer.inputs:
                layer.inputs.append(edge)
        _update_layer(layer, equation)
        if equation.primitive.name != "reshape":  # A reshape belongs to the layers that read it.
            layer.receptive_field = max(result.receptive_field) if result.receptive_field else None
            layer.jump = max(result.jump) if result.jump else None
            shape = _array(equation.outvars[0]).shape
            if len(shape) in (2, 4):  # Statistics of BatchNorm have one axis.
                layer.shape = shape[1:]
        return result._replace(source=index)

    def _index(
        self, equation: JaxprEqn, inputs: Sequence[_TracedArray | None], path: Path
    ) -> int | None:
        """Returns the index of an operation's layer, or None if it only changes the image."""
        primitive = equation.primitive.name
        module = self._layer_of(path)
        if module is not None:
            if module not in self._of_module:
                self._of_module[module] = self._add(self._module_layer(module))
            return self._of_module[module]
        kind = _kind(equation, inputs)
        sources = [value.source for value in inputs if value and value.source is not None]
        latest = max(sources, default=None)
        if kind == AVERAGE_POOL and latest is not None and primitive == "dot_general":
            # Adaptive pooling is two products, along rows and along columns.
            before = self.layers[latest]
            if before.kind == AVERAGE_POOL and before.module == "/".join(path):
                return latest
        return self._add(Layer(self._free_name(path, kind), kind)) if kind else latest

    def _add(self, layer: Layer) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def _free_name(self, path: Path, kind: str) -> str:
        """Returns an unused name for an operation without a module."""
        name = "/".join((*path, kind.replace(" ", "_")))
        taken = {layer.name for layer in self.layers}
        numbered = (f"{name}_{number}" for number in range(2, len(taken) + 3))
        return name if name not in taken else next(n for n in numbered if n not in taken)

    def _module_layer(self, path: Path) -> Layer:
        """Returns the layer of a module, with the fields that its operations do not determine."""
        sizes = {
            name: math.prod(leaf.shape)
            for name, leaf in self._params.items()
            if name[: len(path)] == path
        }
        weights = [name for name in sizes if name[-1] == "kernel"]
        extras = [
            f"dropout {module.rate:.0%}"
            for inner, module in self._modules.items()
            if inner[: len(path)] == path and isinstance(module, nn.Dropout) and module.rate
        ]
        if any(name[: len(path)] == path for name in self._normalized):
            extras.append("BatchNorm")
        if any((*name[:-1], "bias") in sizes for name in weights):
            extras.append("bias")
        return Layer(
            "/".join(path),
            extras=extras,
            parameters=sum(sizes.values()),
            weights=sum(sizes[name] for name in weights),
        )


def _array(atom: Any) -> jax.core.ShapedArray:
    """Returns shape and dtype of an operation's input or output."""
    return atom.aval


def _kind(equation: JaxprEqn, inputs: Sequence[_TracedArray | None]) -> str:
    """Returns the kind of an operation outside any layer's module; "": it belongs to its input."""
    primitive = equation.primitive.name
    if primitive == "reduce_window_sum" and equation.params["window_dimensions"][-1] > 1:
        return RESPONSE_NORM
    if primitive in _REDUCTIONS and _array(equation.invars[0]).ndim == 4:
        return _REDUCTIONS[primitive] if set(equation.params["axes"]) <= {1, 2} else ""
    if primitive == "dot_general" and not _is_over_channels(equation, inputs):
        return AVERAGE_POOL  # Adaptive: a product with a matrix that averages rows or columns.
    return _OPERATIONS.get(primitive, "")


def _is_over_channels(equation: JaxprEqn, inputs: Sequence[_TracedArray | None]) -> bool:
    """Returns whether a product's sum is over the last axis of what depends on the image."""
    factor = 0 if inputs[0] is not None else 1
    contracted, _ = equation.params["dimension_numbers"]
    return tuple(contracted[factor]) == (_array(equation.invars[factor]).ndim - 1,)


def _windows(equation: JaxprEqn) -> tuple[Pair, Pair, Pair] | None:
    """Returns an operation's window, strides and dilation; None if it has no windows of an image.

    Each is along the rows and along the columns.
    """
    primitive, params = equation.primitive.name, equation.params
    if primitive == "conv_general_dilated" and _array(equation.invars[1]).ndim == 4:
        kernel = _array(equation.invars[1]).shape
        return (kernel[0], kernel[1]), params["window_strides"], params["rhs_dilation"]
    if primitive.startswith("reduce_window") and _array(equation.invars[0]).ndim == 4:
        names = ("window_dimensions", "window_strides", "window_dilation")
        window, strides, dilation = (params[name][1:3] for name in names)
        return window, strides, dilation
    return None


def _update_layer(layer: Layer, equation: JaxprEqn) -> None:
    """Updates a layer with one of its operations."""
    primitive = equation.primitive.name
    if primitive == "max" and "ReLU" not in layer.extras:
        layer.extras.append("ReLU")
    if primitive == "conv_general_dilated":
        kernel = _array(equation.invars[1]).shape
        layer.kind = CONVOLUTION
        layer.multiply_adds += _array(equation.outvars[0]).size * math.prod(kernel[:-1])
    elif primitive == "dot_general" and layer.kind != AVERAGE_POOL:
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(_array(equation.invars[0]).shape[axis] for axis in contracted)
        layer.kind = LINEAR
        layer.multiply_adds += _array(equation.outvars[0]).size * depth
    if layer.kind in (CONVOLUTION, MAX_POOL, AVERAGE_POOL) and (found := _windows(equation)):
        layer.window, strides, _ = found
        layer.stride = max(strides)


def _propagate_receptive_field(
    equation: JaxprEqn, inputs: Sequence[_TracedArray | None]
) -> _TracedArray:
    """Returns an operation's output, whose receptive field contains those of all inputs."""
    sources = [value for value in inputs if value is not None]
    value = sources[0]._replace(
        receptive_field=_largest([each.receptive_field for each in sources]),
        jump=_largest([each.jump for each in sources]),
    )
    if value.receptive_field is None or value.jump is None:
        return value
    before, after = _array(equation.invars[0]), _array(equation.outvars[0])
    if found := _windows(equation):
        window, strides, dilation = found
    elif before.ndim == 4 and after.ndim == 2:  # A mean over the feature map, or flattening.
        window, strides, dilation = before.shape[1:3], (1, 1), (1, 1)
    elif equation.primitive.name == "dot_general" and not _is_over_channels(equation, inputs):
        return value._replace(receptive_field=None, jump=None)  # Windows of several sizes.
    else:
        return value
    (height, width), (rows, columns) = value.receptive_field, value.jump
    field = (
        height + (window[0] - 1) * dilation[0] * rows,
        width + (window[1] - 1) * dilation[1] * columns,
    )
    if after.ndim == 2:  # There are no neighbors.
        return value._replace(receptive_field=field, jump=None)
    return value._replace(receptive_field=field, jump=(rows * strides[0], columns * strides[1]))


def _largest(pairs: Sequence[Pair | None]) -> Pair | None:
    """Returns the largest value along each axis; None if one of the pairs is unknown."""
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return None
    return max(height for height, _ in known), max(width for _, width in known)
