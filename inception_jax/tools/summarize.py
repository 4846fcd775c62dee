"""Summarizes a network: its layers and, with trained weights, its filters and activations."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from inception_jax import cli, console

if TYPE_CHECKING:
    from inception_jax.config import Config
    from inception_jax.inspection.structure import Structure
    from inception_jax.models.weights import Weights
    from inception_jax.storage import paths

USAGE = """
Summarize the blocks of a network in a drawing and a table.

  python -m inception_jax.tools.summarize --config experiments/tiny.py
  python -m inception_jax.tools.summarize --config experiments/image_folder.py --classes=5
  python -m inception_jax.tools.summarize --workdir DIR
  python -m inception_jax.tools.summarize --weights FILE --image cat.jpg --layer=inception_4a

Draws the network with Graphviz (architecture.svg, .png) and lists each block's output size,
parameters, multiply-adds and receptive field (architecture.md, .csv). At 224 px, compares the
paper's network with Table 1 of its paper. With trained weights, also draws the first layer's
filters (filters.png) and, with --image, the activations of a module (activations.png).
"""

cli.define_config()
_TRAINED = cli.define_trained(or_config=True)
_OUTPUT = cli.define_path(
    "output", "folder for the files; default: DIR/summary with --workdir=DIR, else runs/summary"
)
_CLASSES = flags.DEFINE_integer(
    "classes", None, "with --config: number of classes, if the data set does not define it", 1
)
_IMAGE = cli.define_path("image", "image file to compute activations for")
_LAYER = flags.DEFINE_string(
    "layer",
    None,
    "module to draw the activations of; default: the first with several layers, or the first",
)
cli.require_with("classes", "config")
cli.require_with("layer", "image")


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax import config as configs
    from inception_jax.errors import UserError
    from inception_jax.inference import image_files, load
    from inception_jax.inspection import drawing, structure
    from inception_jax.inspection.table import make_table
    from inception_jax.models import networks
    from inception_jax.registry import DATASETS
    from inception_jax.runtime import devices
    from inception_jax.storage import access

    given: Config | None = flags.FLAGS.config
    if _IMAGE.value is not None and given is not None:
        raise UserError(
            "--image: activations need trained weights; use --workdir=DIR or --weights=FILE"
        )
    image = None if _IMAGE.value is None else image_files.read(str(_IMAGE.value))
    # Tracing needs no accelerator, and another command may be using it.
    devices.initialize(platform="cpu", log=console.log)
    if given is not None:
        configs.validate(given)
        weights = None
        classes = DATASETS.get(given.data.name).known_count("classes", _CLASSES.value or 0)
        name, size = given.model.name, given.data.image_size
        network = networks.create(given.model, classes, rewrite="")
    else:
        weights = load.load(**_TRAINED.values(), log=console.log)
        name, size, classes = weights.model.name, weights.image_size, weights.num_classes
        network = weights.network
    folder = _OUTPUT.value or (_TRAINED.workdir.value or pathlib.Path("runs")) / "summary"
    access.check_output_folder(folder, "output")
    analyzed = structure.analyze(network, size)
    table = make_table(analyzed)
    print(table.markdown())
    title = f"{name}, {size} px, {classes} classes"
    written = table.write(folder)
    written += drawing.write(drawing.draw(analyzed, title), folder, log=console.log)
    if weights is not None:
        written += _draw_weights(folder, weights, analyzed, image)
    for path in written:
        print(path)


def _draw_weights(
    folder: "paths.Path", weights: "Weights", structure: "Structure", image: bytes | None
) -> "list[paths.Path]":
    """Draws the first layer's filters and the activations for an image; returns the files."""
    from inception_jax.inference.predictor import Predictor
    from inception_jax.inspection import feature_maps

    written = []
    if first := feature_maps.first_filters(weights):
        written.append(folder / "filters.png")
        name, kernel = first
        feature_maps.draw_filters(written[0], kernel, f"{name} of {weights}")
    else:
        console.log(f"{weights.model.name}: no convolution of the image, so no filters to draw")
    if image is None:
        return written
    written.append(folder / "activations.png")
    spatial = feature_maps.spatial_layers(weights)
    modules = (each.name for each in structure.blocks() if len(each.layers) > 1)
    layer = _LAYER.value or next((name for name in (*modules, *spatial) if name in spatial), "")
    predictor = Predictor(weights)
    pixels = predictor.read(image, str(_IMAGE.value))
    maps = feature_maps.compute_activations(predictor, pixels, layer)
    feature_maps.draw_activations(written[-1], pixels, maps, layer=layer, title=str(weights))
    return written


if __name__ == "__main__":
    cli.run(main, USAGE)
