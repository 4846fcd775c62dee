"""Counts what a compiled program does: operations, memory traffic, collectives, and where.

Everything is per device. If a fused operation does several things, its products, convolutions, or
windows decide its kind, or else the name that the compiler gives it.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from inception_jax.programs import hlo
from inception_jax.programs.hlo import Array, Computation, Instruction, Module

# Operations that compute and move nothing.
_FREE = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_LOOPS = {"call", "conditional", "while"}
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_HOST = {"infeed", "outfeed", "recv", "send"}
_HOST_CALLS = re.compile(r"callback|MoveToHost|MoveToDevice|host_compute", re.IGNORECASE)
_COPIES = {"copy", "copy-start", "transpose"}
_SLICES = {"slice", "dynamic-slice"}
# Copies of a part of an array, as the compiler starts them: by these names, or as a computation.
_SLICE_STARTS = {"slice-start", "dynamic-slice-start"}
_IN_SLICES = {*_SLICES, "bitcast", "constant", "copy", "parameter"}
# A custom call that computes nothing: it names slices that were copied side by side.
_CONCAT_BITCAST = "ConcatBitcast"
# Operations that hand on what they are given.
_HAND_ON = {"bitcast", "get-tuple-element", "opt-barrier"}

# Names of kinds and modules, in records on disk, too.
MOVES, OPTIMIZER, NO_MODULE = "moves between memories", "optimizer and averages", "(none)"
_LAYOUT = "copies and layout"
# The parts of a step outside the network, by the scope that it names.
_SCOPES = {
    "augment": "augmentation",
    "average": OPTIMIZER,
    "loss": "loss",
    "metrics": "metrics",
    "optimizer": OPTIMIZER,
}
_CUDNN_FILTER, _CUDNN_INPUT = "__cudnn$convBackwardFilter", "__cudnn$convBackwardInput"
# A top-level module in the name of an argument: state.params['conv1']['conv']['kernel'].
_MODULE = re.compile(r"\bparams(?:'\])?\['([^']+)'\]")
# Wrappers that JAX puts around a name.
_WRAPPER = re.compile(r"(?:transpose|jvp|vmap|remat|checkpoint)\((.*)\)")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation that the device starts.

    Attributes:
      name: in the text of the program.
      opcode: such as "fusion".
      kind: what it does, such as "convolution, to the kernel".
      module: the part of the network, or of the step, that it belongs to.
      times: how often it runs.
      flops: operations of its products and convolutions, two for each multiply-add.
      bytes: moved to and from the device's memory, with padding.
      cycles: the compiler's estimate; None: there is none.
      accessed: bytes that it reads and writes in any memory, with padding.
      padding: how many of `accessed` only fill tiles.
      awaited: of a copy that goes on beside other operations, the index of the operation that waits
        for its end (the number of operations: the program's end); None: nothing goes on beside it.
    """

    name: str
    opcode: str
    kind: str
    module: str
    times: int
    flops: float
    bytes: int
    cycles: int | None
    accessed: int = 0
    padding: int = 0
    awaited: int | None = None


@dataclasses.dataclass(frozen=True)
class Audit:
    """What a program does.

    Attributes:
      operations: everything that it starts, in order.
      collectives: how often each kind of operation between devices runs, and its bytes in all.
      convolutions: number of convolutions, also of those written as products, by the type of their
        operands, such as "bf16".
      arguments: type and shape of each argument by its name, such as "batch['image']".
      state_bytes: bytes of the arguments below `state`.
      donated_bytes: bytes of arguments whose memory is reused for results.
      host_transfers: names of operations that wait for the host or move data to or from it.
      dynamic_shapes: names of operations with a dimension that is known only when they run.
    """

    operations: tuple[Operation, ...]
    collectives: dict[str, tuple[int, int]]
    convolutions: dict[str, int]
    arguments: dict[str, str]
    state_bytes: int
    donated_bytes: int
    host_transfers: tuple[str, ...]
    dynamic_shapes: tuple[str, ...]

    @property
    def flops(self) -> float:
        """Operations of all products and convolutions."""
        return sum(each.times * each.flops for each in self.operations)

    @property
    def bytes(self) -> int:
        """Bytes moved to and from the device's memory."""
        return sum(each.times * each.bytes for each in self.operations)

    @property
    def cycles(self) -> int | None:
        """The sum of the compiler's estimates; None: it makes none."""
        known = [each.times * each.cycles for each in self.operations if each.cycles is not None]
        return sum(known) if known else None

    @property
    def counts(self) -> dict[str, int]:
        """How many operations of each opcode are in the program, most first."""
        return dict(Counter(each.opcode for each in self.operations).most_common())


