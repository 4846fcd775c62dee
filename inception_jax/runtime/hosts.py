"""The other processes of a run on several hosts: which of them live, and what they know.

`runtime` joins the processes through JAX, whose coordination service, in process 0, keeps a small
store of texts that all of them read and write. Each process writes there, once a second, that it
lives; each reads what the others wrote. One that falls silent, or that says it failed, ends all
others with one message that names it and its host. Without that they would wait for it inside a
collective operation: for minutes, or for ever.

A run of one process has no `Hosts`, and the functions of this module then do nothing. Imports
nothing heavy, as the command line does it at each start.
"""

import atexit
import dataclasses
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from inception_jax.errors import UserError

INTERVAL = 1.0  # Seconds from one sign of life to the next.
# How many intervals a process has to stop by itself, with a message and files of its own, once
# another has said that it failed: all fail alike where a loss is not finite.
GRACE = 10
_ROOT = "inception_jax"
_SIGNS = f"{_ROOT}/signs/"
_WAIT = 30.0  # Seconds until a process that is waited for is named.
# How the errors of XLA and its collectives begin, in several types; memory is each process's own.
_STATUS = re.compile(r"(?!RESOURCE_EXHAUSTED)[A-Z]+(_[A-Z]+)*: ")


class Store(Protocol):
    """Texts that all processes of a run read and write; each method may raise RuntimeError."""

    def put(self, key: str, text: str) -> None:
        """Writes a text, over an earlier one."""

    def wait(self, key: str, seconds: float) -> str | None:
        """Returns a text as soon as it is there, or None if it is not there in time."""

    def under(self, prefix: str) -> dict[str, str]:
        """Returns all texts whose keys begin so, by the rest of their keys."""


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a process last said of itself.

    Attributes:
      beat: rises with each sign.
      code: its exit code once it ends; None before.
      reason: why it failed; empty as long as it did not.
    """

    beat: int = 0
    code: int | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Loss:
    """A process that is gone.

    Attributes:
      process: its number.
      what: what became of it, as it goes on in a sentence.
      code: the exit code for those that it leaves behind.
    """

    process: int
    what: str
    code: int


class Liveness:
    """Judges, once each interval, which process is gone. Reads no clock.

    Silence is counted in intervals of this process itself: where all of them were suspended
    together, none is taken for dead when they wake.

    Args:
      count: of processes.
      limit: intervals of silence after which a process is taken for dead.
    """

    def __init__(self, count: int, limit: int) -> None:
        self._limit = limit
        self._signs = dict.fromkeys(range(count), Sign())
        self._silent = dict.fromkeys(range(count), 0)
        self._since_failure = 0
        self._unanswered = 0

    def observe(self, signs: Mapping[int, Sign] | None) -> Loss | None:
        """Takes note of what one interval brought.

        Args:
          signs: the last sign of each process; None: the store, in process 0, gave no answer.

        Returns:
          The process that is gone; None as long as all are there.
        """
        if signs is None:
            self._unanswered += 1
            return self._silence(0) if self._unanswered >= self._limit else None
        self._unanswered = 0
        for process, before in list(self._signs.items()):
            sign = signs.get(process, before)
            self._silent[process] = 0 if sign != before else self._silent[process] + 1
            self._signs[process] = sign
        return self._failed() or self._fallen_silent()

    def _failed(self) -> Loss | None:
        """Returns the first process that said that it failed, once the others had their grace."""
        failed = [p for p, sign in self._signs.items() if sign.reason]
        self._since_failure += bool(failed)
        if not failed or self._since_failure <= GRACE:
            return None
        sign = self._signs[min(failed)]
        return Loss(min(failed), f"failed: {sign.reason}", sign.code or 1)

    def _fallen_silent(self) -> Loss | None:
        silent = [
            process
            for process, intervals in self._silent.items()
            if intervals >= self._limit and self._signs[process].code is None
        ]
        return self._silence(min(silent)) if silent else None

    def _silence(self, process: int) -> Loss:
        seconds = self._limit * INTERVAL
        what = (
            f"has given no sign of life for {seconds:g} s: it was killed, or its host is down or "
            "cut off"
        )
        return Loss(process, what, 1)


class Hosts:
    """This process among the others of its run.

    Args:
      store: of all of them.
      process: the number of this one.
      count: of processes.
      host: the name of this machine.
      limit: seconds of silence after which another process is taken for dead.
      log: takes a line for the user.
      exit_now: ends this process at once, with an exit code.
    """

    def __init__(
        self,
        store: Store,
        *,
        process: int,
        count: int,
        host: str,
        limit: float,
        log: Callable[[str], None] = print,
        exit_now: Callable[[int], Any] = os._exit,
    ) -> None:
        self.process, self.count = process, count
        self._store, self._log, self._exit_now = store, log, exit_now
        self._limit = limit
        self._liveness = Liveness(count, max(1, round(limit / INTERVAL)))
        self._lock = threading.Lock()
        self._sign = Sign()
        self._hosts = ["unknown"] * count
        self._hosts[process] = host
        self._heard: dict[int, Sign] | None = None
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begins to give signs of life, and to watch those of the others."""
        for work in (self._exchange, self._judge):
            work()
            thread = threading.Thread(target=self._repeat, args=(work,), daemon=True)
            self._threads.append(thread)
            thread.start()
        self._hosts = self.gather("host name", self._hosts[self.process])

    def stop(self) -> None:
        """Ends both threads; the process is about to end."""
        self._over.set()
        for thread in self._threads:
            # One that waits for an answer of a store that is gone is left behind.
            thread.join(timeout=2 * INTERVAL)

    def name(self, process: int) -> str:
        """Returns 'process 1 (host a)'."""
        return f"process {process} (host {self._hosts[process]})"

    def lost(self, loss: Loss) -> None:
        """Says which process is gone, and ends this one."""
        if not self._end(Sign(code=0)):
            return
        self._log(
            f"error: {self.name(loss.process)} {loss.what}. The run cannot go on without it, so "
            f"{self.name(self.process)} stops too. Mend the cause, and start the same command "
            "again on all hosts: it goes on from the last checkpoint"
        )
        if loss.process:  # Process 0 has the store, and would not answer.
            self._publish()
            self._await_ends(but=loss.process)
        self._exit(loss.code)

    def done(self) -> None:
        """Tells the others that this process has done all its work, and ends."""
        if self._end(Sign(code=0)):
            self._publish()

    def fail(self, reason: str, code: int) -> None:
        """Tells the others that this process failed, and ends it when they know.

        Args:
          reason: what failed, for their messages.
          code: the exit code, theirs too.
        """
        if self._end(Sign(code=code, reason=reason or "unknown")):
            self._publish()
            self._await_ends()
        else:
            # `lost` is about to end this process, with the cause of this failure.
            time.sleep(GRACE * INTERVAL)
        self._exit(code)

    def await_verdict(self, error: BaseException) -> None:
        """Waits until it is known whether another process's death is the cause of an error.

        A broken connection shows at once, and the silence of the process at its end only later.
        Where there is such a process, `lost` ends this one meanwhile.
        """
        cause: BaseException | None = error
        while cause is not None:
            if _STATUS.match(str(cause)):
                # What was said ends this process after its grace, silence after its limit.
                time.sleep(max(self._limit, GRACE * INTERVAL) + 5 * INTERVAL)
                return
            cause = cause.__cause__ or cause.__context__

    def gather(self, what: str, value: Any) -> list[Any]:
        """Returns the values that all processes give, in their order; waits for all of them.

        Args:
          what: a name for them, used once in a run.
          value: this process's, for JSON.
        """
        key = f"{_ROOT}/{what}/"
        self._store.put(f"{key}{self.process}", json.dumps(value))
        values = []
        for process in range(self.count):
            text = self._store.wait(f"{key}{process}", _WAIT)
            while text is None:
                self._log(f"waiting for {self.name(process)}: it has not come to its {what} yet")
                text = self._store.wait(f"{key}{process}", _WAIT)
            values.append(json.loads(text))
        return values

    def _repeat(self, work: Callable[[], None]) -> None:
        while not self._over.wait(INTERVAL):
            work()

    def _exchange(self) -> None:
        """Gives a sign of life and fetches those of the others; waits where the store does."""
        with self._lock:
            self._sign = dataclasses.replace(self._sign, beat=self._sign.beat + 1)
        if self._publish():
            self._heard = self._signs()

    def _judge(self) -> None:
        heard, self._heard = self._heard, None
        if loss := self._liveness.observe(heard):
            self.lost(loss)

    def _publish(self) -> bool:
        """Writes this process's sign into the store; returns whether that was possible."""
        try:
            text = json.dumps(dataclasses.asdict(self._sign))
            self._store.put(f"{_SIGNS}{self.process}", text)
        except RuntimeError:
            return False
        return True

    def _signs(self) -> dict[int, Sign] | None:
        try:
            found = self._store.under(_SIGNS)
        except RuntimeError:
            return None
        return {int(process): Sign(**json.loads(text)) for process, text in found.items()}

    def _end(self, sign: Sign) -> bool:
        """Makes this process's sign that of its end; returns whether it had none before."""
        with self._lock:
            if self._sign.code is not None:
                return False
            self._sign = dataclasses.replace(sign, beat=self._sign.beat)
            return True

    def _await_ends(self, but: int | None = None) -> None:
        """Waits, in process 0, for the others to say that they end; they could not once it is gone.

        Args:
          but: a process that will not say it.
        """
        if self.process != 0:
            return
        until = time.monotonic() + (GRACE + 5) * INTERVAL
        while time.monotonic() < until and (signs := self._signs()) is not None:
            ended = {process for process, sign in signs.items() if sign.code is not None}
            if ended | {self.process, but} >= set(range(self.count)):
                break
            time.sleep(INTERVAL / 5)
        time.sleep(INTERVAL)

    def _exit(self, code: int) -> None:
        # Not sys.exit: it would wait for minutes for processes that no longer answer.
        sys.stdout.flush()
        sys.stderr.flush()
        self._exit_now(code)


