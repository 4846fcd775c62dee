"""Writes the weights of a checkpoint as one file."""

import pathlib
from collections.abc import Sequence

from absl import flags

from inception_jax import cli

USAGE = """
Write the weights that evaluation uses of a checkpoint (the moving average where the run keeps one)
as one safetensors file, with the network's settings, the classes and the normalisation.

  python -m inception_jax.tools.export_weights --workdir DIR --output FILE.safetensors
  python -m inception_jax.main --config EXPERIMENT --mode=eval --weights FILE.safetensors
  python -m inception_jax.main --config OTHER --workdir NEW --config.init.weights=FILE.safetensors

In bfloat16 the file is half as large; BatchNorm statistics stay float32.
"""

_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run", required=True)
_OUTPUT = flags.DEFINE_string(
    "output", None, "file to write; one that is there is replaced", required=True
)
_CHECKPOINT = flags.DEFINE_string("checkpoint", "best", "best, last or the number of a step")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "type of the parameters")


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax import runtime
    from inception_jax.models import weights
    from inception_jax.training import pretrained, workdir

    # Copying needs no accelerator, and another command may be using it.
    runtime.initialize(platform="cpu", log=cli.say)
    folder = workdir.Workdir(pathlib.Path(_WORKDIR.value))
    exported = pretrained.from_checkpoint(folder, _CHECKPOINT.value)
    path = pathlib.Path(_OUTPUT.value)
    weights.save(path, exported, dtype=_DTYPE.value)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB; {exported}")


if __name__ == "__main__":
    cli.run(main, USAGE)
