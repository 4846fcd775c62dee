"""tf.data over JPEG files: reads and decodes them with parallel map and AUTOTUNE."""

import os
import pathlib
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import tensorflow as tf

from benchmarks.contenders import reading, serve


def make(settings: dict[str, Any]) -> serve.Contender:
    """Creates the contender with the mode "host"."""
    tf.config.set_visible_devices([], "GPU")
    paths = [str(path) for path in sorted(pathlib.Path(settings["files"]).rglob("*.JPEG"))]
    classes = sorted({path.rsplit("/", 1)[0] for path in paths})
    label_of = {name: index for index, name in enumerate(classes)}
    labels = [label_of[path.rsplit("/", 1)[0]] for path in paths]

    def load(path: Any, label: Any) -> tuple[Any, Any]:
        return tf.io.decode_jpeg(tf.io.read_file(path), channels=3), label

    dataset = tf.data.Dataset.from_tensor_slices((paths, labels)).shuffle(len(paths)).repeat()
    dataset = dataset.map(load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    dataset = dataset.batch(settings["batch_size"], drop_remainder=True)
    batches = iter(dataset.prefetch(tf.data.AUTOTUNE))
    facts = {
        "versions": {"tensorflow": tf.__version__},
        "images": len(paths),
        "device": "cpu",
    }
    return serve.Contender(
        facts, {"host": reading.timed_reader(batches, lambda batch: len(batch[1]))}
    )
