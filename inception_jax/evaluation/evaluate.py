"""Exact evaluation: every example of a split counted once, whatever the batch size and devices."""

from typing import Any

import jax
import jax.numpy as jnp

from inception_jax.input import augment, pipeline, sharding
from inception_jax.input.splits import Split
from inception_jax.models import ops
from inception_jax.telemetry.metrics import EvalMetrics
from inception_jax.training import losses
from inception_jax.training import state as states
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.run import Run
from inception_jax.training.state import Variables
from inception_jax.training.workdir import Workdir


class Evaluator:
    """Evaluates model variables on a run's evaluation split.

    The same object, and so the same compiled function, serves evaluation during training and of a
    checkpoint: their numbers are equal.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        replicated = sharding.replicated(run.mesh)
        # Nothing is donated: training goes on with the same variables.
        self._step = jax.jit(
            self._eval_step,
            in_shardings=(replicated, sharding.batch_sharding(run.mesh)),
            out_shardings=replicated,
            compiler_options=ops.compiler_options(run.config.model.dtype),
        )

    def __call__(self, variables: Variables) -> dict[str, float]:
        """Returns loss (mean cross-entropy), top1 and top5 (percent) and count.

        Args:
          variables: {"params", "batch_stats"} as `TrainState.eval_variables` gives them.
        """
        split = self._run.dataset.evaluation
        return self._evaluate(variables, split, len(split))

    def train_sample(self, variables: Variables) -> dict[str, float]:
        """Returns the same of the first `evaluation.train_examples` of the training split."""
        split = self._run.dataset.train
        examples = min(self._run.config.evaluation.train_examples, len(split))
        return self._evaluate(variables, split, examples)

    def _evaluate(self, variables: Variables, split: Split, examples: int) -> dict[str, float]:
        batches = pipeline.eval_batches(
            split,
            batch_size=self._run.config.evaluation.batch_size,
            mesh=self._run.mesh,
            examples=examples,
        )
        metrics = EvalMetrics.total(self._step(variables, batch) for batch in batches).compute()
        assert metrics["count"] == examples, (metrics["count"], examples)
        return metrics

    def _eval_step(self, variables: Variables, batch: dict[str, jax.Array]) -> EvalMetrics:
        dataset = self._run.dataset
        images = augment.normalise(batch["image"], dataset.mean, dataset.std)
        output: Any = self._run.model.apply(variables, images, train=False)
        logits = output.logits
        labels = batch["label"]
        targets = jax.nn.one_hot(labels, dataset.num_classes, dtype=jnp.float32)
        return EvalMetrics.single_batch(
            loss=losses.cross_entropy(logits, targets),
            top1=losses.top_k_correct(logits, labels, 1),
            top5=losses.top_k_correct(logits, labels, 5),
            mask=batch["mask"],
        )


def evaluate_checkpoint(run: Run, workdir: Workdir, which: str) -> dict[str, Any]:
    """Evaluates a checkpoint of a workdir.

    Args:
      run: with the model and data set of the workdir.
      workdir: of a run that has saved a checkpoint.
      which: "best", "last" or the number of a step.

    Returns:
      step, epoch, split, count, loss, top1 and top5.

    Raises:
      CheckpointError: if there is no such checkpoint or it does not fit the model.
    """
    with Checkpoints(workdir.checkpoints, read_only=True) as checkpoints:
        step = checkpoints.resolve(which)
        model = checkpoints.restore_model(step, states.abstract(run))
    return {
        "step": step,
        "epoch": run.timeline.epoch(step),
        "split": run.dataset.eval_split,
        **Evaluator(run)(states.eval_variables(**model)),
    }
