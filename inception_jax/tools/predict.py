"""Says what is in pictures, by a trained network."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from absl import flags

from inception_jax import cli, console
from inception_jax.errors import DataError, RunError, UserError
from inception_jax.runtime import huge_pages
from inception_jax.storage import atomic

if TYPE_CHECKING:
    from inception_jax.config import Data
    from inception_jax.console import Progress
    from inception_jax.datasets.splits import Split
    from inception_jax.inference.gradcam import HeatmapWriter
    from inception_jax.inference.image_files import ImageFiles
    from inception_jax.inference.output_formats import Format
    from inception_jax.inference.predictor import Predictor
    from inception_jax.models.weights import Weights

USAGE = """
Say what is in pictures: the most probable classes, by a run's checkpoint or a file of weights.

  python -m inception_jax.tools.predict --workdir DIR IMAGE|FOLDER|- [...]
  python -m inception_jax.tools.predict --weights FILE.safetensors photos/ --csv --output found.csv
  python -m inception_jax.tools.predict --workdir DIR cat.jpg --explain heatmaps/
  python -m inception_jax.tools.predict --workdir DIR --split test --output predictions.txt

Pictures may have any size, any format that Pillow knows, and a rotation in their EXIF data; '-' is
one picture from the standard input. They are cut and resized as an evaluation does it; the command
says how. Folders are walked, in an order in which 2.jpg comes before 10.jpg: what begins with a dot
is passed over, and files that are not named as pictures are left out, and named.

--split predicts the images of a prepared split instead, a line for each, in the order of the file
names: the file's name and the class id where the data set has such ids ("test_0.JPEG n01443537",
the leaderboard file of Tiny ImageNet's unlabelled test split), else rows of CSV, file and class.

