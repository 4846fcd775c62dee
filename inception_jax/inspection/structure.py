"""What a network is made of, found by tracing it: layers, what flows between them, and their cost.

Nothing here knows a network. Flax names each operation of a traced program by the module that it
was called in; operations are gathered into layers by these names, and the rest follows from the
operations' own shapes. So a description cannot differ from what is computed.
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
from jax.extend.core import Jaxpr, JaxprEqn, Literal

from inception_jax.models import introspect, protocol

# A module's path from the network: ("inception_3a", "conv_3x3").
Path = tuple[str, ...]
Shape = tuple[int, ...]

CONVOLUTION = "convolution"
LINEAR = "linear"
MAX_POOL = "max pool"
AVERAGE_POOL = "average pool"
RESPONSE_NORM = "local response norm"
CONCATENATION = "concatenation"
MEAN = "mean"

# A module with at most one of these is a layer; one with more holds layers.
_OPERATIONS = {
    "conv_general_dilated": CONVOLUTION,
    "dot_general": LINEAR,
    "reduce_window_max": MAX_POOL,
    "reduce_window_sum": AVERAGE_POOL,
    "concatenate": CONCATENATION,
}


class Edge(NamedTuple):
    """What a layer reads.

    Attributes:
      source: index of the layer that made it; None: the image.
      shape: of one example, without the batch.
    """

    source: int | None
    shape: Shape


@dataclasses.dataclass
class Layer:
    """One operation over the image, with what is done to each number after it.

    Attributes:
      name: path in the network, with slashes: "inception_3a/conv_3x3". Operations that are no
        module have the name of their kind: "inception_3a/max_pool".
      kind: one of the constants of this file.
      window: side of the kernel or of the pool's window, pixels; 0: it has none.
      stride: distance between windows, pixels.
      extras: what belongs to it besides: "BatchNorm", "bias", "ReLU", "dropout 40%".
      inputs: what it reads.
      shape: of its result for one example: (H, W, C), or (features,).
      parameters: number of all its parameters.
      weights: number of those that multiply activations.
      multiply_adds: for one image.
      receptive_field: side of the square of the image that one pixel of the result depends on, in
        pixels (Araujo et al. 2019, "Computing Receptive Fields of Convolutional Neural Networks");
        it may be larger than the image. None: not the same everywhere.
      jump: distance in the image between neighbouring pixels of the result, in pixels; None: there
        are no neighbours, or not at equal distances.
    """

    name: str
    kind: str = ""
    window: int = 0
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
        """Path of the module that holds it, with slashes; "" is the network."""
        return self.name.rpartition("/")[0]


@dataclasses.dataclass(frozen=True)
class Block:
    """A row of a table: a module of the network, or an operation between its modules.

    Attributes:
      name: of the module.
      kind: of its only layer, or the name of the module's class in words: "inception".
      layers: what it is made of, in the order of computation.
      shape: of its result.
      receptive_field, jump: of its result, as a layer's.
      is_auxiliary: whether the logits do without it: only training computes it.
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
    """A network at one size of image, as training computes it.

    Attributes:
      image: shape of an image, (H, W, C).
      layers: in the order of computation.
      outputs: the layers that give the logits and then those of auxiliary heads.
      classes: the name of each module's class, by the module's path with slashes.
    """

    image: Shape
    layers: tuple[Layer, ...]
    outputs: tuple[int, ...]
    classes: Mapping[str, str]

    def blocks(self) -> list[Block]:
        """Returns the network's parts in the order of computation."""
        needed = self._needed_for_logits()
        groups: dict[str, list[int]] = {}
        for index, layer in enumerate(self.layers):
            groups.setdefault(layer.name.partition("/")[0], []).append(index)
        return [self._block(name, group, needed) for name, group in groups.items()]

    def _block(self, name: str, group: Sequence[int], needed: set[int]) -> Block:
        layers = tuple(self.layers[index] for index in group)
        whole = layers[0].kind if len(layers) == 1 else split_camel_case(self.classes[name])
        last = layers[-1]
        return Block(
            name=name,
            kind=whole,
            layers=layers,
            shape=last.shape,
            receptive_field=last.receptive_field,
            jump=last.jump,
            is_auxiliary=not needed & set(group),
        )

    def _needed_for_logits(self) -> set[int]:
        """Returns the layers that the logits depend on."""
        needed: set[int] = set()
        waiting: list[int | None] = [self.outputs[0]]
        while waiting:
            index = waiting.pop()
            if index is not None and index not in needed:
                needed.add(index)
                waiting += [edge.source for edge in self.layers[index].inputs]
        return needed


def split_camel_case(name: str) -> str:
    """Returns the name of a class in words: "mini inception" of MiniInception."""
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


