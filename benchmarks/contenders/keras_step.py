"""The training and evaluation step in Keras on TensorFlow, using the functions behind fit().

Bare, like ours: the same batch of normalized float32 pixels in every step, without augmentation.
"""

import os
from typing import Any

os.environ.update(KERAS_BACKEND="tensorflow", TF_CPP_MIN_LOG_LEVEL="2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from benchmarks.contenders import network, serve


def unit(x: Any, filters: int, kernel_size: int = 1, stride: int = 1) -> Any:
    """Applies convolution, BatchNorm and ReLU."""
    x = layers.Conv2D(filters, kernel_size, stride, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization(momentum=network.NORM_MOMENTUM, epsilon=network.NORM_EPSILON)(x)
    return layers.ReLU()(x)


def inception(x: Any, widths: tuple[int, ...]) -> Any:
    """Applies an inception module."""
    one, reduce3, three, reduce5, five, pool = widths
    branches = [
        unit(x, one),
        unit(unit(x, reduce3), three, 3),
        unit(unit(x, reduce5), five, 5),
        unit(layers.MaxPooling2D(3, 1, padding="same")(x), pool),
    ]
    return layers.Concatenate()(branches)


def googlenet(stem: str, image_size: int, classes: int) -> Any:
    """Returns the network of `network`; on even grids, "same" pools equal Caffe's ceil mode."""
    first = network.STEMS[stem]
    inputs = keras.Input((image_size, image_size, 3))
    x = unit(inputs, 64, first.kernel_size, first.stride)
    x = layers.MaxPooling2D(3, 2, padding="same")(x)
    x = unit(unit(x, 64), 192, 3)
    if first.second_pool:
        x = layers.MaxPooling2D(3, 2, padding="same")(x)
    for name, widths in network.MODULES.items():
        x = inception(x, widths)
        if name in network.POOL_AFTER:
            x = layers.MaxPooling2D(3, 2, padding="same")(x)
    x = layers.Dropout(network.DROPOUT)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(classes, dtype="float32")(x))


def matmul(settings: dict[str, Any]) -> serve.TimedOperation:
    """Returns a timed product of two square matrices."""
    size = settings["matmul_size"]
    a = tf.cast(tf.random.normal((size, size)), settings["dtype"])
    result = a

    def multiply() -> None:
        nonlocal result
        result = tf.matmul(a, a)

    # Fetching one element waits for the entire result.
    return serve.TimedOperation(multiply, lambda: result[0, 0].numpy()).warm_up()


def make(settings: dict[str, Any]) -> serve.Contender:
    """Creates the contender with the modes (train, eval, matmul) of settings["modes"]."""
    if settings["platform"] == "cpu":
        tf.config.set_visible_devices([], "GPU")
    elif not tf.config.get_visible_devices("GPU"):
        raise RuntimeError("TensorFlow did not find a GPU")
    if settings["dtype"] == "bfloat16":
        keras.mixed_precision.set_global_policy("mixed_bfloat16")
    size, count = settings["image_size"], settings["batch_size"]
    model = googlenet(settings["stem"], size, settings["classes"])
    model.compile(
        optimizer=keras.optimizers.SGD(network.LEARNING_RATE, network.MOMENTUM, nesterov=True),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=settings["compile"],
    )
    random = np.random.default_rng(0)
    images = tf.constant(random.normal(size=(count, size, size, 3)).astype(np.float32))
    labels = tf.constant(random.integers(0, settings["classes"], count))
    batches = iter(tf.data.Dataset.from_tensors((images, labels)).repeat())
    model.make_train_function()
    model.make_test_function()
    logs: Any = None

    def train() -> None:
        nonlocal logs
        logs = model.train_function(batches)

    def evaluate() -> None:
        nonlocal logs
        logs = model.test_function(batches)

    def wait() -> None:
        for value in tf.nest.flatten(logs):
            value.numpy()

    makers = {
        "train": lambda: serve.TimedOperation(train, wait).warm_up(),
        "eval": lambda: serve.TimedOperation(evaluate, wait).warm_up(),
        "matmul": lambda: matmul(settings),
    }
    gpus = tf.config.get_visible_devices("GPU")
    facts = {
        "versions": {"keras": keras.__version__, "tensorflow": tf.__version__},
        "device": tf.config.experimental.get_device_details(gpus[0])["device_name"]
        if gpus
        else "cpu",
        "parameters": sum(int(np.prod(each.shape)) for each in model.trainable_variables),
    }
    return serve.Contender(facts, {mode: makers[mode]() for mode in settings["modes"]})
