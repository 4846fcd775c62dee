"""Tabulates a network block by block, compared with Table 1 of its paper where that applies."""

import csv
from collections.abc import Sequence
from typing import NamedTuple

from inception_jax.console import markdown_table
from inception_jax.inspection.structure import Block, Layer, Shape, Structure
from inception_jax.storage import atomic, paths

Cell = str | int | None

_HEAD = ("block", "type", "output", "parameters", "multiply-adds", "receptive field", "stride")
_PAPER_HEAD = ("paper: output", "weights", "operations", "deviation")
_PAPER_IMAGE = (224, 224, 3)


class PaperRow(NamedTuple):
    """A row of the paper's Table 1.

    Attributes:
      blocks: names of our blocks that the row covers.
      shape: of the output.
      kilo_weights: "params" as printed, without the K; None: empty.
      mega_operations: "ops" as printed, without the M, in multiply-adds; None: empty.
    """

    blocks: tuple[str, ...]
    shape: Shape
    kilo_weights: float | None = None
    mega_operations: float | None = None


# Szegedy et al. 2014, arXiv:1409.4842.
PAPER_ROWS = (
    PaperRow(("conv1",), (112, 112, 64), 2.7, 34),
    PaperRow(("max_pool",), (56, 56, 64)),
    PaperRow(("conv2_reduce", "conv2"), (56, 56, 192), 112, 360),
    PaperRow(("max_pool_2",), (28, 28, 192)),
    PaperRow(("inception_3a",), (28, 28, 256), 159, 128),
    PaperRow(("inception_3b",), (28, 28, 480), 380, 304),
    PaperRow(("max_pool_3",), (14, 14, 480)),
    PaperRow(("inception_4a",), (14, 14, 512), 364, 73),
    PaperRow(("inception_4b",), (14, 14, 512), 437, 88),
    PaperRow(("inception_4c",), (14, 14, 512), 463, 100),
    PaperRow(("inception_4d",), (14, 14, 528), 580, 119),
    PaperRow(("inception_4e",), (14, 14, 832), 840, 170),
    PaperRow(("max_pool_4",), (7, 7, 832)),
    PaperRow(("inception_5a",), (7, 7, 832), 1072, 54),
    PaperRow(("inception_5b",), (7, 7, 1024), 1388, 71),
    PaperRow(("mean",), (1024,)),
    PaperRow(("classifier",), (1000,), 1000, 1),
)
_NOTES = """\
The paper's columns are from Table 1 of Szegedy et al. 2014. K means 1,024 weights and operations
are millions of multiply-adds, both without biases and BatchNorm, so only our weights are compared,
not our parameters. An empty deviation means equal after rounding or truncation. The weights printed
for most modules do not match the printed widths (4c is furthest off), while the operations do,
except in 5a. The 2.7 K and 34 M of the first convolution are those of a separable one, 7x7 on each
channel with a multiplier of 8 followed by 1x1 (49 · 3 · 8 + 24 · 64 = 2,712 weights), which Ioffe
and Szegedy 2015 (arXiv:1502.03167) report using; the paper's text describes an ordinary one.
"""


class Table(NamedTuple):
    """Lines of cells under a head, and notes."""

    head: tuple[str, ...]
    lines: list[list[Cell]]
    notes: str = ""

    def markdown(self) -> str:
        """Returns the table as aligned Markdown, numbers right-aligned, followed by the notes."""
        left = [
            column
            for column in range(len(self.head))
            if not any(isinstance(line[column], int) for line in self.lines)
        ]
        cells = [[_format_cell(cell) for cell in line] for line in self.lines]
        lines = markdown_table(self.head, cells, left=left) + "\n"
        return f"{lines}\n{self.notes}" if self.notes else lines

    def write(self, folder: paths.Path) -> list[paths.Path]:
        """Writes architecture.md, and architecture.csv with plain numbers.

        Raises:
          WriteError: if they cannot be written.
        """
        markdown, comma = folder / "architecture.md", folder / "architecture.csv"
        with atomic.replacing(markdown) as temporary:
            temporary.write_text(self.markdown(), encoding="utf-8")
        with (
            atomic.replacing(comma) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as file,
        ):
            csv.writer(file).writerows([self.head, *self.lines])
        return [markdown, comma]


