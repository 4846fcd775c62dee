"""Exact evaluation: each example counts once, whatever the batch size and devices."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
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
    """The result of an evaluation.

    Attributes:
      metrics: by name: loss (mean cross-entropy, nats), those in `config.evaluation.metrics` (top1
        and top5 in percent) and count.
      predictions: the predictions for all examples.
    """

    metrics: dict[str, float]
    predictions: Predictions


@dataclasses.dataclass(frozen=True)
class LoweredEvaluation:
    """The traced programs of an evaluation.

    Attributes:
      forward: from variables and images to logits, by image size in pixels.
      measure: from logits to metric sums and predictions.
      mean: averages the logits of two views of images; None: not used.
      shift: shifts images; None: not used.
    """

    forward: dict[int, jax.stages.Lowered]
    measure: jax.stages.Lowered
    mean: jax.stages.Lowered | None
    shift: jax.stages.Lowered | None


class Evaluator:
    """Evaluates model variables on a run's evaluation split and its additional evaluations.

    Training and checkpoint evaluation use the same compiled functions, so their numbers are equal.
    Evaluations with the same image size share a program; those of the same examples read them once.

    Args:
      run: the run, with its network, settings and data set.

    Attributes:
      main: name of the main evaluation, which is that of its split.
      views: all evaluations by name, the main one first.
      splits: the examples of each evaluation, by its name.
      batch_size: images of a batch, before it is rounded up to a multiple of the devices.

    Raises:
      ConfigError: if a split does not exist, or a metric returns an invalid value.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._metrics = run.metric_set
        self.main = run.dataset.eval_split
        if self.main in (others := configs.views(run.config)):
            raise ConfigError(
                f"config.evaluations.{self.main}: this name is reserved for the run's own "
                "evaluation; use another name"
            )
        self.views = {self.main: View(), **others}
        self.splits = {name: _split_for_view(run, name, self.views[name]) for name in self.views}
        # One batch size for all splits, so that there is one program to compile.
        self.batch_size = pipeline.eval_batch_size(
            len(run.dataset.evaluation), limit=run.config.evaluation.batch_size
        )
        replicated, batch = sharding.replicated(run.mesh), sharding.batch_sharding(run.mesh)
        options = ops.compiler_options(run.model, run.device)
        self._is_compiled = False
        # Nothing is donated: training continues with the same variables.
        # Jitted functions, replaced by compiled ones in `compile`.
        self._forward: dict[int, Any] = {
            size: jax.jit(
                self._make_forward(size),
                in_shardings=(replicated, batch, replicated),
                out_shardings=batch,
                compiler_options=options,
            )
            for size in {self.image_size(view) for view in self.views.values()}
        }
        self._mean: Any = jax.jit(lambda a, b: (a + b) / 2, in_shardings=batch, out_shardings=batch)
        self._shift: Any = jax.jit(_shifted, in_shardings=(batch, replicated), out_shardings=batch)
        self._measure: Any = jax.jit(
            self._metrics_and_predictions,
            in_shardings=(batch, batch, batch),
            out_shardings=replicated,
            compiler_options=options,
        )

    def compile(self, variables: Variables) -> None:
        """Compiles the programs for variables of these shapes and dtypes in advance, once."""
        if self._is_compiled:
            return
        self._is_compiled = True
        lowered = self.lower(variables)
        self._forward = {size: each.compile() for size, each in lowered.forward.items()}
        self._measure = lowered.measure.compile()
        if lowered.mean:
            self._mean = lowered.mean.compile()
        if lowered.shift:
            self._shift = lowered.shift.compile()

    def lower(self, variables: Variables) -> "LoweredEvaluation":
        """Traces the programs for variables of these shapes and dtypes; computes nothing."""
        replicated = sharding.replicated(self._run.mesh)
        flip = jax.ShapeDtypeStruct((), bool, sharding=replicated)
        offset = jax.ShapeDtypeStruct((), np.int32, sharding=replicated)
        batch = pipeline.abstract_eval_batch(
            self._run.dataset.evaluation, batch_size=self.batch_size, mesh=self._run.mesh
        )
        forward = {
            size: jitted.lower(variables, batch["image"], flip)
            for size, jitted in self._forward.items()
        }
        logits = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=batch["label"].sharding
            ),
            next(iter(forward.values())).out_info,
        )
        shifts = any(view.shift_tta for view in self.views.values())
        averages = shifts or any(view.flip_tta for view in self.views.values())
        return LoweredEvaluation(
            forward=forward,
            measure=self._measure.lower(logits, batch["label"], batch["mask"]),
            mean=self._mean.lower(logits, logits) if averages else None,
            shift=self._shift.lower(batch["image"], offset) if shifts else None,
        )

    def __call__(
        self, variables: Variables, names: Collection[str] | None = None
    ) -> dict[str, EvalResult]:
        """Evaluates variables, counting each example once.

        Args:
          variables: {"params", "batch_stats"}, from `TrainState.eval_variables`.
          names: names of the evaluations; None: all.

        Returns:
          The results by name.
        """
        results: dict[str, EvalResult] = {}
        for name in self.views if names is None else names:
            if name not in results:
                same = [each for each in self.views if self.input_key(each) == self.input_key(name)]
                together = [each for each in same if names is None or each in names]
                results |= self._evaluate(variables, together)
        return results

    def step(self, variables: Variables, batch: Arrays) -> tuple[EvalMetrics, Arrays]:
        """Evaluates one batch as the main evaluation does; the results stay on the devices.

        Args:
          variables: as for `__call__`.
          batch: image uint8 [B, H, W, 3], label int32 [B] and mask bool [B].

        Returns:
          The metric sums, and the arrays of `Predictions` for each example.
        """
        return self._evaluate_batch(variables, batch, [self.main])[self.main]

    @functools.cached_property
    def _flips(self) -> tuple[jax.Array, jax.Array]:
        """False and True, on all devices; not placed before they are needed, for `lower`."""
        return self._place(np.bool_(False)), self._place(np.bool_(True))

    def _place(self, value: np.generic) -> jax.Array:
        """Returns a number on all devices."""
        return jax.device_put(value, sharding.replicated(self._run.mesh))

    def _evaluate(self, variables: Variables, names: list[str]) -> dict[str, EvalResult]:
        """Returns the results of evaluations that use the same images."""
        split = self.splits[names[0]]
        batches = pipeline.eval_batches(split, batch_size=self.batch_size, mesh=self._run.mesh)
        sums: dict[str, EvalMetrics] = {}
        rows: dict[str, list[Any]] = {name: [] for name in names}
        for result in to_host(self._evaluate_batch(variables, batch, names) for batch in batches):
            for name, (metrics, batch_rows) in result.items():
                sums[name] = sums[name].add(metrics) if name in sums else metrics
                rows[name].append(batch_rows)
        return {name: self._result(sums[name], rows[name], split) for name in names}

    def _evaluate_batch(
        self, variables: Variables, batch: Arrays, names: list[str]
    ) -> dict[str, tuple[EvalMetrics, Arrays]]:
        """Returns the results of one batch for evaluations that use the same images, by name."""
        forward = self._forward[self.image_size(self.views[names[0]])]

        @functools.cache
        def logits_of(offset: int, mirrored: bool) -> jax.Array:
            images = batch["image"]
            if offset:
                images = self._shift(images, self._place(np.int32(offset)))
            logits: jax.Array = forward(variables, images, self._flips[mirrored])
            return logits

        def mirror_mean(view: View, offset: int) -> jax.Array:
            logits = logits_of(offset, False)
            return self._mean(logits, logits_of(offset, True)) if view.flip_tta else logits

        def mean(view: View) -> jax.Array:
            logits = mirror_mean(view, 0)
            if view.shift_tta:
                both = [mirror_mean(view, offset) for offset in (-view.shift_tta, view.shift_tta)]
                logits = self._mean(logits, self._mean(*both))
            return logits

        return {
            name: self._measure(mean(self.views[name]), batch["label"], batch["mask"])
            for name in names
        }

    def _result(
        self, sums: EvalMetrics, rows: list[Mapping[str, np.ndarray]], split: Split
    ) -> EvalResult:
        metrics = sums.compute()
        assert metrics["count"] == len(split), (metrics["count"], len(split))
        # Drop the padding of the last batch.
        arrays = {
            name: np.concatenate([row[name] for row in rows])[: len(split)] for name in rows[0]
        }
        if self._metrics.needs_logits:
            metrics |= self._metrics.over_split(arrays.pop("logits"), split.labels)
        count = metrics.pop("count")
        return EvalResult(
            metrics=self._metrics.in_units(metrics) | {"count": count},
            predictions=Predictions(labels=split.labels, **arrays),
        )

    def image_size(self, view: View) -> int:
        """Returns the side of the network's images in an evaluation, in pixels."""
        config, dataset = self._run.config, self._run.dataset
        return view.size or config.evaluation.image_size or dataset.image_size

    def input_key(self, name: str) -> tuple[Any, ...]:
        """Returns a key that is equal for evaluations of the same images at the same size."""
        view = self.views[name]
        crop = view.crop or self._run.config.data.eval_crop_pct
        return view.split, len(self.splits[name]), crop, self.image_size(view)

    def _make_forward(self, size: int) -> Callable[..., jax.Array]:
        """Returns a function from variables, images and whether to flip them to logits [B, K]."""
        dataset, kernel = self._run.dataset, self._run.config.data.resize_kernel

        def logits(variables: Variables, images: jax.Array, flip: jax.Array) -> jax.Array:
            images = augment.resize(images, size, kernel)
            images = augment.normalize(images, dataset.mean, dataset.std)
            images = jnp.where(flip, images[:, :, ::-1], images)
            output: Any = self._run.model.apply(variables, images, train=False)
            return output.logits

        return logits

    def _metrics_and_predictions(
        self, logits: jax.Array, labels: jax.Array, mask: jax.Array
    ) -> tuple[EvalMetrics, Arrays]:
        """Returns a batch's metric sums, and the arrays kept for each of its examples."""
        probabilities = jax.nn.softmax(logits)
        # Among equal logits the lower class number comes first, as in the metrics.
        _, top_classes = jax.lax.top_k(logits, min(predictions.TOP_K, logits.shape[-1]))
        kept = {
            "top_classes": top_classes,
            "top_probs": jnp.take_along_axis(probabilities, top_classes, axis=-1),
            "true_prob": jnp.take_along_axis(probabilities, labels[:, None], axis=-1)[:, 0],
        }
        if self._metrics.needs_logits:
            kept["logits"] = logits.astype(jnp.float32)
        return EvalMetrics.single_batch(self._metrics.per_example(logits, labels), mask), kept


