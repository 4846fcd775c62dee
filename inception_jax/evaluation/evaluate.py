"""Exact evaluation: every example of a split counted once, whatever the batch size and devices."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax.datasets.splits import Split
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Predictions
from inception_jax.input import augment, pipeline
from inception_jax.models import ops
from inception_jax.models.weights import Weights
from inception_jax.runtime import sharding
from inception_jax.telemetry.writers import informative
from inception_jax.training import initialization, losses
from inception_jax.training import state as states
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.metrics import EvalMetrics
from inception_jax.training.run import Run
from inception_jax.training.state import Variables
from inception_jax.training.workdir import Workdir

# The fields of `Predictions` but the labels, of a batch.
_Said = dict[str, jax.Array]


class Evaluator:
    """Evaluates model variables on a run's evaluation split, or on other examples.

    The same object, and so the same compiled function, serves evaluation during training and of a
    checkpoint: their numbers are equal.

    Attributes:
      predictions: what the network said of each example of the run's evaluation split, at its last
        evaluation; None before.
    """

    predictions: Predictions | None

    def __init__(self, run: Run) -> None:
        self._run = run
        self.predictions = None
        # One size for all splits, so that there is one program to compile.
        self._batch_size = pipeline.eval_batch_size(
            len(run.dataset.evaluation), limit=run.config.evaluation.batch_size
        )
        replicated = sharding.replicated(run.mesh)
        # Nothing is donated: training goes on with the same variables.
        self._jitted = jax.jit(
            self._eval_step,
            in_shardings=(replicated, sharding.batch_sharding(run.mesh)),
            out_shardings=replicated,
            compiler_options=ops.compiler_options(run.model),
        )
        self._step: Callable[..., Any] = self._jitted

    def compile(self, variables: Variables) -> None:
        """Compiles ahead what the first evaluation would.

        Args:
          variables: shapes and types of what will be evaluated.
        """
        batch = pipeline.abstract_eval_batch(
            self._run.dataset.evaluation, batch_size=self._batch_size, mesh=self._run.mesh
        )
        self._step = self._jitted.lower(variables, batch).compile()

    def __call__(self, variables: Variables, split: Split | None = None) -> dict[str, float]:
        """Returns loss (mean cross-entropy), top1 and top5 (percent) and count.

        Without top5 where there are no more than five classes.

        With `config.evaluation.flip` also flip_loss, flip_top1 and flip_top5, of logits averaged
        over each image and its mirror image.

        Args:
          variables: {"params", "batch_stats"} as `TrainState.eval_variables` gives them.
          split: the examples; None: the run's evaluation split.
        """
        if split is None:
            split = self._run.dataset.evaluation
        batches = pipeline.eval_batches(split, batch_size=self._batch_size, mesh=self._run.mesh)
        said: list[_Said] = []
        views = EvalMetrics.total(self._steps(variables, batches, said))
        metrics: dict[str, float] = {}
        for prefix, sums in views.items():
            found = sums.compute()
            count = found.pop("count")
            assert count == len(split), (count, len(split))
            metrics |= {f"{prefix}{name}": value for name, value in found.items()}
        if split is self._run.dataset.evaluation:
            self.predictions = _gathered(said, split.labels)
        metrics = informative(metrics, self._run.dataset.num_classes)
        return metrics | {"count": len(split)}

    def _steps(
        self, variables: Variables, batches: Iterator[dict[str, jax.Array]], said: list[_Said]
    ) -> Iterator[dict[str, EvalMetrics]]:
        """Yields the sums of each batch, and adds what was said of its examples to `said`."""
        for batch in batches:
            metrics, of_batch = self._step(variables, batch)
            # Some 40 bytes an example, which wait on the device until all are done.
            said.append(of_batch)
            yield metrics

    def _eval_step(
        self, variables: Variables, batch: dict[str, jax.Array]
    ) -> tuple[dict[str, EvalMetrics], _Said]:
        """Returns the sums of a batch by the prefix of their names, and what was said of each."""
        dataset = self._run.dataset
        size = self._run.config.evaluation.image_size or dataset.image_size
        images = augment.normalise(augment.resize(batch["image"], size), dataset.mean, dataset.std)
        logits = self._logits(variables, images)
        metrics = {"": _metrics(logits, batch)}
        if self._run.config.evaluation.flip:
            mirrored = self._logits(variables, images[:, :, ::-1])
            metrics["flip_"] = _metrics((logits + mirrored) / 2, batch)
        return metrics, _said(logits, batch["label"])

    def _logits(self, variables: Variables, images: jax.Array) -> jax.Array:
        output: Any = self._run.model.apply(variables, images, train=False)
        return output.logits


def _said(logits: jax.Array, labels: jax.Array) -> _Said:
    """Returns the best guesses for each example of a batch, and how probable the right one was."""
    probabilities = jax.nn.softmax(logits)
    # Of equal logits the lower class number comes first, as in the metrics.
    _, guesses = jax.lax.top_k(logits, min(predictions.BEST, logits.shape[-1]))
    return {
        "guesses": guesses,
        "probabilities": jnp.take_along_axis(probabilities, guesses, axis=-1),
        "own": jnp.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0],
    }


def _gathered(said: list[_Said], labels: np.ndarray) -> Predictions:
    """Returns what was said in all batches, without what filled the last one up."""
    batches = jax.device_get(said)
    whole = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    return Predictions(labels=labels, **{name: each[: len(labels)] for name, each in whole.items()})


def _metrics(logits: jax.Array, batch: dict[str, jax.Array]) -> EvalMetrics:
    labels = batch["label"]
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=jnp.float32)
    return EvalMetrics.single_batch(
        loss=losses.cross_entropy(logits, targets),
        top1=losses.top_k_correct(logits, labels, 1),
        top5=losses.top_k_correct(logits, labels, 5),
        mask=batch["mask"],
    )


def evaluate_checkpoint(
    run: Run, workdir: Workdir, which: str, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a workdir.

    Args:
      run: with the model and data set of the workdir.
      workdir: of a run that has saved a checkpoint.
      which: "best", "last" or the number of a step.
      log: takes a line before the evaluation, which compiles its program first.

    Returns:
      checkpoint ("best", "last", both or neither), step, epoch, split, count, loss, top1 and top5.

    Raises:
      CheckpointError: if there is no such checkpoint or it does not fit the model.
    """
    with Checkpoints(workdir.checkpoints, read_only=True) as checkpoints:
        step = checkpoints.resolve(which)
        roles = checkpoints.roles(step)
        model = checkpoints.restore_model(step, states.abstract(run).model_item())
    count = len(run.dataset.evaluation)
    batch_size = pipeline.eval_batch_size(count, limit=run.config.evaluation.batch_size)
    log(
        f"evaluating step {step:,} on {count:,} {run.dataset.eval_split} images, {batch_size:,} at "
        "a time; compiling first"
    )
    return {
        "checkpoint": roles,
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
      checkpoint, step, epoch, split, count, loss, top1 and top5; step and epoch are those of the
      training that gave the weights, None if unknown, and checkpoint says whether that was the
      best or last of its run, as in `Weights`.

    Raises:
      ConfigError: if they are of another network or other classes.
    """
    variables = initialization.for_evaluation(run, found)
    dataset = dataclasses.replace(run.dataset, mean=found.mean, std=found.std)
    variables = jax.device_put(variables, sharding.replicated(run.mesh))
    return {
        "checkpoint": found.checkpoint,
        "step": found.step,
        "epoch": found.epoch,
        "split": dataset.eval_split,
        **Evaluator(dataclasses.replace(run, dataset=dataset))(variables),
    }
