r"""The paper's network with Adam at a constant learning rate: a recipe published for Keras.

Source: the README "GoogLeNet Training on Tiny ImageNet" (Keras; its code was not found). It states
  Adam, 120 epochs, batches of 32, dropout 0.4, images of 64 px, normalized.
Stated: validation loss 3.4950, top-1 41.80%, top-5 85.20% (implausible with that top-1).
Command: python -m inception_jax.main --config experiments/tiny_adam.py --workdir runs/tiny_adam
Expected: the full recipe was not measured. 10.61% top-1, 30.70% top-5 on the validation images
  after the first of its epochs, in bfloat16 (n = 1, seed 0; results/tiny_adam).
Deviations: none known. What the README leaves open was chosen: the learning rate 1e-3 throughout
  and epsilon 1e-7 (Keras's defaults), the paper's stem, BatchNorm, no auxiliary heads, no random
  crops or flips, no weight decay. tiny_base.py lists the deviations that all such experiments
  share.
Changes to tiny_base: augment, optimizer, schedule, train, expected.
Cost: 375,000 steps of 32, 120 epochs; 0.13 GMACs per image forward, 6.2 M parameters.
Short: scaled down for two CPU cores; a constant learning rate needs no other change.
  python -m inception_jax.main --config experiments/tiny_adam.py --workdir runs/tiny_adam_short \
    --config.train.duration='2 epochs'
"""

from experiments import tiny_base
from inception_jax.config import Augment, Config, Expected, Optimizer, Schedule, Train


def get_config() -> Config:
    """Returns the settings."""
    config = tiny_base.get_config()
    config.name = "tiny_adam"
    config.augment = Augment(crop="none", flip=False)
    config.optimizer = Optimizer(name="adam", epsilon=1e-7)
    config.schedule = Schedule(name="constant", learning_rate=1e-3)
    config.train = Train(batch_size=32, duration="120 epochs")
    config.expected = Expected(top1=41.80, source="stated by the recipe's source, a README")
    return config
