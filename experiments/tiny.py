"""GoogLeNet on Tiny ImageNet: the main recipe, for one GPU or TPU host.

Source: GoogLeNet (Szegedy et al. 2015, "Going Deeper with Convolutions") with BatchNorm and a stem
  that leaves grids of 32, 16 and 8 at 64 pixels. The recipe is the usual one for small images (SGD
  with Nesterov momentum, cosine decay, label smoothing, mixup and CutMix until near the end, a
  moving average).
Command: python -m inception_jax.main --config experiments/tiny.py --workdir runs/tiny
  If you already have the archive, add --config.data.source=tiny-imagenet-200.zip
Changes to tiny_base: augment, model, optimizer, schedule, train, evaluation, log.
Expected: not measured yet; it needs an accelerator.
Cost: 11,719 steps of 512, 60 epochs; 1.57 GMACs per image forward, 6.2 M parameters.
"""

from experiments import tiny_base
from inception_jax.config import Config, Model, Optimizer, Schedule, Train


def get_config() -> Config:
    """Returns the settings."""
    config = tiny_base.get_config()
    config.name = "tiny"
    config.augment.mixup, config.augment.cutmix = 0.2, 1.0
    config.augment.mix_probability, config.augment.mix_end = 0.5, "55 epochs"
    config.model = Model(name="googlenet", stem="s32", dropout=0.2, dtype="bfloat16")
    config.optimizer = Optimizer(name="sgd_nesterov", momentum=0.9, weight_decay=5e-4)
    config.schedule = Schedule(name="cosine", learning_rate=0.4, warmup="5 epochs")
    config.train = Train(batch_size=512, duration="60 epochs", label_smoothing=0.1, ema="1 epoch")
    config.evaluation.flip_tta = True
    config.log.every = "50 steps"
    return config
