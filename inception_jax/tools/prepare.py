"""Prepares a data set before training."""

from collections.abc import Sequence

from inception_jax import cli, console

USAGE = """
Prepare an experiment's data set: read its source, write it as a TFDS data set and decode it once.

  python -m inception_jax.tools.prepare --config experiments/tiny.py
  python -m inception_jax.tools.prepare --config experiments/tiny.py \\
      --config.data.source=tiny-imagenet-200.zip --config.data.directory=DIR

The source is an archive or an extracted folder; without one, the official archive is downloaded.
Source and directory may be in a bucket: gs://BUCKET/PATH.
Training does the same if the prepared data set is missing.
"""

_CONFIG = cli.define_config()
cli.require("config")


def main(positional: Sequence[str]) -> None:
    """Runs the command."""
    cli.refuse_positional(positional)
    from inception_jax import config as configs
    from inception_jax.datasets.dataset import prepare

    configs.validate(_CONFIG.value)
    dataset = prepare(_CONFIG.value.data, log=console.log)
    for name, split in dataset.splits.items():
        print(f"{dataset.name} {name}: {len(split):,} images of {dataset.image_size} px")


if __name__ == "__main__":
    cli.run(main, USAGE)
