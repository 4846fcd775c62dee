r"""Eight wide modules, Adam with a stepwise learning rate: a recipe published for TensorFlow 2.

Source: github.com/ankit16-py/GoogLeNet-on-Tiny-ImageNet-from-scratch. Its README first described
  this schedule: Adam at 1e-3 to epoch 26, 1e-4 to 40, 1e-5 to 52 and 1e-6 to 60. The network is the
  one that replaced the first (below). From its code: batches of 64, dropout 0.3, l2(3e-4), images
  shifted by up to 20% and flipped.
Stated: top-1 29.83%, top-5 56.22% for this schedule with the first network (12.0 M parameters,
  dropout of 0.25 after each pool); 47.40% and 72.48% for this network (10.7 M) with the later
  schedule. Both are on 6,000 held-out training images; in the later run's log the best validation
  top-1 is 45.52% (epoch 59).
Command: python -m inception_jax.main --config experiments/tiny_steps.py --workdir runs/tiny_steps
Expected: the full recipe was not measured. 4.17% top-1, 15.56% top-5 on the validation images after
  its whole schedule in half an epoch, in bfloat16 (n = 1, seed 0; results/tiny_steps).
Later schedule: 1e-3 to epoch 25, 1e-4 to 45, 1e-5 to 55, 1e-6 to 65 (101,563 steps).
  python -m inception_jax.main --config experiments/tiny_steps.py --workdir runs/tiny_steps_later \
    --config.schedule.boundaries='25 epochs,45 epochs,55 epochs' --config.train.duration='65 epochs'
Deviations: the source also rotates by up to 20 degrees, shears by up to 0.2 (Keras's degrees) and
  zooms by up to 20%, and repeats the border pixels, which are black here; its l2 is 5e-4 on the
  three convolutions of the stem. tiny_base.py lists the deviations that all such experiments share.
Changes to tiny_base: augment, model, optimizer, schedule, train, expected.
Cost: 93,750 steps of 64, 60 epochs; 0.91 GMACs per image forward, 10.7 M parameters.
Short: scaled down for two CPU cores: the whole schedule in a twentieth of its length.
  python -m inception_jax.main --config experiments/tiny_steps.py --workdir runs/tiny_steps_short \
    --config.train.duration='3 epochs' --config.schedule.boundaries='1.3 epochs,2 epochs,2.6 epochs'
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
    config.name = "tiny_steps"
    config.augment = Augment(crop="pad", pad=13, flip=True)  # 20% of 64 pixels.
    config.model = Model(name="eight_module_googlenet", dropout=0.3, norm_momentum=0.99)
    config.optimizer = Optimizer(name="adam", epsilon=1e-7, weight_decay=6e-4)
    config.schedule = Schedule(
        name="steps",
        learning_rate=1e-3,
        decay_rate=0.1,
        boundaries=("26 epochs", "40 epochs", "52 epochs"),
    )
    config.train = Train(batch_size=64, duration="60 epochs")
    config.expected = Expected(
        top1=29.83,
        source="stated by the recipe's source for its first network, on 6,000 images held out",
    )
    return config
