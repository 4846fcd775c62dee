"""Our reader: batches of the training split, in host memory and on the device.

The modes "host" and "device" read the same batches by `input.pipeline`; for "host" the transfer is
left out.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax

from benchmarks.contenders import reading, serve
from inception_jax import config, runtime
from inception_jax.input import decoded, pipeline, sharding

# Longer than any benchmark: readers are given a last step.
_ENDLESS = 10**9


def make(settings: dict[str, Any]) -> serve.Contender:
    """Makes the contender. A reader of another kind (records) is another value of "reader"."""
    runtime.initialize(platform=settings["platform"])
    data = config.Data(
        name=settings["dataset"],
        directory=settings["data_directory"],
        source=settings["source"],
        image_size=settings["image_size"],
    )
    dataset = {"cache": decoded.prepare}[settings["reader"]](data)
    # Brings the mapped pages into memory, as the first epoch does, and as the peers' files are.
    dataset.train.images.max()
    mesh = sharding.make_mesh()

    def batches() -> Iterator[dict[str, Any]]:
        return pipeline.train_batches(
            dataset.train,
            batch_size=settings["batch_size"],
            seed=0,
            start=0,
            stop=_ENDLESS,
            mesh=mesh,
        )

    transfer = sharding.to_devices
    is_on = True

    def to_devices(batch: dict[str, Any], mesh: Any) -> dict[str, Any]:
        return transfer(batch, mesh) if is_on else batch

    mock.patch.object(sharding, "to_devices", to_devices).start()

    def mode(on: bool) -> Callable[..., serve.Numbers]:
        read = reading.mode(batches(), size_of)

        def switched(seconds: float) -> serve.Numbers:
            nonlocal is_on
            is_on = on
            return read(seconds)

        return switched

    def size_of(batch: dict[str, Any]) -> int:
        return len(jax.block_until_ready(batch)["label"])

    facts = {
        "versions": {"jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
        "images": len(dataset.train),
    }
    return serve.Contender(facts, {"host": mode(False), "device": mode(True)})
