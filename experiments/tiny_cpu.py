"""GoogLeNet on Tiny ImageNet in an hour on two CPU cores.

Source: GoogLeNet (Szegedy et al. 2015) with BatchNorm and a stem that leaves grids of 16, 8 and 4
  at 64 pixels, trained with Muon (Jordan et al. 2024) on images that grow from 32 to 64 pixels, as
  in fast ImageNet trainings (Howard 2018, "Training Imagenet in 3 hours for USD 25"). The learning
  rate rises and falls linearly. With so few epochs, there is no mixing and no dropout.
  It computes in bfloat16 on a CPU that multiplies it (with AMX or AVX-512 BF16, and jax 0.12, which
  needs Python 3.12), in float32 on others; the log says which.
Command: python -m inception_jax.main --config experiments/tiny_cpu.py --workdir runs/tiny_cpu
Changes to tiny_base: model, optimizer, schedule, train, evaluation, checkpoint, expected.
Expected: 55.03% top-1, 79.72% top-5 on the validation images, 55.81% and 80.64% averaged over each
  image and its mirror image (n = 1, seed 0; results/tiny_cpu). In two hours, 16 epochs: 61.22% and
  83.89%, averaged 61.65% and 84.05% (n = 1, seed 0; results/tiny_cpu_long has the command), both in
  bfloat16. Muon was chosen over SGD on held-out training images (41.92% against 30.14% after 2.7
  epochs; docs/notes/recipes.md).
Time: 52 minutes, 50 of them training (16 epochs: 122 and 119), on two cores of an Intel Xeon with
  AMX, Python 3.12.
"""

from experiments import tiny_base
from inception_jax.config import Config, Expected, Model, Optimizer, Schedule, Train


def get_config() -> Config:
    """Returns the settings."""
    config = tiny_base.get_config()
    config.name = "tiny_cpu"
    config.model = Model(name="googlenet", stem="s16", dropout=0.0, dtype="auto")
    config.optimizer = Optimizer(name="muon", momentum=0.9, weight_decay=0.05)
    config.schedule = Schedule(name="linear", learning_rate=0.08, warmup="0.3 epochs")
    config.train = Train(
        batch_size=256,
        duration="6.4 epochs",
        label_smoothing=0.1,
        image_sizes=(32, 48, 64),
        image_size_boundaries=("3.8 epochs", "5.8 epochs"),
    )
    config.evaluation.every = "6 epochs"  # The first is at the last size, too.
    config.evaluation.flip_tta = True
    config.checkpoint.every = "200 steps"
    config.expected = Expected(top1=55.03, source="measured once, seed 0: results/tiny_cpu")
    return config
