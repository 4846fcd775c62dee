"""MiniGoogLeNet on CIFAR-10: small enough for any accelerator.

Source: MiniGoogLeNet (Zhang et al. 2017, "Understanding deep learning requires rethinking
  generalization", arXiv:1611.03530, figure 3) with the usual recipe for small images: SGD with
  Nesterov momentum, 5 epochs of warm-up, cosine decay, padded crops, flips, label smoothing.
Command: python -m inception_jax.main --config experiments/cifar10_mini.py --workdir runs/cifar10
  If you already have the archive, add --config.data.source=cifar-10-python.tar.gz
Expected: not measured yet; the goal is at least 91% top-1 on the test images.
Time: not measured yet. 25,391 steps of 128.
Short: in 46 minutes on two CPU cores, 16 epochs of Muon on images that grow from 16 to 32 pixels
  gave 89.21% on lossy copies of the images; results/cifar10_mini_cpu has the command.
"""

from inception_jax.config import (
    Augment,
    Config,
    Data,
    Log,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config() -> Config:
    """Returns the settings."""
    return Config(
        name="cifar10_mini",
        data=Data(name="cifar10", image_size=32),
        augment=Augment(crop="pad", pad=4, flip=True),
        model=Model(name="mini_googlenet", dropout=0.2, dtype="auto"),
        optimizer=Optimizer(name="sgd_nesterov", momentum=0.9, weight_decay=5e-4),
        schedule=Schedule(name="cosine", learning_rate=0.1, warmup="5 epochs"),
        train=Train(batch_size=128, duration="65 epochs", label_smoothing=0.1),
        log=Log(every="100 steps"),
    )
