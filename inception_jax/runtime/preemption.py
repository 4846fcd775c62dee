"""Graceful shutdown on SIGTERM, SIGINT and their kin.

SIGTERM comes from a scheduler that needs the machine, as do SIGUSR1 and SIGUSR2, by which SLURM
announces it (--signal=USR1@120), and SIGXCPU, at a limit of CPU time. SIGINT is a person who
presses Ctrl-C, SIGHUP a terminal or connection that closes. All mean the same here. Until the first
step is done there is nothing to save, and the process ends at once: what is on disk is whole at any
moment, as a kill must find it so, too. From then on the step in hand ends, and so does an
evaluation that is due at it; a checkpoint is written, and the loop ends the run. A second signal
ends the process at once. One that is ignored at the start, as nohup has SIGHUP ignored, stays so.
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

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
# coreutils' timeout, for one, signals a process and then its group, and so the process twice: that
# is one wish.
SIGNAL_DEBOUNCE_SECONDS = 1.0


class Preemption:
    """Starts listening for signals on construction; create exactly one, in the main thread.

    Used with `with`, it gives the signals back to those who had them before. They are looked at in
    a thread of their own: Python runs handlers in the main thread only, which may be inside XLA for
    minutes, or for ever where another host is gone.

    Args:
      notify_preemption: tells JAX's preemption service, as `devices.initialize` returns it; None:
        there is none. Of several processes one that is signaled must not stop alone: with the
        service they agree on a step, without it nothing is saved.
    """

    def __init__(self, notify_preemption: Callable[[], None] | None = None) -> None:
        self._notify_preemption = notify_preemption
        self._can_save = notify_preemption is not None or jax.process_count() == 1
        self._stepped = False
        self._first: signal.Signals | None = None
        self._first_time = 0.0
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        # Python's part of the handler that runs at once, in any thread, writes the number here.
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._handlers_before = _take_signals()
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._handlers_before.items():
            # None: one that is not Python's, such as JAX's preemption service has.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._writer)  # Which ends the thread.

    def requested(self, step: int) -> bool:
        """Returns whether training must end with this step, at which all processes say the same.

        Args:
          step: finished steps of the whole run; to be asked after each of them.
        """
        if not self._stepped:
            # A device's driver may have put a handler of its own in the place of ours.
            _take_signals()
            self._stepped = True
        if self._notify_preemption is None:
            return self._can_save and self._first is not None
        return multihost_utils.reached_preemption_sync_point(step)

    def _watch(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as numbers:
            while found := numbers.read(64):
                for number in found:
                    if number in SIGNALS:
                        self._receive(signal.Signals(number))

    def _receive(self, received: signal.Signals) -> None:
        now = time.monotonic()
        if self._first is None:
            if not (self._stepped and self._can_save):
                _end(f"{received.name}: exiting immediately. {_RESUME}", EXIT_PREEMPTED)
            self._first, self._first_time = received, now
            _say(
                f"{received.name}: saving after the current step, then exiting; a second signal "
                "exits immediately"
            )
            if self._notify_preemption:
                self._notify_preemption()
        elif now - self._first_time >= SIGNAL_DEBOUNCE_SECONDS:
            _end(f"{received.name} again: exiting immediately. {_RESUME}", 128 + received)


@contextlib.contextmanager
def saved_on_interrupt(log: Callable[[str], None]) -> Iterator[Callable[[int], bool]]:
    """Lets Ctrl-C, or a notebook's stop button, save a run before it ends, in the block alone.

    The first ends the run once its step is saved; before the first step, and a second time, it is
    a KeyboardInterrupt at once. Outside the main thread, or with several processes, of which one
    must not stop alone, nothing changes.

    Args:
      log: takes a line when that happens.

    Yields:
      What says, after a step, whether the run must be saved and end.
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


_RESUME = "Saved files are intact; rerun the same command to resume from the last checkpoint"


def _take_signals() -> dict[signal.Signals, Any]:
    """Takes the signals that are not ignored, and returns who had them before."""
    # A shell has what it runs in the background ignore Ctrl-C, and nohup and others may.
    taken = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, _handle) for number in taken}


def _handle(number: int, frame: object) -> None:
    """Does nothing: Python only wakes the thread for signals that have a handler."""


def _say(line: str) -> None:
    """Writes a line past sys.stderr, on which the main thread may hold a lock."""
    # The terminal may be gone: that may be what the signal is about.
    with contextlib.suppress(OSError):
        # Not behind the progress bar.
        start = "\n" if os.isatty(2) else ""
        os.write(2, f"{start}{line}\n".encode())


def _end(line: str, code: int) -> NoReturn:
    """Ends the process from any thread, without waiting for anything."""
    _say(line)
    os._exit(code)
