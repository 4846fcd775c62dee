"""Compiles a run's programs for a TPU or GPU, without having one, and says what they need."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from inception_jax import cli, console

if TYPE_CHECKING:
    from inception_jax.programs.targets import Target

USAGE = """
Compile the training step and the evaluation for a TPU or GPU, without having one.

  python -m inception_jax.tools.compile --config experiments/tiny.py --target=v5e-8
  python -m inception_jax.tools.compile --config experiments/tiny.py --target=h100 --json=FILE
  python -m inception_jax.tools.compile --config experiments/tiny.py --target=v5e-8 --largest_batch
  python -m inception_jax.tools.compile --config experiments/image_folder.py --target=v6e-1 \\
      --classes=5 --examples=4000

Needs the compiler (the extra tpu or cuda), but no device, no data and no network. Shows whether the
run fits into memory, its work and memory traffic, what it sends between devices, an estimate of its
speed, and where the time goes. Compiling takes minutes.
"""

_CONFIG = cli.define_config()
_TARGET = flags.DEFINE_string(
    "target", "", "devices: v5e-1, v5e-4, v5e-8, …, h100, h100x8, …; a wrong name lists all of them"
)
_TARGET_CONFIG = cli.define_path(
    "target_config",
    "instead of --target: the description of another GPU, a GpuTargetConfigProto as text",
)
_DEVICES = flags.DEFINE_integer(
    "devices", 1, "with --target_config: number of GPUs, in one host", 1
)
_JSON = cli.define_path("json", "file for all figures, as JSON")
_LARGEST_BATCH = flags.DEFINE_bool(
    "largest_batch",
    False,
    "also find the largest batch that fits, by compiling the training step for several",
)
_CLASSES = flags.DEFINE_integer(
    "classes", 0, "number of classes, if the data set does not define it", 0
)
_EXAMPLES = flags.DEFINE_integer(
    "examples", 0, "number of training images, if the data set does not define it", 0
)
cli.require("config")
cli.require_with("devices", "target_config")
cli.require_one(
    "target", "target_config", message="give one of --target=NAME or --target_config=FILE"
)


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax.programs import report
    from inception_jax.runtime import devices
    from inception_jax.storage import access, atomic

    target = _target()
    if _JSON.value is not None:
        access.check_output_file(_JSON.value, "json")
    # Compiling for a device needs none, and another process may be using those that there are.
    devices.initialize(platform="cpu", log=console.log)
    found = report.compile_for(
        _CONFIG.value,
        target,
        classes=_CLASSES.value,
        examples=_EXAMPLES.value,
        largest_batch=_LARGEST_BATCH.value,
        log=console.log,
    )
    print(found)
    if _JSON.value is not None:
        atomic.write_json(_JSON.value, found.record)
        print(_JSON.value)


def _target() -> "Target":
    """Returns the target that the flags name."""
    from inception_jax.errors import UserError
    from inception_jax.programs import targets
    from inception_jax.storage import access

    path = _TARGET_CONFIG.value
    if path is None:
        return targets.get(_TARGET.value)
    if not access.is_file(path):
        raise UserError(f"--target_config={path}: file not found")
    text = access.read_bytes(path).decode(errors="replace")
    return targets.from_target_config(text, _DEVICES.value, f"--target_config={path}")


if __name__ == "__main__":
    cli.run(main, USAGE)
