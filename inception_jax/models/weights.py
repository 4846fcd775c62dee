"""Weights files: the weights of a network with everything needed to use them, and nothing else.

How they were trained is recorded in the workdir: a file outlives training settings, which get
renamed and removed. The format is safetensors: numbers and text, so reading it runs no code. A
tensor is named by its path in the variables ("params/conv1/conv/kernel"). Everything else is one
JSON text in the metadata, under "inception_jax": the format does not keep the order of several
entries, and the same weights must give the same bytes.
"""

import copy
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from safetensors import SafetensorError, safe_open
from safetensors import numpy as safetensors_numpy

from inception_jax import config as configs
from inception_jax import registry
from inception_jax.config import Config, Model
from inception_jax.errors import ConfigError, DataError, UserError
from inception_jax.models import networks, protocol
from inception_jax.storage import access, atomic, paths
from inception_jax.version import __version__

# Increased when older versions would misread new files. Format 1 has all training settings, as
# "config", instead of those that inference needs.
FORMAT = 2
_KEY = "inception_jax"
_PICKLE_SUFFIXES = (".pth", ".pt", ".pkl", ".pickle", ".bin", ".ckpt")
# A zip archive, as PyTorch writes, and a bare pickle of protocol 2 or later.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Trained variables and their metadata.

    Attributes:
      variables: nested {"params", "batch_stats"} of float32 arrays; batch_stats is empty for a
        network without BatchNorm.
      model: settings of the network; copied.
      image_size: height and width of the training images, pixels.
      class_names: in the order of the logits; empty: unknown.
      mean, std: float32 [3], of the normalization (pixel / 255 - mean) / std. A deviation of 0, of
        a constant channel, becomes 1.
      eval_crop: fraction of an image's center square that evaluation keeps, between 0 and 1.
      eval_image_size: size to which evaluation resizes the images, pixels; 0: unchanged.
      resize_kernel: by which it does that (see `input.augment.resize`).
      bit_depth: of the training images (see `datasets.dataset.Dataset`).
      experiment: name of the experiment; "": unknown.
      dataset, dataset_version: name and version of the data set; "": unknown.
      is_average: whether the variables are a moving average.
      step, epoch: length of the training; None: unknown.
      metrics: of an evaluation of these weights, such as top1 in percent; empty: unknown.
      checkpoint: its role in the run: "best", "last" or "best and last"; "": neither, or unknown.
      revision: source commit that wrote them; None: unknown.
      version: of the package that wrote them.
      origin: where they were read from, for messages; not stored.
      module: the network, if it was given as an object that no settings name; such weights cannot
        be saved.
    """

    variables: Variables
    model: Model
    image_size: int
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    eval_crop: float = 1.0
    eval_image_size: int = 0
    resize_kernel: str = "linear"
    bit_depth: int = 0
    experiment: str = ""
    dataset: str = ""
    dataset_version: str = ""
    is_average: bool = False
    step: int | None = None
    epoch: float | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    checkpoint: str = ""
    revision: str | None = None
    version: str = __version__
    origin: str = ""
    module: nn.Module | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", copy.deepcopy(self.model))
        object.__setattr__(self, "std", np.where(self.std > 0, self.std, np.float32(1)))

    @property
    def network(self) -> nn.Module:
        """The network of these variables; see `networks.create` for how to call it.

        Raises:
          ConfigError: if no network is registered by its name, or it has no classifier.
        """
        return self._create(self.num_classes)

    def _create(self, num_classes: int) -> nn.Module:
        if self.module is not None:
            return protocol.adapt(self.module, name=type(self.module).__name__, place="model")
        try:
            return networks.create(self.model, num_classes)
        except ConfigError as error:
            known = self.model.name in registry.MODELS
            remedy = "" if known else ". On the command line, name that file with --parts=FILE"
            raise ConfigError(f"{self.origin or 'weights'}: {error}{remedy}") from error

    @functools.cached_property
    def num_classes(self) -> int:
        """Number of logits; 0 if the weights have no classifier."""
        network = self._create(1)
        if self.class_names and protocol.get_attribute(network, "classifiers") is None:
            return len(self.class_names)
        return protocol.num_classes(network, self.variables["params"])

    def __str__(self) -> str:
        classes = f"{self.num_classes} classes" if self.num_classes else "no classifier"
        name = self.model.name if self.module is None else type(self.module).__name__
        words = [name, classes]
        if self.step is not None and self.epoch is not None:
            role = f" ({self.checkpoint} checkpoint)" if self.checkpoint else ""
            words.append(f"step {self.step:,}, epoch {self.epoch:.2f}{role}")
        if "top1" in self.metrics:
            words.append(f"top-1 {self.metrics['top1']:.2f}%")
        return ", ".join([*words, "moving average"] if self.is_average else words)


def check_weights(weights: object) -> None:
    """Checks that an argument is `Weights`.

    Raises:
      UserError: if it is something else, such as a file's path.
    """
    if not isinstance(weights, Weights):
        raise UserError(
            f"weights: must be Weights, got {type(weights).__name__}; load a workdir or a file "
            "with inception_jax.load_weights(PATH)"
        )


def save(path: paths.Path, weights: Weights, *, dtype: str = "float32") -> None:
    """Writes a weights file atomically.

    Args:
      path: of the file, local or in a bucket; replaced if it exists.
      weights: to write.
      dtype: of the parameters, "float32" or "bfloat16". BatchNorm statistics stay float32: they are
        only 0.2% of the numbers, and rounding them changed the logits of a trained MiniGoogLeNet by
        up to 0.05 of 19.5, rounding the parameters by up to 0.07.

    Raises:
      UserError: if the file cannot be written, or no settings name the network.
    """
    if weights.module is not None:
        raise UserError(
            f"{path}: cannot store a network that was given as an object "
            f"({type(weights.module).__name__}); register it with inception_jax.register_model and "
            "train it by name"
        )
    arrays = {
        name: np.asarray(
            value, jnp.dtype(dtype if name.startswith("params/") else "float32"), order="C"
        )
        for name, value in flatten(weights.variables).items()
    }
    data = safetensors_numpy.save(arrays, metadata={_KEY: json.dumps(_description(weights))})
    with atomic.replacing(path) as temporary:
        # safetensors' save_file would make the file unreadable for other users.
        temporary.write_bytes(data)


def load(path: paths.Path, log: Callable[[str], None] = print) -> Weights:
    """Reads a file that `save` wrote, of this or an older version.

    Args:
      path: of the file, local or in a bucket.
      log: receives a line for each model setting that this version does not have.

    Raises:
      DataError: if it is missing, damaged, of a newer format, a pickle, or not from this package.
    """
    arrays, metadata = read_arrays(path)
    if _KEY not in metadata:
        raise DataError(
            f"{path}: has no description of its network and classes, so it was not written by this "
            "package. Convert weights of torchvision's GoogLeNet with "
            "python -m inception_jax.tools.import_weights"
        )
    try:
        fields, notes = _parse_description(json.loads(metadata[_KEY]))
        variables = unflatten({name: np.array(a, np.float32) for name, a in arrays.items()})
        weights = Weights(variables=variables, origin=str(path), **fields)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(
            f"{path}: its description cannot be read: {error}. It was written by another version "
            "of this package or modified since; export it again, or use the version that wrote it"
        ) from error
    if len(weights.class_names) not in (0, weights.num_classes):
        raise DataError(
            f"{path}: has {len(weights.class_names)} class names and {weights.num_classes} logits, "
            "so it was modified after it was written; export it again"
        )
    for note in notes:
        log(f"{path}: {note}")
    return weights


def read_arrays(path: paths.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the arrays of any safetensors file, of any shape, by name, and its metadata.

    Raises:
      DataError: if it is missing, damaged, or not a safetensors file.
      BucketError: if it is in a bucket that cannot be read.
    """
    try:
        with access.local_copy(path) as local:
            is_pickle = looks_like_pickle(local)
            with safe_open(local, framework="np") as tensors:
                return tensors.get_tensors(), tensors.metadata() or {}
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}. Use a weights file"
        ) from error
    except SafetensorError as error:
        if is_pickle:
            raise DataError(
                f"{path}: must be a safetensors file; it looks like a pickle, which can run "
                "arbitrary code when it is read. Convert weights of torchvision's GoogLeNet with "
                "python -m inception_jax.tools.import_weights"
            ) from error
        raise DataError(
            f"{path}: not a safetensors file, or truncated ({error}). Copy or download it again, "
            "or export it again with python -m inception_jax.tools.export"
        ) from error


