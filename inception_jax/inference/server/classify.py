"""The answers of the web page and API, independent of HTTP."""

import base64
import threading
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from inception_jax.datasets import decode
from inception_jax.errors import DataError, UserError
from inception_jax.inference import gradcam
from inception_jax.inference.gradcam import Explainer
from inception_jax.inference.predictor import Predictor

# Images decoded and classified at a time; others wait. Each may take about 300 MB.
_MAX_CONCURRENT = 2


class Limits(NamedTuple):
    """The largest image accepted.

    Attributes:
      bytes: size of the file.
      pixels: width times height.
    """

    bytes: int = 20_000_000
    pixels: int = 50_000_000


class TooLargeError(Exception):
    """An image exceeds a limit; the message is for the user."""


class PredictionService:
    """Classifies and explains images for the web service. Thread-safe.

    Attributes:
      limits: the largest image accepted.

    Args:
      predictor: with batch size 1.
      explainer: of the same network.
      limits: the largest image to accept.
    """

    def __init__(self, predictor: Predictor, explainer: Explainer, limits: Limits) -> None:
        self.limits = limits
        self._predictor, self._explainer = predictor, explainer
        self._slots = threading.BoundedSemaphore(_MAX_CONCURRENT)

    def warm_up(self) -> None:
        """Compiles the programs, so that the first request need not wait."""
        size = self._predictor.weights.image_size
        self.classify(gradcam.encode_png(np.zeros((size, size, 3), np.uint8)))

    def model_info(self) -> dict[str, Any]:
        """Returns a description of the network and its input, as JSON-compatible values."""
        weights = self._predictor.weights
        return {
            "network": str(weights),
            "classes": [self._predictor.class_name(k) for k in range(weights.num_classes)],
            "preparation": self._predictor.preparation,
            "layer": self._explainer.layer,
            "limits": self.limits._asdict(),
        }

    def classify(
        self, data: bytes, *, top: int = 5, label: int | None = None, heat_map: bool = True
    ) -> dict[str, Any]:
        """Returns the most probable classes of an image and a heat map, as JSON-compatible values.

        Args:
          data: the file's content.
          top: number of classes.
          label: of the class to explain; None: the best.
          heat_map: whether to compute a heat map.

        Raises:
          TooLargeError: if the image exceeds a limit.
          DataError: if it cannot be read.
          UserError: if there is no such class.
        """
        classes = self._predictor.weights.num_classes
        if label is not None and label >= classes:
            raise UserError(f"label = {label}: must be less than {classes}, the number of classes")
        with self._slots:
            self._check_size(data)
            try:
                pixels = self._predictor.read(data, "the image")[None]
            except decode.ImageError as error:
                raise _unreadable(error.problem) from error
            logits = self._predictor.logits(pixels)
            best = self._predictor.top_k(logits[0], top)
            answer: dict[str, Any] = {"guesses": [each._asdict() for each in best]}
            if heat_map:
                label = best[0].label if label is None else label
                explained = self._predictor.prediction(logits[0], label)
                answer |= {"explained": explained._asdict()} | self._image_urls(data, pixels, label)
            return answer

    def _check_size(self, data: bytes) -> None:
        """Rejects images that would take too much memory to decode, judging by their headers."""
        limits = self.limits
        if len(data) > limits.bytes:
            raise file_too_large(limits)
        try:
            width, height = decode.dimensions(data)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise _image_too_large("more than 90 megapixels", limits) from error
        except decode.DECODE_ERRORS:
            return  # Decoding will fail, too, and say why.
        if width * height > limits.pixels:
            raise _image_too_large(f"{width:,} × {height:,} pixels", limits)

    def _image_urls(self, data: bytes, pixels: np.ndarray, label: int) -> dict[str, str]:
        """Returns the part the network sees, without and with the heat map, as data URLs."""
        view = self._predictor.view(data, "the image", gradcam.VIEW_SIZE)
        (heat,) = self._explainer.maps(pixels, np.array([label]))
        return {"picture": _data_url(view), "heat_map": _data_url(gradcam.overlay(view, heat))}


def file_too_large(limits: Limits) -> TooLargeError:
    """Returns the error for a file that is too large."""
    return TooLargeError(
        f"The file is too large: the limit is {limits.bytes / 1e6:g} MB. Use a smaller image"
    )


def _image_too_large(size: str, limits: Limits) -> TooLargeError:
    return TooLargeError(
        f"The image has {size}; the limit is {limits.pixels / 1e6:g} megapixels. Use a smaller "
        "image"
    )


def _unreadable(problem: decode.Problem) -> DataError:
    return DataError(
        f"The image cannot be read: {problem}. {problem.advice}. Supported formats are JPEG, PNG, "
        "WebP, GIF, BMP, TIFF and AVIF"
    )


def _data_url(pixels: np.ndarray) -> str:
    return f"data:image/png;base64,{base64.b64encode(gradcam.encode_png(pixels)).decode()}"