Results go to the standard output or to --output, all else to stderr. Exit code 2, before anything
is read: a mistake in the command, such as a path that leads nowhere. Exit code 1, after all else is
done: files that could not be read as pictures; each is named.
"""

_TRAINED = cli.define_trained()
_TOP = flags.DEFINE_integer("top", 5, "how many classes to give for each picture", 1)
_JSON = flags.DEFINE_bool("json", False, "write a JSON object a line: file, guesses")
_CSV = flags.DEFINE_bool("csv", False, "write CSV, a row for each class: file, rank, label …")
_OUTPUT = cli.define_path("output", "file for the results; there whole or not at all")
_EXPLAIN = cli.define_path(
    "explain", "folder for a PNG of each picture beside its Grad-CAM heat map"
)
_EXPLAIN_CLASS = flags.DEFINE_string(
    "explain_class", None, "with explain: the class the heat map is for; the best if not given"
)
_LAYER = flags.DEFINE_string(
    "layer",
    None,
    "with explain: where to look, such as inception_4e for a finer grid; the last inception module "
    "if not given",
)
_SPLIT = flags.DEFINE_string("split", None, "predict this split of the data set, such as test")
# Of the data set's settings only this one may change: the others are those of the training.
_DIRECTORY = flags.DEFINE_string(
    "config.data.directory", None, "with split: where the data are prepared; else as in training"
)
_PLATFORM = cli.define_platform()
# Flags may stand behind pictures.
flags.FLAGS.set_gnu_getopt(True)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    _check_flags(positional)
    from inception_jax.inference import image_files

    found = image_files.find(positional) if positional else None
    from inception_jax.inference import load
    from inception_jax.runtime import devices

    if _EXPLAIN.value is not None:
        atomic.make_output_folder(_EXPLAIN.value)
    devices.initialize(platform=_PLATFORM.value, log=console.say)
    weights = load.load(**_TRAINED.values(), log=console.say)
    console.say(f"network: {weights}")
    if found is None:
        _predict_split(weights)
    else:
        _predict_files(weights, found)


def _check_flags(positional: Sequence[str]) -> None:
    """Checks that the flags that are given have a meaning together."""
    if bool(positional) == (_SPLIT.value is not None):
        raise UserError("give pictures or folders of them, or --split=NAME. See --help")
    if _JSON.value and _CSV.value:
        raise UserError("--json and --csv: give one of them")
    if _SPLIT.value is not None and (_JSON.value or _CSV.value or _EXPLAIN.value is not None):
        raise UserError(
            "--split: has a format of its own; give it without --json, --csv and --explain"
        )
    for flag, needed in ((_EXPLAIN_CLASS, _EXPLAIN), (_LAYER, _EXPLAIN), (_DIRECTORY, _SPLIT)):
        if flag.value is not None and needed.value is None:
            raise UserError(f"--{flag.name}={flag.value}: has a meaning with --{needed.name} only")


def _predict_files(weights: "Weights", found: "ImageFiles") -> None:
    """Writes the best classes of picture files, and says which could not be read."""
    from inception_jax.datasets.builders import folders
    from inception_jax.inference import output_formats
    from inception_jax.inference.predictor import Predictor, batch_size_for, classify, read_files

    if found.left_out:
        left_out = folders.listed([folders.shown(path) for path in found.left_out])
        console.say(f"left out, as not named as pictures: {left_out}")
    predictor = Predictor(weights, batch_size=batch_size_for(len(found.files)))
    console.say(f"pictures: {predictor.preparation}, as in evaluation")
    heat_maps = _heat_maps(predictor)
    format = output_formats.FORMATS["json" if _JSON.value else "csv" if _CSV.value else "table"]
    read = read_files(predictor, found.files, view_size=heat_maps.view_size if heat_maps else 0)
    failed = 0
    with _results(format) as file, _progress(len(found.files), predictor) as progress:
        for batch in classify(predictor, read):
            for each in batch:
                if isinstance(each, DataError):
                    progress.note(str(each))
                    failed += 1
                else:
                    predictions = predictor.top_k(each.logits, _TOP.value)
                    file.write(format.entry(each.picture.name, predictions))
            if heat_maps:
                heat_maps.draw([each for each in batch if not isinstance(each, DataError)])
            file.flush()
            progress.update(len(batch))
    if heat_maps:
        console.say(f"heat maps of {heat_maps.layer} ({heat_maps.count:,}): {_EXPLAIN.value}")
    if failed:
        raise RunError(f"{failed:,} of {len(found.files):,} files could not be read; see above")


def _heat_maps(predictor: "Predictor") -> "HeatmapWriter | None":
    """Returns what draws the heat maps that the flags ask for, if they do."""
    if _EXPLAIN.value is None:
        return None
    # Imports matplotlib.
    from inception_jax.inference.gradcam import Explainer, HeatmapWriter

    explainer = Explainer(predictor, _LAYER.value or "")
    height, width = explainer.grid
    console.say(f"heat maps: Grad-CAM of {explainer.layer}, {height} × {width}")
    label = None if _EXPLAIN_CLASS.value is None else predictor.label(_EXPLAIN_CLASS.value)
    return HeatmapWriter(_EXPLAIN.value, explainer, label)


def _predict_split(weights: "Weights") -> None:
    """Writes the best class of each image of a prepared split."""
    import numpy as np

    from inception_jax.datasets import decode
    from inception_jax.datasets.dataset import class_ids
    from inception_jax.inference import image_files, output_formats
    from inception_jax.inference.predictor import Predictor, batch_size_for

    data = _data_settings(weights)
    split = _open_split(weights, data)
    format = output_formats.best_only(class_ids(data))
    predictor = Predictor(weights, batch_size=batch_size_for(len(split)))
    order = sorted(range(len(split)), key=lambda n: image_files.natural_key(split.names[n]))
    with _results(format) as file, _progress(len(order), predictor) as progress:
        pieces = [np.array(piece) for piece in decode.pieces(order, predictor.batch_size)]
        for piece, pixels in zip(pieces, decode.threaded_map(split.read, pieces), strict=True):
            for n, best in zip(piece, predictor.predict(pixels, 1), strict=True):
                file.write(format.entry(split.names[n], best))
            progress.update(len(piece))


def _data_settings(weights: "Weights") -> "Data":
    """Returns the settings of the data set that a network was trained on.

    Raises:
      UserError: if they are not known.
    """
    import dataclasses

    from inception_jax.config import Data
    from inception_jax.storage.workdir import Workdir
    from inception_jax.training import workdir

    if _TRAINED.workdir.value is not None:
        data = workdir.recorded_run(Workdir(_TRAINED.workdir.value)).config.data
    elif weights.dataset:
        data = Data(
            name=weights.dataset,
            image_size=weights.image_size,
            eval_crop_pct=weights.eval_crop,
            storage="decoded" if weights.eval_crop == 1 else "records",
        )
    else:
        raise UserError(
            f"--split={_SPLIT.value}: {weights.origin} does not say its data set; give the images "
            "of the split, or the run: --workdir=DIR"
        )
    directory = data.directory if _DIRECTORY.value is None else _DIRECTORY.value
    # Whoever trained may have prepared the data again; to predict is no reason to.
    return dataclasses.replace(data, directory=directory, on_change="refuse")


def _open_split(weights: "Weights", data: "Data") -> "Split":
    """Returns the split that --split names, as an evaluation sees it."""
    from inception_jax.datasets.dataset import prepare
    from inception_jax.training import initialization

    dataset = prepare(data, log=console.say)
    initialization.check_classes(weights, dataset)
    if _SPLIT.value == dataset.train_split:
        return dataset.train_evaluated
    if _SPLIT.value not in dataset.splits:
        raise UserError(
            f"--split={_SPLIT.value}: {dataset.name} has none of that name; it has "
            f"{', '.join(dataset.splits)}"
        )
    return dataset.splits[_SPLIT.value]


@contextlib.contextmanager
def _results(format: "Format") -> Iterator[TextIO]:
    """Opens where the results go, and writes what comes before the first."""
    from inception_jax.inference import output_formats

    with output_formats.written(_OUTPUT.value) as file:
        file.write(format.header)
        yield file


def _progress(total: int, predictor: "Predictor") -> "Progress":
    """Returns what shows progress, if it takes a while and is not shown by the results."""
    from inception_jax.console import Progress

    seen = _OUTPUT.value is None and sys.stdout.isatty()
    shown = total > predictor.batch_size and not seen
    return Progress("classifying", total, log=console.say, shown=shown)


if __name__ == "__main__":
    huge_pages.use_huge_pages()
    cli.run(main, USAGE)