def make_table(structure: Structure) -> Table:
    """Returns the table of a network, compared with the paper's if it has all of its blocks.

    The last lines are the parameters of no block, if there are any, the totals without auxiliary
    heads and, if the network has them, with them.
    """
    blocks = structure.blocks()
    lines = [_line(block) for block in blocks]
    needed = [block for block in blocks if not block.is_auxiliary]
    others = structure.other_parameters
    if others:
        lines.append(["others", None, None, others, None, None, None])
    lines.append(_sums("total", needed, others))
    if len(needed) < len(blocks):
        lines.append(_sums("with auxiliary heads", blocks, others))
    if not matches_paper(structure):
        return Table(_HEAD, lines)
    paper_cells = _paper_cells(blocks)
    empty: list[Cell] = [None] * len(_PAPER_HEAD)
    lines = [[*line, *paper_cells.get(str(line[0]), empty)] for line in lines]
    return Table(_HEAD + _PAPER_HEAD, lines, _NOTES)


def matches_paper(structure: Structure) -> bool:
    """Returns whether Table 1 describes the network, at the same image size."""
    names = {block.name for block in structure.blocks()}
    return structure.image == _PAPER_IMAGE and all(
        names.issuperset(row.blocks) for row in PAPER_ROWS
    )


def shape_text(shape: Shape) -> str:
    """Returns a shape as text.

    >>> shape_text((28, 28, 256))
    '28×28×256'
    """
    return "×".join(map(str, shape))


def layer_text(layer: Layer) -> str:
    """Returns a layer's kind, window and stride in the paper's notation: "convolution 7×7/2"."""
    if not any(layer.window):
        return layer.kind
    stride = f"/{layer.stride}" if layer.stride > 1 else ""
    return f"{layer.kind} {shape_text(layer.window)}{stride}"


def _line(block: Block) -> list[Cell]:
    kind = block.kind
    if len(block.layers) == 1:
        kind = ", ".join([layer_text(block.layers[0]), *block.layers[0].extras])
    return [
        block.name,
        f"{kind} (training only)" if block.is_auxiliary else kind,
        shape_text(block.shape),
        block.parameters,
        block.multiply_adds,
        block.receptive_field,
        block.jump,
    ]


def _sums(name: str, blocks: Sequence[Block], others: int) -> list[Cell]:
    parameters = others + sum(block.parameters for block in blocks)
    multiply_adds = sum(block.multiply_adds for block in blocks)
    return [name, None, None, parameters, multiply_adds, None, None]


def _paper_cells(blocks: Sequence[Block]) -> dict[str, list[Cell]]:
    """Returns the paper's cells and our deviation from them, by the last block of each row."""
    by_name = {block.name: block for block in blocks}
    cells: dict[str, list[Cell]] = {}
    for row in PAPER_ROWS:
        ours = [by_name[name] for name in row.blocks]
        weights = sum(block.weights for block in ours) / 1024
        operations = sum(block.multiply_adds for block in ours) / 1e6
        deviations = [
            "" if ours[-1].shape == row.shape else "output",
            _deviation("weights", weights, row.kilo_weights),
            _deviation("operations", operations, row.mega_operations),
        ]
        cells[row.blocks[-1]] = [
            shape_text(row.shape),
            "" if row.kilo_weights is None else f"{row.kilo_weights:g} K",
            "" if row.mega_operations is None else f"{row.mega_operations:g} M",
            ", ".join(filter(None, deviations)),
        ]
    return cells


def _deviation(name: str, ours: float, printed: float | None) -> str:
    """Returns "weights +7.4%", or "" if ours rounds or truncates to the printed value."""
    if printed is None or printed in (round(ours), int(ours)):
        return ""
    return f"{name} {ours / printed - 1:+.1%}"


def _format_cell(cell: Cell) -> str:
    if cell is None:
        return ""
    return f"{cell:,}" if isinstance(cell, int) else cell
