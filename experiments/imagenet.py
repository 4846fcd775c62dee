"""GoogLeNet on ImageNet at 224 pixels: the paper's task, for a host with several accelerators.

Source: GoogLeNet (Szegedy et al. 2015, "Going Deeper with Convolutions"): the network without
  BatchNorm, with local response normalization and both auxiliary heads; crops of 8 to 100% of the
  image and Howard's photometric distortions (section 6); the averaged parameters are evaluated
  (Polyak averaging; here a moving average over an epoch). The optimizer settings are those of BVLC
  Caffe's models/bvlc_googlenet/quick_solver.prototxt: SGD with momentum 0.9, learning rate 0.01
  decaying as (1 - t / T) ^ 0.5, L2 of 0.0002, 60 epochs. Unlike there, the batch size is 256, not
  32, at the same learning rate, and kernels are initialized from He's distribution.
  The paper's schedule, -4% every 8 epochs, is --config.schedule.name=exponential
  --config.schedule.decay_rate=0.96 --config.schedule.decay_period='8 epochs'
  --config.schedule.staircase=true (BVLC ran it for 250 epochs).
Command: python -m inception_jax.main --config experiments/imagenet.py --workdir runs/imagenet
  with --config.data.source=FOLDER, which contains ILSVRC2012_img_train.tar and
  ILSVRC2012_img_val.tar, and --config.data.directory on a disk with 150 GB; or with a directory in
  which `tfds build imagenet2012 --file_format=array_record` has prepared the data.
Expected: not measured: the data must be requested from image-net.org. BVLC reports 68.7% top-1 and
  88.9% top-5, center crop, for its solver with batches of 32, 2.4 million steps and neither these
  crops nor photometric distortions.
Evaluation: the central 224 pixels of the image resized to a shorter side of 256, one crop.
Cost: 1.6 GMACs per image forward, 7.0 M parameters without the heads; 300,274 steps of 256. JPEGs
  are decoded and cropped at each step, on every core of the host, 2.1 ms per image and core
  (docs/notes/decisions/data.md).
"""

from inception_jax.config import (
    Augment,
    Checkpoint,
    Config,
    Data,
    Evaluation,
    Expected,
    Log,
    Model,
    Optimizer,
    Schedule,
    Train,
)


def get_config() -> Config:
    """Returns the settings."""
    return Config(
        name="imagenet",
        data=Data(name="imagenet2012", image_size=224, storage="records", eval_crop_pct=0.875),
        augment=Augment(
            crop="inception", crop_scale_min=0.08, crop_ratio_max=4 / 3, flip=True, color_jitter=0.5
        ),
        model=Model(
            name="googlenet",
            stem="paper",
            norm="lrn",
            aux_heads=True,
            dropout=0.4,
            aux_dropout=0.7,
            dtype="bfloat16",
        ),
        optimizer=Optimizer(name="sgd", momentum=0.9, weight_decay=2e-4),
        schedule=Schedule(name="polynomial", learning_rate=0.01, power=0.5),
        train=Train(
            batch_size=256,
            duration="60 epochs",
            aux_weight=0.3,
            ema="1 epoch",
        ),
        evaluation=Evaluation(batch_size=500, every="1 epoch"),
        checkpoint=Checkpoint(every="2000 steps"),
        log=Log(every="100 steps"),
        expected=Expected(
            top1=68.7, source="BVLC Caffe's, with another solver and without these boxes"
        ),
    )
