"""Exact evaluation: every example of a split counted once, whatever the batch size and devices."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax import config as configs
from inception_jax.config import View
from inception_jax.datasets.splits import Split
from inception_jax.errors import ConfigError
from inception_jax.evaluation import predictions
from inception_jax.evaluation.predictions import Predictions
from inception_jax.input import augment, pipeline
from inception_jax.models import ops
from inception_jax.models.weights import Weights
from inception_jax.runtime import sharding
from inception_jax.storage.workdir import Workdir
from inception_jax.training import initialization
from inception_jax.training import state as states
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.metrics import EvalMetrics, to_host
from inception_jax.training.run import Run
from inception_jax.training.state import Variables

Arrays = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class EvalResult:
    """What an evaluation gave.

    Attributes:
      metrics: loss (mean cross-entropy, nats), those that `config.evaluation.metrics` names (top1
        and top5 in percent) and count, by name.
      predictions: for each example.
    """

    metrics: dict[str, float]
    predictions: Predictions


class Evaluator:
    """Evaluates model variables on a run's evaluation split, and on its other evaluations.

    The same object, and so the same compiled functions, serve evaluation during training and of a
    checkpoint: their numbers are equal. Evaluations of one image size share a program, and those of
    the same examples read them once.

    Args:
      run: with the network, the settings and the data set.

    Attributes:
      main: the name of the run's own evaluation, which is that of the split.
      views: all evaluations by name, the run's own first.
      splits: the examples of each, by its name.

    Raises:
      ConfigError: if an evaluation is of a split that is not there, or a metric does not return
        what it should.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._metrics = run.metric_set
        self.main = run.dataset.eval_split
        if self.main in (others := configs.views(run.config)):
            raise ConfigError(
                f"config.evaluations.{self.main}: this is the name of the run's own evaluation; "
                "give it another name"
            )
        self.views = {self.main: View(), **others}
        self.splits = {name: _examples(run, name, self.views[name]) for name in self.views}
        # One size for all splits, so that there is one program to compile.
        self._batch_size = pipeline.eval_batch_size(
            len(run.dataset.evaluation), limit=run.config.evaluation.batch_size
        )
        replicated, batch = sharding.replicated(run.mesh), sharding.batch_sharding(run.mesh)
        options = ops.compiler_options(run.model)
        self._plain, self._mirrored = jax.device_put((np.bool_(False), np.bool_(True)), replicated)
        self._is_compiled = False
        # Nothing is donated: training goes on with the same variables.
        # Jitted, or once `compile` was called compiled.
        self._forward: dict[int, Any] = {
            size: jax.jit(
                self._logits_of(size),
                in_shardings=(replicated, batch, replicated),
                out_shardings=batch,
                compiler_options=options,
            )
            for size in {self._size(view) for view in self.views.values()}
        }
        self._mean: Any = jax.jit(lambda a, b: (a + b) / 2, in_shardings=batch, out_shardings=batch)
        self._measure: Any = jax.jit(
            self._measured,
            in_shardings=(batch, batch, batch),
            out_shardings=replicated,
            compiler_options=options,
        )

    def compile(self, variables: Variables) -> None:
        """Compiles ahead what the first evaluation would, once.

        Args:
          variables: shapes and types of what will be evaluated.
        """
        if self._is_compiled:
            return
        self._is_compiled = True
        batch = pipeline.abstract_eval_batch(
            self._run.dataset.evaluation, batch_size=self._batch_size, mesh=self._run.mesh
        )
        logits: Any = None
        for size, forward in self._forward.items():
            lowered = forward.lower(variables, batch["image"], self._plain)
            logits = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=batch["label"].sharding
                ),
                lowered.out_info,
            )
            self._forward[size] = lowered.compile()
        self._measure = self._measure.lower(logits, batch["label"], batch["mask"]).compile()
        if any(view.flip_tta for view in self.views.values()):
            self._mean = self._mean.lower(logits, logits).compile()

    def __call__(
        self, variables: Variables, names: Collection[str] | None = None
    ) -> dict[str, EvalResult]:
        """Evaluates, each example counted once.

        Args:
          variables: {"params", "batch_stats"} as `TrainState.eval_variables` gives them.
          names: of the evaluations; None: all.

        Returns:
          The results by name.
        """
        results: dict[str, EvalResult] = {}
        for name in self.views if names is None else names:
            if name not in results:
                same = [each for each in self.views if self._source(each) == self._source(name)]
                together = [each for each in same if names is None or each in names]
                results |= self._evaluate(variables, together)
        return results

    def step(self, variables: Variables, batch: Arrays) -> tuple[EvalMetrics, Arrays]:
        """Evaluates one batch as the run's own evaluation does; the results stay on the devices.

        Args:
          variables: as of a call.
          batch: image uint8 [B, H, W, 3], label int32 [B] and mask bool [B].

        Returns:
          The sums, and what `Predictions` holds of each example.
        """
        return self._steps(variables, batch, [self.main])[self.main]

    def _evaluate(self, variables: Variables, names: list[str]) -> dict[str, EvalResult]:
        """Returns the results of evaluations of the same images."""
        split = self.splits[names[0]]
        batches = pipeline.eval_batches(split, batch_size=self._batch_size, mesh=self._run.mesh)
        sums: dict[str, EvalMetrics] = {}
        rows: dict[str, list[Any]] = {name: [] for name in names}
        for found in to_host(self._steps(variables, batch, names) for batch in batches):
            for name, (metrics, of_batch) in found.items():
                sums[name] = sums[name].plus(metrics) if name in sums else metrics
                rows[name].append(of_batch)
        return {name: self._result(sums[name], rows[name], split) for name in names}

    def _steps(
        self, variables: Variables, batch: Arrays, names: list[str]
    ) -> dict[str, tuple[EvalMetrics, Arrays]]:
        """Returns what evaluations of the same images give for a batch of them, by name."""
        forward = self._forward[self._size(self.views[names[0]])]
        flipped = [name for name in names if self.views[name].flip_tta]
        logits = forward(variables, batch["image"], self._plain)
        mean = logits
        if flipped:
            mean = self._mean(logits, forward(variables, batch["image"], self._mirrored))
        return {
            name: self._measure(mean if name in flipped else logits, batch["label"], batch["mask"])
            for name in names
        }

    def _result(
        self, sums: EvalMetrics, rows: list[Mapping[str, np.ndarray]], split: Split
    ) -> EvalResult:
        metrics = sums.compute()
        assert metrics["count"] == len(split), (metrics["count"], len(split))
        # Without what filled the last batch up.
        whole = {
            name: np.concatenate([row[name] for row in rows])[: len(split)] for name in rows[0]
        }
        if self._metrics.needs_logits:
            metrics |= self._metrics.over_split(whole.pop("logits"), split.labels)
        count = metrics.pop("count")
        return EvalResult(
            metrics=self._metrics.in_units(metrics) | {"count": count},
            predictions=Predictions(labels=split.labels, **whole),
        )

    def _source(self, name: str) -> tuple[Any, ...]:
        """Returns what evaluations have in common that see the same images of the same size."""
        view = self.views[name]
        crop = view.crop or self._run.config.data.eval_crop_pct
        return view.split, len(self.splits[name]), crop, self._size(view)

    def _size(self, view: View) -> int:
        config, dataset = self._run.config, self._run.dataset
        return view.size or config.evaluation.image_size or dataset.image_size

    def _logits_of(self, size: int) -> Callable[..., jax.Array]:
        """Returns what maps variables, images, and whether to mirror them, to logits [B, K]."""
        dataset = self._run.dataset

        def logits(variables: Variables, images: jax.Array, mirrored: jax.Array) -> jax.Array:
            images = augment.normalise(augment.resize(images, size), dataset.mean, dataset.std)
            images = jnp.where(mirrored, images[:, :, ::-1], images)
            output: Any = self._run.model.apply(variables, images, train=False)
            return output.logits

        return logits

    def _measured(
        self, logits: jax.Array, labels: jax.Array, mask: jax.Array
    ) -> tuple[EvalMetrics, Arrays]:
        """Returns the sums of a batch, and what is kept of each of its examples."""
        probabilities = jax.nn.softmax(logits)
        # Of equal logits the lower class number comes first, as in the metrics.
        _, guesses = jax.lax.top_k(logits, min(predictions.BEST, logits.shape[-1]))
        kept = {
            "guesses": guesses,
            "probabilities": jnp.take_along_axis(probabilities, guesses, axis=-1),
            "own": jnp.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0],
        }
        if self._metrics.needs_logits:
            kept["logits"] = logits.astype(jnp.float32)
        return EvalMetrics.single_batch(self._metrics.per_example(logits, labels), mask), kept