def _shifted(images: jax.Array, offset: jax.Array) -> jax.Array:
    """Returns images, uint8 [B, H, W, 3], shifted down and right by an offset, int32 [].

    The border is filled by reflection at its pixels, as `infer_mirror_translate` in
    KellerJordan/cifar10-airbench does, whose weights of the views are those of `View.shift_tta`.
    """
    for axis in (1, 2):
        last = images.shape[axis] - 1
        source = jnp.abs(jnp.arange(last + 1) - offset)
        images = jnp.take(images, last - jnp.abs(last - source), axis=axis)
    return images


def _split_for_view(run: Run, name: str, view: View) -> Split:
    """Returns the examples of an evaluation; raises a ConfigError if they are not available."""
    crop = view.crop or run.config.data.eval_crop_pct
    try:
        split = run.dataset.view(view.split, crop=crop, examples=view.examples or None)
    except ConfigError as error:
        raise ConfigError(f"the evaluation {name!r} of split {view.split!r}: {error}") from error
    if (split.labels < 0).any():
        raise ConfigError(
            f"config.evaluations.{name}.split = {view.split!r}: has images without labels, which "
            "only tools.predict can use (--split); use another split"
        )
    return split


def summary(results: Mapping[str, EvalResult]) -> dict[str, Any]:
    """Returns the first evaluation's metrics, with those of any others under "evaluations"."""
    first, *others = results
    metrics: dict[str, Any] = dict(results[first].metrics)
    if others:
        metrics["evaluations"] = {name: results[name].metrics for name in others}
    return metrics


