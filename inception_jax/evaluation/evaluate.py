"""Exact evaluation: every example of a split counted once, whatever the batch size and devices."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from inception_jax.input import augment, pipeline, sharding
from inception_jax.input.splits import Split
from inception_jax.models import ops
from inception_jax.models.weights import Weights
from inception_jax.telemetry.metrics import EvalMetrics
from inception_jax.training import losses, pretrained
from inception_jax.training import state as states
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.run import Run
from inception_jax.training.state import Variables
from inception_jax.training.workdir import Workdir


class Evaluator:
    """Evaluates model variables on a run's evaluation split, or on other examples.

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

    def __call__(self, variables: Variables, split: Split | None = None) -> dict[str, float]:
        """Returns loss (mean cross-entropy), top1 and top5 (percent) and count.

        With `config.evaluation.flip` also flip_loss, flip_top1 and flip_top5, of logits averaged
        over each image and its mirror image.

        Args:
          variables: {"params", "batch_stats"} as `TrainState.eval_variables` gives them.
          split: the examples; None: the run's evaluation split.
        """
        if split is None:
            split = self._run.dataset.evaluation
        batches = pipeline.eval_batches(
            split, batch_size=self._run.config.evaluation.batch_size, mesh=self._run.mesh
        )
        views = EvalMetrics.total(self._step(variables, batch) for batch in batches)
        metrics: dict[str, float] = {}
        for prefix, sums in views.items():
            found = sums.compute()
            count = found.pop("count")
            assert count == len(split), (count, len(split))
            metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        return metrics | {"count": len(split)}

    def _eval_step(
        self, variables: Variables, batch: dict[str, jax.Array]
    ) -> dict[str, EvalMetrics]:
        """Returns the sums of a batch by the prefix of their names."""
        dataset = self._run.dataset
        size = self._run.config.evaluation.image_size or dataset.image_size
        images = augment.normalise(augment.resize(batch["image"], size), dataset.mean, dataset.std)
        logits = self._logits(variables, images)
        metrics = {"": _metrics(logits, batch)}
        if self._run.config.evaluation.flip:
            mirrored = self._logits(variables, images[:, :, ::-1])
            metrics["flip_"] = _metrics((logits + mirrored) / 2, batch)
        return metrics

    def _logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        output: Any = self._run.model.apply(variables, images, train=False)
        return output.logits


def _metrics(logits: jax.Array, batch: dict[str, jax.Array]) -> EvalMetrics:
    labels = batch["label"]
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
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
        model = checkpoints.restore_model(step, states.abstract(run).model_item())
    return {
        "step": step,
        "epoch": run.timeline.epoch(step),
        "split": run.dataset.eval_split,
        **Evaluator(run)(states.eval_variables(**model)),
    }


def evaluate_weights(run: Run, found: Weights) -> dict[str, Any]:
    """Evaluates weights on a run's evaluation split.

    Images are normalised by the weights' own mean and std, as they were trained.

    Args:
      run: with the network of the weights, and a data set of its classes.
      found: the weights.

    Returns:
      step, epoch, split, count, loss, top1 and top5; step and epoch are those of the training that
      gave the weights, None if unknown.

    Raises:
      ConfigError: if they are of another network or other classes.
    """
    variables = pretrained.for_evaluation(run, found)
    dataset = dataclasses.replace(run.dataset, mean=found.mean, std=found.std)
    variables = jax.device_put(variables, sharding.replicated(run.mesh))
    return {
        "step": found.step,
        "epoch": found.epoch,
        "split": dataset.eval_split,
        **Evaluator(dataclasses.replace(run, dataset=dataset))(variables),
    }
