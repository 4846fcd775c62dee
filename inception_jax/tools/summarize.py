"""Shows what a network is made of, and what a trained one sees."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from inception_jax import cli, console

if TYPE_CHECKING:
    from inception_jax.config import Config
    from inception_jax.inspection.structure import Structure
    from inception_jax.models.weights import Weights

USAGE = """
Show what a network is made of: a drawing (architecture.svg and .png, by Graphviz) and a table,
block by block, of output size, parameters, multiply-adds and receptive field (architecture.md and
.csv). At 224 px the paper's network is compared with table 1 of its paper.

  python -m inception_jax.tools.summarize --config experiments/tiny.py
  python -m inception_jax.tools.summarize --config experiments/image_folder.py --classes=5
  python -m inception_jax.tools.summarize --workdir DIR
  python -m inception_jax.tools.summarize --weights FILE --image cat.jpg --layer=inception_4a

Of trained weights it also draws the first layer's filters (filters.png) and, with --image, what a
module finds in a picture (activations.png).
"""

cli.define_config()
_TRAINED = cli.define_trained(or_config=True)
_OUTPUT = cli.define_path(
    "output", "folder for the files; default: DIR/summary for --workdir=DIR, otherwise runs/summary"
)
_CLASSES = flags.DEFINE_integer(
    "classes", None, "with --config: number of classes, where the data set does not say it", 1
)
_IMAGE = cli.define_path("image", "picture to draw the activations of")
_LAYER = flags.DEFINE_string(
    "layer", None, "module to draw the activations of; default: the first that holds layers"
)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax import config as configs
    from inception_jax.errors import UserError
    from inception_jax.inference import load
    from inception_jax.inspection import drawing, structure
    from inception_jax.inspection.table import make_table
    from inception_jax.models import networks
    from inception_jax.runtime import devices
    from inception_jax.training import workdir

    given: Config | None = flags.FLAGS.config
    if _IMAGE.value is not None and given is not None:
        raise UserError(
            "--image: activations need trained weights: --workdir=DIR or --weights=FILE"
        )
    # Tracing needs no accelerator, and another command may be using it.
    devices.initialize(platform="cpu", log=console.say)
    if given is not None:
        configs.validate(given)
        weights, classes = None, _classes(given.data.name)
        name, size = given.model.name, given.data.image_size
        network = networks.create(given.model, classes, rewrite=False)
    else:
        weights = load.load(**_TRAINED.values(), log=console.say)
        name, size, classes = weights.model.name, weights.image_size, weights.num_classes
        network = weights.network
    found = structure.describe(network, size)
    folder = _OUTPUT.value or pathlib.Path(_TRAINED.workdir.value or "runs", "summary")
    workdir.check_writable(folder, flag="output")
    table = make_table(found)
    print(table.markdown())
    title = f"{name}, {size} px, {classes} classes"
    written = table.write(folder)
    written += drawing.write(drawing.draw(found, title), folder, log=console.say)
    if weights is not None:
        written += _draw_weights(folder, weights, found)
    for path in written:
        print(path)


def _classes(name: str) -> int:
    """Returns how many classes a data set has."""
    from inception_jax.errors import UserError
    from inception_jax.registry import DATASETS

    part = DATASETS.get(name)
    classes = _CLASSES.value or part.classes or len(part.class_names)
    if not classes:
        raise UserError(
            f"the number of classes of {name} depends on its source: give it as --classes=N"
        )
    return classes


def _draw_weights(
    folder: pathlib.Path, weights: "Weights", structure: "Structure"
) -> list[pathlib.Path]:
    """Draws the first filters and, of an image, activations; returns the files."""
    from inception_jax.inference.predictor import Predictor
    from inception_jax.inspection import feature_maps

    written = []
    first = next(layer.name for layer in structure.layers if layer.inputs[0].source is None)
    kernel = feature_maps.filters(weights, first)
    if kernel.ndim == 4:
        written.append(folder / "filters.png")
        feature_maps.draw_filters(written[0], kernel, f"{first} of {weights}")
    else:
        console.say(f"{first}: the first layer is no convolution, so it has no filters to draw")
    if _IMAGE.value is None:
        return written
    written.append(folder / "activations.png")
    modules = (block.name for block in structure.blocks() if len(block.layers) > 1)
    layer = _LAYER.value or next(modules)
    predictor = Predictor(weights)
    pixels = predictor.read(_IMAGE.value.read_bytes(), str(_IMAGE.value))
    maps = feature_maps.activations(predictor, pixels, layer)
    feature_maps.draw_activations(written[-1], pixels, maps, layer=layer, title=str(weights))
    return written


if __name__ == "__main__":
    cli.run(main, USAGE)
