"""What all plots have in common: names in them as they are, and files whole."""

import pathlib
import warnings
from typing import TYPE_CHECKING

from inception_jax.datasets.builders import folders

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: "Figure", path: pathlib.Path, *, dpi: int = 150) -> None:
    """Writes a figure as a PNG file, with all names in it as they are.

    A class, a run or a file may be called $x$, which is no formula here. Only the ticks of an axis
    keep theirs, such as powers of ten.

    Raises:
      OSError: if the file cannot be written.
    """
    # Imported late: most commands draw nothing.
    from matplotlib.axis import Axis
    from matplotlib.text import Text

    in_axes = {text for axis in figure.findobj(Axis) for text in axis.findobj(Text)}
    for text in figure.findobj(Text):
        if text not in in_axes:
            text.set_parse_math(False)
    with warnings.catch_warnings():
        # A letter of a class's name that the font lacks is drawn as a box.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, format="png", dpi=dpi)


def short(name: str, length: int) -> str:
    """Returns a name as text of one line of at most so many characters, for a plot."""
    name = folders.escape_for_display(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"
