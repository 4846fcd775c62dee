"""Writes a trained network as a file for other programs."""

import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from inception_jax import cli, console

if TYPE_CHECKING:
    from inception_jax.config import Config
    from inception_jax.datasets.dataset import Dataset
    from inception_jax.export.program import Classify
    from inception_jax.models.weights import Weights

USAGE = """
Write a trained network as a file for other programs, or its weights for this one.

  python -m inception_jax.tools.export --to=savedweights --workdir DIR --output FILE.safetensors
  python -m inception_jax.tools.export --to=stablehlo --workdir DIR --output FILE.stablehlo
  python -m inception_jax.tools.export --to=onnx --weights FILE.safetensors --output FILE.onnx
  python -m inception_jax.tools.export --to=onnx --workdir DIR --output FILE.onnx --quantize=int8

Of a run it takes the weights that evaluation uses: the moving average where there is one.
savedweights: one safetensors file with the network's settings, the classes and the normalisation,
which --weights and --config.init.pretrained read. In bfloat16 it is half as large; BatchNorm
statistics stay float32.
stablehlo: by jax.export, for CPUs, CUDA GPUs and TPUs; FILE.json beside it says what goes in and
comes out. onnx: for ONNX Runtime and others; needs the extra [onnx]. Both take uint8 pixels [batch,
S, S, 3] and give logits [batch, classes]; docs/export.md has the lines to load and call them.
--quantize=int8 computes in 8 bits, with ranges seen on images of the training split, and prints the
accuracy of both forms on the evaluation split; the file's description has that of int8. The data
are those of the run, but for what --config.data.directory says; with --weights give the experiment
too (--config). Where 8 bits cost too much accuracy: --float_ends, or more --calibration images.
"""

_TO = flags.DEFINE_enum(
    "to", None, ["savedweights", "stablehlo", "onnx"], "what to write", required=True
)
cli.define_config()
_TRAINED = cli.define_trained()
_OUTPUT = cli.define_path("output", "file to write; one that is there is replaced", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "savedweights: type of the parameters"
)
_QUANTIZE = flags.DEFINE_enum("quantize", "none", ["none", "int8"], "onnx: what to compute in")
_CALIBRATION = flags.DEFINE_integer(
    "calibration", 512, "--quantize: training images that the ranges are taken from", 1
)
_FLOAT_ENDS = flags.DEFINE_bool(
    "float_ends", False, "--quantize: leave the first convolution and the classifier in float32"
)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax.errors import UserError
    from inception_jax.inference import load
    from inception_jax.models import weights
    from inception_jax.runtime import devices
    from inception_jax.training import workdir

    if _QUANTIZE.value != "none" and _TO.value != "onnx":
        raise UserError(f"--quantize={_QUANTIZE.value}: is for --to=onnx")
    if _FLOAT_ENDS.value and _QUANTIZE.value == "none":
        raise UserError("--float_ends: is for --quantize=int8")
    if _DTYPE.value != "float32" and _TO.value != "savedweights":
        raise UserError(f"--dtype={_DTYPE.value}: is for --to=savedweights; the others are float32")
    # Converting needs no accelerator, and another command may be using it.
    devices.initialize(platform="cpu", log=console.say)
    trained = load.load(**_TRAINED.values(), log=console.say)
    path = cli.given(_OUTPUT)
    workdir.check_writable(path.parent, flag="output", own=False)
    form = f"{_TO.value}, {_DTYPE.value}"
    if _TO.value == "savedweights":
        weights.save(path, trained, dtype=_DTYPE.value)
    elif _TO.value == "stablehlo":
        _write_stablehlo(path, trained)
    elif _QUANTIZE.value == "none":
        _write(path, _onnx_file(trained))
    else:
        trained, form = _write_quantized(path, trained), f"{_TO.value}, int8"
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {form}; {trained}")


def _write_stablehlo(path: pathlib.Path, weights: "Weights") -> None:
    import json

    from inception_jax.export import program, stablehlo

    data = stablehlo.export(weights)
    _check(weights, stablehlo.load(data))
    _write(path, data)
    about = json.dumps(program.describe(weights), indent=2)
    _write(path.with_name(f"{path.name}.json"), f"{about}\n".encode())


