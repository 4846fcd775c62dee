"""What the Tiny ImageNet experiments share: each of the others derives from this.

It is no recipe: run one of the others. All of them train on the whole training split (100,000
images, in a new order each epoch, none dropped) and are evaluated on all 10,000 images of the
official validation split each epoch, unless they say otherwise. Images are normalised by mean and
standard deviation of the training split.

Those that follow another project's recipe (tiny_adam, tiny_deeper, tiny_paper, tiny_steps) deviate
from their sources in common:
  - The sources in Keras subtract the mean alone, and some hold training images out as a test set,
    train on the rest, and skip the images of the last partial batch.
  - Kernels start from He's truncated normal instead of Glorot's uniform (Keras) or Caffe's Xavier.
  - BatchNorm stands before the ReLU, where two of the sources have it after; convolutions that are
    followed by BatchNorm have no biases.
  - Keras's l2(r) adds r times the sum of squares to the loss, so weight_decay is 2 r here; it acts
    on kernels, as there.
"""

from inception_jax.config import Augment, Checkpoint, Config, Data, Evaluation, Log, Model


def get_config() -> Config:
    """Returns the settings."""
    return Config(
        name="tiny_base",
        data=Data(name="tiny_imagenet", image_size=64),
        augment=Augment(crop="pad", pad=4, flip=True),
        model=Model(name="googlenet", stem="paper", norm="batch", dropout=0.4),
        evaluation=Evaluation(batch_size=500, every="1 epoch"),
        checkpoint=Checkpoint(every="1 epoch", keep_last=2, keep_best=1),
        log=Log(every="100 steps"),
    )
