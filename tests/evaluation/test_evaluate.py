import pathlib

import jax
import numpy as np
import pytest

from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.training import run, state
from tests import small


def test_an_evaluation_is_what_counting_by_hand_gives(tmp_path: pathlib.Path) -> None:
    this = run.build(small.config(tmp_path), log=lambda _: None)
    variables = state.create(this).eval_variables()
    found = Evaluator(this)(variables)

    split, dataset = this.dataset.evaluation, this.dataset
    images = (
        split.read(np.arange(len(split))).astype(np.float32) / 255 - dataset.mean
    ) / dataset.std
    logits = np.asarray(
        this.model.apply(jax.device_get(variables), images, train=False).logits, np.float64
    )
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = log_p[np.arange(len(split)), split.labels]
    rank = (log_p > own[:, None]).sum(1)
    assert found["count"] == len(split) == 360
    assert found["loss"] == pytest.approx(-own.mean(), rel=1e-5)
    assert found["top1"] == pytest.approx(100 * (rank < 1).mean())
    assert found["top5"] == pytest.approx(100 * (rank < 5).mean())
