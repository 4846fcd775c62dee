"""The all-reduces of a compiled program, and how many of them wait for one another."""

import functools

from inception_jax.programs import hlo


def all_reduces(text: str) -> tuple[int, int]:
    """Returns the number of all-reduces, and of those in the longest chain, one after another.

    Args:
      text: of the compiled program, whose loops contain none.
    """
    instructions = hlo.parse(text).entry.instructions

    @functools.cache
    def chain(name: str) -> int:
        each = instructions[name]
        before = max(
            (chain(operand) for operand in each.operands if operand in instructions), default=0
        )
        return before + is_all_reduce(each)

    def is_all_reduce(each: hlo.Instruction) -> bool:
        return each.opcode.removesuffix("-start") == "all-reduce"

    # In the order of execution, so that no recursion is deep.
    return sum(map(is_all_reduce, instructions.values())), max(map(chain, instructions))
