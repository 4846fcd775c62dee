"""Contenders in separate processes: availability, order and results."""

import pathlib
from typing import Any

import pytest

from benchmarks import workers


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PAUSE", 0.0)


@pytest.fixture
def log(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "log"


def fake(name: str, log: pathlib.Path, **settings: Any) -> workers.Contender:
    settings = {"name": name, "log": str(log), **settings}
    return workers.Contender(name, "tests.benchmarks.fake", settings)


def test_contenders_take_turns_in_persistent_processes(log: pathlib.Path) -> None:
    with workers.running([fake("a", log), fake("b", log)]) as (ready, absent):
        numbers = workers.take_turns(ready, [{"mode": "count", "start": 10}], rounds=3)
    assert not absent
    assert log.read_text().split() == ["a", "b", "a", "b", "a", "b"]
    for name in ("a", "b"):
        rounds = numbers[name, "count"]
        assert [each["turn"] for each in rounds] == [11, 12, 13]
        assert len({each["pid"] for each in rounds}) == 1
        assert all(each["idle_wall"] >= 0 for each in rounds)


def test_unavailable_contenders_are_named_and_skipped(log: pathlib.Path) -> None:
    contenders = [
        fake("missing", log, needs="no_such_package"),
        fake("broken", log, broken=True),
        workers.Contender("lost", "tests.benchmarks.fake", {}, python="/no/such/python"),
        fake("good", log),
    ]
    with workers.running(contenders) as (ready, absent):
        assert [worker.name for worker in ready] == ["good"]
        assert ready[0].facts == {"parameters": 7, "modes": ["count", "fail"]}
    assert absent["missing"] == "not installed: no_such_package"
    assert absent["broken"] == "failed: broken: ValueError: broken on purpose"
    assert "/no/such/python" in absent["lost"]


def test_missing_own_module_is_an_error() -> None:
    gone = workers.Contender("gone", "benchmarks.contenders.gone", {})
    with workers.running([gone]) as (ready, absent):
        assert not ready
    assert absent["gone"].startswith("failed: gone: ModuleNotFoundError")


def test_unsupported_modes_are_skipped(log: pathlib.Path) -> None:
    with workers.running([fake("a", log)]) as (ready, _):
        numbers = workers.take_turns(
            ready, [{"mode": "other"}, {"mode": "count", "start": 0}], rounds=1
        )
    assert set(numbers) == {("a", "count")}


def test_failure_in_a_turn_includes_the_contender_output(log: pathlib.Path) -> None:
    with (
        workers.running([fake("a", log)]) as (ready, _),
        pytest.raises(workers.ContenderError, match="failed in its turn") as caught,
    ):
        workers.take_turns(ready, [{"mode": "fail"}], rounds=1)
    assert "libraries print this" in str(caught.value)
    assert "Traceback" in str(caught.value)
