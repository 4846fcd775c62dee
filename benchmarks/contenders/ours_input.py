"""Our input pipeline: batches of the training split, in host memory and on the device.

The modes "host" and "device" read the same batches; "host" skips the transfer.
"""

from typing import Any

import jax
import numpy as np

from benchmarks.contenders import reading, serve
from inception_jax import config
from inception_jax.datasets import dataset
from inception_jax.datasets.splits import Split
from inception_jax.input import pipeline
from inception_jax.runtime import devices, sharding

# More steps than any benchmark reads; readers require a last step.
_ENDLESS = 10**9


def make(settings: dict[str, Any]) -> serve.Contender:
    """Creates the contender, which reads from settings["storage"]."""
    devices.initialize(platform=settings["platform"])
    data = config.Data(
        name=settings["dataset"],
        directory=settings["data_directory"],
        source=settings["source"],
        image_size=settings["image_size"],
        storage=settings["storage"],
    )
    train = dataset.prepare(data).train
    _into_page_cache(train)
    mesh = sharding.make_mesh()
    steps = {"batch_size": settings["batch_size"], "seed": 0, "start": 0, "stop": _ENDLESS}

    def size_of(batch: dict[str, Any]) -> int:
        return len(jax.block_until_ready(batch)["label"])

    facts = {
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "images": len(train),
    }
    modes = {
        "host": reading.timed_reader(pipeline.train_batches(train, **steps), size_of),
        "device": reading.timed_reader(pipeline.train_batches(train, mesh=mesh, **steps), size_of),
    }
    return serve.Contender(facts, modes)


def _into_page_cache(split: Split) -> None:
    """Reads a split once, as the first epoch does; the peers' files are cached too."""
    for first in range(0, len(split), 1000):
        split.read(np.arange(first, min(first + 1000, len(split))))
