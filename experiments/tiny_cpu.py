"""GoogLeNet on Tiny ImageNet in about an hour on two CPU cores.

Source: GoogLeNet (Szegedy et al. 2015) with BatchNorm and the paper's own stem, which at 64 pixels
  leaves grids of 8, 4 and 2: a twelfth of the work of experiments/tiny.py. The rate rises and falls
  linearly; so few epochs need little regularisation.
Command: python -m inception_jax.main --config experiments/tiny_cpu.py --workdir runs/tiny_cpu
Expected: 30.56% top-1, 58.53% top-5 (measured once, seed 0: results/tiny_cpu/README.md).
Time: 83 minutes for that run, on cores shared with other work. On free ones 175 images/s since
  (benchmarks/results/end_to_end.json), so some 30 minutes, and with --config.model.dtype=bfloat16,
  on Python 3.12, about half of that. Two cores of an Intel Xeon with AVX-512 and AMX.
"""

from inception_jax.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Duration,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config() -> Config:
    """Returns the settings."""
    return Config(
        name="tiny_cpu",
        data=Data(name="tiny_imagenet", image_size=64),
        augment=Augment(crop="pad", pad=4, flip=True),
        model=Model(name="googlenet", stem="paper", dropout=0.2),
        optimizer=Optimizer(name="sgd_nesterov", momentum=0.9, weight_decay=5e-4),
        schedule=Schedule(name="linear", learning_rate=0.1, warmup=Duration(epochs=0.3)),
        train=Train(batch_size=128, length=Duration(epochs=3), label_smoothing=0.1),
        checkpoint=Checkpoint(every=Duration(steps=200)),
    )
