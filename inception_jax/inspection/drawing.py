"""Draws a network with Graphviz: layers as boxes, modules around them, shapes on the arrows."""

import html
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from inception_jax.inspection import structure as structures
from inception_jax.inspection.structure import Block, Edge, Layer, Structure
from inception_jax.inspection.table import layer_text, shape_text
from inception_jax.storage import atomic, paths

if TYPE_CHECKING:
    import graphviz

# Fill colors of boxes; the larger the kernel of a convolution, the darker.
_CONVOLUTIONS = {1: "#E3EEF9", 3: "#C2DCF3", 5: "#9CC6EA", 7: "#7DB2E0"}
_FILLS = {
    structures.MAX_POOL: "#F8D5CF",
    structures.AVERAGE_POOL: "#FBE0C3",
    structures.MEAN: "#FBE0C3",
    structures.RESPONSE_NORM: "#E4DBF0",
    structures.CONCATENATION: "#DCEBD3",
    structures.LINEAR: "#FDECA6",
}
_INK, _QUIET, _FRAME = "#1F2933", "#5F6B7A", "#C9D1DA"
_PNG_DPI = "110"

_DOT_MISSING = (
    "cannot be rendered, as the program dot is not installed. Install Graphviz (apt-get install "
    "graphviz, brew install graphviz or conda install graphviz) and rerun, or run on another "
    "machine: dot -Tsvg -O {path}"
)


def draw(structure: Structure, title: str) -> "graphviz.Digraph":
    """Returns the drawing of a network, from the image at the top to the logits at the bottom.

    Args:
      structure: of the network.
      title: of the drawing.
    """
    import graphviz

    drawing = graphviz.Digraph(
        "architecture",
        graph_attr={
            "label": f"<<b>{html.escape(title)}</b><br/> >",
            "labelloc": "t",
            "fontsize": "20",
            "fontname": "Helvetica",
            "fontcolor": _INK,
            "bgcolor": "white",
            "nodesep": "0.2",
            "ranksep": "0.32",
            # Branches from left to right, in order of computation.
            "ordering": "out",
        },
        node_attr={
            "shape": "box",
            "style": "rounded,filled",
            "color": _FRAME,
            "fontname": "Helvetica",
            "fontsize": "12",
            "fontcolor": _INK,
            "height": "0.3",
            "margin": "0.12,0.05",
        },
        edge_attr={
            "color": _QUIET,
            "arrowsize": "0.6",
            "fontname": "Helvetica",
            "fontsize": "9",
            "fontcolor": _QUIET,
        },
    )
    drawing.node("image", _label("image"), fillcolor="white")
    for block in structure.blocks():
        _draw_block(drawing, structure, block)
    forks = [fork for block in structure.blocks() for fork in _forks(structure, block)]
    for fork in forks:
        drawing.edge(_node(fork.edge.source), fork.name, label=_shape(fork.edge), arrowhead="none")
    forked = {(index, fork.edge) for fork in forks for index in fork.readers}
    for index, layer in enumerate(structure.layers):
        for edge in layer.inputs:
            if (index, edge) not in forked:
                drawing.edge(_node(edge.source), _node(index), label=_shape(edge))
    _draw_outputs(drawing, structure)
    return drawing


def write(
    drawing: "graphviz.Digraph", folder: paths.Path, log: Callable[[str], None]
) -> list[paths.Path]:
    """Writes architecture.dot and, where Graphviz is installed, architecture.svg and .png.

    Args:
      drawing: of a network.
      folder: an existing folder, or one in a bucket.
      log: receives a line if the images cannot be rendered.

    Returns:
      The files written.

    Raises:
      WriteError: if they cannot be written.
    """
    import graphviz

    source = folder / "architecture.dot"
    written = [source]
    try:
        with atomic.replacing(source) as temporary:
            temporary.write_text(drawing.source, encoding="utf-8")
        high_resolution = drawing.copy()
        high_resolution.attr(dpi=_PNG_DPI)
        for graph, extension in ((drawing, "svg"), (high_resolution, "png")):
            path = folder / f"architecture.{extension}"
            image = graph.pipe(format=extension)
            with atomic.replacing(path) as temporary:
                temporary.write_bytes(image)
            written.append(path)
    except graphviz.ExecutableNotFound:
        log(f"{source}: {_DOT_MISSING.format(path=source.name)}")
    return written


