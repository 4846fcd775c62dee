"""Measurements of memory and disk space."""

import pathlib
import shutil

import numpy as np
import pytest

from inception_jax.telemetry import resources


def test_resident_memory_grows_with_allocations() -> None:
    before = resources.resident_memory()
    assert before is not None and before > 0.01
    block = np.ones(200_000_000, np.uint8)
    after = resources.resident_memory()
    assert after is not None and after - before == pytest.approx(0.2, abs=0.05)
    del block


def test_free_disk_is_that_of_the_directory(tmp_path: pathlib.Path) -> None:
    expected = shutil.disk_usage(tmp_path).free / 1e9
    assert resources.free_disk(tmp_path) == pytest.approx(expected, abs=1)
    assert resources.free_disk(tmp_path / "gone") is None


def test_resident_memory_is_none_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_STATM", pathlib.Path("/nowhere"))
    assert resources.resident_memory() is None
