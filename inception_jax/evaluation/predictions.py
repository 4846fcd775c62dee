"""What a network said of each evaluated example, and the file in which a run keeps it.

Every evaluation of a run leaves `predictions.npz` in its folder, which a report is made of without
the data set and without a second pass over it. A few pictures are in it, too: those that a report
shows. It is a plain NumPy archive, with no pickled objects.
"""

import dataclasses
import json
import pathlib
import zipfile
import zlib
from typing import Any

import numpy as np
from PIL import Image

from inception_jax.datasets.splits import Split
from inception_jax.errors import UserError
from inception_jax.storage import atomic
from inception_jax.storage.workdir import Workdir

# How many of the most probable classes are kept of each example.
BEST = 5
# How many mistakes and right answers are kept as pictures, and the longest side of those, pixels.
MISTAKES = 24
RIGHT = 12
MOST_PIXELS = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """What a network said of N examples of K classes.

    Attributes:
      labels: int32 [N], the true classes.
      guesses: int32 [N, G], the G = min(5, K) most probable classes, the most probable first.
      probabilities: float32 [N, G], of the guesses, by the softmax of the logits.
      own: float32 [N], the probability of the true class.
    """

    labels: np.ndarray
    guesses: np.ndarray
    probabilities: np.ndarray
    own: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> np.ndarray:
        """Whether the most probable class is the true one: bool [N]."""
        return self.guesses[:, 0] == self.labels

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the most probable class: float32 [N]."""
        return self.probabilities[:, 0]


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluated:
    """An evaluation, as it is kept in a run's folder.

    Attributes:
      result: what result.json would hold if the run had ended there.
      predictions: of all examples of the split.
      shown: int64 [M], which of them have a picture: first the mistakes, then the right answers.
      names: M file names.
      pictures: uint8 [M, H, W, 3].
    """

    result: dict[str, Any]
    predictions: Predictions
    shown: np.ndarray
    names: tuple[str, ...]
    pictures: np.ndarray


def choose(predictions: Predictions) -> np.ndarray:
    """Returns which examples are worth a look: int64 [M], at most MISTAKES + RIGHT.

    First the mistakes that the network was surest of, the surest first; then right answers, evenly
    spaced in the order of the split, which is shuffled.
    """
    wrong, right = np.flatnonzero(~predictions.right), np.flatnonzero(predictions.right)
    # Stable: of equally sure ones the first comes first, on every machine.
    order = np.argsort(-predictions.confidence[wrong], kind="stable")
    spaced = np.linspace(0, len(right) - 1, min(RIGHT, len(right))).astype(np.int64)
    return np.concatenate([wrong[order][:MISTAKES], right[spaced]])


def gather(result: dict[str, Any], predictions: Predictions, split: Split) -> Evaluated:
    """Returns an evaluation with the pictures of the examples that are worth a look.

    Args:
      result: of the loop.
      predictions: of all examples of the split.
      split: where the pictures are read.
    """
    shown = choose(predictions)
    pixels = split.read(shown)
    if split.image_size > MOST_PIXELS:
        size = (MOST_PIXELS, MOST_PIXELS)
        pixels = np.stack([np.asarray(Image.fromarray(each).resize(size)) for each in pixels])
    return Evaluated(
        result=result,
        predictions=predictions,
        shown=shown,
        names=tuple(split.names[index] for index in shown),
        pictures=pixels,
    )


def write(path: pathlib.Path, evaluated: Evaluated) -> None:
    """Writes an evaluation's file into a run's folder, whole or not at all.

    Raises:
      WriteError: if it cannot be written.
    """
    with atomic.replacing(Workdir(path).predictions) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            result=np.array(json.dumps(evaluated.result)),
            shown=evaluated.shown,
            names=np.array(evaluated.names, np.str_),
            pictures=evaluated.pictures,
            **dataclasses.asdict(evaluated.predictions),
        )


def read(path: pathlib.Path) -> Evaluated | None:
    """Returns the evaluation that a run's folder holds, or None if it holds none.

    Raises:
      UserError: if its file cannot be read as that.
    """
    path = Workdir(path).predictions
    fields = [field.name for field in dataclasses.fields(Predictions)]
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as found:
            return Evaluated(
                result=json.loads(str(found["result"])),
                predictions=Predictions(**{name: found[name] for name in fields}),
                shown=found["shown"],
                names=tuple(map(str, found["names"])),
                pictures=found["pictures"],
            )
    except FileNotFoundError:
        return None
    # What NumPy and zipfile raise for a file that is no such archive, or a damaged one.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not a readable predictions file: {error}. Delete it; rerunning the training "
            "command recreates it"
        ) from error