def audit(text: str) -> Audit:
    """Reads the text of a compiled program and counts what it does."""
    module = hlo.parse(text)
    names = _Names(module)
    everything = [
        (computation, each)
        for computation in module.computations.values()
        for each in computation.instructions.values()
    ]
    convolutions: Counter[str] = Counter()
    for computation, each in everything:
        if _flops(computation, each) and _is_of_convolution(_parts(each.op_name)[0]):
            dtypes = {array.dtype for array in computation.operands(each)[:2]}
            convolutions[" and ".join(sorted(dtypes))] += 1
    parameters = module.parameters
    return Audit(
        operations=_operations(module, names),
        collectives=_collectives(module),
        convolutions=dict(convolutions),
        arguments={
            each.op_name: f"{array.dtype}[{','.join(map(str, array.shape))}]"
            for each in parameters
            for array in each.arrays
        },
        state_bytes=sum(_bytes(each) for each in parameters if each.op_name.startswith("state")),
        donated_bytes=sum(_bytes(parameters[number]) for number in module.aliased),
        host_transfers=tuple(each.name for _, each in everything if _uses_host(each)),
        dynamic_shapes=tuple(
            each.name for _, each in everything if any(array.is_dynamic for array in each.arrays)
        ),
    )


def _operations(module: Module, names: "_Names") -> tuple[Operation, ...]:
    """Returns what a program starts, with what its loops start, in order."""
    found: list[Operation] = []

    def add(computation: Computation, times: int) -> None:
        started: dict[str, int] = {}
        for each in computation.instructions.values():
            if each.opcode in _LOOPS:
                for name in each.calls:
                    add(module.computations[name], times * each.trips)
            elif each.opcode.endswith("-done"):
                if (index := started.get(each.operands[0])) is not None:
                    found[index] = dataclasses.replace(found[index], awaited=len(found))
            elif not _is_free(each) and not each.opcode.endswith("-update"):
                move = _move(module, computation, each)
                if move and each.opcode.endswith("-start"):
                    started[each.name] = len(found)
                inside = [(computation, each), *module.inside(each)]
                accesses = _accesses(module, computation, each, move)
                found.append(
                    Operation(
                        each.name,
                        each.opcode,
                        *names.kind_and_module(computation, each, move),
                        times=times,
                        flops=sum(_flops(there, one) for there, one in inside),
                        bytes=sum(a.bytes for a in accesses if a.array.memory == hlo.DEVICE_MEMORY),
                        cycles=each.cycles,
                        accessed=sum(a.bytes for a in accesses),
                        padding=sum(a.padding for a in accesses),
                    )
                )

    add(module.entry, 1)
    return tuple(found)


def _is_free(each: Instruction) -> bool:
    return each.opcode in _FREE or each.custom_call_target == _CONCAT_BITCAST


@dataclasses.dataclass(frozen=True)
class _Move:
    """A copy of an array, or of a slice of it: what it is read from, and what it writes."""

    source: Array
    result: Array

    @property
    def is_between_memories(self) -> bool:
        """Whether nothing but the memory changes."""
        same = self.source.order == self.result.order
        return same and self.source.memory != self.result.memory

    @property
    def accesses(self) -> tuple["_Access", ...]:
        """What it reads and writes."""
        whole = self.source.shape == self.result.shape
        read = dataclasses.replace(self.source if whole else self.result, layout=self.source.layout)
        return _Access(read), _Access(self.result)


def _move(module: Module, computation: Computation, each: Instruction) -> _Move | None:
    """Returns the copy that an operation is or starts, None if it is something else."""
    if each.opcode == "copy-start":
        # It returns its result, its operand and a handle.
        return _Move(each.arrays[1], each.arrays[0])
    operands = computation.operands(each)
    if each.opcode == "copy" and operands:
        return _Move(operands[0], each.arrays[0])
    starts_slice = each.opcode in _SLICE_STARTS or (
        each.opcode == "async-start"
        and all(one.opcode in _IN_SLICES for _, one in module.inside(each))
    )
    # Its result is a tuple of its operands, the slice, and a handle.
    if starts_slice and 0 < len(operands) < len(each.arrays):
        return _Move(operands[0], each.arrays[len(operands)])
    return None


@dataclasses.dataclass(frozen=True)
class _Access:
    """An array that an operation reads or writes, or the share of it that it reads."""

    array: Array
    share: float = 1.0

    @property
    def bytes(self) -> int:
        return round(self.share * self.array.padded_bytes)

    @property
    def padding(self) -> int:
        return round(self.share * (self.array.padded_bytes - self.array.bytes))


def _accesses(
    module: Module, computation: Computation, each: Instruction, move: _Move | None
) -> list[_Access]:
    """Returns what an operation reads and writes, in any memory."""
    if move:
        return list(move.accesses)
    found = [_Access(array) for array in each.arrays]
    for number, name in enumerate(each.operands):
        read = computation.instructions.get(name)
        for array in read.arrays if read else ():
            share = _share_read(module, each, number) if each.opcode == "fusion" else 1.0
            found.append(_Access(array, share))
    return found