_joined: Hosts | None = None


def service_lost() -> None:
    """Ends this process, as process 0, which serves the store, is gone."""
    if _joined and _joined.process:
        _joined.lost(Loss(0, "is gone: it ended, was killed, or is cut off", 1))
        # It ends already, in another thread.
        time.sleep(GRACE * INTERVAL)


def join(hosts: Hosts) -> None:
    """Makes `hosts` those of this process, and starts to watch them until it ends."""
    global _joined
    _joined = hosts
    # Before JAX's own end, which waits for the others and then closes the store.
    atexit.register(hosts.stop)
    hosts.start()


def done() -> None:
    """Tells the other processes that this one has done its work, and ends."""
    if _joined:
        _joined.done()


def fail(reason: str, code: int) -> None:
    """Ends this process with the others, which are told why; one alone goes on to end by itself.

    Args:
      reason: what failed, for their messages.
      code: the exit code.
    """
    if _joined:
        _joined.fail(reason, code)


def await_verdict(error: BaseException) -> None:
    """Waits for the cause of an error to show, as `Hosts.await_verdict`."""
    if _joined:
        _joined.await_verdict(error)


def several() -> bool:
    """Whether this process has joined others."""
    return _joined is not None


def gather(what: str, value: Any) -> list[Any]:
    """Returns what all processes give, in their order; with one process, its own value alone."""
    return _joined.gather(what, value) if _joined else [value]


