"""Formats predictions as text: for people, for programs, and for a leaderboard."""

import contextlib
import csv
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TextIO

from inception_jax.datasets.builders import folders
from inception_jax.inference.predictor import Prediction
from inception_jax.storage import atomic, paths


class Format(NamedTuple):
    """A text format for predictions.

    Attributes:
      header: text before the first image.
      entry: returns the text for an image, given its name and its predictions, best first.
    """

    header: str
    entry: Callable[[str, Sequence[Prediction]], str]


def _table(name: str, predictions: Sequence[Prediction]) -> str:
    # Class names must not be able to send control codes to the terminal.
    lines = [
        f"{each.probability:9.2%}  {folders.escape_for_display(each.name)}" for each in predictions
    ]
    return "\n".join([name, *lines, ""])


def _json(name: str, predictions: Sequence[Prediction]) -> str:
    values = {"file": name, "guesses": [each._asdict() for each in predictions]}
    return json.dumps(values, ensure_ascii=False) + "\n"


def _csv(name: str, predictions: Sequence[Prediction]) -> str:
    return _rows(
        [name, rank, each.label, each.name, f"{each.probability:.6g}"]
        for rank, each in enumerate(predictions, 1)
    )


def _rows(rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


FORMATS: Mapping[str, Format] = {
    "table": Format("", _table),
    "json": Format("", _json),
    "csv": Format("file,rank,label,name,probability\n", _csv),
}


def split_format(class_ids: Sequence[str]) -> Format:
    """Returns the format for a split's predictions: one line per image, with its best class.

    Args:
      class_ids: by label. If given, a line has the format of Tiny ImageNet's leaderboard, file name
        without folders and class id: "test_0.JPEG n01443537". If empty, it is a CSV row of the
        file's path and the class name, after a header.
    """
    if class_ids:
        return Format(
            "", lambda name, best: f"{os.path.basename(name)} {class_ids[best[0].label]}\n"
        )
    return Format("file,class\n", lambda name, best: _rows([[name, best[0].name]]))


@contextlib.contextmanager
def open_output(path: paths.Path | None) -> Iterator[TextIO]:
    """Opens a text file to be written atomically, or standard output for None.

    Raises:
      UserError: if the file cannot be written.
    """
    if path is None:
        yield sys.stdout
        sys.stdout.flush()
        return
    with atomic.replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        yield file