def _draw_block(drawing: "graphviz.Digraph", structure: Structure, block: Block) -> None:
    """Draws a layer, or a module with its layers inside."""
    indices = [structure.layers.index(layer) for layer in block.layers]
    if len(indices) == 1:
        _draw_layer(drawing, indices[0], block.layers[0])
        return
    with drawing.subgraph(name=f"cluster_{block.name}") as cluster:
        cost = [
            f"{block.parameters:,} parameters",
            f"{block.multiply_adds / 1e6:,.1f} M multiply-adds",
        ]
        note = ["training only"] if block.is_auxiliary else []
        cluster.attr(
            label=_label(block.name, *note, *cost, align="left"),
            labeljust="l",
            labelloc="t",
            fontsize="13",
            style="rounded,filled,dashed" if block.is_auxiliary else "rounded,filled",
            color=_QUIET if block.is_auxiliary else _FRAME,
            fillcolor="#FFF9EC" if block.is_auxiliary else "#F6F8FA",
            margin="12",
        )
        for index, layer in zip(indices, block.layers, strict=True):
            _draw_layer(cluster, index, layer)
        for fork in _forks(structure, block):
            _draw_fork(cluster, fork)


def _draw_layer(drawing: "graphviz.Digraph", index: int, layer: Layer) -> None:
    name = layer_text(layer)
    fill = _FILLS.get(layer.kind, "white")
    if layer.kind == structures.CONVOLUTION:
        fill = _CONVOLUTIONS.get(max(layer.window), _CONVOLUTIONS[7])
    if layer.weights:
        name = f"{name.replace('convolution', 'conv')}, {layer.shape[-1]}"
    field = f", receptive field {layer.receptive_field}" if layer.receptive_field else ""
    tooltip = (
        f"{layer.name}: {shape_text(layer.shape)}, {layer.parameters:,} parameters, "
        f"{layer.multiply_adds:,} multiply-adds{field}"
    )
    label = _label(name, ", ".join(layer.extras))
    drawing.node(_node(index), label, fillcolor=fill, tooltip=tooltip)


class _Fork(NamedTuple):
    """The point where a module's input splits into its branches.

    Attributes:
      name: of the node.
      edge: the input.
      readers: indices of the layers that read it.
    """

    name: str
    edge: Edge
    readers: tuple[int, ...]


def _forks(structure: Structure, block: Block) -> list[_Fork]:
    """Returns the inputs from outside a module that several of its layers read."""
    inside = {structure.layers.index(layer) for layer in block.layers}
    readers: dict[Edge, list[int]] = {}
    for index in sorted(inside):
        for edge in structure.layers[index].inputs:
            if edge.source not in inside:
                readers.setdefault(edge, []).append(index)
    return [
        _Fork(f"input_{block.name}_{edge.source}", edge, tuple(indices))
        for edge, indices in readers.items()
        if len(indices) > 1
    ]


def _draw_fork(drawing: "graphviz.Digraph", fork: _Fork) -> None:
    """Draws one arrow into a module, and from its end one to each branch."""
    drawing.node(fork.name, "", shape="point", width="0.05", color=_QUIET)
    with drawing.subgraph() as branches:
        branches.attr(rank="same")
        for index in fork.readers:
            branches.node(_node(index))
    for index in fork.readers:
        drawing.edge(fork.name, _node(index))


def _draw_outputs(drawing: "graphviz.Digraph", structure: Structure) -> None:
    for number, index in enumerate(structure.outputs):
        name = f"auxiliary logits {number}" if number else "logits"
        drawing.node(name, _label(name), fillcolor="white")
        drawing.edge(_node(index), name, label=f" {shape_text(structure.layers[index].shape)} ")


def _shape(edge: Edge) -> str:
    return f" {shape_text(edge.shape)} "


def _node(index: int | None) -> str:
    return "image" if index is None else f"layer_{index}"


def _label(title: str, *lines: str, align: str = "center") -> str:
    """Returns a Graphviz label: a title over small lines, omitting empty ones."""
    small = f'<font point-size="9" color="{_QUIET}">'
    rows = [f"<b>{html.escape(title)}</b>"]
    rows += [f"{small}{html.escape(line)}</font>" for line in lines if line]
    cells = "".join(f'<tr><td align="{align}">{row}</td></tr>' for row in rows)
    return f'<<table border="0" cellborder="0" cellspacing="0" cellpadding="1">{cells}</table>>'
