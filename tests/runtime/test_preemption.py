"""Signals, in small subprocesses that handle them as training does."""

import contextlib
import io
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import IO

import pytest

from inception_jax.errors import EXIT_PREEMPTED
from inception_jax.runtime import preemption

ROOT = pathlib.Path(__file__).parents[2]

WAITS = "print('ready', flush=True); time.sleep(600)"
# Simulates XLA when another host is gone: the main thread never returns to Python.
STUCK = """
mutex, libc = ctypes.create_string_buffer(256), ctypes.CDLL(None)
stop(1)
print('ready', flush=True)
for _ in range(2):
    libc.pthread_mutex_lock(mutex)
"""
TRAINS = """
for step in range(1, 100_000):
    if stop(step):
        break
    print('ready', flush=True)
    time.sleep(0.01)
time.sleep(0.5)
print(f'saved step {step}')
"""


class Process:
    """Runs a script with `stop`, the function that training calls after each step."""

    def __init__(self, script: str, before: str = "") -> None:
        lines = [
            "import ctypes, signal, time",
            before,
            "from inception_jax.runtime.preemption import Preemption",
            "stop = Preemption().requested",
            script,
        ]
        self._process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.send = self._process.send_signal
        assert self._process.stdout and self._process.stderr
        self._output: IO[str] = self._process.stdout
        self._messages: IO[str] = self._process.stderr
        assert self._output.readline() == "ready\n", self._messages.read()

    def message(self) -> str:
        """Returns the next line on stderr; empty if there is none within two minutes."""
        with self._killed_later():
            return self._messages.readline()

    def end(self) -> tuple[int, str, str]:
        """Returns exit code, stdout and stderr; kills the process after two minutes."""
        with self._killed_later():
            output, messages = self._output.read(), self._messages.read()
            return self._process.wait(), output, messages

    @contextlib.contextmanager
    def _killed_later(self) -> Iterator[None]:
        timer = threading.Timer(120, self._process.kill)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def hang_up(self) -> None:
        """Closes the read end of its stderr, so that its writes fail from now on."""
        self._messages.close()
        self._messages = io.StringIO()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()
        self._messages.close()


@pytest.fixture
def processes() -> Iterator[list[Process]]:
    started: list[Process] = []
    yield started
    for process in started:
        process.close()


# A parent that ignores Ctrl-C (a shell with a background job) or SIGHUP (nohup) passes that on.
LISTEN = (
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "signal.signal(signal.SIGHUP, signal.SIG_DFL)"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_first_step_exits_immediately(
    number: signal.Signals, processes: list[Process]
) -> None:
    processes.append(process := Process(WAITS, LISTEN))
    process.send(number)
    code, _, messages = process.end()
    assert code == EXIT_PREEMPTED == 75
    assert messages.startswith(f"{number.name}: exiting immediately.")
    assert "rerun the same command to resume" in messages
    assert messages.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_exits_even_if_main_thread_hangs(
    number: signal.Signals, processes: list[Process]
) -> None:
    processes.append(process := Process(STUCK, LISTEN))
    process.send(signal.SIGTERM)
    assert process.message().startswith("SIGTERM: saving after the current step")
    time.sleep(preemption.SIGNAL_DEBOUNCE_SECONDS)
    process.send(number)
    code, _, messages = process.end()
    assert code == 128 + number
    assert messages.startswith(f"{number.name} again: exiting immediately.")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signal_stops_training_after_a_step(
    number: signal.Signals, processes: list[Process]
) -> None:
    processes.append(process := Process(TRAINS, LISTEN))
    process.send(number)
    code, output, messages = process.end()
    assert code == 0 and "saved step" in output
    assert messages.startswith(f"{number.name}: saving after the current step, then exiting")


def test_signal_works_without_a_terminal(processes: list[Process]) -> None:
    processes.append(process := Process(TRAINS, LISTEN))
    process.hang_up()
    process.send(signal.SIGHUP)
    code, output, _ = process.end()
    assert code == 0 and "saved step" in output


def test_duplicate_signal_counts_once(processes: list[Process]) -> None:
    """coreutils' timeout signals the process and then its group."""
    processes.append(process := Process(TRAINS))
    process.send(signal.SIGTERM)
    process.message()
    process.send(signal.SIGTERM)
    code, output, messages = process.end()
    assert code == 0 and "saved step" in output
    assert not messages


def test_ignored_signals_stay_ignored(processes: list[Process]) -> None:
    # nohup ignores SIGHUP; shells make background jobs ignore Ctrl-C.
    before = "for n in (signal.SIGINT, signal.SIGHUP): signal.signal(n, signal.SIG_IGN)"
    processes.append(process := Process(WAITS, before))
    process.send(signal.SIGINT)
    process.send(signal.SIGHUP)
    process.send(signal.SIGTERM)
    code, _, messages = process.end()
    assert code == EXIT_PREEMPTED
    assert messages.startswith("SIGTERM")


@pytest.fixture(params=preemption.SIGNALS)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that is not ignored, though a shell makes background jobs ignore some."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_handlers_are_restored_after_the_block(number: signal.Signals) -> None:
    def handlers() -> list[object]:
        return [signal.getsignal(number) for number in preemption.SIGNALS]

    before, threads = handlers(), threading.active_count()
    with preemption.Preemption() as stopping:
        assert handlers() != before and not stopping.requested(1)
        signal.raise_signal(number)
        deadline = time.monotonic() + 30
        while not stopping.requested(2):
            assert time.monotonic() < deadline
    assert handlers() == before
    assert signal.set_wakeup_fd(-1) == -1
    deadline = time.monotonic() + 30
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
