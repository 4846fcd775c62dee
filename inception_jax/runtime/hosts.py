"""Multi-process runs: peer failures and start-up consistency.

JAX detects dead processes: if the coordination service in process 0 gets no heartbeat from a
process for `config.watch.heartbeat_timeout_seconds`, JAX terminates all others from C++ (SIGABRT)
and reports the dead process's number as the "task". This module adds what JAX does not know, using
the service's key-value store: host names, inconsistencies between the processes that a collective
operation would hang on, and the reason for a failure. In a single process all of it is a no-op.
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

# How long process 0, which serves the store, lets the others exit with their own messages: all of
# them fail in the same way if a loss is not finite.
GRACE_SECONDS = 10.0
SETTLE_SECONDS = 1.0  # From the last write of a process to its exit.
_ROOT = "inception_jax"
_FAILURES, _ENDED = f"{_ROOT}/failures/", f"{_ROOT}/ended/"
_LOG_WAIT_SECONDS = 30.0  # Between lines that name the process being waited for.
# Start of the errors of XLA and its collectives. Out of memory concerns this process only.
_STATUS = re.compile(r"(?!RESOURCE_EXHAUSTED)[A-Z]+(_[A-Z]+)*: ")


@dataclasses.dataclass
class Hosts:
    """The processes of a run.

    Attributes:
      store: key-value store shared by all processes; each method may raise RuntimeError.
      process_index: index of this process.
      process_count: number of processes.
      heartbeat_timeout: seconds without a heartbeat after which JAX considers a process dead.
      log: called with a line for the user.
      host_names: host name of each process; empty before `join`.
    """

    store: "KeyValueStore"
    process_index: int
    process_count: int
    heartbeat_timeout: float
    log: Callable[[str], None] = print
    host_names: Sequence[str] = ()

    def describe(self, process: int) -> str:
        """Returns a process and its host for messages: 'process 1 (host a)'."""
        host = self.host_names[process] if self.host_names else "unknown"
        return f"process {process} (host {host})"


_joined: Hosts | None = None


def join(hosts: Hosts, host_name: str) -> None:
    """Registers the processes of the run and exchanges host names; process 0 logs them.

    Args:
      hosts: the processes of this run.
      host_name: name of this machine.
    """
    global _joined
    _joined = hosts
    hosts.host_names = gather("host name", host_name)
    if hosts.process_index == 0:
        names = ", ".join(f"{number} on {host}" for number, host in enumerate(hosts.host_names))
        hosts.log(
            f"{hosts.process_count} processes: {names}. If one dies, JAX stops the others within "
            f"{hosts.heartbeat_timeout:g} s and reports its number as the task"
        )


def is_multi_process() -> bool:
    """Whether this process is one of several."""
    return _joined is not None


def fail(reason: str, code: int) -> None:
    """Exits without waiting for the other processes and tells them why; a no-op in a single one.

    After sys.exit, JAX would wait minutes for processes that hang in a collective.

    Args:
      reason: what failed; empty if another process did, so that its reason is not hidden.
      code: exit code.
    """
    if not _joined:
        return
    store, process = _joined.store, _joined.process_index
    with contextlib.suppress(RuntimeError):
        if reason:
            store.set(f"{_FAILURES}{process}", reason)
        store.set(f"{_ENDED}{process}", "")
        if process == 0:
            deadline = time.monotonic() + GRACE_SECONDS
            for other in range(1, _joined.process_count):
                store.wait_for(f"{_ENDED}{other}", max(0.001, deadline - time.monotonic()))
            time.sleep(SETTLE_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def peer_failure(error: BaseException) -> str:
    """Returns which other process failed and why, if that caused this error; otherwise ''.

    If the other process was killed and gave no reason, this waits for JAX's heartbeat timeout,
    which terminates this process and names the other.
    """
    if not _joined or not _is_collective_error(error):
        return ""
    with contextlib.suppress(RuntimeError):
        if failures := _joined.store.get_all(_FAILURES):
            process = min(map(int, failures))
            return (
                f"{_joined.describe(process)} failed: {failures[str(process)]}. The run cannot "
                f"continue without it, so {_joined.describe(_joined.process_index)} exits too. "
                "Fix this and rerun the same command on all hosts to resume from the last "
                "checkpoint"
            )
    timeout = _joined.heartbeat_timeout + GRACE_SECONDS
    _joined.log(f"a collective operation failed; JAX reports the cause within {timeout:g} s")
    time.sleep(timeout)
    return ""


def _is_collective_error(error: BaseException | None) -> bool:
    """Whether an error or one of its causes may be the failure of another process."""
    while error is not None and not _STATUS.match(str(error)):
        error = error.__cause__ or error.__context__
    return error is not None


def gather(name: str, value: Any) -> list[Any]:
    """Returns the values of all processes, by process index; waits for all of them.

    Args:
      name: name of the values, used once per run.
      value: JSON value of this process; the only one in a single process.
    """
    if not _joined:
        return [value]
    key = f"{_ROOT}/{name}/"
    _joined.store.set(f"{key}{_joined.process_index}", json.dumps(value))
    values = []
    for process in range(_joined.process_count):
        while (text := _joined.store.wait_for(f"{key}{process}", _LOG_WAIT_SECONDS)) is None:
            _joined.log(f"waiting for {_joined.describe(process)} to report its {name}")
        values.append(json.loads(text))
    return values


def check_consistent(
    name: str,
    fingerprint: Callable[[], Mapping[str, Any]],
    remedy: str = "Start all of them with the same command, settings, software and data",
) -> None:
    """Checks that all processes have equal fingerprints; a no-op in a single process.

    Args:
      name: name of the check, used once per run.
      fingerprint: returns JSON values by name.
      remedy: what the user must do if they differ.

    Raises:
      UserError: in all processes, with each value that differs, the processes and their hosts.
    """
    if not _joined:
        return
    fingerprints = gather(name, dict(fingerprint()))
    if lines := differences(
        fingerprints, [_joined.describe(number) for number in range(_joined.process_count)]
    ):
        raise UserError(
            "the processes of this run are inconsistent:\n  " + "\n  ".join(lines) + f"\n{remedy}"
        )


def differences(fingerprints: Sequence[Mapping[str, Any]], processes: Sequence[str]) -> list[str]:
    """Returns the differences between processes, a line for each value that differs.

    Values are listed from the rarest to the most common; for the last, only one process is named.

    >>> differences([{"seed": 0}, {"seed": 0}, {"seed": 1}], ["a", "b", "c"])
    ['seed: 1 on c; 0 on a and 1 more']

    Args:
      fingerprints: the JSON values of each process, by name; a missing one counts as None.
      processes: names of the processes, in the same order.
    """
    lines = []
    for name in dict.fromkeys(name for each in fingerprints for name in each):
        by_value: dict[str, list[str]] = {}
        for each, process in zip(fingerprints, processes, strict=True):
            by_value.setdefault(json.dumps(each.get(name)), []).append(process)
        if len(by_value) > 1:
            *rare, (common, others) = sorted(by_value.items(), key=lambda item: len(item[1]))
            parts = [f"{value} on {', '.join(on)}" for value, on in rare]
            more = f" and {len(others) - 1} more" if len(others) > 1 else ""
            parts.append(f"{common} on {others[0]}{more}")
            lines.append(f"{name}: {'; '.join(parts)}")
    return lines
