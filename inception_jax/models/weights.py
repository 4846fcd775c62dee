"""Weights of a network as one file, with all that using them takes, and nothing else.

How they were trained is in the run's folder: a file outlives the settings of a training, which
are renamed and taken away. The format is safetensors: numbers and text, nothing that runs when it
is read. A tensor is named by its path in the variables ("params/conv1/conv/kernel"). The rest is
one JSON text in the metadata, under "inception_jax": the format keeps no order of several entries,
and the same weights are to give the same bytes.
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
from inception_jax.storage import atomic
from inception_jax.version import __version__

# Rises when files are written that older versions would read wrongly. Format 1 has all settings of
# the training, as "config", in place of those that inference needs.
FORMAT = 2
_KEY = "inception_jax"
_PICKLE_SUFFIXES = (".pth", ".pt", ".pkl", ".pickle", ".bin", ".ckpt")
# A zip archive, as PyTorch writes, and a bare pickle of protocol 2 and later.
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

Variables = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Trained variables and what they mean.

    Attributes:
      variables: {"params", "batch_stats"}, nested, of float32 arrays; batch_stats is empty for a
        network without BatchNorm.
      model: settings of the network; a copy of those given.
      image_size: height and width of the images of their training, pixels.
      class_names: in the order of the logits; empty: unknown.
      mean, std: float32 [3], of the normalisation (pixel / 255 - mean) / std of their images. A
        deviation of 0, of a channel that never changes, becomes 1.
      eval_crop: share of an image's centred square that evaluation keeps, between 0 and 1.
      eval_image_size: what evaluation resizes the images to, pixels; 0: they stay as they are.
      bit_depth: of the images of their training, as `datasets.dataset.Dataset` has it.
      experiment: name of the training's settings; "": unknown.
      dataset, dataset_version: name and version of the data set; "": unknown.
      is_average: whether they are a moving average.
      step, epoch: length of their training; None: unknown.
      metrics: of an evaluation of them, such as top1 in percent; empty: unknown.
      checkpoint: which of their run they were: "best", "last" or "best and last"; "": neither, or
        unknown.
      revision: commit of the source that wrote them; None: unknown.
      version: of the package that wrote them.
      origin: where they were read from, for messages; it is not written.
      module: the network itself, where it is an object of a program's own that no settings name;
        such weights cannot be written.
    """

    variables: Variables
    model: Model
    image_size: int
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    eval_crop: float = 1.0
    eval_image_size: int = 0
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
        """The network whose variables they are, to be called as `networks.create` says.

        Raises:
          ConfigError: if nothing registered a network of its name, or it has no classifier.
        """
        return self._create(self.num_classes)

    def _create(self, num_classes: int) -> nn.Module:
        if self.module is not None:
            return protocol.adapted(self.module, name=type(self.module).__name__, place="model")
        try:
            return networks.create(self.model, num_classes)
        except ConfigError as error:
            known = self.model.name in registry.MODELS
            remedy = "" if known else ". On the command line, give that file as --parts=FILE"
            raise ConfigError(f"{self.origin or 'weights'}: {error}{remedy}") from error

    @functools.cached_property
    def num_classes(self) -> int:
        """How many logits the network gives; 0: the weights are without a classifier."""
        network = self._create(1)
        if self.class_names and protocol.said(network, "classifiers") is None:
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
    """Checks that a caller gave weights.

    Raises:
      UserError: if it is something else, such as the path of a file.
    """
    if not isinstance(weights, Weights):
        raise UserError(
            f"weights: must be Weights, got {type(weights).__name__}; load a run's folder or a "
            "file with inception_jax.load_weights(PATH)"
        )


def save(path: pathlib.Path, weights: Weights, *, dtype: str = "float32") -> None:
    """Writes a file of weights, whole or not at all.

    Args:
      path: of the file; one that is there is replaced.
      weights: to write.
      dtype: of the parameters, "float32" or "bfloat16". BatchNorm statistics stay float32: they are
        0.2% of the numbers, and rounding them alone moved the logits of a trained MiniGoogLeNet by
        up to 0.05 of 19.5, where rounding the parameters moved them by up to 0.07.

    Raises:
      UserError: if the file cannot be written, or no settings name the network.
    """
    if weights.module is not None:
        raise UserError(
            f"{path}: no file can have a network that is an object of a program "
            f"({type(weights.module).__name__}). Register it with inception_jax.register_model, "
            "and train by its name"
        )
    arrays = {
        name: np.ascontiguousarray(
            value, jnp.dtype(dtype if name.startswith("params/") else "float32")
        )
        for name, value in flatten(weights.variables).items()
    }
    data = safetensors_numpy.save(arrays, metadata={_KEY: json.dumps(_description(weights))})
    with atomic.replacing(path) as temporary:
        # Its own save_file would let nobody else read the file.
        temporary.write_bytes(data)


