"""Settings shared by the Tiny ImageNet experiments: each of the others derives from this.

This is not a recipe: run one of the others. All of them train on the whole training split (100,000
images, in a new order each epoch, none dropped) and are evaluated on all 10,000 images of the
official validation split each epoch, unless they say otherwise. Images are normalized by mean and
standard deviation of the training split.

The experiments that follow another project's recipe (tiny_adam, tiny_deeper, tiny_paper,
tiny_steps) share these deviations from their sources:
  - The sources in Keras subtract only the mean, and some hold out training images as a test set,
    train on the rest, and skip the images of the last partial batch.
  - Kernels are initialized from He's truncated normal instead of Glorot's uniform (Keras) or
    Caffe's Xavier.
  - BatchNorm is before the ReLU; two of the sources have it after. Convolutions followed by
    BatchNorm have no biases.
  - Keras's l2(r) adds r times the sum of squares to the loss, so weight_decay is 2 r here. It
    applies to kernels, as in the sources.
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
