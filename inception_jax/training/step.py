"""One training step: augment → forward → loss → gradient → update → averages → metrics."""

from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from inception_jax.input import augment, pipeline
from inception_jax.models import ops, protocol
from inception_jax.runtime import sharding
from inception_jax.telemetry import compilations
from inception_jax.training import ema, gradients, keys, losses, nonfinite
from inception_jax.training.metrics import TrainMetrics
from inception_jax.training.run import Run
from inception_jax.training.state import TrainState

Batch = dict[str, jax.Array]
CompiledStep = futures.Future[jax.stages.Compiled]


class Found(NamedTuple):
    """What a step says of itself, besides the state after it.

    Attributes:
      loss: float32 scalar, the mean over the batch.
      finite: bool [1 + M], whether the loss of each example is finite, and the gradient of each of
        the M top-level modules, in the order of their names.
    """

    loss: jax.Array
    finite: jax.Array


def compile_train_steps(
    run: Run,
    like: TrainState,
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
      like: shapes, types and shardings of the state.
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
        return make_train_step(run, image_size).lower(like, batch)

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


def make_train_step(run: Run, image_size: int) -> jax.stages.Wrapped:
    """Returns the jitted training step of a run for images resized to `image_size` pixels.

    The step maps (state, batch) to (state after it, `Found`). A batch holds
    image: uint8 [B, H, W, 3] and label: int32 [B], split over the devices. The state is donated:
    the one passed in can no longer be used.
    """
    config, dataset = run.config, run.dataset
    seed = config.seed
    time_constant = run.timeline.steps(config.train.ema)
    mixed_steps = run.timeline.steps(config.augment.mix_until)
    momentum = protocol.said(run.model, "norm_momentum")

    gradient = gradients.make_gradient(
        run.model, config.train, sam_rho=config.optimizer.sam_rho, mesh=run.mesh
    )

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Found]:
        images, targets = augment.augment(
            keys.derive(seed, "augment", state.step),
            batch["image"],
            batch["label"],
            settings=config.augment,
            mean=dataset.mean,
            std=dataset.std,
            num_classes=dataset.num_classes,
            size=image_size,
            mix_probability=mix_probability(
                state.step, config.augment.mix_probability, mixed_steps
            ),
        )
        grads, batch_stats, loss, logits = gradient(
            state.params,
            state.batch_stats,
            images,
            targets,
            keys.derive(seed, "dropout", state.step),
        )
        if momentum is not None:
            # Each micro-batch updates the running statistics once.
            kept = momentum**config.train.accumulate
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
        metrics = state.metrics.merge(
            TrainMetrics.single_step(
                step=state.step + 1,
                loss=loss,
                top1=losses.top_k_correct(logits, labels, 1),
                top5=losses.top_k_correct(logits, labels, 5),
                gradient_norm=optax.tree.norm(grads),
            )
        )
        after = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=batch_stats,
            average=average,
            opt_state=opt_state,
            metrics=metrics,
        )
        finite = nonfinite.parts(loss, grads)
        if config.train.nonfinite == "skip":
            after = nonfinite.skipped(state, after, finite.all(), config.train.nonfinite_limit)
        return after, Found(loss.mean(), finite)

    replicated = sharding.replicated(run.mesh)
    return jax.jit(
        train_step,
        donate_argnums=0,
        compiler_options=ops.compiler_options(run.model),
        in_shardings=(replicated, sharding.batch_sharding(run.mesh)),
        out_shardings=replicated,
    )


def mix_probability(step: jax.Array, share: float, mixed_steps: int) -> ArrayLike:
    """Returns the share of batches mixed at a step, traced where mixing ends.

    Args:
      step: int32 scalar, counted from 0.
      share: of batches, as long as they are mixed.
      mixed_steps: how many steps mix; 0: all.
    """
    return jnp.where(step < mixed_steps, share, 0.0) if mixed_steps else share