def _onnx_file(weights: "Weights") -> bytes:
    from inception_jax.export import onnx

    data = onnx.export(weights)
    _check(weights, onnx.load(data))
    return data


def _write_quantized(path: pathlib.Path, weights: "Weights") -> "Weights":
    """Writes the network in 8 bits, prints what that costs, and returns it with its own metrics."""
    import dataclasses

    import numpy as np

    from inception_jax.export import onnx, quantization

    dataset = _dataset(weights)
    plain = _onnx_file(weights)
    train = dataset.train_evaluated
    count = min(_CALIBRATION.value, len(train))
    # Examples lie in the order of a hash, so the first are as good as any.
    images = train.read(np.arange(count))
    small = quantization.quantize(plain, images, float_ends=_FLOAT_ENDS.value)
    before, after = (
        quantization.measure_accuracy(form, onnx.load(data), dataset.evaluation, size=len(data))
        for form, data in (("float32", plain), ("int8", small))
    )
    found = {"top1": after.top1} | ({} if after.top5 is None else {"top5": after.top5})
    quantized = dataclasses.replace(weights, metrics=found | {"count": after.count})
    _write(path, onnx.with_description(small, quantized, precision="int8"))
    print(f"{dataset.name}, {dataset.eval_split}; ranges from {count} training images")
    top5 = after.top5 is not None
    print(f"| ONNX | MB | top-1 |{' top-5 |' if top5 else ''} images | images/s |")
    print(f"| --- | --: | --: |{' --: |' if top5 else ''} --: | --: |")
    for each in (before, after):
        print(
            f"| {each.form} | {each.megabytes:.1f} | {each.top1:.2f}% |"
            f"{f' {each.top5:.2f}% |' if top5 else ''} {each.count:,} | "
            f"{each.images_per_second:,.0f} |"
        )
    # The first recovers most: of MiniGoogLeNet on digits all 1.1 points, more images 0.3.
    remedies = [] if _FLOAT_ENDS.value else ["--float_ends"]
    if count < len(train):
        remedies.append(f"--calibration={min(4 * count, len(train))} (now {count})")
    remedies.append("float32 (--quantize=none)")
    if warning := quantization.loss_warning(before, after, remedies):
        console.say(warning)
    return quantized


def _dataset(weights: "Weights") -> "Dataset":
    """Opens the data of --config, for which cli takes the run's own where it is not given.

    Raises:
      UserError: if it is not known which data, or they are of other classes or another size.
    """
    from inception_jax import config as configs
    from inception_jax.datasets import dataset
    from inception_jax.errors import UserError
    from inception_jax.storage.workdir import Workdir
    from inception_jax.training import initialization, workdir

    given: Config | None = flags.FLAGS.config
    if given is None:
        raise UserError(
            "--quantize needs the data set; with --weights give its experiment too: --config=FILE"
        )
    if given.data.image_size != weights.image_size:
        raise UserError(
            f"config.data.image_size = {given.data.image_size}: the network takes images of "
            f"{weights.image_size} px; give the experiment that it was trained by: --config=FILE"
        )
    folder = _TRAINED.workdir.value
    before = workdir.previous(Workdir(folder)).record if folder is not None else None
    for problem in configs.validate(given, recorded=before.config if before else None):
        console.say(problem)
    found = dataset.prepare(given.data, log=console.say)
    initialization.check_classes(weights, found)
    return found


def _write(path: pathlib.Path, data: bytes) -> None:
    from inception_jax.storage import atomic

    with atomic.replacing(path) as temporary:
        temporary.write_bytes(data)


def _check(weights: "Weights", classify: "Classify") -> None:
    """Checks that an exported network gives the logits of the original, and says how nearly."""
    from inception_jax.export import program

    difference = program.largest_difference(weights, classify)
    console.say(f"checked: on images of noise the logits differ by at most {difference:.2g}")


if __name__ == "__main__":
    cli.run(main, USAGE, settings_of="workdir")