def looks_like_pickle(path: pathlib.Path) -> bool:
    """Returns whether torch.save wrote a file, judging by its first bytes, else by its name.

    Raises:
      OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_PICKLE_STARTS):
        return True
    # A safetensors file starts with the length of its JSON header.
    return start[8:] != b"{" and path.suffix.lower() in _PICKLE_SUFFIXES


def flatten(variables: Variables) -> dict[str, Any]:
    """Returns the leaves of nested variables by slash-separated path.

    >>> flatten({"params": {"conv1": {"kernel": 1}}})
    {'params/conv1/kernel': 1}
    """
    return traverse_util.flatten_dict(variables, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Variables:
    """Inverts `flatten`; always includes batch_stats, even if empty."""
    return {"batch_stats": {}} | traverse_util.unflatten_dict(leaves, sep="/")


# Fields of `Weights` that a file stores in another form or not at all; it stores the others as is.
_CONVERTED_FIELDS = {
    "variables",
    "model",
    "module",
    "class_names",
    "mean",
    "std",
    "metrics",
    "origin",
}
_VERBATIM_FIELDS = [
    field.name for field in dataclasses.fields(Weights) if field.name not in _CONVERTED_FIELDS
]


def _description(weights: Weights) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(weights.model),
        "class_names": list(weights.class_names),
        # Every float32 is also a double, so the text restores the same bits.
        "mean": weights.mean.tolist(),
        "std": weights.std.tolist(),
        "metrics": dict(weights.metrics),
        **{name: getattr(weights, name) for name in _VERBATIM_FIELDS},
    }


def _parse_description(description: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of `Weights` in a file's description, and lines for the log."""
    version = description["format"]
    if version not in (1, FORMAT):
        raise ValueError(f"format = {version}: this version reads up to {FORMAT}")
    settings = description["config"] if version == 1 else {"model": description["model"]}
    config, notes = configs.read_settings(settings)
    fields = {name: description[name] for name in _VERBATIM_FIELDS if name in description}
    if version == 1:
        fields = _format_1_fields(config) | fields
    fields |= {
        "model": config.model,
        "class_names": tuple(description["class_names"]),
        "mean": np.array(description["mean"], np.float32),
        "std": np.array(description["std"], np.float32),
        "metrics": description["metrics"],
    }
    # Of the training settings in format 1, only those of the model still matter.
    return fields, [note for note in notes if note.startswith("config.model.")]


def _format_1_fields(config: Config) -> dict[str, Any]:
    """Returns the fields that format 1 stores only in the training settings, or not at all."""
    return {
        "eval_crop": config.data.eval_crop_pct,
        "eval_image_size": config.evaluation.image_size,
        "bit_depth": configs.unrecorded_bit_depth(config.data.name),
        "experiment": config.name,
        "dataset": config.data.name,
    }
