"""Exports a trained network to a file for other programs."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from inception_jax import cli, console
from inception_jax.errors import UserError

if TYPE_CHECKING:
    from inception_jax.config import Config
    from inception_jax.datasets.dataset import Dataset
    from inception_jax.export.program import LogitsFunction
    from inception_jax.models.weights import Weights
    from inception_jax.storage import paths

USAGE = """
Export a trained network for other programs, or its weights for this one.

  python -m inception_jax.tools.export --to=savedweights --workdir DIR --output FILE.safetensors
  python -m inception_jax.tools.export --to=stablehlo --workdir DIR --output FILE.stablehlo
  python -m inception_jax.tools.export --to=onnx --weights FILE.safetensors --output FILE.onnx
  python -m inception_jax.tools.export --to=onnx --workdir DIR --output FILE.onnx --quantize=int8

Exports the weights that evaluation uses: the moving average (EMA) if the run keeps one. Formats:

  savedweights  safetensors with the network's settings, class names and normalization, read by
                --weights and --config.init.pretrained. --dtype=bfloat16 halves its size; BatchNorm
                statistics stay float32.
  stablehlo     written by jax.export for CPUs, CUDA GPUs and TPUs; FILE.json describes it.
  onnx          for ONNX Runtime and others; requires the extra [onnx].

