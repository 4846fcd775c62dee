"""Classifies new images with trained weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax.datasets import decode
from inception_jax.errors import DataError, UserError, nearest
from inception_jax.inference import image_files
from inception_jax.input import augment
from inception_jax.models import ops
from inception_jax.models.weights import Variables, Weights, check_weights

# Files that a thread reads and decodes at a time.
_CHUNK_SIZE = 4


class Prediction(NamedTuple):
    """A class with its predicted probability.

    Attributes:
      label: number of the class.
      name: its name, or its number if the weights have no class names.
      probability: softmax of the logits, between 0 and 1.
    """

    label: int
    name: str
    probability: float


class LoadedImage(NamedTuple):
    """An image file that has been read.

    Attributes:
      name: its path, as a single line.
      pixels: uint8 [S, S, 3], the input of `Predictor.logits`.
      view: uint8 [V, V, 3], the same part of the image for display.
    """

    name: str
    pixels: np.ndarray
    view: np.ndarray


class ClassifiedImage(NamedTuple):
    """An image with its logits.

    Attributes:
      image: as it was read.
      logits: float32 [classes].
    """

    image: LoadedImage
    logits: np.ndarray


class Predictor:
    """Classifies images with trained weights, preprocessed as in evaluation.

    Images are cropped, resized and normalized as the weights record for their evaluation, so an
    image of the data set gets the same logits as in evaluation. Thread-safe.

    Attributes:
      weights: as passed.
      model: the network.
      variables: of the network, on the device.
      batch_size: images computed at a time.

    Args:
      weights: of the network.
      batch_size: images computed at a time; smaller batches are padded, so that only one program is
        compiled.
    """

    def __init__(self, weights: Weights, *, batch_size: int = 64) -> None:
        check_weights(weights)
        self.weights = weights
        self.batch_size = batch_size
        self.model = weights.network
        self.variables: Variables = jax.device_put(weights.variables)
        self._logits = jax.jit(self._compute_logits, compiler_options=self.compiler_options)

    @property
    def compiler_options(self) -> dict[str, bool]:
        """Compiler options for programs of the network."""
        return ops.compiler_options(self.model)

    @property
    def preparation(self) -> str:
        """The crop and resizing of an image before the network sees it, in words."""
        size, final = self.weights.image_size, self.weights.eval_image_size
        crop = self.weights.eval_crop
        part = "" if crop == 1 else f"the middle {crop:.1%} of "
        words = f"{part}the center square, resized to {size} × {size} px"
        return f"{words}, then to {final} × {final} px" if final not in (0, size) else words

    def read(self, data: bytes, name: str) -> np.ndarray:
        """Returns the pixels of an image file, as `logits` expects them.

        Args:
          data: the file's content, in any format, size and color mode that PIL reads; its EXIF
            orientation is applied.
          name: of the file, for errors.

        Returns:
          uint8 [S, S, 3], S the training image size.

        Raises:
          DataError: if it cannot be decoded.
        """
        return self.view(data, name, self.weights.image_size)

    def view(self, data: bytes, name: str, size: int) -> np.ndarray:
        """Returns the part of an image that the network sees, uint8 [size, size, 3].

        Args:
          data, name: see `read`.
          size: height and width, pixels.

        Raises:
          DataError: if it cannot be decoded.
          UserError: if it is not the content of a file.
        """
        _check_content(data, name)
        weights = self.weights
        return decode.decode(data, size, name, weights.eval_crop, bit_depth=weights.bit_depth)

    def logits(self, pixels: np.ndarray) -> np.ndarray:
        """Returns the network's logits, float32 [N, classes].

        Args:
          pixels: uint8 [N, S, S, 3], RGB, N at least 1, S the training image size. Other dtypes and
            shapes are rejected, since their meaning would be a guess.

        Raises:
          UserError: if the pixels have another dtype or shape.
        """
        return self.map_batches(self._logits, self.validate_pixels(pixels))

    def predict(self, pixels: np.ndarray, count: int = 5) -> list[list[Prediction]]:
        """Returns the most probable classes of each image, best first.

        Args:
          pixels: uint8 [N, S, S, 3]; see `logits`.
          count: number of classes per image; fewer if the network has fewer.

        Raises:
          UserError: if the pixels have another dtype or shape.
        """
        return [self.top_k(row, count) for row in self.logits(pixels)]

    def top_k(self, logits: np.ndarray, count: int = 5) -> list[Prediction]:
        """Returns an image's most probable classes, best first, from logits float32 [classes]."""
        # Stable: among equal logits the lower label comes first.
        order = np.argsort(-logits, kind="stable")[:count]
        return [self.prediction(logits, int(label)) for label in order]

    def prediction(self, logits: np.ndarray, label: int) -> Prediction:
        """Returns a class with its probability, from one image's logits, float32 [classes]."""
        exponentials = np.exp(logits.astype(np.float64) - logits.max())
        return Prediction(
            label, self.class_name(label), float(exponentials[label] / exponentials.sum())
        )

    def class_name(self, label: int) -> str:
        """Returns the name of a class, or its number if the weights have no class names."""
        return self.weights.class_names[label] if self.weights.class_names else str(label)

    def label(self, name: str) -> int:
        """Returns the number of a class, given its name or number.

        Raises:
          UserError: if there is no such class.
        """
        names = [self.class_name(label) for label in range(self.weights.num_classes)]
        if name in names:
            return names.index(name)
        if name.isdecimal() and int(name) < len(names):
            return int(name)
        raise UserError(
            f"class {name!r}: no such class.{nearest(name, names)} Use one of the network's "
            f"{len(names)} class names, or a number from 0 to {len(names) - 1}"
        )

    def validate_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """Returns images as an array, after checking that `logits` accepts them.

        Raises:
          UserError: if they have another dtype or shape, or there are none, with the remedy.
        """
        try:
            pixels = np.asarray(pixels)
        except ValueError as error:
            raise UserError(f"pixels: must be one array of all images: {error}") from error
        self._check(pixels, _numbers_remedy(pixels))
        if not len(pixels):
            raise UserError("pixels: must contain at least one image")
        return pixels

    def _check(self, pixels: Any, numbers: str) -> None:
        """Checks dtype and shape of images, which may be traced.

        Args:
          pixels: an array.
          numbers: the remedy if the dtype is wrong.
        """
        size = self.weights.image_size
        remedies = []
        if pixels.shape[1:] != (size, size, 3):
            remedies.append(_shape_remedy(pixels.shape, size))
        if pixels.dtype != np.uint8:
            remedies.append(numbers)
        if remedies:
            raise UserError(
                f"pixels: must be uint8 [N, {size}, {size}, 3], RGB, got {pixels.dtype} "
                f"{list(pixels.shape)}. {'. '.join(remedies)}"
            )

    def preprocess(self, pixels: jax.Array) -> jax.Array:
        """Returns the network's input, float32 [N, H, W, 3], for images uint8 [N, S, S, 3].

        Raises:
          UserError: if they have another dtype or shape.
        """
        self._check(pixels, _ASTYPE)
        weights = self.weights
        size = weights.eval_image_size or weights.image_size
        images = augment.resize(pixels, size, weights.resize_kernel)
        return augment.normalize(images, weights.mean, weights.std)

    def map_batches(self, compute: Callable[..., jax.Array], *arrays: np.ndarray) -> np.ndarray:
        """Applies a function to arrays in batches, and returns the concatenated results.

        Args:
          compute: maps the network's variables and arrays [batch_size, …] to an array [batch_size,
            …], row by row.
          arrays: [N, …], N at least 1.
        """
        parts = [
            self._apply_padded(
                compute, [array[start : start + self.batch_size] for array in arrays]
            )
            for start in range(0, len(arrays[0]), self.batch_size)
        ]
        return np.concatenate(parts)

    def _apply_padded(
        self, compute: Callable[..., jax.Array], arrays: Sequence[np.ndarray]
    ) -> np.ndarray:
        count = len(arrays[0])
        missing = self.batch_size - count
        padded = [np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in arrays]
        return np.asarray(compute(self.variables, *padded))[:count]

    def _compute_logits(self, variables: Variables, pixels: jax.Array) -> jax.Array:
        output: Any = self.model.apply(variables, self.preprocess(pixels), train=False)
        return output.logits.astype(jnp.float32)


