"""The other processes of a run: whether they agree, and what this one does when one is gone.

Liveness is JAX's own: a process that sends its coordination service, in process 0, no heartbeat for
`config.watch.heartbeat_timeout_seconds` counts as dead, and JAX ends all others from C++ (SIGABRT),
with the dead one's number ("task") in the message. Python adds, through the service's store of
texts, what JAX does not know: names of hosts, differences between the processes before a collective
operation could hang on them, and the reason why a process fails. One alone has nobody to ask.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from inception_jax.errors import UserError

if TYPE_CHECKING:
    from inception_jax.runtime._jax_private import KeyValueStore

# Seconds that process 0, which serves the store, leaves the others to end by themselves with a
# message of their own: all fail alike where a loss is not finite.
GRACE = 10.0
SETTLE = 1.0  # Seconds from a process's last word in the store to its end.
_ROOT = "inception_jax"
_FAILURES, _ENDED = f"{_ROOT}/failures/", f"{_ROOT}/ended/"
_WAIT = 30.0  # Seconds until a process that is waited for is named.
# How the errors of XLA and its collectives begin, in several types; memory is each process's own.
_STATUS = re.compile(r"(?!RESOURCE_EXHAUSTED)[A-Z]+(_[A-Z]+)*: ")


@dataclasses.dataclass
class Hosts:
    """The processes of a run.

    Attributes:
      store: of texts that all of them read and write; each method may raise RuntimeError.
      process: the number of this one.
      count: of processes.
      heartbeat_timeout: seconds of silence after which JAX takes a process for dead.
      log: takes a line for the user.
      names: of the processes' machines.
    """

    store: "KeyValueStore"
    process: int
    count: int
    heartbeat_timeout: float
    log: Callable[[str], None] = print
    names: Sequence[str] = ()

    def describe(self, process: int) -> str:
        """Returns 'process 1 (host a)'."""
        return f"process {process} (host {self.names[process] if self.names else 'unknown'})"


_joined: Hosts | None = None


def join(hosts: Hosts, name: str) -> None:
    """Makes `hosts` those of this process; process 0 logs which they are.

    Args:
      hosts: of this run.
      name: of this machine.
    """
    global _joined
    _joined = hosts
    hosts.names = gather("host name", name)
    if hosts.process == 0:
        names = ", ".join(f"{number} on {host}" for number, host in enumerate(hosts.names))
        hosts.log(
            f"{hosts.count} processes: {names}. If one dies, JAX stops the others within "
            f"{hosts.heartbeat_timeout:g} s and gives its number as the task"
        )


def is_multi_process() -> bool:
    """Whether this process has joined others."""
    return _joined is not None


def fail(reason: str, code: int) -> None:
    """Ends this process without waiting for the others, which are told why; one alone goes on.

    After sys.exit, JAX would wait minutes for processes that hang in a collective.

    Args:
      reason: what failed; empty if that is another process, whose reason it would hide.
      code: the exit code.
    """
    if not _joined:
        return
    store, process = _joined.store, _joined.process
    with contextlib.suppress(RuntimeError):
        if reason:
            store.put(f"{_FAILURES}{process}", reason)
        store.put(f"{_ENDED}{process}", "")
        if process == 0:
            until = time.monotonic() + GRACE
            for other in range(1, _joined.count):
                store.wait(f"{_ENDED}{other}", max(0.001, until - time.monotonic()))
            time.sleep(SETTLE)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def peer_failure(error: BaseException) -> str:
    """Returns which other process failed and why, if an error here comes from that; else ''.

    Where another was killed, and so gave no reason, this waits for JAX's heartbeat, which then ends
    this process and names the other.
    """
    if not _joined or not _is_collective_error(error):
        return ""
    with contextlib.suppress(RuntimeError):
        if failures := _joined.store.under(_FAILURES):
            process = min(map(int, failures))
            return (
                f"{_joined.describe(process)} failed: {failures[str(process)]}. The run cannot go "
                f"on without it, so {_joined.describe(_joined.process)} stops too. Fix this and "
                "rerun the same command on all hosts: it resumes from the last checkpoint"
            )
    patience = _joined.heartbeat_timeout + GRACE
    _joined.log(f"an operation over all processes failed; JAX says why within {patience:g} s")
    time.sleep(patience)
    return ""


def _is_collective_error(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, may be another process's death seen from here."""
    while error is not None and not _STATUS.match(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def gather(what: str, value: Any) -> list[Any]:
    """Returns the values that all processes give, in their order; waits for all of them.

    Args:
      what: a name for them, used once in a run.
      value: this process's, for JSON; the only one where there is one process.
    """
    if not _joined:
        return [value]
    key = f"{_ROOT}/{what}/"
    _joined.store.put(f"{key}{_joined.process}", json.dumps(value))
    values = []
    for process in range(_joined.count):
        while (text := _joined.store.wait(f"{key}{process}", _WAIT)) is None:
            _joined.log(f"waiting for {_joined.describe(process)}: it has not reached its {what}")
        values.append(json.loads(text))
    return values


def check_consistent(what: str, fingerprint: Callable[[], Mapping[str, Any]]) -> None:
    """Checks that all processes know the same facts; does nothing where there is only one.

    Args:
      what: a name for them, used once in a run.
      fingerprint: returns them by what they are, as values for JSON.

    Raises:
      UserError: in all processes alike, naming each fact that differs, with processes and hosts.
    """
    if not _joined:
        return
    found = gather(what, dict(fingerprint()))
    if lines := differences(found, [_joined.describe(number) for number in range(_joined.count)]):
        raise UserError(
            "the processes of this run do not agree:\n  "
            + "\n  ".join(lines)
            + "\nStart all of them with the same command, settings, software and data"
        )


def differences(fingerprints: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """Returns what processes do not agree on, a line for each fact.

    Args:
      fingerprints: facts of each process, by what they are; one that is missing has the value None.
      names: of the processes, in the same order.

    Returns:
      Such as "config.seed: 1 on process 2 (host c); 0 on the other 2": the values from the rarest
      to the commonest, of which the last names the first of its processes only.
    """
    lines = []
    for what in dict.fromkeys(what for each in fingerprints for what in each):
        holders: dict[str, list[str]] = {}
        for each, name in zip(fingerprints, names, strict=True):
            holders.setdefault(json.dumps(each.get(what)), []).append(name)
        if len(holders) > 1:
            *rare, (common, others) = sorted(holders.items(), key=lambda item: len(item[1]))
            parts = [f"{value} on {', '.join(on)}" for value, on in rare]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            parts.append(f"{common} on {others[0]}{more}")
            lines.append(f"{what}: {'; '.join(parts)}")
    return lines
