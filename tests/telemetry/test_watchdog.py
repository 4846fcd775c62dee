"""A stalled run is logged once, with the stacks of its threads."""

import subprocess
import sys

import pytest

from inception_jax.telemetry.clock import Clock
from inception_jax.telemetry.watchdog import Watchdog


class Time:
    """A fake clock."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(limit: float = 60, long_limit: float = 600) -> tuple[Time, Clock, Watchdog, list[str]]:
    time = Time()
    logged: list[str] = []
    clock = Clock(now=time)
    watchdog = Watchdog(
        clock,
        limit=limit,
        long_limit=long_limit,
        log=logged.append,
        dump=lambda: logged.append("stacks"),
    )
    return time, clock, watchdog, logged


def test_each_stall_is_logged_once() -> None:
    time, clock, watchdog, logged = watched()
    with clock.phase("other"):
        for _ in range(3):
            with clock.phase("train"):
                for _ in range(30):
                    time.now += 5
                    watchdog.check()
            watchdog.check()
    assert len(logged) == 6 and logged[1::2] == ["stacks"] * 3
    assert "for 1.1 minutes in phase 'train'" in logged[0]


def test_steps_within_the_limit_are_not_a_stall() -> None:
    time, clock, watchdog, logged = watched()
    with clock.phase("other"):
        for _ in range(100):
            for phase in ("input", "train"):
                with clock.phase(phase):
                    time.now += 59
                    watchdog.check()
    assert not logged


@pytest.mark.parametrize("phase", ["compile", "evaluate"])
def test_long_phases_have_a_separate_limit(phase: str) -> None:
    time, clock, watchdog, logged = watched()
    with clock.phase("other"), clock.phase(phase):
        time.now += 599
        watchdog.check()
        assert not logged
        time.now += 2
        watchdog.check()
    assert f"phase '{phase}'" in logged[0]


def test_finished_run_is_not_a_stall() -> None:
    time, clock, watchdog, logged = watched()
    with clock.phase("other"):
        time.now += 5
    time.now += 1e6
    watchdog.check()
    assert not logged


def test_thread_shows_where_a_run_hangs() -> None:
    code = (
        "import sys, time\n"
        "from inception_jax.telemetry import clock, watchdog\n"
        "def hanging():\n"
        "    while not logged: time.sleep(0.01)\n"
        "    time.sleep(0.2)\n"
        "logged, here = [], clock.Clock()\n"
        "with watchdog.Watchdog(here, limit=0.05, long_limit=1, log=logged.append):\n"
        "    with here.phase('train'): hanging()\n"
        "print(len(logged), logged[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 no progress for")
    assert "in hanging" in done.stderr and "Thread" in done.stderr


def test_a_limit_alone_is_watched() -> None:
    for limits in ({"limit": 0, "long_limit": 0.05}, {"limit": 0.05, "long_limit": 0}):
        _, clock, watchdog, _ = watched(**limits)
        with clock.phase("other"), watchdog:
            assert watchdog._thread.is_alive()
