"""The training step: augment → forward → loss → gradient → update → averages → metrics."""

from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import ArrayLike

from inception_jax import advice
from inception_jax.config import Train
from inception_jax.input import augment, pipeline
from inception_jax.models import ops, protocol
from inception_jax.runtime import sharding
from inception_jax.telemetry import compilations
from inception_jax.training import ema, gradients, kernels, keys, losses, nonfinite
from inception_jax.training.gradients import Loss
from inception_jax.training.metrics import TrainMetrics
from inception_jax.training.run import Batch, Run, check_run
from inception_jax.training.state import TrainState

CompiledStep = futures.Future[jax.stages.Compiled]
# (key, images uint8 [B, H, W, 3], labels int32 [B]) → (normalized images float32 [B, h, w, 3],
# targets float32 [B, K])
Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class StepOutput(NamedTuple):
    """The output of a step in addition to the new state.

    Attributes:
      loss: float32 scalar, the mean over the batch.
      metrics: metrics of this batch only; `metrics.compute()` returns them by name.
      finite: bool [1 + M], whether all losses are finite, and the gradient of each of the M
        top-level modules, sorted by name.
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
    """Compiles the training step in the background for each image size that a run still needs.

    They compile one after another in the order of their use. The first is traced before this
    returns: XLA lets other threads run, tracing does not.

    Args:
      run: the run to train.
      abstract_state: shapes, dtypes and shardings of the state.
      background: compiles them in the order of submission.
      first: number of finished steps.
      log: called with a line before and after each compilation, from the compiling thread.

    Returns:
      Futures of compiled steps, called as described in `make_train_step`, by image size in pixels;
      empty if no step remains.
    """

    def compile_step(size: int, lowered: jax.stages.Lowered | None) -> jax.stages.Compiled:
        lowered = lowered or lower_train_step(run, abstract_state, size)
        what = f"training step for {size} px"
        kind = f"{what}, {run.compilation_key()}"
        seconds = compilations.last_seconds(kind)
        estimate = "" if seconds is None else f" (about {seconds:.0f} s last time)"
        log(f"{what}: compiling{estimate}, or loading from the compilation cache")
        try:
            return compilations.compile_and_log(lowered, what, kind, log)
        except Exception as error:
            # That of a later size is raised when the run gets there, perhaps hours later.
            log(f"{what}: compiling failed: {advice.first_line(error)}")
            raise

    steps: dict[int, CompiledStep] = {}
    for size in run.train_image_sizes(first):
        if size not in steps:
            # The others are traced while the first compiles.
            lowered = None if steps else lower_train_step(run, abstract_state, size)
            steps[size] = background.submit(compile_step, size, lowered)
    return steps


def lower_train_step(run: Run, abstract_state: TrainState, image_size: int) -> jax.stages.Lowered:
    """Traces the training step of a run for an image size in pixels; computes nothing."""
    batch = pipeline.abstract_train_batch(
        run.dataset.train, batch_size=run.config.train.batch_size, mesh=run.mesh
    )
    return make_train_step(run, image_size).lower(abstract_state, batch)


def make_train_step(
    run: Run,
    image_size: int = 0,
    *,
    loss: Loss | None = None,
    augment: Augmentation | None = None,
) -> jax.stages.Wrapped:
    """Returns the jitted training step of a run: step(state, batch) → (state, output).

    A batch has image: uint8 [B, H, W, 3] and label: int32 [B], sharded over the devices. The input
    state is donated and cannot be used afterwards. The output is a `StepOutput`.

    Args:
      run: the run to train.
      image_size: side in pixels that images are resized to; 0: the run's first one.
      loss: computes the loss of each example, float32 [B], from the network's `ModelOutput` and
        targets float32 [B, K]; None: as configured (`losses.objective`).
      augment: maps a key, images uint8 [B, H, W, 3] and labels int32 [B] to normalized images
        float32 [B, h, w, 3] and targets float32 [B, K]; None: as configured (`augment.augment`).

    Raises:
      UserError: if `run` is not a run.
    """
    check_run(run)
    config, seed = run.config, run.config.seed
    time_constant = run.timeline.steps(config.train.ema)
    freeze = kernels.make_freeze(run) if config.init.whiten else None
    metric_fns = run.metric_set
    momentum = protocol.get_attribute(run.model, "norm_momentum")
    gradient = gradients.make_gradient(
        run.model,
        loss or _settings_loss(config.train),
        num_microbatches=config.train.grad_accum_steps,
        sam_rho=config.optimizer.sam_rho,
        mesh=run.mesh,
    )
    on_gpu = ops.preferred_rewrite(run.device) == "gpu"
    settings_augmentation = _settings_augmentation(run, image_size or run.train_image_size(0))

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepOutput]:
        key, pixels, labels = (
            keys.key_for(seed, "augment", state.step),
            batch["image"],
            batch["label"],
        )
        # The scopes name these parts of the step in profiles and in tables of compiled programs.
        with jax.named_scope("augment"):
            if augment is None:
                images, targets = settings_augmentation(key, pixels, labels, state.step)
            else:
                images, targets = augment(key, pixels, labels)
        grads, batch_stats, per_example_loss, logits = gradient(
            state.params,
            state.batch_stats,
            images,
            targets,
            keys.key_for(seed, "dropout", state.step),
        )
        if freeze:
            grads = freeze(grads, state.step)
        if momentum is not None:
            # Each micro-batch updates the running statistics once.
            step_momentum = momentum**config.train.grad_accum_steps
            batch_stats = ema.correct_start(
                state.batch_stats, batch_stats, state.step, step_momentum
            )
        with jax.named_scope("optimizer"):
            directions = jax.tree.map(_in_order_of_parameters, grads) if on_gpu else grads
            updates, opt_state = run.optimizer.update(directions, state.opt_state, state.params)
            if freeze:  # From weight decay, and from momentum before the biases were frozen.
                updates = freeze(updates, state.step)
            params = optax.apply_updates(state.params, updates)
        average: dict[str, Any] = {}
        if time_constant:
            with jax.named_scope("average"):
                decay = ema.decay(state.step, time_constant)
                current = {"params": params, "batch_stats": batch_stats}
                average = ema.update(state.average, current, decay)
        with jax.named_scope("metrics"):
            # For mixed images, the label with the larger weight counts as correct.
            labels = jnp.argmax(targets, axis=-1)
            metrics = TrainMetrics.single_step(
                step=state.step + 1,
                values={**metric_fns.per_example(logits, labels), "loss": per_example_loss},
                scale=metric_fns.scale,
                gradient_norm=optax.tree.norm(grads),
            )
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            average=average,
            opt_state=opt_state,
            metrics=state.metrics.merge(metrics),
        )
        finite = nonfinite.finite_flags(per_example_loss, grads)
        if config.train.on_nonfinite == "skip":
            new_state = nonfinite.skip_if_nonfinite(
                state, new_state, finite.all(), config.train.nonfinite_limit
            )
        return new_state, StepOutput(per_example_loss.mean(), metrics, finite)

    replicated = sharding.replicated(run.mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        compiler_options=ops.compiler_options(run.model, run.device),
        in_shardings=(replicated, sharding.batch_sharding(run.mesh)),
        out_shardings=replicated,
    )


def _in_order_of_parameters(gradient: jax.Array) -> jax.Array:
    """Returns a gradient whose elements are in the same order in memory as its parameter's.

    cuDNN returns the gradients of kernels in another order, in which XLA would also compute the new
    parameters, momentum and averages, and then copy each (171 copies in GoogLeNet's step). With the
    barrier, one operation reorders the gradient, and one updates all three in place.
    """
    if gradient.ndim < 4:  # Not a convolution's.
        return gradient
    ordered = with_layout_constraint(gradient, Layout(tuple(range(gradient.ndim))))
    return jax.lax.optimization_barrier(ordered)


def _settings_loss(train: Train) -> Loss:
    """Returns the configured loss."""
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
    """Returns the configured augmentation, whose last argument is the number of finished steps."""
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
        resize_kernel=run.config.data.resize_kernel,
        mix_probability=mix_probability(step, settings.mix_probability, mixed_steps),
    )


def mix_probability(step: jax.Array, probability: float, mixed_steps: int) -> ArrayLike:
    """Returns the probability that a step's batch is mixed, traced if mixing ends.

    Args:
      step: int32 scalar, counted from 0.
      probability: the probability while batches are mixed.
      mixed_steps: number of steps with mixing; 0: all.
    """
    return jnp.where(step < mixed_steps, probability, 0.0) if mixed_steps else probability