def load(path: pathlib.Path, log: Callable[[str], None] = print) -> Weights:
    """Reads a file that `save` wrote, of this or an older version.

    Args:
      path: of the file.
      log: takes a line for each setting of the network that this version does not have.

    Raises:
      DataError: if it is not there, damaged, of a newer format, a pickle, or was not written here.
    """
    arrays, metadata = read_arrays(path)
    if _KEY not in metadata:
        raise DataError(
            f"{path}: says nothing about its network and classes, so it was not written by this "
            "package. Weights of torchvision's GoogLeNet become such a file by "
            "python -m inception_jax.tools.import_weights"
        )
    try:
        fields, notes = _fields(json.loads(metadata[_KEY]))
        variables = unflatten({name: np.array(a, np.float32) for name, a in arrays.items()})
        found = Weights(variables=variables, origin=str(path), **fields)
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise DataError(
            f"{path}: its description cannot be read: {error}. It was written by another version "
            "of this package, or changed since: export it again, or use the version that wrote it"
        ) from error
    if len(found.class_names) not in (0, found.num_classes):
        raise DataError(
            f"{path}: has {len(found.class_names)} class names and {found.num_classes} logits, so "
            "it was changed since it was written: export it again"
        )
    for note in notes:
        log(f"{path}: {note}")
    return found


def read_arrays(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns the tensors of any safetensors file by name, and its metadata.

    Raises:
      DataError: if it is not there, damaged or no such file.
    """
    try:
        is_pickle = looks_like_pickle(path)
        with safe_open(path, framework="np") as tensors:
            return tensors.get_tensors(), tensors.metadata() or {}
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read: {error.strerror or error}. Give a file of weights"
        ) from error
    except SafetensorError as error:
        if is_pickle:
            raise DataError(
                f"{path}: is no safetensors file but, it seems, a pickle, which may run any "
                "program when it is read. Weights of torchvision's GoogLeNet become such a file by "
                "python -m inception_jax.tools.import_weights"
            ) from error
        raise DataError(
            f"{path}: is no safetensors file, or only a part of one ({error}). Copy or download it "
            "again, or export it again with python -m inception_jax.tools.export"
        ) from error


def looks_like_pickle(path: pathlib.Path) -> bool:
    """Returns whether a file is what torch.save writes: by its first bytes, else by its name.

    Raises:
      OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_PICKLE_STARTS):
        return True
    # safetensors begins with the length of its description, in JSON.
    return start[8:] != b"{" and path.suffix.lower() in _PICKLE_SUFFIXES


def flatten(variables: Variables) -> dict[str, Any]:
    """Returns the leaves of nested variables by path, with slashes."""
    return traverse_util.flatten_dict(variables, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Variables:
    """Returns what `flatten` was given; batch_stats is there even if it is empty."""
    return {"batch_stats": {}} | traverse_util.unflatten_dict(leaves, sep="/")


# What a file says in other words than `Weights`, or not at all; the rest it says by the same names.
_IN_OTHER_WORDS = {"variables", "model", "class_names", "mean", "std", "metrics", "origin"}
_AS_THEY_ARE = [
    field.name for field in dataclasses.fields(Weights) if field.name not in _IN_OTHER_WORDS
]


def _description(weights: Weights) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": dataclasses.asdict(weights.model),
        "class_names": list(weights.class_names),
        # Every float32 is a double too, so the text gives back the same bits.
        "mean": weights.mean.tolist(),
        "std": weights.std.tolist(),
        "metrics": dict(weights.metrics),
        **{name: getattr(weights, name) for name in _AS_THEY_ARE},
    }


def _fields(description: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Returns the fields of `Weights` that a description gives, and lines for the log."""
    version = description["format"]
    if version not in (1, FORMAT):
        raise ValueError(f"its format is {version}; this version reads up to {FORMAT}")
    settings = description["config"] if version == 1 else {"model": description["model"]}
    config, notes = configs.read_settings(settings)
    found = {name: description[name] for name in _AS_THEY_ARE if name in description}
    if version == 1:
        found = _inferred(config) | found
    found |= {
        "model": config.model,
        "class_names": tuple(description["class_names"]),
        "mean": np.array(description["mean"], np.float32),
        "std": np.array(description["std"], np.float32),
        "metrics": description["metrics"],
    }
    # Of the training's settings in format 1 only these still mean something.
    return found, [note for note in notes if note.startswith("config.model.")]


def _inferred(config: Config) -> dict[str, Any]:
    """Returns what files of format 1 say in the training's settings, or do not say."""
    return {
        "eval_crop": config.data.eval_crop_pct,
        "eval_image_size": config.evaluation.image_size,
        "bit_depth": configs.unrecorded_bit_depth(config.data.name),
        "experiment": config.name,
        "dataset": config.data.name,
    }
