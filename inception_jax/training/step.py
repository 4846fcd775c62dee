"""One training step: augment → forward → loss → gradient → update → averages → metrics."""

from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from inception_jax.config import Train
from inception_jax.input import augment, pipeline
from inception_jax.models import ops, protocol
from inception_jax.runtime import sharding
from inception_jax.telemetry import compilations
from inception_jax.training import ema, gradients, keys, losses, nonfinite
from inception_jax.training.gradients import Loss
from inception_jax.training.metrics import TrainMetrics
from inception_jax.training.run import Batch, Run
from inception_jax.training.state import TrainState

CompiledStep = futures.Future[jax.stages.Compiled]
# From a key, images uint8 [B, H, W, 3] and labels int32 [B], what the network sees: images float32
# [B, h, w, 3], normalized, and targets float32 [B, K].
Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class StepOutput(NamedTuple):
    """What a step says of its batch, besides the state after it.

    Attributes:
      loss: float32 scalar, the mean over the batch.
      metrics: of this batch alone: `metrics.compute()` gives them by name.
      finite: bool [1 + M], whether the loss of each example is finite, and the gradient of each of
        the M top-level modules, in the order of their names.
    """

    loss: jax.Array
    metrics: TrainMetrics
    finite: jax.Array


def compile_train_steps(
    run: Run,
    abstract_state: TrainState,
    background: futures.Executor,
    *,
    first: int,
    log: Callable[[str], None] = lambda line: None,
) -> dict[int, CompiledStep]:
    """Returns the training step for each image size that a run still needs.

    They compile in the background, one after another in the order of their use. The first is traced
    before this returns: XLA lets other threads run, tracing does not.

    Args:
      run: what is trained.
      abstract_state: shapes, types and shardings of the state.
      background: where they are compiled, in the order in which they are handed in.
      first: how many steps are finished already.
      log: takes a line before and after each compilation, from the thread that compiles.

    Returns:
      By image size in pixels, what is to be called as `make_train_step` describes; empty if no step
      is left.
    """
    batch = pipeline.abstract_train_batch(
        run.dataset.train, batch_size=run.config.train.batch_size, mesh=run.mesh
    )

    def lower(image_size: int) -> jax.stages.Lowered:
        return make_train_step(run, image_size).lower(abstract_state, batch)

    def compile_lowered(image_size: int, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        what = f"training step for {image_size} px"
        kind = f"{what}, {run.compile_kind()}"
        known = compilations.expected(kind)
        about = "" if known is None else f" (the first time about {known:.0f} s, as last measured)"
        log(f"{what}: compiling{about}, or loading it from the compilation cache")
        return compilations.compile_and_say(lowered, what, kind, log)

    def trace_and_compile(image_size: int) -> jax.stages.Compiled:
        return compile_lowered(image_size, lower(image_size))

    steps: dict[int, CompiledStep] = {}
    for size in run.train_image_sizes(first):
        if not steps:
            steps[size] = background.submit(compile_lowered, size, lower(size))
        elif size not in steps:
            steps[size] = background.submit(trace_and_compile, size)
    return steps


def make_train_step(
    run: Run,
    image_size: int = 0,
    *,
    loss: Loss | None = None,
    augment: Augmentation | None = None,
) -> jax.stages.Wrapped:
    """Returns the jitted training step of a run: step(state, batch) → (state, output).

    A batch holds image: uint8 [B, H, W, 3] and label: int32 [B], split over the devices. The input
    state is donated: it can no longer be used. The output is a `StepOutput`.

    Args:
      run: what is trained.
      image_size: that images are resized to, pixels; 0: what the run begins with.
      loss: of each example, float32 [B], from the network's `ModelOutput` and targets float32
        [B, K]; None: that of the settings (`losses.objective`).
      augment: from a key, images uint8 [B, H, W, 3] and labels int32 [B], what the network sees:
        normalized images float32 [B, h, w, 3] and targets float32 [B, K]; None: that of the
        settings (`augment.augment`).
    """
    config, seed = run.config, run.config.seed
    time_constant = run.timeline.steps(config.train.ema)
    metric_fns = run.metric_set
    momentum = protocol.said(run.model, "norm_momentum")
    gradient = gradients.make_gradient(
        run.model,
        loss or _settings_loss(config.train),
        num_microbatches=config.train.grad_accum_steps,
        sam_rho=config.optimizer.sam_rho,
        mesh=run.mesh,
    )
    settings_augmentation = _settings_augmentation(run, image_size or run.train_image_size(0))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
        key, pixels, labels = (
            keys.derive(seed, "augment", state.step),
            batch["image"],
            batch["label"],
        )
        if augment is None:
            images, targets = settings_augmentation(key, pixels, labels, state.step)
        else:
            images, targets = augment(key, pixels, labels)
        grads, batch_stats, of_each, logits = gradient(
            state.params,
            state.batch_stats,
            images,
            targets,
            keys.derive(seed, "dropout", state.step),
        )
        if momentum is not None:
            # Each micro-batch updates the running statistics once.
            kept = momentum**config.train.grad_accum_steps
            batch_stats = ema.correct_start(state.batch_stats, batch_stats, state.step, kept)
        updates, opt_state = run.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average: dict[str, Any] = {}
        if time_constant:
            decay = ema.decay(state.step, time_constant)
            current = {"params": params, "batch_stats": batch_stats}
            average = ema.update(state.average, current, decay)
        # With mixed images, the label that has the larger share counts as right.
        labels = jnp.argmax(targets, axis=-1)
        metrics = TrainMetrics.single_step(
            step=state.step + 1,
            values={**metric_fns.per_example(logits, labels), "loss": of_each},
            scale=metric_fns.scale,
            gradient_norm=optax.tree.norm(grads),
        )
        after = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            average=average,
            opt_state=opt_state,
            metrics=state.metrics.merge(metrics),
        )
        finite = nonfinite.finite_flags(of_each, grads)
        if config.train.on_nonfinite == "skip":
            after = nonfinite.skip_if_nonfinite(
                state, after, finite.all(), config.train.nonfinite_limit
            )
        return after, StepOutput(of_each.mean(), metrics, finite)

    replicated = sharding.replicated(run.mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        compiler_options=ops.compiler_options(run.model),
        in_shardings=(replicated, sharding.batch_sharding(run.mesh)),
        out_shardings=replicated,
    )


def _settings_loss(train: Train) -> Loss:
    """Returns the loss that settings ask for."""
    return lambda output, targets: losses.objective(
        output.logits,
        output.aux,
        targets,
        label_smoothing=train.label_smoothing,
        aux_weight=train.aux_weight,
    )


def _settings_augmentation(
    run: Run, image_size: int
) -> Callable[[jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Returns the augmentation that settings ask for, which also takes the finished steps."""
    settings, dataset = run.config.augment, run.dataset
    mixed_steps = run.timeline.steps(settings.mix_end)
    return lambda key, pixels, labels, step: augment.augment(
        key,
        pixels,
        labels,
        settings=settings,
        mean=dataset.mean,
        std=dataset.std,
        num_classes=dataset.num_classes,
        size=image_size,
        mix_probability=mix_probability(step, settings.mix_probability, mixed_steps),
    )


def mix_probability(step: jax.Array, share: float, mixed_steps: int) -> ArrayLike:
    """Returns the share of batches mixed at a step, traced where mixing ends.

    Args:
      step: int32 scalar, counted from 0.
      share: of batches, as long as they are mixed.
      mixed_steps: how many steps mix; 0: all.
    """
    return jnp.where(step < mixed_steps, share, 0.0) if mixed_steps else share
