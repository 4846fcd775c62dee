r"""DeeperGoogLeNet with Adam and a stepwise learning rate: a recipe that comes from a book.

Source: github.com/T-DevH/GoogleNet (TensorFlow 2), after Rosebrock, "Deep Learning for Computer
  Vision with Python". From its code: Adam from 1e-3, batches of 64, dropout 0.4, l2(5e-4), images
  shifted by up to 20% and flipped. From its log, 65 epochs: the loss drops after epochs 40 and 45,
  and the last learning rate in the code is 1e-5, so the values are taken as 1e-3, 1e-4 and 1e-5.
Stated: best validation top-1 45.23% (epoch 58), 45.18% at the end; no top-5.
Command: python -m inception_jax.main --config experiments/tiny_deeper.py --workdir runs/tiny_deeper
Expected: the full recipe was not measured. 8.80% top-1, 25.97% top-5 on the validation images after
  its whole schedule in half an epoch, in bfloat16 (n = 1, seed 0; results/tiny_deeper).
Variant: steps after epochs 40 and 60 of 70, as in github.com/meng1994412/GoogLeNet_from_scratch
  (there with SGD and nine modules: top-1 55.05% on held-out training images).
  python -m inception_jax.main --config experiments/tiny_deeper.py --workdir runs/tiny_deeper_70 \
    --config.schedule.boundaries='40 epochs,60 epochs' --config.train.duration='70 epochs'
Deviations: the source also rotates by up to 18 degrees, shears by up to 0.15 (Keras's degrees) and
  zooms by up to 15%, and repeats the border pixels, which are black here. tiny_base.py lists the
  deviations that all such experiments share.
Changes to tiny_base: augment, model, optimizer, schedule, train, expected.
Cost: 101,563 steps of 64, 65 epochs; 0.46 GMACs per image forward, 3.7 M parameters.
Short: scaled down for two CPU cores: the whole schedule in a twentieth of its length.
  python -m inception_jax.main --config experiments/tiny_deeper.py --workdir runs/deeper_short \
    --config.train.duration='3.25 epochs' --config.schedule.boundaries='2 epochs,2.25 epochs'
"""

from experiments import tiny_base
from inception_jax.config import (
    Augment,
    Config,
    Expected,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config() -> Config:
    """Returns the settings."""
    config = tiny_base.get_config()
    config.name = "tiny_deeper"
    config.augment = Augment(crop="pad", pad=13, flip=True)  # 20% of 64 pixels.
    config.model = Model(name="deeper_googlenet", dropout=0.4, norm_momentum=0.99)
    config.optimizer = Optimizer(name="adam", epsilon=1e-7, weight_decay=1e-3)
    config.schedule = Schedule(
        name="steps", learning_rate=1e-3, decay_rate=0.1, boundaries=("40 epochs", "45 epochs")
    )
    config.train = Train(batch_size=64, duration="65 epochs")
    config.expected = Expected(top1=45.18, source="stated by the recipe's source, last epoch")
    return config
