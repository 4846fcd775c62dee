"""Predictions for each evaluated example, and the file in which a run keeps them.

Every evaluation of a run writes `predictions.npz` to its workdir, so that a report needs neither
the data set nor another pass over it. It also contains the few images that a report shows. The file
is a plain NumPy archive without pickled objects.
"""

import dataclasses
import json
import zipfile
import zlib
from typing import Any

import numpy as np
from PIL import Image

from inception_jax.datasets.splits import Split
from inception_jax.errors import UserError
from inception_jax.storage import atomic
from inception_jax.storage.workdir import Workdir

# Number of most probable classes kept for each example.
TOP_K = 5
# Number of mistakes and correct predictions kept as images, and the side of those in pixels.
MAX_MISTAKES = 24
MAX_CORRECT = 12
MAX_IMAGE_SIZE = 128


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """A network's predictions for N examples of K classes.

    Attributes:
      labels: int32 [N], the true classes.
      top_classes: int32 [N, G], the G = min(5, K) most probable classes, the most probable first.
      top_probs: float32 [N, G], their probabilities, the softmax of the logits.
      true_prob: float32 [N], the probability of the true class.
    """

    labels: np.ndarray
    top_classes: np.ndarray
    top_probs: np.ndarray
    true_prob: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def correct(self) -> np.ndarray:
        """Whether the most probable class is the true one: bool [N]."""
        return self.top_classes[:, 0] == self.labels

    @property
    def confidence(self) -> np.ndarray:
        """The probability of the most probable class: float32 [N]."""
        return self.top_probs[:, 0]


# The names of the arrays in the file.
_STORED_NAMES = {
    "labels": "labels",
    "top_classes": "guesses",
    "top_probs": "probabilities",
    "true_prob": "own",
}


@dataclasses.dataclass(frozen=True, eq=False)
class SavedEvaluation:
    """An evaluation as stored in a workdir.

    Attributes:
      result: the result.json that the run would have written if it had ended there.
      predictions: predictions for all examples of the split.
      indices: int64 [M], which examples have an image: first mistakes, then correct ones.
      names: M file names.
      images: uint8 [M, H, W, 3].
    """

    result: dict[str, Any]
    predictions: Predictions
    indices: np.ndarray
    names: tuple[str, ...]
    images: np.ndarray


def select_examples(predictions: Predictions) -> np.ndarray:
    """Selects the examples to show: int64 [M], at most MAX_MISTAKES + MAX_CORRECT.

    First the most confident mistakes, most confident first; then correct predictions, evenly spaced
    in the order of the split, which is shuffled.
    """
    wrong, correct = np.flatnonzero(~predictions.correct), np.flatnonzero(predictions.correct)
    # A stable sort gives the same order of ties on every machine.
    order = np.argsort(-predictions.confidence[wrong], kind="stable")
    spaced = np.linspace(0, len(correct) - 1, min(MAX_CORRECT, len(correct))).astype(np.int64)
    return np.concatenate([wrong[order][:MAX_MISTAKES], correct[spaced]])


def with_images(result: dict[str, Any], predictions: Predictions, split: Split) -> SavedEvaluation:
    """Returns an evaluation with the images of the examples to show.

    Args:
      result: the loop's result.
      predictions: predictions for all examples of the split.
      split: the split that the images are read from.
    """
    indices = select_examples(predictions)
    images = split.read(indices)
    if split.image_size > MAX_IMAGE_SIZE:
        size = (MAX_IMAGE_SIZE, MAX_IMAGE_SIZE)
        images = np.stack([np.asarray(Image.fromarray(image).resize(size)) for image in images])
    return SavedEvaluation(
        result=result,
        predictions=predictions,
        indices=indices,
        names=tuple(split.names[index] for index in indices),
        images=images,
    )


def write(workdir: Workdir, evaluated: SavedEvaluation) -> None:
    """Writes an evaluation's file to a workdir atomically.

    Raises:
      WriteError: if it cannot be written.
    """
    with atomic.replacing(workdir.predictions) as temporary, temporary.open("wb") as file:
        np.savez_compressed(
            file,
            result=np.array(json.dumps(evaluated.result)),
            shown=evaluated.indices,
            names=np.array(evaluated.names, np.str_),
            pictures=evaluated.images,
            **{
                stored: getattr(evaluated.predictions, name)
                for name, stored in _STORED_NAMES.items()
            },
        )


def read(workdir: Workdir) -> SavedEvaluation | None:
    """Returns the evaluation stored in a workdir, or None if there is none.

    Raises:
      UserError: if its file is not readable.
    """
    try:
        with workdir.predictions.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return SavedEvaluation(
                result=json.loads(str(archive["result"])),
                predictions=Predictions(
                    **{name: archive[stored] for name, stored in _STORED_NAMES.items()}
                ),
                indices=archive["shown"],
                names=tuple(map(str, archive["names"])),
                images=archive["pictures"],
            )
    except FileNotFoundError:
        return None
    # Raised by NumPy and zipfile for a corrupt file or one of another format.
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{workdir.location_of(workdir.predictions)}: not a readable predictions file: "
            f"{error}. Delete it; rerunning the training command recreates it"
        ) from error
