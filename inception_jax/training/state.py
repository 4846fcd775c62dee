"""The training state: everything that a step reads and writes and a checkpoint stores."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from inception_jax.models import weights
from inception_jax.runtime import sharding
from inception_jax.training import kernels, keys
from inception_jax.training.metrics import TrainMetrics
from inception_jax.training.run import Run

Variables = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """State after `step` finished steps; each leaf is an array on all devices.

    Args:
      step: int32 scalar.
      params: float32 parameters.
      batch_stats: float32 BatchNorm statistics; empty for a model without BatchNorm.
      average: {"params", "batch_stats"} of the EMA; empty if the run has none.
      opt_state: the optimizer's state.
      metrics: sums of the training metrics since the last report. They are part of the state so
        that a run killed between two reports resumes with the same numbers.
    """

    step: jax.Array
    params: Variables
    batch_stats: Variables
    average: Variables
    opt_state: Any
    metrics: TrainMetrics

    def model_item(self) -> dict[str, Variables]:
        """Returns everything that evaluation needs: a checkpoint's item "model"."""
        return {
            "params": self.params,
            "batch_stats": self.batch_stats,
            "average": self.average,
        }

    def eval_variables(self) -> Variables:
        """Returns the variables for evaluation: the averages if the run keeps them."""
        return eval_variables(self.params, self.batch_stats, self.average)

    def with_eval_batch_stats(self, batch_stats: Variables) -> "TrainState":
        """Returns the state with its BatchNorm statistics for evaluation replaced."""
        if self.average:
            return self.replace(average=self.average | {"batch_stats": batch_stats})
        return self.replace(batch_stats=batch_stats)


def eval_variables(params: Variables, batch_stats: Variables, average: Variables) -> Variables:
    """Returns the variables for evaluation: the averages if there are any."""
    return average or {"params": params, "batch_stats": batch_stats}


def _init_variables(model: nn.Module, image_size: int, seed: int) -> tuple[Variables, Variables]:
    """Returns initial parameters and BatchNorm statistics, the latter empty without BatchNorm."""
    variables = model.init(
        {"params": keys.key_for(seed, "init"), "dropout": keys.key_for(seed, "init dropout")},
        jnp.zeros((1, image_size, image_size, 3)),
        train=True,
    )
    return variables["params"], variables.get("batch_stats", {})


def _init_state(run: Run) -> TrainState:
    params, batch_stats = _init_variables(run.model, run.dataset.image_size, run.config.seed)
    if run.config.init.identity_convs:
        params = kernels.with_identity(run.model, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        # Copies, as the step donates each buffer.
        average=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
        if run.config.train.keeps_average
        else {},
        opt_state=run.optimizer.init(params),
        metrics=TrainMetrics.empty(run.metric_set.scale),
    )


def lower_init(run: Run) -> tuple[TrainState, Callable[[], TrainState]]:
    """Traces the initialization; nothing is compiled or computed yet.

    Returns:
      Shapes, dtypes and shardings of the state; and a function that returns the state before the
      first step, on all devices.
    """
    replicated = sharding.replicated(run.mesh)
    traced = jax.jit(lambda: _init_state(run), out_shardings=replicated).trace()
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        traced.out_info,
    )
    # It runs once, and at full optimization LLVM takes 12 s for 57 random draws. The values are the
    # same.
    options = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    return abstract, lambda: traced.lower().compile(options)()


def create(run: Run) -> TrainState:
    """Returns the state before the first step, on all devices."""
    return lower_init(run)[1]()


def with_initial_weights(state: TrainState, values: Mapping[str, np.ndarray]) -> TrainState:
    """Replaces initial variables in the state before the first step.

    Args:
      state: the state from `create`.
      values: parameters and BatchNorm statistics by path ("params/conv1/conv/kernel"), in the
        shapes of the state; all others keep their values. The averages start from the same values.
    """

    def replaced(state: TrainState, values: Mapping[str, jax.Array]) -> TrainState:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        variables = weights.unflatten({**weights.flatten(variables), **values})
        average = jax.tree.map(jnp.copy, variables) if state.average else {}
        return state.replace(**variables, average=average)

    return jax.jit(replaced, out_shardings=state.step.sharding)(state, values)


def abstract_state(run: Run) -> TrainState:
    """Returns shapes, dtypes and shardings of the state without computing it."""
    return lower_init(run)[0]


def abstract_model_item(
    model: nn.Module, *, image_size: int, has_average: bool
) -> dict[str, Variables]:
    """Returns shapes and dtypes of `TrainState.model_item`, for the first device only.

    Args:
      model: the network.
      image_size: side of its images in pixels, which the auxiliary heads' shapes depend on.
      has_average: whether the run keeps moving averages.
    """
    on_first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, batch_stats = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=on_first_device),
        jax.eval_shape(lambda: _init_variables(model, image_size, seed=0)),
    )
    variables = {"params": params, "batch_stats": batch_stats}
    return variables | {"average": variables if has_average else {}}


def make_reset_metrics(run: Run) -> Callable[[TrainMetrics], TrainMetrics]:
    """Returns a jitted function that resets metrics after they were reported."""
    return jax.jit(TrainMetrics.reset, out_shardings=sharding.replicated(run.mesh))
