"""Helpers shared by all plots."""

import pathlib
import warnings
from typing import TYPE_CHECKING

from inception_jax.datasets.builders import folders

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: "Figure", path: pathlib.Path, *, dpi: int = 150) -> None:
    """Writes a figure as a PNG file, with all names in it shown literally.

    A class, run or file may be called $x$, which must not be rendered as a formula. Only axis ticks
    keep math text, such as powers of ten.

    Raises:
      OSError: if the file cannot be written.
    """
    # Imported here, because most commands draw nothing.
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    in_axes = {text for axis in figure.findobj(Axis) for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        if text not in in_axes:
            text.set_parse_math(False)
    with warnings.catch_warnings():
        # Characters of class names that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=dpi)


def truncate(name: str, length: int) -> str:
    """Returns a name for a plot, on one line of at most `length` characters."""
    name = folders.escape_for_display(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"
