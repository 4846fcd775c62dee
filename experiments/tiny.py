"""GoogLeNet on Tiny ImageNet: the main job, for one GPU or TPU host.

Source: GoogLeNet (Szegedy et al. 2015, "Going Deeper with Convolutions") with BatchNorm and a stem
  that keeps grids of 32, 16 and 8 at 64 pixels; the recipe is the usual one for small images (SGD
  with Nesterov momentum, cosine decay, label smoothing, mixup and CutMix).
Command: python -m inception_jax.main --config experiments/tiny.py --workdir runs/tiny
  Add --config.data.source=tiny-imagenet-200.zip where the archive is already at hand.
Expected: not measured yet; it needs an accelerator. experiments/tiny_cpu.py has measured figures.
Cost: 1.57 GMACs an image forward, 6.2 M parameters; 11,719 steps of 512.
"""

from inception_jax.config import (
    Augment,
    Config,
    Data,
    Duration,
    Log,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config() -> Config:
    """Returns the settings."""
    return Config(
        name="tiny",
        data=Data(name="tiny_imagenet", image_size=64),
        augment=Augment(crop="pad", pad=4, flip=True, mixup=0.2, cutmix=1.0, mix_probability=0.5),
        model=Model(name="googlenet", stem="s32", dropout=0.2, dtype="bfloat16"),
        optimizer=Optimizer(name="sgd_nesterov", momentum=0.9, weight_decay=5e-4),
        schedule=Schedule(name="cosine", learning_rate=0.4, warmup=Duration(epochs=5)),
        train=Train(
            batch_size=512,
            length=Duration(epochs=60),
            label_smoothing=0.1,
            ema=Duration(epochs=1),
        ),
        log=Log(every=Duration(steps=50)),
    )
