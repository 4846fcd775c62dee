"""What processes make of each other's signs of life, without JAX and without waiting."""

import json
import threading
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

import pytest

from inception_jax.errors import UserError
from inception_jax.runtime import hosts
from inception_jax.runtime.hosts import Hosts, Liveness, Loss, Sign


class Memory:
    """A store inside one process, for hosts in its threads."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}
        self._changed = threading.Condition()
        self.gone = False

    def put(self, key: str, text: str) -> None:
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        with self._changed:
            self._texts[key] = text
            self._changed.notify_all()

    def wait(self, key: str, seconds: float) -> str | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._texts, seconds)
            return self._texts.get(key)

    def under(self, prefix: str) -> dict[str, str]:
        if self.gone:
            raise RuntimeError("UNAVAILABLE")
        with self._changed:
            return {
                key.removeprefix(prefix): text
                for key, text in self._texts.items()
                if key.startswith(prefix)
            }


def alive(count: int, beat: int, **others: Sign) -> dict[int, Sign]:
    signs = {process: Sign(beat) for process in range(count)}
    return signs | {int(name[1:]): sign for name, sign in others.items()}


def watch(liveness: Liveness, signs: Callable[[int], Any], intervals: int) -> tuple[int, Loss]:
    for beat in range(1, intervals + 1):
        if loss := liveness.observe(signs(beat)):
            return beat, loss
    raise AssertionError("nobody was lost")


def test_all_that_give_signs_are_alive() -> None:
    liveness = Liveness(3, limit=2)
    for beat in range(1, 50):
        assert liveness.observe(alive(3, beat)) is None


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_one_that_falls_silent_is_lost_after_the_limit(lost: int) -> None:
    last = {f"p{lost}": Sign(7)}
    liveness = Liveness(3, limit=5)
    for beat in range(1, 8):
        assert liveness.observe(alive(3, beat)) is None
    beat, loss = watch(liveness, lambda beat: alive(3, 7 + beat, **last), 20)
    assert (beat, loss.process, loss.code) == (5, lost, 1)
    assert "no sign of life for 0.1 s" in loss.what


def test_one_that_never_gave_a_sign_is_lost_too() -> None:
    beat, loss = watch(Liveness(2, limit=5), lambda beat: {0: Sign(beat)}, 20)
    assert (beat, loss.process) == (5, 1)


def test_a_short_silence_is_forgiven() -> None:
    liveness = Liveness(2, limit=3)
    for beat in range(1, 40):
        assert liveness.observe(alive(2, beat, p1=Sign(beat // 3))) is None


def test_process_0_is_lost_where_the_store_gives_no_answer() -> None:
    liveness = Liveness(2, limit=4)
    assert liveness.observe(alive(2, 1)) is None
    beat, loss = watch(liveness, lambda beat: None, 20)
    assert (beat, loss.process) == (4, 0)


def test_a_slow_store_is_no_loss() -> None:
    liveness = Liveness(2, limit=4)
    for beat in range(1, 40):
        assert liveness.observe(None if beat % 4 else alive(2, beat)) is None


def test_one_that_has_done_its_work_may_be_silent() -> None:
    liveness = Liveness(2, limit=3)
    for beat in range(1, 40):
        assert liveness.observe(alive(2, beat, p1=Sign(5, code=0))) is None


def test_a_failure_ends_the_others_after_their_grace() -> None:
    failed = Sign(5, code=2, reason="config.seed: must be at least 0")
    beat, loss = watch(Liveness(3, limit=3), lambda beat: alive(3, beat, p2=failed), 50)
    assert beat == hosts.GRACE + 1
    assert (loss.process, loss.code) == (2, 2)
    assert loss.what == "failed: config.seed: must be at least 0"


# Several hosts, each in a thread.


class Machine:
    """A host in a thread, with what it said and how it ended."""

    def __init__(self, store: Memory, process: int, count: int, limit: float = 60) -> None:
        self.said: list[str] = []
        self.codes: list[int] = []
        self.hosts = Hosts(
            store,
            process=process,
            count=count,
            host=f"host{process}",
            limit=limit,
            log=self.said.append,
            exit_now=self._exit,
        )

    def _exit(self, code: int) -> None:
        self.codes.append(code)
        self.hosts._over.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "INTERVAL", 0.02)


def start(count: int, **options: Any) -> tuple[Memory, list[Machine]]:
    store = Memory()
    machines = [Machine(store, process, count, **options) for process in range(count)]
    with futures.ThreadPoolExecutor(count) as threads:
        list(threads.map(lambda machine: machine.hosts.start(), machines))
    return store, machines


def test_gathered_values_are_in_the_order_of_the_processes() -> None:
    _, machines = start(3)
    with futures.ThreadPoolExecutor(3) as threads:
        found = list(
            threads.map(lambda m: m.hosts.gather("number", m.hosts.process**2), reversed(machines))
        )
    assert found == [[0, 1, 4]] * 3
    assert machines[0].hosts.name(2) == "process 2 (host host2)"
    for machine in machines:
        machine.hosts.stop()


def test_one_that_is_waited_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (first, second) = start(2)
    monkeypatch.setattr(hosts, "_WAIT", 0.02)
    with futures.ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(first.hosts.gather, "data set", 1)
        while not first.said:
            pass
        second.hosts.gather("data set", 2)
        assert waiting.result() == [1, 2]
    assert first.said[0] == (
        "waiting for process 1 (host host1): it has not come to its data set yet"
    )
    first.hosts.stop()
    second.hosts.stop()


def test_a_failure_reaches_all_and_names_its_process() -> None:
    _, (first, second, third) = start(3)
    second.hosts.fail("the disk is full", 2)
    for machine in (first, third):
        machine.hosts._threads[1].join()
        assert machine.codes == [2]
        assert machine.said[0].startswith(
            "error: process 1 (host host1) failed: the disk is full. The run cannot go on"
        )
    assert second.codes == [2] and not second.said


def test_work_done_harms_nobody() -> None:
    _, (first, second) = start(2, limit=0.06)
    second.hosts.done()
    second.hosts.stop()
    first.hosts._over.wait(0.5)
    assert not first.codes and not first.said
    first.hosts.stop()


def test_an_error_of_the_devices_waits_for_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    machine = Machine(Memory(), 0, 2, limit=30)
    for own in (KeyError("a bug"), ValueError("No: bug"), RuntimeError("RESOURCE_EXHAUSTED: 8 GB")):
        machine.hosts.await_verdict(own)
    assert not slept
    machine.hosts.await_verdict(ValueError("UNKNOWN: Gloo all-reduce failed"))
    wrapped = ValueError("a save failed")
    wrapped.__cause__ = ValueError("UNKNOWN: Gloo all-reduce failed")
    machine.hosts.await_verdict(wrapped)
    assert len(slept) == 2 and min(slept) > 30


def test_differences_name_each_fact_and_its_processes() -> None:
    facts = [{"seed": 0, "jax": "1", "same": [1]} for _ in range(4)]
    facts[2] = {"seed": 1, "jax": None, "same": [1]}
    del facts[1]["jax"]
    assert hosts.differences(facts, ["a", "b", "c", "d"]) == [
        "seed: 1 on c; 0 on a and 2 more",
        'jax: "1" on a, d; null on b and 1 more',
    ]
    assert hosts.differences(facts[:1], ["a"]) == []


def test_processes_that_disagree_are_all_told(monkeypatch: pytest.MonkeyPatch) -> None:
    _, machines = start(3)
    joined = threading.local()

    class Here:
        """The hosts of this thread, in place of those of the process."""

        def __getattr__(self, name: str) -> Any:
            return getattr(joined.hosts, name)

    monkeypatch.setattr(hosts, "_joined", Here())

    def agree(machine: Machine) -> str:
        joined.hosts = machine.hosts
        hosts.agree("same", lambda: {"classes": 10})
        with pytest.raises(UserError) as error:
            hosts.agree("other", lambda: {"labels": "ab" if machine is machines[1] else "cd"})
        return str(error.value)

    with futures.ThreadPoolExecutor(3) as threads:
        messages = set(threads.map(agree, machines))
    assert len(messages) == 1
    assert (
        f"labels: {json.dumps('ab')} on process 1 (host host1); "
        f"{json.dumps('cd')} on process 0 (host host0) and 1 more" in messages.pop()
    )
    for machine in machines:
        machine.hosts.stop()