def analyze(network: nn.Module, image_size: int) -> Structure:
    """Returns what a network is made of.

    Nothing is computed, so it takes a second or two whatever the size.

    Args:
      network: as `networks.create` returns it.
      image_size: height and width of its images, pixels.

    Raises:
      ConfigError: if the images are too small for the network.
    """
    network = protocol.with_plain_ops(network)
    image = (image_size, image_size, 3)
    images = jax.ShapeDtypeStruct((1, *image), jnp.float32)
    modules: dict[Path, nn.Module] = {}

    def remember(module: nn.Module, path: str, result: Any) -> Any:
        # A user's network is called inside one of the same path.
        modules.setdefault(tuple(path.split("/")) if path else (), module)
        return result

    def initialise(images: jax.Array) -> Any:
        return network.init(jax.random.key(0), images)

    def call(images: jax.Array, variables: Any) -> Any:
        # In training, for only there the auxiliary heads are computed.
        output, _ = network.apply(
            variables,
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return output

    variables = jax.eval_shape(initialise, images)
    with introspect.intercept_outputs(remember):
        program = jax.make_jaxpr(call)(images, variables)
    reader = _LayerCollector(program.jaxpr, modules, variables)
    outputs = reader.read()
    return Structure(
        image=image,
        layers=tuple(reader.layers),
        outputs=tuple(outputs),
        classes={"/".join(path): type(module).__name__ for path, module in modules.items()},
    )


class _TracedArray(NamedTuple):
    """An array of the program that depends on the image.

    Attributes:
      source: index of the layer that made it; None: it is the image.
      receptive_field, jump: as a layer's.
    """

    source: int | None
    receptive_field: int | None
    jump: int | None


class _LayerCollector:
    """Walks through a traced program, gathering its operations into layers.

    Attributes:
      layers: found so far.

    Args:
      program: of a call, whose first argument is the images.
      modules: by path, as they were called.
      variables: shapes of the network's variables.
    """

    def __init__(
        self, program: Jaxpr, modules: Mapping[Path, nn.Module], variables: Mapping[str, Any]
    ) -> None:
        self.layers: list[Layer] = []
        self._program = program
        self._modules = modules
        self._params = traverse_util.flatten_dict(variables["params"])
        self._normalised = set(traverse_util.flatten_dict(variables.get("batch_stats", {})))
        self._operations = collections.Counter(
            path[:depth] for path in self._paths(program) for depth in range(1, len(path) + 1)
        )
        self._of_module: dict[Path, int] = {}

    def read(self) -> list[int]:
        """Fills `layers` and returns the indices of those that give the program's results."""
        inputs: list[_TracedArray | None] = [None] * len(self._program.invars)
        inputs[0] = _TracedArray(None, 1, 1)
        outputs = []
        values = self._walk(self._program, inputs, ())
        for value in values:
            assert value is not None and value.source is not None
            outputs.append(value.source)
        return outputs

    def _paths(self, program: Jaxpr, outer: Path = ()) -> Iterator[Path]:
        """Yields the module of each operation that makes a layer."""
        for equation in program.eqns:
            path = outer or self._path(equation)
            if equation.primitive.name in _OPERATIONS:
                yield path
            elif (inner := introspect.called_jaxpr(equation)) is not None:
                yield from self._paths(inner, path)

    def _path(self, equation: JaxprEqn) -> Path:
        """Returns the path of the module that an operation was called in.

        Scopes are the network's class, then modules; "GoogLeNet._stem" is a method, and not all are
        of modules: what jnp.einsum names its products is none.
        """
        scopes = str(equation.source_info.name_stack).split("/")[1:]
        path: Path = ()
        for scope in scopes:
            if (*path, scope) in self._modules:
                path = (*path, scope)
        return path

    def _layer_of(self, path: Path) -> Path | None:
        """Returns the outermost module around `path` that is one layer; None: there is none."""
        prefixes = (path[:depth] for depth in range(1, len(path) + 1))
        return next((prefix for prefix in prefixes if self._operations[prefix] == 1), None)

    def _walk(
        self, program: Jaxpr, inputs: Sequence[_TracedArray | None], outer: Path
    ) -> list[_TracedArray | None]:
        """Follows the image through a program; None is what does not depend on it."""
        values = dict(zip(program.invars, inputs, strict=True))

        def value(atom: Any) -> _TracedArray | None:
            return None if isinstance(atom, Literal) else values.get(atom)

        for equation in program.eqns:
            found = [value(atom) for atom in equation.invars]
            path = outer or self._path(equation)
            if (inner := introspect.called_jaxpr(equation)) is not None:
                results = self._walk(inner, found, path)
            elif any(found):
                results = [self._operation(equation, found, path)] * len(equation.outvars)
            else:
                results = [None] * len(equation.outvars)
            values.update(zip(equation.outvars, results, strict=True))
        return [value(atom) for atom in program.outvars]

    def _operation(
        self, equation: JaxprEqn, inputs: Sequence[_TracedArray | None], path: Path
    ) -> _TracedArray:
        """Adds an operation to its layer, a new one if need be, and returns its result."""
        sources = [value for value in inputs if value is not None]
        index = self._index(equation, sources, path)
        if index is None:  # The image itself, in another type or shape.
            return _propagate_receptive_field(equation, sources[0])
        layer = self.layers[index]
        for value, atom in zip(inputs, equation.invars, strict=True):
            if value is None or value.source == index:
                continue
            edge = Edge(value.source, _array(atom).shape[1:])
            if edge not in layer.inputs:
                layer.inputs.append(edge)
        _update_layer(layer, equation)
        result = _propagate_receptive_field(
            equation, max(sources, key=lambda value: value.receptive_field or math.inf)
        )
        if equation.primitive.name != "reshape":  # Which is of its readers' making.
            layer.receptive_field, layer.jump = result.receptive_field, result.jump
            shape = _array(equation.outvars[0]).shape
            if len(shape) in (2, 4):  # Statistics of BatchNorm have one axis.
                layer.shape = shape[1:]
        return result._replace(source=index)

    def _index(self, equation: JaxprEqn, sources: Sequence[_TracedArray], path: Path) -> int | None:
        """Returns the layer that an operation belongs to; None: it changes only the image."""
        primitive = equation.primitive.name
        module = self._layer_of(path)
        if module is not None:
            if module not in self._of_module:
                self._of_module[module] = self._add(self._module_layer(module))
            return self._of_module[module]
        kind = _kind(equation)
        latest = max((value.source for value in sources if value.source is not None), default=None)
        if kind == AVERAGE_POOL and latest is not None and primitive == "dot_general":
            # Pooling to a given size is two products, along rows and along columns.
            before = self.layers[latest]
            if before.kind == AVERAGE_POOL and before.module == "/".join(path):
                return latest
        return self._add(Layer(self._free_name(path, kind), kind)) if kind else latest

    def _add(self, layer: Layer) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def _free_name(self, path: Path, kind: str) -> str:
        """Returns a name for an operation that is no module."""
        name = "/".join((*path, kind.replace(" ", "_")))
        taken = {layer.name for layer in self.layers}
        numbered = (f"{name}_{number}" for number in range(2, len(taken) + 3))
        return name if name not in taken else next(n for n in numbered if n not in taken)

    def _module_layer(self, path: Path) -> Layer:
        """Returns the layer of a module: what its operations do not say."""
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
        if any(name[: len(path)] == path for name in self._normalised):
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
    """Returns shape and type of what an operation reads or makes."""
    return atom.aval


def _kind(equation: JaxprEqn) -> str:
    """Returns what an operation outside of any layer's module is; "": it belongs to its input."""
    primitive = equation.primitive.name
    if primitive == "reduce_window_sum" and equation.params["window_dimensions"][-1] > 1:
        return RESPONSE_NORM
    if primitive == "reduce_sum" and _array(equation.invars[0]).ndim == 4:
        return MEAN
    # A product without parameters: pooling to a given size.
    return AVERAGE_POOL if primitive == "dot_general" else _OPERATIONS.get(primitive, "")


def _update_layer(layer: Layer, equation: JaxprEqn) -> None:
    """Adds to a layer what one of its operations says of it."""
    primitive = equation.primitive.name
    if primitive == "max" and "ReLU" not in layer.extras:
        layer.extras.append("ReLU")
    if primitive == "conv_general_dilated":
        kernel = _array(equation.invars[1]).shape
        layer.kind, layer.window = CONVOLUTION, kernel[0]
        layer.stride = equation.params["window_strides"][0]
        layer.multiply_adds += _array(equation.outvars[0]).size * math.prod(kernel[:3])
    elif primitive == "dot_general" and layer.kind != AVERAGE_POOL:
        (contracted, _), _ = equation.params["dimension_numbers"]
        depth = math.prod(_array(equation.invars[0]).shape[axis] for axis in contracted)
        layer.kind = LINEAR
        layer.multiply_adds += _array(equation.outvars[0]).size * depth
    elif layer.kind in (MAX_POOL, AVERAGE_POOL) and primitive.startswith("reduce_window"):
        layer.window = equation.params["window_dimensions"][1]
        layer.stride = equation.params["window_strides"][1]


def _propagate_receptive_field(equation: JaxprEqn, value: _TracedArray) -> _TracedArray:
    """Returns what an operation's result sees of the image, from what its widest input sees."""
    if value.receptive_field is None or value.jump is None:
        return value
    primitive, before = equation.primitive.name, _array(equation.invars[0])
    after = _array(equation.outvars[0])
    if primitive == "dot_general" and before.ndim == after.ndim == 4:
        return value._replace(receptive_field=None, jump=None)  # Windows of several sizes.
    window, stride = 1, 1
    if primitive == "conv_general_dilated":
        window, stride = _array(equation.invars[1]).shape[0], equation.params["window_strides"][0]
    elif primitive in ("reduce_window_max", "reduce_window_sum"):
        window = equation.params["window_dimensions"][1]
        stride = equation.params["window_strides"][1]
    elif before.ndim == 4 and after.ndim == 2:  # A mean over the grid, or all of it in a row.
        seen = value.receptive_field + (before.shape[1] - 1) * value.jump
        return value._replace(receptive_field=seen, jump=None)
    seen = value.receptive_field + (window - 1) * value.jump
    return value._replace(receptive_field=seen, jump=value.jump * stride)
