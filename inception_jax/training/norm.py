"""Re-estimates BatchNorm's statistics before an evaluation.

Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", arXiv:2105.07576, section 3. Running
statistics average over steps between which the weights moved, in a run of some hundred steps too
far: 32 pictures of two colors, which training had at 100%, were told apart at 50 to 100% with
running statistics, corrected for their start or not, and at 100% with these.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from inception_jax.input import augment, pipeline
from inception_jax.models import ops, protocol
from inception_jax.runtime import sharding
from inception_jax.training import keys
from inception_jax.training.run import Run
from inception_jax.training.state import TrainState, Variables


class NormEstimator:
    """Replaces the statistics that evaluation uses by new ones.

    They become the mean of those of the first `evaluation.norm_examples` that training sees, in its
    batches, with the parameters that evaluation uses and images as it has them. Training normalises
    by each batch's own, so it goes on as it would have. Where the setting is 0, or the network has
    no BatchNorm, or does not say its momentum, a state stays as it is.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        examples = min(run.config.evaluation.norm_examples, len(run.dataset.train))
        self._batches = -(-examples // run.config.train.batch_size)
        if protocol.get_attribute(run.model, "norm_momentum") is None:
            self._batches = 0
        replicated = sharding.replicated(run.mesh)
        self._jitted = jax.jit(
            self._add_statistics,
            in_shardings=(replicated, replicated, sharding.batch_sharding(run.mesh)),
            out_shardings=replicated,
            compiler_options=ops.compiler_options(run.model),
        )
        self._compute: Callable[..., Variables] = self._jitted

    def compile(self, variables: Variables) -> None:
        """Compiles ahead what the first estimate would.

        Args:
          variables: shapes and types of those for evaluation.
        """
        if self._batches and variables["batch_stats"]:
            batch = pipeline.abstract_train_batch(
                self._run.dataset.train_evaluated,
                batch_size=self._run.config.train.batch_size,
                mesh=self._run.mesh,
            )
            self._compute = self._jitted.lower(
                variables, variables["batch_stats"], batch["image"]
            ).compile()

    def __call__(self, state: TrainState) -> TrainState:
        """Returns a state with new statistics, on all devices."""
        variables, run = state.eval_variables(), self._run
        if not self._batches or not variables["batch_stats"]:
            return state
        batches = pipeline.train_batches(
            run.dataset.train_evaluated,
            batch_size=run.config.train.batch_size,
            seed=run.config.seed,
            start=0,
            stop=self._batches,
            mesh=run.mesh,
        )
        mean = jax.tree.map(lambda old: np.zeros(old.shape, old.dtype), variables["batch_stats"])
        for batch in batches:
            mean = self._compute(variables, mean, batch["image"])
        return state.with_norm(mean)

    def _add_statistics(self, variables: Variables, mean: Any, images: jax.Array) -> Any:
        """Returns the mean over all batches, as far as it is known, with one batch more."""
        config, dataset = self._run.config, self._run.dataset
        size = config.evaluation.image_size or dataset.image_size
        _, updated = self._run.model.apply(
            variables | {"batch_stats": optax.tree.zeros_like(variables["batch_stats"])},
            augment.normalise(augment.resize(images, size), dataset.mean, dataset.std),
            train=True,
            rngs={"dropout": keys.derive(config.seed, "norm")},
            mutable=["batch_stats"],
        )
        # The network keeps its momentum's share of the zeros.
        momentum = protocol.get_attribute(self._run.model, "norm_momentum")
        share = 1 / (1 - momentum) / self._batches
        return jax.tree.map(lambda old, new: old + share * new, mean, updated["batch_stats"])