def evaluate_checkpoint(
    run: Run, workdir: Workdir, which: str, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Evaluates a checkpoint of a workdir.

    Args:
      run: the run, with the model and data set of the workdir.
      workdir: a workdir with a checkpoint.
      which: "best", "last" or a step number.
      log: called with a line before the evaluation, which compiles its program first.

    Returns:
      checkpoint ("best", "last", "best and last" or ""), step, epoch, split, the metrics of the
      main evaluation and, if there are others, evaluations: their metrics by name.

    Raises:
      CheckpointError: if the checkpoint does not exist or does not match the model.
    """
    with Checkpoints(workdir.checkpoints, read_only=True) as checkpoints:
        step = checkpoints.resolve(which)
        roles = checkpoints.roles(step)
        model = checkpoints.restore_model(step, states.abstract_state(run).model_item())
    evaluator = Evaluator(run)
    log(
        f"evaluating step {step:,} on {len(run.dataset.evaluation):,} {run.dataset.eval_split} "
        f"images in batches of {evaluator.batch_size:,}; compiling first"
    )
    return {
        "checkpoint": roles,
        "step": step,
        "epoch": run.timeline.epoch(step),
        "split": run.dataset.eval_split,
        **summary(evaluator(states.eval_variables(**model))),
    }


def evaluate_weights(
    run: Run, weights: Weights, log: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Evaluates weights on a run's evaluation split.

    Images are normalized by the weights' own mean and std, as in their training, but cropped and
    resized as the run's settings say.

    Args:
      run: a run with the network and the classes of the weights.
      weights: the weights.
      log: called with a line for each of these settings that differs from the weights' own.

    Returns:
      As `evaluate_checkpoint`; step, epoch and checkpoint come from `Weights` and describe the
      training that produced them (step and epoch None if unknown).

    Raises:
      ConfigError: if the weights belong to another network or other classes.
    """
    variables = initialization.variables_for_eval(run, weights)
    for line in _preprocessing_differences(run, weights):
        log(line)
    dataset = dataclasses.replace(run.dataset, mean=weights.mean, std=weights.std)
    variables = jax.device_put(variables, sharding.replicated(run.mesh))
    return {
        "checkpoint": weights.checkpoint,
        "step": weights.step,
        "epoch": weights.epoch,
        "split": dataset.eval_split,
        **summary(Evaluator(dataclasses.replace(run, dataset=dataset))(variables)),
    }


def _preprocessing_differences(run: Run, weights: Weights) -> Iterator[str]:
    """Yields a line for each setting of evaluation images that differs from the weights' own."""
    config, size = run.config, run.dataset.image_size
    own = {
        "data.image_size": (size, weights.image_size),
        "evaluation.image_size": (
            config.evaluation.image_size or size,
            weights.eval_image_size or weights.image_size,
        ),
        "data.eval_crop_pct": (run.dataset.eval_crop, weights.eval_crop),
        "data.resize_kernel": (config.data.resize_kernel, weights.resize_kernel),
    }
    for name, (ours, theirs) in own.items():
        if ours != theirs:
            yield (
                f"{weights.origin or 'weights'}: config.{name} is {ours!r}; recorded with the "
                f"weights: {theirs!r}"
            )
