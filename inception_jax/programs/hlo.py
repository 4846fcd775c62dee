"""Reads the text of compiled programs: `jax.stages.Compiled.as_text()`, which is XLA's HLO.

Only what the audit needs: types with their layouts, operations, operands and some attributes. The
text of a TPU and of a GPU program have the same grammar. XLA documents it only in its source
(xla/hlo/parser/hlo_parser.cc), and its shapes and layouts in openxla.org/xla/shapes and
openxla.org/xla/tiled_layout.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# Bits of an element of each type that our programs use.
_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
    "s32": 32,
    "u32": 32,
    "f32": 32,
    "s64": 64,
    "u64": 64,
    "f64": 64,
}
# The memory of the device itself; others are on the chip, or the host's.
DEVICE_MEMORY, HOST_MEMORY = 0, 5

_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_TYPE = r"\w+\[[^\]]*\](?:\{[^}]*\})?|\((?:[^()]|\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\))*\)"
_INSTRUCTION = re.compile(rf"\s+(ROOT )?%?([\w.-]+) = ({_TYPE}) ([a-z][\w-]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLS = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)"
)
_CALL_LISTS = re.compile(r"(?:called_computations|branch_computations)=\{([^}]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_LHS_DILATE = re.compile(r"lhs_dilate=([\dx]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_WINDOW = re.compile(r"window=\{size=([\dx]+)")
_DIM_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ALIASES = re.compile(r"\{[\d, ]*\}: \((\d+), ")


@dataclasses.dataclass(frozen=True)
class Array:
    """The type of one array.

    Attributes:
      dtype: such as "bf16".
      shape: its dimensions.
      layout: the order of its dimensions in memory, with tiles and memory space.
      is_dynamic: whether a dimension is only known when the program runs.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str
    is_dynamic: bool

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def memory(self) -> int:
        """The memory space: `DEVICE_MEMORY`, `HOST_MEMORY` or another."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else DEVICE_MEMORY

    @property
    def order(self) -> str:
        """How it lies in its memory: the layout without the memory space."""
        return re.sub(r"S\(\d+\)", "", self.layout).removesuffix(":")

    @property
    def bytes(self) -> int:
        """The bytes of its elements."""
        return self.size * _BITS.get(self.dtype, 0) // 8

    @property
    def padded_bytes(self) -> int:
        """The bytes that it occupies: a TPU pads the last dimensions in memory to whole tiles."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not self.shape:
            return self.bytes
        sides = [int(side) for side in tile[1].split(",")]
        # The layout names the dimension that varies fastest first, the shape last.
        sizes = [self.shape[int(dimension)] for dimension in order.split(",")][::-1]
        sizes = [1] * (len(sides) - len(sizes)) + sizes
        for index, side in enumerate(sides, start=len(sizes) - len(sides)):
            sizes[index] = -(-sizes[index] // side) * side
        return math.prod(sizes) * _BITS.get(self.dtype, 0) // 8


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """One operation of a computation.

    Attributes:
      name: unique in its computation.
      opcode: such as "fusion".
      arrays: the arrays that it returns.
      operands: the names of its operands.
      calls: the names of the computations that it calls.
      attributes: the rest of its line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    calls: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def op_name(self) -> str:
        """The operation of the traced program that it comes from, with the flax path, or ''."""
        found = _OP_NAME.search(self.attributes)
        return found[1].replace("\\'", "'") if found else ""

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate of its duration; None: there is none."""
        found = _CYCLES.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def trips(self) -> int:
        """How often a loop runs, if it is one and the compiler knows, or 1."""
        found = _TRIPS.search(self.attributes)
        return int(found[1]) if found else 1

    @property
    def custom_call_target(self) -> str:
        """The function of a custom call, or ''."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    @property
    def window(self) -> tuple[int, ...]:
        """The window of a convolution or pooling, () if it has none."""
        found = _WINDOW.search(self.attributes)
        return tuple(int(side) for side in found[1].split("x")) if found else ()

    @property
    def lhs_dilation(self) -> tuple[int, ...]:
        """The distances of a convolution's inputs, () if they are adjacent."""
        found = _LHS_DILATE.search(self.attributes)
        return tuple(int(each) for each in found[1].split("x")) if found else ()

    @property
    def dim_labels(self) -> tuple[str, str, str] | None:
        """The labels of a convolution's dimensions: those of both operands and of the result."""
        found = _DIM_LABELS.search(self.attributes)
        return (found[1], found[2], found[3]) if found else None

    @property
    def contracting_dimensions(self) -> tuple[int, ...]:
        """The dimensions of the first operand that a product sums over."""
        found = _CONTRACTING.search(self.attributes)
        return tuple(int(each) for each in found[1].split(",") if each) if found else ()


@dataclasses.dataclass(frozen=True, eq=False)
class Computation:
    """A function of a program, as instructions by name in the order of execution."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Its arguments, in order."""
        found = [each for each in self.instructions.values() if each.opcode == "parameter"]
        return sorted(found, key=lambda each: int(each.attributes.partition(")")[0]))

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read the result of each one, in the order of execution."""
        found: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for each in self.instructions.values():
            for name in dict.fromkeys(each.operands):
                found.setdefault(name, []).append(each)
        return found

    def operands(self, instruction: Instruction) -> list[Array]:
        """Returns the arrays that an instruction of this computation reads."""
        read = (self.instructions.get(name) for name in instruction.operands)
        return [array for each in read if each for array in each.arrays]


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A compiled program.

    Attributes:
      computations: its functions by name.
      entry: the one that the program starts with.
      aliased: numbers of the parameters whose memory a result reuses.
    """

    computations: dict[str, Computation]
    entry: Computation
    aliased: frozenset[int]

    @property
    def parameters(self) -> list[Instruction]:
        """The arguments of the program, in order."""
        return self.entry.parameters

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Yields the instructions of the computations that one calls, and of those they call."""
        for name in instruction.calls:
            computation = self.computations[name]
            for each in computation.instructions.values():
                yield computation, each
                yield from self.inside(each)


def parse(text: str) -> Module:
    """Reads the text of a compiled program."""
    header, _, rest = text.partition("\n")
    aliases = header.partition("input_output_alias={")[2].partition(" }")[0]
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in rest.splitlines():
        if line.startswith((" ", "\t")):
            if current is not None and (found := _INSTRUCTION.match(line)):
                instruction = _instruction(found)
                current.instructions[instruction.name] = instruction
        elif found := _COMPUTATION.match(line):
            current = Computation(found[2], {})
            computations[current.name] = current
            entry = current if found[1] else entry
        else:
            current = None
    if entry is None:
        raise ValueError("the text of a compiled program must have an ENTRY computation")
    return Module(computations, entry, frozenset(map(int, _ALIASES.findall(aliases))))


def _instruction(line: re.Match[str]) -> Instruction:
    name, types, opcode, rest = line[2], line[3], line[4], line[5]
    operands = rest.partition(")")[0]
    calls = _CALLS.findall(rest)
    for names in _CALL_LISTS.findall(rest):
        calls += re.findall(r"[\w.-]+", names)
    return Instruction(
        name, opcode, _arrays(types), tuple(_OPERAND.findall(operands)), tuple(calls), rest
    )


@functools.lru_cache(maxsize=4096)
def _arrays(types: str) -> tuple[Array, ...]:
    return tuple(
        Array(
            dtype,
            tuple(int(side.strip(" <=")) for side in shape.split(",") if side),
            layout,
            is_dynamic="<=" in shape,
        )
        for dtype, shape, layout in _ARRAY.findall(types)
    )