def _share_read(module: Module, fusion: Instruction, number: int) -> float:
    """Returns the part of an operand that a fused operation reads, as it may only take slices."""
    return min(1.0, sum(_slices(module, fusion, number).values()))


def _slices(module: Module, fusion: Instruction, number: int) -> dict[str, float]:
    """Returns the different parts of an operand that are read, as fractions of it."""
    function = module.computations[fusion.calls[0]]

    def parts(name: str, whole: int) -> dict[str, float]:
        found: dict[str, float] = {}
        for user in function.users[name]:
            if user.opcode in _SLICES:
                bounds = user.attributes.partition("slice={")[2].partition("}")[0]
                found[f"{bounds or user.name} of {whole}"] = user.arrays[0].size / whole
            elif user.opcode == "bitcast":
                found |= parts(user.name, whole)
            elif user.opcode == "fusion":
                for position, operand in enumerate(user.operands):
                    if operand == name:
                        found |= _slices(module, user, position)
            else:
                found["all"] = 1.0
        return found

    parameter = function.parameters[number]
    return parts(parameter.name, parameter.arrays[0].size or 1)


def _bytes(each: Instruction) -> int:
    return sum(array.bytes for array in each.arrays)


def _is_convolution(each: Instruction) -> bool:
    """Whether it is a convolution with a window, or a product written as a convolution."""
    is_cudnn = each.custom_call_target.startswith("__cudnn$conv")
    return (each.opcode == "convolution" or is_cudnn) and each.dim_labels is not None


def _flops(computation: Computation, each: Instruction) -> float:
    """Returns the operations of a product or convolution, 0 of anything else."""
    if each.opcode == "dot" or each.custom_call_target.startswith("__cublas$"):
        left = computation.operands(each)[0]
        sides = [left.shape[dimension] for dimension in each.contracting_dimensions]
        return 2 * each.arrays[0].size * math.prod(sides)
    if not _is_convolution(each) or each.dim_labels is None:
        return 0
    left, right = computation.operands(each)[:2]
    labels = each.dim_labels
    if each.custom_call_target == _CUDNN_FILTER:
        # Written as the forward convolution whose kernel it returns.
        return 2 * right.size * each.arrays[0].size / each.arrays[0].shape[labels[1].index("o")]
    if each.custom_call_target == _CUDNN_INPUT:
        return 2 * left.size * right.size / right.shape[labels[1].index("o")]
    dilations = each.lhs_dilation or (1,) * len(each.window)
    taps = 1.0
    for number, (side, dilation) in enumerate(zip(each.window, dilations, strict=True)):
        # An input of one pixel, padded to a wide window, is a way to write a convolution of 1 x 1.
        taps *= min(side / dilation, left.shape[labels[0].index(str(number))])
    return 2 * each.arrays[0].size * taps * right.shape[labels[1].index("i")]


def _collectives(module: Module) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}

    def add(computation: Computation, times: int) -> None:
        for each in computation.instructions.values():
            name = each.opcode.removesuffix("-start")
            if name in _COLLECTIVES:
                count, size = found.get(name, (0, 0))
                sent = sum(array.bytes for array in computation.operands(each))
                found[name] = count + times, size + times * sent
            for called in each.calls:
                add(module.computations[called], times * each.trips)

    add(module.entry, 1)
    return found


def _uses_host(each: Instruction) -> bool:
    return (
        each.opcode.removesuffix("-done") in _HOST
        or _HOST_CALLS.search(each.custom_call_target) is not None
        or any(array.memory == hlo.HOST_MEMORY for array in each.arrays)
    )


