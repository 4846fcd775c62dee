"""Comparison of outcomes, and distinction of phases."""

import dataclasses
import pathlib

import numpy as np
import pytest

from benchmarks import fault_injection, killable_run, measure


def test_differences_are_named() -> None:
    bits = np.float32([1.0, 2.0]).tobytes()
    one = killable_run.Outcome([{"step": 1}], {"params": bits, "step": b"1"}, {"loss": 1.0})
    assert one.differences(dataclasses.replace(one)) == []
    # Equal as numbers, but not bit-identical.
    zero, minus_zero = (np.float32([each]).tobytes() for each in (0.0, -0.0))
    left, right = (dataclasses.replace(one, arrays={"params": each}) for each in (zero, minus_zero))
    assert left.differences(right) == ["params"]
    assert one.differences(dataclasses.replace(one, arrays={"params": bits})) == [
        "step",
        "names of arrays",
    ]
    assert one.differences(dataclasses.replace(one, lines=[{"step": 1}] * 2)) == ["metrics.jsonl"]
    assert one.differences(dataclasses.replace(one, result={"loss": 2.0})) == ["result.json"]


def test_incomplete_line_is_rejected(tmp_path: pathlib.Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\n{"step": 2')
    with pytest.raises(measure.BenchmarkError, match="incomplete"):
        killable_run.outcome(tmp_path)


def test_phase_entries_are_counted() -> None:
    until = fault_injection._after_entries("save", 2)
    seen = ["steps", "save", "save", "steps", "save"]
    assert [until(phase) for phase in seen] == [False, False, False, False, True]
