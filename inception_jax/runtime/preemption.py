"""Graceful shutdown on SIGTERM, SIGINT and similar signals.

SIGTERM comes from a scheduler that needs the machine, as do SIGUSR1 and SIGUSR2, with which SLURM
announces it (--signal=USR1@120), and SIGXCPU, at a CPU time limit. SIGINT is Ctrl-C; SIGHUP is a
terminal or connection that closes. All are handled in the same way. Before the first step there is
nothing to save and the process exits immediately; files on disk are intact at any time, as they
must be for a kill. Afterwards, the current step and any evaluation due after it are finished, a
checkpoint is saved, and the loop ends the run. A second signal exits immediately. Signals that are
ignored at the start, such as SIGHUP under nohup, stay ignored.
"""

import contextlib
import os
import signal
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import jax
from jax.experimental import multihost_utils

from inception_jax.errors import EXIT_PREEMPTED
from inception_jax.storage import lease

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
# For example, coreutils' timeout signals a process and then its group, so the process gets the
# signal twice. That must not count as a second signal.
SIGNAL_DEBOUNCE_SECONDS = 1.0


class Preemption:
    """Starts listening for signals on construction; create exactly one, in the main thread.

    As a context manager, it restores the previous handlers at the end. Signals are processed in a
    separate thread: Python runs handlers only in the main thread, which may be inside XLA for
    minutes, or forever if another host is gone.

    Args:
      notify_preemption: notifies JAX's preemption service, as returned by `devices.initialize`;
        None: there is no service. With several processes, a signaled one must not stop alone: with
        the service they agree on a step; without it, nothing is saved.
    """

    def __init__(self, notify_preemption: Callable[[], None] | None = None) -> None:
        self._notify_preemption = notify_preemption
        self._can_save = notify_preemption is not None or jax.process_count() == 1
        self._stepped = False
        self._first: signal.Signals | None = None
        self._first_time = 0.0
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # Python's C handler, which runs immediately in any thread, writes the signal number here.
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = _install_handlers()
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers_before.items():
            # None: a handler not installed by Python, such as that of JAX's preemption service.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._writer)  # Ends the thread.

    def requested(self, step: int) -> bool:
        """Returns whether training must stop after this step; the same in all processes.

        Args:
          step: number of finished steps of the run. Call after each step.
        """
        if not self._stepped:
            # A device driver may have replaced our handlers.
            _install_handlers()
            self._stepped = True
        if self._notify_preemption is None:
            return self._can_save and self._first is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def _watch(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as numbers:
            while received := numbers.read(64):
                for number in received:
                    if number in SIGNALS:
                        self._receive(signal.Signals(number))

    def _receive(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            if not (self._stepped and self._can_save):
                _exit(f"{received.name}: exiting immediately. {_RESUME}", EXIT_PREEMPTED)
            self._first, self._first_time = received, now
            _log(
                f"{received.name}: saving after the current step, then exiting; a second signal "
                "exits immediately"
            )
            if self._notify_preemption:
                self._notify_preemption()
        elif now - self._first_time >= SIGNAL_DEBOUNCE_SECONDS:
            _exit(f"{received.name} again: exiting immediately. {_RESUME}", 128 + received)


@contextlib.contextmanager
def save_on_interrupt(log: Callable[[str], None]) -> Iterator[Callable[[int], bool]]:
    """Makes Ctrl-C or a notebook's stop button save the run before it stops, within the block.

    The first interrupt stops the run after saving the current step. A second one, or one before the
    first step, raises KeyboardInterrupt immediately. Does nothing outside the main thread or with
    several processes, one of which must not stop alone.

    Args:
      log: called with a line on the first interrupt.

    Yields:
      A function of the finished steps that returns whether the run must be saved and stopped.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(before) or jax.process_count() > 1:
        yield lambda step: False
        return
    stepped = asked = False

    def receive(number: int, frame: types.FrameType | None) -> None:
        nonlocal asked
        if asked or not stepped:
            before(number, frame)
            return
        asked = True
        log(
            "interrupted: saving after the current step, then stopping; a second interrupt stops "
            "immediately"
        )

    def requested(step: int) -> bool:
        nonlocal stepped
        stepped = True
        return asked

    signal.signal(signal.SIGINT, receive)
    try:
        yield requested
    finally:
        signal.signal(signal.SIGINT, before)


_RESUME = "Saved files are intact; rerun the same command to resume from them"


def _install_handlers() -> dict[signal.Signals, Any]:
    """Installs handlers for the signals that are not ignored; returns the previous handlers."""
    # Shells make background jobs ignore Ctrl-C, and nohup ignores SIGHUP.
    numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _noop_handler) for number in numbers}


def _noop_handler(number: int, frame: object) -> None:
    """Does nothing; Python wakes the thread only for signals that have a handler."""


def _log(line: str) -> None:
    """Writes a line directly to stderr, because the main thread may hold the lock of sys.stderr."""
    # The terminal may be gone, which may be the reason for the signal.
    with contextlib.suppress(OSError):
        # Not on the line of the progress bar.
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{line}\n".encode())


def _exit(line: str, code: int) -> NoReturn:
    """Exits from any thread, without waiting for anything but the release of leases."""
    _log(line)
    lease.release_all(_log)
    os._exit(code)
