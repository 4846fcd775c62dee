import json
import math

import pytest

from inception_jax.telemetry.clock import Clock, Laps


class _Time:
    """A fake clock."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_inner_phase_pauses_the_outer_one() -> None:
    time = _Time()
    clock = Clock(now=time)
    time.sleep(100)
    with clock.phase("train"):
        time.sleep(1)
        with clock.phase("evaluate"):
            time.sleep(2)
            with clock.phase("compile"):
                time.sleep(4)
            time.sleep(8)
        time.sleep(16)
    time.sleep(100)
    assert clock.state() == {"train": 17, "evaluate": 10, "compile": 4}
    assert clock.total() == 31


def test_phase_is_reentrant_and_readable_while_open() -> None:
    time = _Time()
    clock = Clock(now=time)
    for _ in range(3):
        with clock.phase("train"):
            time.sleep(1)
    with clock.phase("train"), clock.phase("train"):
        time.sleep(1)
        assert clock.seconds("train") == 4
        assert clock.total() == 4
        time.sleep(1)
    assert clock.seconds("train") == 5
    assert clock.seconds("save") == 0


def test_time_counts_if_a_phase_raises() -> None:
    time = _Time()
    clock = Clock(now=time)
    with pytest.raises(KeyError), clock.phase("save"):
        time.sleep(2)
        raise KeyError
    time.sleep(5)
    assert clock.state() == {"save": 2}


def test_resumed_clock_continues() -> None:
    time = _Time()
    clock = Clock(now=time)
    with clock.phase("train"):
        time.sleep(1.5)
    saved = json.loads(json.dumps(clock.state()))
    resumed = Clock(saved, now=time)
    with resumed.phase("train"):
        time.sleep(2)
    with resumed.phase("save"):
        time.sleep(1)
    assert resumed.state() == {"train": 3.5, "save": 1}
    assert saved == {"train": 1.5}


def test_clock_uses_monotonic_time_by_default() -> None:
    clock = Clock()
    with clock.phase("train"):
        pass
    assert 0 <= clock.total() < 60


def test_throughput_excludes_pauses_and_earlier_intervals() -> None:
    time = _Time()
    clock = Clock({"train": 50.0}, now=time)
    laps = Laps(clock)
    with clock.phase("train"):
        time.sleep(3)
        with clock.phase("evaluate"):
            time.sleep(30)
        with clock.phase("input"):
            time.sleep(1)
    assert laps.since_last(400)[0] == 100
    with clock.phase("train"):
        time.sleep(2)
    assert laps.since_last(400)[0] == 200
    assert math.isnan(laps.since_last(0)[0])


def test_input_wait_covers_the_time_since_the_last_report() -> None:
    time = _Time()
    clock = Clock({"input": 50.0}, now=time)
    laps = Laps(clock)
    with clock.phase("train"):
        time.sleep(3)
        with clock.phase("input"):
            time.sleep(1)
    assert laps.since_last(1)[1] == 0.25
    with clock.phase("train"):
        time.sleep(2)
    assert laps.since_last(1)[1] == 0
    assert math.isnan(laps.since_last(1)[1])


def test_idle_time_is_that_of_the_innermost_phase() -> None:
    time = _Time()
    clock = Clock(now=time)
    assert clock.idle_time() == ("", 0)
    with clock.phase("other"):
        time.sleep(2)
        assert clock.idle_time() == ("other", 2)
        with clock.phase("train"):
            assert clock.idle_time() == ("train", 0)
            time.sleep(3)
            assert clock.idle_time() == ("train", 3)
    assert clock.idle_time()[0] == ""