def _check_content(data: object, name: str) -> None:
    """Checks that an argument is a file's content, not its path."""
    if not isinstance(data, bytes | bytearray | memoryview):
        raise UserError(
            f"{name}: must be the content of an image file, as bytes, got "
            f"{type(data).__name__}; use pathlib.Path(FILE).read_bytes()"
        )


# The remedy for a dtype other than uint8.
_ASTYPE = "Use integers from 0 to 255: pixels.astype(numpy.uint8)"


def _numbers_remedy(pixels: np.ndarray) -> str:
    """Returns the remedy for an array whose dtype is not uint8."""
    if pixels.dtype == bool or pixels.dtype.kind not in "iuf" or not pixels.size:
        return "Use an array of integers from 0 to 255"
    low, high = pixels.min(), pixels.max()
    if pixels.dtype.kind == "f" and low >= 0 and high <= 1:
        return "Its values are from 0 to 1; use (pixels * 255).round().astype(numpy.uint8)"
    if low >= 0 and high <= 255:
        return f"Its values are from {low:g} to {high:g}; use pixels.round().astype(numpy.uint8)"
    return (
        f"Its values are from {low:g} to {high:g}; use the images before normalization, which the "
        "predictor does itself"
    )


def _shape_remedy(shape: Sequence[int], size: int) -> str:
    """Returns the remedy for an array whose shape is not [N, size, size, 3]."""
    read = "or prepare the files with the predictor's read()"
    if len(shape) == 3 and shape[-1] == 3:
        return f"For a single image, use pixels[None], {size} × {size} px"
    if (len(shape), shape[-3:-2]) in ((3, (3,)), (4, (3,)), (4, (1,))) and shape[-1] > 4:
        return "Channels must come last; use numpy.moveaxis(pixels, -3, -1)"
    if len(shape) == 4 and shape[-1] == 4:
        return f"To drop the alpha channel, use pixels[..., :3], {read}"
    if len(shape) == 4 and shape[-1] == 1:
        return f"For gray images, use numpy.repeat(pixels, 3, axis=-1), {read}"
    if len(shape) in (2, 3):
        return f"For gray images, use numpy.stack([pixels] * 3, axis=-1), {read}"
    if len(shape) == 4 and shape[-1] == 3:
        return f"Resize the images to {size} × {size} px, {read}"
    return "Use one array of all images"