The last two map uint8 pixels [batch, S, S, 3] to logits [batch, classes]; docs/export.md shows how
to load and call them. --quantize=int8 computes in 8 bits, with activation ranges calibrated on
training images, and prints the accuracy of float32 and int8 on the evaluation split; the file
records that of int8. It uses the run's data set (at --config.data.directory if given); with
--weights, also give the experiment (--config). If int8 costs too much accuracy, use --float_ends or
more --calibration images.
"""

_TO = flags.DEFINE_enum(
    "to", None, ["savedweights", "stablehlo", "onnx"], "format to write", required=True
)
cli.define_config()
_TRAINED = cli.define_trained()
_OUTPUT = cli.define_path("output", "file to write; replaced if it exists", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "savedweights: data type of the parameters"
)
_QUANTIZE = flags.DEFINE_enum("quantize", "none", ["none", "int8"], "onnx: precision to compute in")
_CALIBRATION = flags.DEFINE_integer(
    "calibration", 512, "--quantize: training images to calibrate activation ranges on", 1
)
_FLOAT_ENDS = flags.DEFINE_bool(
    "float_ends", False, "--quantize: keep the first convolution and the classifier in float32"
)
cli.require_with("dtype", "to", "savedweights")
cli.require_with("quantize", "to", "onnx")
cli.require_with("calibration", "quantize", "int8")
cli.require_with("float_ends", "quantize", "int8")


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    overridden = [name for name in cli.overrides() if not name.startswith("bucket.")]
    if _QUANTIZE.value == "none" and overridden:
        raise UserError(
            f"--config.{min(overridden)}: has no effect without --quantize=int8; settings come "
            "with the trained weights"
        )
    from inception_jax.inference import load
    from inception_jax.models import weights
    from inception_jax.runtime import devices
    from inception_jax.storage import access

    # Converting needs no accelerator, and another command may be using it.
    devices.initialize(platform="cpu", log=console.log)
    trained = load.load(**_TRAINED.values(), log=console.log)
    path = cli.given(_OUTPUT)
    access.check_output_file(path, "output")
    description = f"{_TO.value}, {_DTYPE.value}"
    if _TO.value == "savedweights":
        weights.save(path, trained, dtype=_DTYPE.value)
    elif _TO.value == "stablehlo":
        _write_stablehlo(path, trained)
    elif _QUANTIZE.value == "none":
        _write_file(path, _onnx_file(trained))
    else:
        trained, description = _write_quantized(path, trained), f"{_TO.value}, int8"
    print(f"{path}: {access.size(path) / 1e6:.1f} MB, {description}; {trained}")


def _write_stablehlo(path: "paths.Path", weights: "Weights") -> None:
    from inception_jax.export import program, stablehlo
    from inception_jax.storage import atomic

    data = stablehlo.export(weights)
    _verify(weights, stablehlo.load(data))
    _write_file(path, data)
    atomic.write_json(path.with_name(f"{path.name}.json"), program.export_metadata(weights))


def _onnx_file(weights: "Weights") -> bytes:
    from inception_jax.export import onnx

    data = onnx.export(weights)
    _verify(weights, onnx.load(data))
    return data


def _write_quantized(path: "paths.Path", weights: "Weights") -> "Weights":
    """Writes the network in int8, prints the cost in accuracy, and returns it with its metrics."""
    import dataclasses

    import numpy as np

    from inception_jax.export import onnx, quantization

    dataset = _open_dataset(weights)
    float32_data = _onnx_file(weights)
    train = dataset.train_eval_view
    count = min(_CALIBRATION.value, len(train))
    # Examples are in hash order, so the first are as good as any.
    images = train.read(np.arange(count))
    int8_data = quantization.quantize(float32_data, images, float_ends=_FLOAT_ENDS.value)
    before, after = (
        quantization.measure_accuracy(name, onnx.load(data), dataset.evaluation, size=len(data))
        for name, data in (("float32", float32_data), ("int8", int8_data))
    )
    metrics = {"top1": after.top1} | ({} if after.top5 is None else {"top5": after.top5})
    quantized = dataclasses.replace(weights, metrics=metrics | {"count": after.count})
    _write_file(path, onnx.with_description(int8_data, quantized, precision="int8"))
    print(f"{dataset.name}, {dataset.eval_split}; calibrated on {count} training images")
    top5 = after.top5 is not None
    head = ["ONNX", "MB", "top-1", *(["top-5"] if top5 else []), "images", "images/s"]
    rows = [
        [
            each.precision,
            f"{each.megabytes:.1f}",
            f"{each.top1:.2f}%",
            *([f"{each.top5:.2f}%"] if top5 else []),
            f"{each.count:,}",
            f"{each.images_per_second:,.0f}",
        ]
        for each in (before, after)
    ]
    print(console.markdown_table(head, rows))
    # The first recovers most: all 1.1 points for MiniGoogLeNet on digits; more images recover 0.3.
    remedies = [] if _FLOAT_ENDS.value else ["--float_ends"]
    if count < len(train):
        remedies.append(f"--calibration={min(4 * count, len(train))} (now {count})")
    remedies.append("float32 (--quantize=none)")
    if warning := quantization.accuracy_warning(before, after, remedies):
        console.log(warning)
    return quantized


def _open_dataset(weights: "Weights") -> "Dataset":
    """Opens the data set of --config, which cli sets to the run's if it is not given.

    Raises:
      UserError: if the data set is unknown, or has other classes or another image size.
    """
    from inception_jax import config as configs
    from inception_jax.datasets import dataset
    from inception_jax.errors import UserError
    from inception_jax.inference import load
    from inception_jax.training import initialization, workdir

    given: Config | None = flags.FLAGS.config
    if given is None:
        raise UserError(
            f"--quantize={_QUANTIZE.value}: needs the data set; with --weights, also give its "
            "experiment: --config=FILE"
        )
    if given.data.image_size != weights.image_size:
        raise UserError(
            f"config.data.image_size = {given.data.image_size}: must be {weights.image_size}, the "
            "network's image size; give the experiment it was trained with: --config=FILE"
        )
    folder = _TRAINED.workdir.value
    before = None
    if folder is not None:
        before = workdir.require_record(load.open_workdir(folder), needs_data=True)
    for problem in configs.validate(given, recorded=before.config if before else None):
        console.log(problem)
    prepared = dataset.prepare(given.data, log=console.log)
    initialization.check_classes(weights, prepared)
    if prepared.eval_crop != weights.eval_crop:
        console.log(
            f"config.data.eval_crop_pct is {prepared.eval_crop}; recorded with the weights: "
            f"{weights.eval_crop}. The accuracies are those of the former"
        )
    return prepared


def _write_file(path: "paths.Path", data: bytes) -> None:
    from inception_jax.storage import atomic

    with atomic.replacing(path) as temporary:
        temporary.write_bytes(data)


def _verify(weights: "Weights", classify: "LogitsFunction") -> None:
    """Checks that an exported network returns the original's logits, and logs the difference."""
    from inception_jax.export import program

    difference = program.max_logit_difference(weights, classify)
    console.log(
        "verified: on random images its logits differ from the original's by at most "
        f"{difference:.2g}"
    )


if __name__ == "__main__":
    cli.run(main, USAGE, settings_of="workdir")
