"""Views of splits, for evaluations."""

import pathlib

import numpy as np
import pytest

from inception_jax.config import Data
from inception_jax.datasets.dataset import prepare
from inception_jax.errors import ConfigError


def test_views_are_cropped_limited_and_cached(tmp_path: pathlib.Path) -> None:
    settings = Data(
        name="digits", directory=str(tmp_path), image_size=8, storage="records", eval_crop_pct=0.75
    )
    dataset = prepare(settings, log=lambda line: None)
    assert dataset.view("eval", crop=0.75) is dataset.evaluation
    assert dataset.view("train") is dataset.train
    assert dataset.view("test", crop=0.75, examples=10_000) is not dataset.view("test")
    some = dataset.view("train", crop=0.5, examples=7)
    assert some is dataset.view("train", crop=0.5, examples=7)
    assert (len(some), some.names) == (7, dataset.train.names[:7])
    cut = dataset.view("train", crop=0.5).read(np.arange(7))
    np.testing.assert_array_equal(some.read(np.arange(7)), cut)
    assert (cut != dataset.train.read(np.arange(7))).any()
    assert dataset.train_eval_view is dataset.view("train", crop=0.75)


def test_invalid_view_is_refused(tmp_path: pathlib.Path) -> None:
    settings = Data(name="digits", directory=str(tmp_path), image_size=8, holdout=20)
    dataset = prepare(settings, log=lambda line: None)
    assert dataset.view("holdout") is dataset.view("eval") is dataset.evaluation
    with pytest.raises(ConfigError, match=r"digits: split 'tset' not found\. Did you mean test"):
        dataset.view("tset")
    with pytest.raises(ConfigError, match=r"crop = 0\.9: .*with config\.data\.storage=records"):
        dataset.view("holdout", crop=0.9)