class _Names:
    """Derives kinds and modules from the names that JAX gave to operations."""

    def __init__(self, program: Module) -> None:
        self._program = program
        arguments = "\n".join(each.op_name for each in program.parameters)
        self._modules = set(_MODULE.findall(arguments))

    def kind_and_module(
        self, computation: Computation, each: Instruction, move: _Move | None
    ) -> tuple[str, str]:
        """Returns what an operation does, and the part that it belongs to."""
        names, kind = self._described(computation, each)
        module = self._module(names)
        if move is None:
            return kind, module
        kind = MOVES if move.is_between_memories else _LAYOUT
        if module == NO_MODULE:
            # A copy to the device's memory belongs to what made the array, others to what reads it.
            is_eviction = move.result.memory == hlo.DEVICE_MEMORY
            module = self._neighbor(computation, each, backward=is_eviction)
        return kind, module

    def _described(self, computation: Computation, each: Instruction) -> tuple[list[str], str]:
        """Returns the names of an operation, and its kind if it is no move."""
        inside = [(computation, each), *self._program.inside(each)]
        main = next((one for there, one in inside if _flops(there, one)), None)
        main = main or next((one for _, one in inside if _is_pooling(one)), None)
        names, is_backward = _parts((main or each).op_name or each.op_name)
        return names, self._kind(each, main, names, is_backward)

    def _neighbor(self, computation: Computation, each: Instruction, *, backward: bool) -> str:
        """Returns the module of the nearest operation with one that reads or made a result."""
        seen, waiting = {each.name}, [each]
        while waiting:
            this = waiting.pop(0)
            near = [computation.instructions.get(name) for name in this.operands]
            for one in near if backward else computation.users[this.name]:
                if one is None or one.name in seen:
                    continue
                seen.add(one.name)
                module = self._module(self._described(computation, one)[0])
                if module != NO_MODULE:
                    return module
                if self._hands_on(computation, one):
                    waiting.append(one)
        return NO_MODULE

    def _hands_on(self, computation: Computation, each: Instruction) -> bool:
        return (
            each.opcode in _HAND_ON
            or each.opcode.endswith("-done")
            or each.custom_call_target == _CONCAT_BITCAST
            or _move(self._program, computation, each) is not None
        )

    def _kind(
        self, each: Instruction, main: Instruction | None, names: list[str], is_backward: bool
    ) -> str:
        if each.opcode.removesuffix("-start") in _COLLECTIVES:
            return "between devices"
        if main is not None and _is_pooling(main):
            return "pooling"
        if main is not None:
            return _product_kind(main, names, is_backward)
        if each.opcode in _COPIES:
            return _LAYOUT
        for name in names:
            if name in _SCOPES:
                return _SCOPES[name]
        if "max_pool" in names:
            return "pooling"
        if any("norm" in name.lower() for name in names):
            return "normalization"
        last = names[-1] if names else ""
        if last == "concatenate" or (is_backward and last in ("split", "slice", "pad")):
            return "concatenation"
        return "other" if names else _LAYOUT

    def _module(self, names: list[str]) -> str:
        for name in names:
            if name in self._modules:
                return name
            if name in _SCOPES:
                return _SCOPES[name]
        return NO_MODULE


def _parts(op_name: str) -> tuple[list[str], bool]:
    """Returns the parts of an operation's name, and whether it belongs to the gradient.

    >>> _parts("jit(train_step)/transpose(jvp(Net))/conv1/norm/mul")
    (['Net', 'conv1', 'norm', 'mul'], True)
    """
    names = []
    for name in op_name.split("/"):
        while found := _WRAPPER.fullmatch(name):
            name = found[1]
        if name and not name.startswith("jit("):
            names.append(name)
    return names, "transpose(" in op_name


def _is_of_convolution(names: list[str]) -> bool:
    """Whether names are those of a convolution, whatever the compiler has made of it."""
    return bool(names) and "conv" in names[-1]


def _is_pooling(each: Instruction) -> bool:
    return each.opcode in ("select-and-scatter", "reduce-window")


def _product_kind(main: Instruction, names: list[str], is_backward: bool) -> str:
    """Returns the kind of a product or convolution."""
    if not _is_of_convolution(names):
        return "dense layer"
    if not is_backward:
        return "convolution"
    # The gradient to the kernel sums over the images, which are its features.
    if main.custom_call_target == _CUDNN_FILTER:
        sums_images = True
    elif main.dim_labels is not None:
        sums_images = main.dim_labels[0].startswith("f")
    else:
        sums_images = main.contracting_dimensions == (0,)
    return "convolution, to the kernel" if sums_images else "convolution, to the input"


def tables(operations: tuple[Operation, ...], seconds: Sequence[float]) -> dict[str, list[Any]]:
    """Returns the totals by kind and by module, those that take longest first.

    Args:
      operations: those of an audit.
      seconds: the estimated time of each.

    Returns:
      "by_kind" and "by_module", with rows of name, operations, seconds, cycles (of those that the
      compiler estimates), bytes, accessed and padding.
    """
    found: dict[str, list[Any]] = {}
    for table, name in (("by_kind", "kind"), ("by_module", "module")):
        rows: dict[str, dict[str, Any]] = {}
        for each, time in zip(operations, seconds, strict=True):
            key = getattr(each, name)
            row = rows.setdefault(key, {"name": key, "operations": 0, "seconds": 0.0})
            row["operations"] += each.times
            row["seconds"] += time
            for column in ("cycles", "bytes", "accessed", "padding"):
                row[column] = row.get(column, 0) + each.times * (getattr(each, column) or 0)
        found[table] = sorted(rows.values(), key=lambda row: -row["seconds"])
    return found