def _examples(run: Run, name: str, view: View) -> Split:
    """Returns the examples of an evaluation.

    Raises:
      ConfigError: if there is no such split.
    """
    crop = view.crop or run.config.data.eval_crop_pct
    try:
        return run.dataset.view(view.split, crop=crop, examples=view.examples or None)
    except ConfigError as error:
        raise ConfigError(f"config.evaluations.{name}.split = {view.split!r}: {error}") from error


def summary(results: Mapping[str, EvalResult]) -> dict[str, Any]:
    """Returns the metrics of the first of some evaluations, and by name, if any, of the others."""
    first, *others = results
    found: dict[str, Any] = dict(results[first].metrics)
    if others:
        found["evaluations"] = {name: results[name].metrics for name in others}
    return found


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
      checkpoint ("best", "last", both or neither), step, epoch, split, the metrics of the run's own
      evaluation, and, where there are more, evaluations: the metrics of each by its name.

    Raises:
      CheckpointError: if there is no such checkpoint or it does not fit the model.
    """
    with Checkpoints(workdir.checkpoints, read_only=True) as checkpoints:
        step = checkpoints.resolve(which)
        roles = checkpoints.roles(step)
        model = checkpoints.restore_model(step, states.abstract_state(run).model_item())
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
        **summary(Evaluator(run)(states.eval_variables(**model))),
    }


def evaluate_weights(run: Run, found: Weights) -> dict[str, Any]:
    """Evaluates weights on a run's evaluation split.

    Images are normalised by the weights' own mean and std, as they were trained.

    Args:
      run: with the network of the weights, and a data set of its classes.
      found: the weights.

    Returns:
      What `evaluate_checkpoint` does; step and epoch are those of the training that gave the
      weights, None if unknown, and checkpoint says whether that was the best or last of its run, as
      in `Weights`.

    Raises:
      ConfigError: if they are of another network or other classes.
    """
    variables = initialization.variables_for_eval(run, found)
    dataset = dataclasses.replace(run.dataset, mean=found.mean, std=found.std)
    variables = jax.device_put(variables, sharding.replicated(run.mesh))
    return {
        "checkpoint": found.checkpoint,
        "step": found.step,
        "epoch": found.epoch,
        "split": dataset.eval_split,
        **summary(Evaluator(dataclasses.replace(run, dataset=dataset))(variables)),
    }
