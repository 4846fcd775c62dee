"""Classifies image files with a trained network."""

from inception_jax.runtime import huge_pages

if __name__ == "__main__":
    huge_pages.use_huge_pages()  # Restarts; the imports below are the new process's.

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from absl import flags

from inception_jax import cli, console
from inception_jax.errors import DataError, RunError, UserError, join_truncated
from inception_jax.storage import access, paths

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
Classify image files with a run's checkpoint or a weights file.

  python -m inception_jax.tools.predict --workdir DIR IMAGE|FOLDER|- [...]
  python -m inception_jax.tools.predict --weights FILE.safetensors photos/ --csv --output out.csv
  python -m inception_jax.tools.predict --workdir DIR cat.jpg --explain heatmaps/
  python -m inception_jax.tools.predict --workdir DIR --split test --output predictions.txt

Images may have any size, any format that Pillow reads and any EXIF orientation; '-' reads one image
from standard input. They are cropped and resized as in evaluation; the log states how. Folders,
local or gs://BUCKET/PATH, are searched recursively, in natural order (2.jpg before 10.jpg); names
that start with a dot are ignored, as are local folders that this program wrote below a given one;
files without an image extension are skipped and logged.

--split predicts a prepared split instead, one line per image, in the order of the file names: file
name and class id if the data set has such ids ("test_0.JPEG n01443537", the leaderboard format of
Tiny ImageNet's unlabeled test split), otherwise CSV rows of file and class.

Results go to standard output or --output, everything else to standard error. Exit code 2: usage
error, such as a missing path; nothing was read. Exit code 1, after all other work is done: some
files could not be read; each is logged.
"""

_TRAINED = cli.define_trained()
_TOP = flags.DEFINE_integer("top", 5, "number of classes to report for each image", 1)
_JSON = flags.DEFINE_bool("json", False, "write one JSON object per line: file, guesses")
_CSV = flags.DEFINE_bool("csv", False, "write CSV, one row per class: file, rank, label …")
_OUTPUT = cli.define_path("output", "file for the results, written atomically")
_EXPLAIN = cli.define_path("explain", "folder for a PNG of each image with its Grad-CAM heat map")
_EXPLAIN_CLASS = flags.DEFINE_string(
    "explain_class", None, "with --explain: class to explain; default: each image's most probable"
)
_LAYER = flags.DEFINE_string(
    "layer",
    None,
    "with --explain: layer to explain, such as inception_4e for a finer heat map; default: the "
    "last inception module",
)
_SPLIT = flags.DEFINE_string("split", None, "split of the data set to predict, such as test")
# The only data setting that may change: the others must be those of the training.
_DIRECTORY = flags.DEFINE_string(
    "config.data.directory",
    None,
    "with --split: directory of the prepared data; default: as in training",
)
_DTYPE = cli.define_inference_dtype()
_PLATFORM = cli.define_platform()
cli.require_with("explain_class", "explain")
cli.require_with("layer", "explain")
cli.require_with("config.data.directory", "split")
# Flags may follow image files.
flags.FLAGS.set_gnu_getopt(True)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    _check_flags(positional)
    from inception_jax.inference import image_files

    images = image_files.find(positional) if positional else None
    if images and _EXPLAIN.value is not None:
        _check_explain_folder(images)
    from inception_jax.inference import load
    from inception_jax.runtime import devices

    devices.initialize(platform=_PLATFORM.value, log=console.log)
    weights = load.load(**_TRAINED.values(), log=console.log)
    if _EXPLAIN.value is not None:
        access.check_output_folder(_EXPLAIN.value, "explain")
    if _OUTPUT.value is not None:
        access.check_output_file(_OUTPUT.value, "output")
    console.log(f"network: {weights}")
    weights = load.for_inference(weights, _DTYPE.value, console.log)
    if images is None:
        _predict_split(weights)
    else:
        _predict_files(weights, images)


def _check_flags(positional: Sequence[str]) -> None:
    """Checks that the flags are compatible."""
    if bool(positional) == (_SPLIT.value is not None):
        raise UserError("give either image files and folders or --split=NAME. See --help")
    if _JSON.value and _CSV.value:
        raise UserError("--json and --csv: cannot be combined; use one of them")
    only_files = (_JSON.value, _CSV.value, _EXPLAIN.value is not None, _TOP.value != _TOP.default)
    if _SPLIT.value is not None and any(only_files):
        raise UserError(
            "--split: cannot be combined with --json, --csv, --explain or --top; omit those"
        )


def _check_explain_folder(images: "ImageFiles") -> None:
    """Refuses to write heat maps into a folder whose images are classified."""
    from inception_jax.inference.image_files import STDIN

    folder = paths.absolute(_EXPLAIN.value)
    for name in images.files:
        if name != STDIN and paths.absolute(paths.from_text(name).parent) == folder:
            raise UserError(
                f"--explain={_EXPLAIN.value}: contains images to classify, such as {name}; use "
                "another folder"
            )


def _predict_files(weights: "Weights", images: "ImageFiles") -> None:
    """Writes the best classes of image files, and logs which could not be read."""
    from inception_jax.datasets.builders import folders
    from inception_jax.inference import output_formats
    from inception_jax.inference.predictor import Predictor, batch_size_for, classify, read_files

    if images.skipped:
        skipped = join_truncated([folders.escape_for_display(path) for path in images.skipped])
        console.log(f"skipped, no image extension: {skipped}")
    predictor = Predictor(weights, batch_size=batch_size_for(len(images.files)))
    console.log(f"images: {predictor.preparation}, as in evaluation")
    heat_maps = _heat_maps(predictor)
    format = output_formats.FORMATS["json" if _JSON.value else "csv" if _CSV.value else "table"]
    loaded = read_files(predictor, images.files, view_size=heat_maps.view_size if heat_maps else 0)
    failed = 0
    with _open_results(format) as file, _progress(len(images.files), predictor) as progress:
        for batch in classify(predictor, loaded):
            for each in batch:
                if isinstance(each, DataError):
                    progress.log(str(each))
                    failed += 1
                else:
                    predictions = predictor.top_k(each.logits, _TOP.value)
                    file.write(format.entry(each.image.name, predictions))
            if heat_maps:
                heat_maps.draw([each for each in batch if not isinstance(each, DataError)])
            file.flush()
            progress.update(len(batch))
    if heat_maps:
        console.log(f"heat maps of {heat_maps.layer} ({heat_maps.count:,}): {_EXPLAIN.value}")
    if failed:
        raise RunError(
            f"{failed:,} of {len(images.files):,} files could not be read; see the lines above"
        )


def _heat_maps(predictor: "Predictor") -> "HeatmapWriter | None":
    """Returns the writer of heat maps, or None without --explain."""
    if _EXPLAIN.value is None:
        return None
    # Imports matplotlib.
    from inception_jax.inference.gradcam import Explainer, HeatmapWriter

    explainer = Explainer(predictor, _LAYER.value or "")
    height, width = explainer.grid
    console.log(f"heat maps: Grad-CAM of {explainer.layer}, {height} × {width}")
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
    format = output_formats.split_format(class_ids(data))
    predictor = Predictor(weights, batch_size=batch_size_for(len(split)))
    order = sorted(range(len(split)), key=lambda n: image_files.natural_key(split.names[n]))
    with _open_results(format) as file, _progress(len(order), predictor) as progress:
        batches = [np.array(batch) for batch in decode.chunks(order, predictor.batch_size)]
        for batch, pixels in zip(batches, decode.threaded_map(split.read, batches), strict=True):
            for n, best in zip(batch, predictor.predict(pixels, 1), strict=True):
                file.write(format.entry(split.names[n], best))
            progress.update(len(batch))


def _data_settings(weights: "Weights") -> "Data":
    """Returns the settings of the data set that a network was trained on.

    Raises:
      UserError: if they are unknown.
    """
    import dataclasses

    from inception_jax.config import Data
    from inception_jax.inference import load
    from inception_jax.registry import DATASETS
    from inception_jax.training import workdir

    if _TRAINED.workdir.value is not None:
        folder = load.open_workdir(_TRAINED.workdir.value)
        data = workdir.require_record(folder, needs_data=True).config.data
    elif weights.dataset:
        data = Data(
            name=weights.dataset,
            image_size=weights.image_size,
            eval_crop_pct=weights.eval_crop,
            storage="decoded" if weights.eval_crop == 1 else "records",
        )
        if list(DATASETS.get(data.name).problems(data, Data())):
            raise UserError(
                f"--split={_SPLIT.value}: {weights.origin} does not record which data set of "
                f"{data.name} it was trained on; use --workdir=DIR, or give the split's image files"
            )
    else:
        raise UserError(
            f"--split={_SPLIT.value}: {weights.origin} does not name its data set; use "
            "--workdir=DIR, or give the split's image files"
        )
    directory = data.directory if _DIRECTORY.value is None else _DIRECTORY.value
    # Only training may prepare changed data again, not prediction.
    return dataclasses.replace(data, directory=directory, on_change="refuse")


def _open_split(weights: "Weights", data: "Data") -> "Split":
    """Returns the split named by --split, preprocessed as in evaluation."""
    from inception_jax.datasets.dataset import prepare
    from inception_jax.training import initialization

    dataset = prepare(data, log=console.log)
    initialization.check_classes(weights, dataset)
    if _SPLIT.value == dataset.train_split:
        return dataset.train_eval_view
    if _SPLIT.value not in dataset.splits:
        raise UserError(
            f"--split={_SPLIT.value}: no such split of {dataset.name}; use one of "
            f"{', '.join(dataset.splits)}"
        )
    return dataset.splits[_SPLIT.value]


@contextlib.contextmanager
def _open_results(format: "Format") -> Iterator[TextIO]:
    """Opens the output for the results and writes the format's header."""
    from inception_jax.inference import output_formats

    with output_formats.open_output(_OUTPUT.value) as file:
        file.write(format.header)
        yield file


def _progress(total: int, predictor: "Predictor") -> "Progress":
    """Returns a progress bar, visible if it takes a while and results do not go to the terminal."""
    from inception_jax.console import Progress

    to_terminal = _OUTPUT.value is None and sys.stdout.isatty()
    visible = total > predictor.batch_size and not to_terminal
    return Progress("classifying", total, log=console.log, visible=visible)


if __name__ == "__main__":
    cli.run(main, USAGE)
