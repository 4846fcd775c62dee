r"""GoogLeNet on a folder of your own images.

Source: GoogLeNet (Szegedy et al. 2015, "Going Deeper with Convolutions") with BatchNorm and a stem
  for small images, at 64 pixels. Batch size, learning rate, duration, warm-up and evaluation
  intervals are chosen from the number of training images (train.auto_size), bfloat16 or float32
  from the hardware; the log reports the choice, config.json records it, and a flag overrides it. A
  small folder is memorized within a few epochs, hence crops of 25 to 100% of the image, flips,
  dropout, label smoothing, and mixup if there are many images and steps. The average over the last
  epochs is evaluated, with BatchNorm's statistics re-estimated from training images.
Command: python -m inception_jax.main --config experiments/image_folder.py --workdir runs/mine \
    --config.data.source=IMAGES --config.data.directory=DATA
  IMAGES contains train/CLASS/ and val/CLASS/, or only CLASS/, in which case a fraction is held out
  (--config.data.val_fraction=0.2). It may also be a zip or tar archive of that. DATA is the
  directory for prepared data; use one for each IMAGES. --config.data.on_unreadable=skip skips
  corrupt and non-image files.
  --config.init.pretrained=results/pretrained/googlenet-s16-tiny-imagenet.safetensors starts from
  pretrained weights and trains for a third of the epochs. To train longer:
  --config.train.duration='200 epochs'
  Larger images: --config.data.image_size=128 --config.model.stem=paper costs about the same.
Expected: depends on the images. 245 of ants and bees (hymenoptera_data.zip, PyTorch's tutorials)
  gave 82.35% top-1 on 153 others in 20 epochs from results/pretrained (n = 1, seed 0, bfloat16).
  From scratch, they gave 76.47% in 60 epochs (n = 1, seed 0, bfloat16; results/image_folder).
Cost: 0.49 GMACs per image forward, 6 M parameters.
"""

from inception_jax.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Log,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config() -> Config:
    """Returns the settings."""
    return Config(
        name="image_folder",
        data=Data(name="image_folder", image_size=64),
        augment=Augment(crop="resized", crop_scale_min=0.25, flip=True, mixup=-1.0),
        model=Model(name="googlenet", stem="s16", dropout=0.4, dtype="auto"),
        optimizer=Optimizer(name="sgd_nesterov", momentum=0.9, weight_decay=5e-4),
        schedule=Schedule(name="cosine", learning_rate=0.0),
        train=Train(
            auto_size=True,
            batch_size=0,
            duration="",
            label_smoothing=0.1,
            ema="2 epochs",
        ),
        evaluation=Evaluation(batch_size=250, every="", train_eval_examples=100, norm_examples=128),
        checkpoint=Checkpoint(every=""),
        log=Log(every=""),
    )