def batch_size_for(count: int) -> int:
    """Returns the batch size for a number of images: a power of two up to 64.

    This wastes little padding and compiles few programs.

    >>> batch_size_for(1), batch_size_for(3), batch_size_for(1000)
    (1, 4, 64)
    """
    return min(64, 1 << (count - 1).bit_length())


def read_files(
    predictor: Predictor, files: Sequence[str], *, view_size: int = 0
) -> Iterator[LoadedImage | DataError]:
    """Yields the image of each file, or the error, in order; reads ahead in threads.

    Args:
      predictor: determines the preprocessing.
      files: paths, or `image_files.STDIN`.
      view_size: height and width of the views, pixels; 0: use the pixels as views.
    """

    def read(file: str) -> LoadedImage | DataError:
        name = image_files.display_name(file)
        try:
            data = image_files.read(file)
            pixels = predictor.read(data, name)
            view = predictor.view(data, name, view_size) if view_size else pixels
        except DataError as error:
            return error
        return LoadedImage(name, pixels, view)

    return decode.threaded_map(read, files, _CHUNK_SIZE)


def classify(
    predictor: Predictor, read: Iterable[LoadedImage | DataError]
) -> Iterator[list[ClassifiedImage | DataError]]:
    """Yields the results of `read_files` in batches, with the logits of each image."""
    for batch in decode.chunks(read, predictor.batch_size):
        pixels = [each.pixels for each in batch if isinstance(each, LoadedImage)]
        logits = iter(predictor.logits(np.stack(pixels)) if pixels else ())
        yield [
            ClassifiedImage(each, next(logits)) if isinstance(each, LoadedImage) else each
            for each in batch
        ]
