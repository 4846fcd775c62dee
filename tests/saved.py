"""Checkpoints of a small state of a few arrays, for tests."""

import jax
import jax.numpy as jnp
import numpy as np

from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.metrics import TrainMetrics
from inception_jax.training.state import TrainState


def state(step: int) -> TrainState:
    values = jnp.asarray(np.random.default_rng(step).normal(size=2000), jnp.float32)
    return TrainState(
        step=jnp.int32(step),
        params={"kernel": values},
        batch_stats={"mean": values[:3]},
        average={"params": {"kernel": values + 1}},
        opt_state={"trace": -values},
        metrics=TrainMetrics.empty({}),
    )


def save(checkpoints: Checkpoints, step: int, *, top1: float | None = 1.0) -> None:
    metrics = None if top1 is None else {"top1": top1}
    checkpoints.save(state(step), progress={"seconds": {"train": step}}, metrics=metrics)


def check_restores(checkpoints: Checkpoints, step: int) -> None:
    restored, progress = checkpoints.restore(step, state(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(step))
    assert progress == {"seconds": {"train": step}}
