"""Multi-process checks and failures without JAX, with a thread for each process."""

import functools
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import pytest

from inception_jax.errors import UserError
from inception_jax.runtime import hosts
from inception_jax.storage.workdir import Workdir
from inception_jax.training import workdir as workdirs


class Memory:
    """A key-value store within one process."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._changed = threading.Condition()
        self.gone = False

    def set(self, key: str, text: str) -> None:
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        with self._changed:
            self._texts[key] = text
            self._changed.notify_all()

    def wait_for(self, key: str, seconds: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._texts, seconds)
            return self._texts.get(key)

    def get_all(self, prefix: str) -> dict[str, str]:
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        return {
            key.removeprefix(prefix): text
            for key, text in self._texts.items()
            if key.startswith(prefix)
        }


class Exit(Exception):
    """Replaces the exit of a process."""


class Machines:
    """Several hosts; each runs in a thread in which it is the current one for `hosts`."""

    def __init__(self, count: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.store = Memory()
        self.logs: list[list[str]] = [[] for _ in range(count)]
        self.all = [
            hosts.Hosts(self.store, number, count, 60, self.logs[number].append, **options)
            for number in range(count)
        ]
        here = threading.local()

        class Here:
            """Redirects to the hosts of the current thread."""

            def __getattr__(self, name: str) -> Any:
                return getattr(here.hosts, name)

        def exit_now(code: int) -> None:
            raise Exit(code)

        monkeypatch.setattr(hosts, "_joined", Here())
        monkeypatch.setattr(os, "_exit", exit_now)
        self._here = here

    def each(self, work: Callable[[int], Any], *numbers: int) -> list[Any]:
        """Returns the result of `work` for each machine, or its exit."""

        def run(number: int) -> Any:
            self._here.hosts = self.all[number]
            try:
                return work(number)
            except Exit as end:
                return f"exit {end}"

        with futures.ThreadPoolExecutor(len(self.all)) as threads:
            return list(threads.map(run, numbers or range(len(self.all))))

    def name(self) -> None:
        for machine in self.all:
            machine.host_names = [f"host{number}" for number in range(len(self.all))]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(hosts, "SETTLE_SECONDS", 0.01)


def test_single_process_is_a_no_op() -> None:
    assert not hosts.is_multi_process()
    assert hosts.gather("number", 7) == [7]
    assert hosts.peer_failure(ValueError("UNKNOWN: Gloo all-reduce failed")) == ""
    hosts.check_consistent("start", pytest.fail)
    hosts.fail("a bug", 1)


def test_join_exchanges_host_names_and_process_0_logs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    # `join` sets a global that the threads share.
    store = Memory()
    lines: list[str] = []
    monkeypatch.setattr(hosts, "_joined", None)
    store.set("inception_jax/host name/1", '"b"')
    hosts.join(hosts.Hosts(store, 0, 2, 60, lines.append), "a")
    assert hosts.is_multi_process()
    assert lines == [
        "2 processes: 0 on a, 1 on b. If one dies, JAX stops the others within 60 s and reports "
        "its number as the task"
    ]


def test_gather_orders_values_by_process_index(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(3, monkeypatch)
    assert machines.each(lambda number: hosts.gather("number", number**2)) == [[0, 1, 4]] * 3


def test_gather_logs_the_process_it_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(2, monkeypatch)
    machines.name()
    monkeypatch.setattr(hosts, "_LOG_WAIT_SECONDS", 0.02)

    def arrive_late(number: int) -> list[int]:
        while number == 1 and not machines.logs[0]:
            time.sleep(0.001)
        return hosts.gather("data set", number)

    assert machines.each(arrive_late) == [[0, 1]] * 2
    assert machines.logs[0][0] == ("waiting for process 1 (host host1) to report its data set")


GLOO = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")


def test_peer_failure_reports_the_first_failed_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machines = Machines(3, monkeypatch)
    machines.name()
    assert machines.each(lambda _: hosts.fail("KeyError: 'a bug'", 1), 1) == ["exit 1"]

    def seen(number: int) -> str:
        message = hosts.peer_failure(GLOO)
        hosts.fail("", 1)
        return message

    # Their own exits are not causes: later calls still report the first failure.
    assert machines.each(seen, 0, 2) == ["exit 1"] * 2
    (message,) = machines.each(lambda _: hosts.peer_failure(GLOO), 2)
    assert message.startswith("process 1 (host host1) failed: KeyError: 'a bug'. The run cannot")
    assert "process 2 (host host2) exits too" in message


def test_process_0_serves_the_store_until_the_others_exit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 30)
    machines = Machines(3, monkeypatch)
    ended = []

    def end(number: int) -> None:
        time.sleep(0.1 * number)
        try:
            hosts.fail("loss is not finite", 1)
        finally:
            ended.append(number)

    assert machines.each(end) == ["exit 1"] * 3
    assert ended[-1] == 0
    # But no longer than the grace period if they never exit.
    monkeypatch.setattr(hosts, "GRACE_SECONDS", 0.05)
    assert Machines(3, monkeypatch).each(lambda _: hosts.fail("a bug", 1), 0) == ["exit 1"]


def test_peer_failure_without_reason_waits_for_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    machines = Machines(2, monkeypatch)

    def seen(error: BaseException, _: int) -> str:
        return hosts.peer_failure(error)

    for error in (
        KeyError("a bug"),
        ValueError("No: bug"),
        RuntimeError("RESOURCE_EXHAUSTED: 8 GB"),
    ):
        assert machines.each(functools.partial(seen, error), 0) == [""]
    assert not slept
    wrapped = ValueError("a save failed")
    wrapped.__cause__ = GLOO
    for error in (GLOO, wrapped):
        machines.store.gone = error is wrapped
        assert machines.each(functools.partial(seen, error), 0) == [""]
    assert len(slept) == 2 and min(slept) > 60
    assert "JAX reports the cause within 60.3 s" in machines.logs[0][0]


def test_differences_list_values_and_processes() -> None:
    facts = [{"seed": 0, "jax": "1", "same": [1]} for _ in range(4)]
    facts[2] = {"seed": 1, "jax": None, "same": [1]}
    del facts[1]["jax"]
    assert hosts.differences(facts, ["a", "b", "c", "d"]) == [
        "seed: 1 on c; 0 on a and 2 more",
        'jax: "1" on a, d; null on b and 1 more',
    ]
    assert hosts.differences(facts[:1], ["a"]) == []


def test_inconsistent_processes_all_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(3, monkeypatch)
    machines.name()

    def check(number: int) -> str:
        hosts.check_consistent("same", lambda: {"classes": 10})
        with pytest.raises(UserError) as error:
            hosts.check_consistent("other", lambda: {"labels": "ab" if number == 1 else "cd"})
        return str(error.value)

    (message,) = set(machines.each(check))
    assert (
        f"labels: {json.dumps('ab')} on process 1 (host host1); "
        f"{json.dumps('cd')} on process 0 (host host0) and 1 more" in message
    )


def test_a_local_workdir_that_the_hosts_do_not_share_is_rejected(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(3, monkeypatch)
    machines.name()
    disks = [tmp_path / f"disk{number}" for number in range(3)]
    for disk in disks:
        disk.mkdir()

    def check(number: int) -> str:
        with pytest.raises(UserError) as error:
            workdirs.check_shared(Workdir(disks[number]))
        return str(error.value)

    (message,) = set(machines.each(check))
    assert (
        "--workdir contains the file that process 0 wrote: true on process 0 (host host0); false "
        "on process 1 (host host1) and 1 more" in message
    )
    assert message.endswith("Use --workdir=gs://BUCKET/PATH, or a folder that all hosts mount")
    assert [list(disk.iterdir()) for disk in disks] == [[], [], []]