def agree(what: str, facts: Callable[[], Mapping[str, Any]]) -> None:
    """Checks that all processes know the same facts; does nothing where there is only one.

    Args:
      what: a name for them, used once in a run.
      facts: returns them by what they are, as values for JSON.

    Raises:
      UserError: in all processes alike, naming each fact that differs, with processes and hosts.
    """
    if not _joined:
        return
    found = _joined.gather(what, dict(facts()))
    names = [_joined.name(process) for process in range(_joined.count)]
    if lines := differences(found, names):
        raise UserError(
            "the processes of this run do not agree:\n  "
            + "\n  ".join(lines)
            + "\nStart all of them with the same command, settings, software and data"
        )


def differences(facts: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns what processes do not agree on, a line for each fact.

    Args:
      facts: of each process, by what they are; one that lacks a fact has the value None.
      names: of the processes, in the same order.

    Returns:
      Such as "config.seed: 1 on process 2 (host c); 0 on the other 2": the values from the rarest
      to the commonest, of which the last names the first of its processes only.
    """
    lines = []
    for what in dict.fromkeys(what for each in facts for what in each):
        holders: dict[str, list[str]] = {}
        for each, name in zip(facts, names, strict=True):
            holders.setdefault(json.dumps(each.get(what)), []).append(name)
        if len(holders) > 1:
            *rare, (common, others) = sorted(holders.items(), key=lambda item: len(item[1]))
            parts = [f"{value} on {', '.join(on)}" for value, on in rare]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            parts.append(f"{common} on {others[0]}{more}")
            lines.append(f"{what}: {'; '.join(parts)}")
    return lines
