import contextlib
import functools
import json
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from etils import epath

from inception_jax.errors import RunError, UserError
from inception_jax.storage import buckets, lease, lock, workdir
from tests import gcs as servers

# Holds a lease, and answers each line of its standard input with the result of the check.
HOLD = """
import sys
from etils import epath
from inception_jax.errors import RunError
from inception_jax.storage import lease
timing = lease.Timing(seconds=float(sys.argv[2]))
with lease.lease(
    epath.Path(sys.argv[1]), print, what="the thing", doing="at work", timing=timing
) as check:
    print("held", flush=True)
    for line in sys.stdin:
        try:
            check()
            print("valid", flush=True)
        except RunError as error:
            print(error, flush=True)
"""


@pytest.fixture
def path(bucket: str) -> epath.Path:
    return epath.Path(bucket) / "run.lock"


@pytest.fixture
def quick_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "_retry_seconds", 0.2)


class Clock:
    """A clock that only advances by sleeping."""

    def __init__(self) -> None:
        self.seconds = 1e6

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds

    def timing(self, seconds: float = 60.0) -> lease.Timing:
        return lease.Timing(seconds, self.now, self.sleep)


def quiet(line: str) -> None:
    raise AssertionError(line)


def take(
    path: epath.Path,
    log: lease.Log = quiet,
    timing: lease.Timing | None = None,
    **arguments: Any,
) -> contextlib.AbstractContextManager[Callable[[], None]]:
    return lease.lease(
        path,
        log,
        what="the thing",
        doing="at work",
        remedy="Wait",
        timing=timing or Clock().timing(),
        **arguments,
    )


def contents(path: epath.Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(buckets.read_bytes(path))
    return values


def leave_behind(path: epath.Path, **changes: Any) -> None:
    """Leaves a lease like a process that was killed; by default on another host."""
    with take(path):
        values = contents(path)
    values |= {"machine": "another", "host": "vm-7", "process": 123} | changes
    buckets.write_bytes(path, json.dumps(values).encode())


@contextlib.contextmanager
def holder(path: epath.Path, seconds: float) -> Iterator["subprocess.Popen[str]"]:
    """Runs a process that holds a lease."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def ask(process: "subprocess.Popen[str]") -> str:
    """Lets a holder check its lease; returns the result."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("before", ["missing", "released", "expired", "another text"])
def test_only_one_of_eight_gets_a_free_lease(before: str, path: epath.Path) -> None:
    if before == "released":
        with take(path):
            pass
    elif before == "expired":
        leave_behind(path, seconds=0.1)
    elif before == "another text":
        # As in a copy of a local run.
        buckets.write_bytes(path, b"process 123 on vm-7\n")
    start, all_tried = threading.Barrier(8), threading.Barrier(8)
    results: list[str] = []

    def race() -> None:
        start.wait()
        try:
            with take(path, lambda line: None, lease.Timing(4.0)):
                results.append("held")
                all_tried.wait()
        except UserError as error:
            results.append(str(error))
            all_tried.wait()

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8 and results.count("held") == 1
    refused = [each for each in results if each != "held"]
    assert all(each.startswith("the thing: another process is at work (") for each in refused)
    assert contents(path)["released"]


def test_refusal_names_the_holder_and_follows_its_first_renewal(path: epath.Path) -> None:
    lines: list[str] = []
    with holder(path, seconds=2.0) as process:
        values = contents(path)
        who = f"process {process.pid} on {values['host']}, since {values['since']}"
        clock = Clock()
        # Waiting for the renewal takes real time.
        timing = lease.Timing(60.0, clock.now, lambda seconds: time.sleep(0.05))
        with pytest.raises(UserError) as raised, take(path, lines.append, timing):
            pass
        assert str(raised.value) == f"the thing: another process is at work ({who}). Wait"
        assert lines == [
            "the thing: waiting up to 2 s to find out whether another process is still at work "
            f"({who})"
        ]
        assert ask(process) == "valid"


def test_lease_of_a_dead_host_is_taken_over_once_its_duration_has_passed(
    path: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Wall clocks do not matter.
    leave_behind(path, since="2099-01-01 00:00:00 UTC", seconds=30.0)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + 1e5)
    clock, lines = Clock(), list[str]()
    start = clock.seconds
    with take(path, lines.append, clock.timing()) as check:
        assert 30 <= clock.seconds - start <= 31
        monkeypatch.setattr(time, "time", lambda: wall() - 1e5)
        check()
    who = "process 123 on vm-7, since 2099-01-01 00:00:00 UTC"
    waiting, taking = lines
    assert waiting.startswith("the thing: waiting up to 30 s") and who in waiting
    assert taking == f"the thing: {who}, did not renew {path} for 30 s; taking over"


def test_released_lease_is_free_at_once(path: epath.Path) -> None:
    for _ in range(2):
        clock = Clock()
        start = clock.seconds
        with take(path, timing=clock.timing()):
            assert not contents(path)["released"]
        assert clock.seconds == start and contents(path)["released"]
    with pytest.raises(ZeroDivisionError), take(path):
        raise ZeroDivisionError
    assert contents(path)["released"]


def test_killed_process_of_this_machine_is_recognized_at_once(path: epath.Path) -> None:
    with holder(path, seconds=60.0) as process:
        process.send_signal(signal.SIGKILL)
        # Until its parent waits for it, it remains as a zombie.
        while ") Z " not in pathlib.Path(f"/proc/{process.pid}/stat").read_text():
            time.sleep(0.01)
        zombie, lines = Clock(), list[str]()
        values = buckets.read_bytes(path)
        with take(path, lines.append, zombie.timing()):
            assert zombie.seconds == Clock().seconds
        buckets.write_bytes(path, values)
    clock = Clock()
    with take(path, lines.append, clock.timing()):
        assert clock.seconds == Clock().seconds
    assert [line.endswith("has ended; taking over") for line in lines] == [True, True]


@pytest.mark.parametrize("changes", [{"machine": "another"}, {"machine": ""}])
def test_process_id_of_another_machine_is_not_looked_up(
    changes: dict[str, Any], path: epath.Path
) -> None:
    # A container with a process namespace of its own counts as another machine.
    with subprocess.Popen(["true"]) as process:
        pass
    leave_behind(path, process=process.pid, **changes)
    clock = Clock()
    with take(path, lambda line: None, clock.timing()):
        assert clock.seconds - Clock().seconds >= 60


def test_reused_process_id_does_not_keep_a_lease(path: epath.Path) -> None:
    with take(path):
        values = contents(path)
    values |= {"released": False, "process_start": values["process_start"] - 1}
    buckets.write_bytes(path, json.dumps(values).encode())
    clock, lines = Clock(), list[str]()
    with take(path, lines.append, clock.timing()):
        assert clock.seconds == Clock().seconds
    assert len(lines) == 1


def test_check_renews_only_after_half_of_the_duration(path: epath.Path, gcs: servers.Proxy) -> None:
    clock = Clock()
    with take(path, timing=clock.timing()) as check:
        gcs.clear()
        clock.sleep(29)
        check()
        assert gcs.requests == []
        clock.sleep(2)
        check()
        assert [each.operation for each in gcs.requests] == ["write"]
        check()
        assert len(gcs.requests) == 1
        assert contents(path)["renewals"] == 1


def test_released_lease_permits_no_write(path: epath.Path) -> None:
    clock = Clock()
    with take(path, timing=clock.timing()) as check:
        check()
    for _ in range(2):
        with pytest.raises(RunError, match=f"^the thing: this process has released {path}"):
            check()
        clock.sleep(40)


@pytest.mark.parametrize("fault", [None, servers.Status(503)], ids=str)
def test_lease_released_during_a_check_permits_no_write(
    fault: servers.Action | None,
    path: epath.Path,
    gcs: servers.Proxy,
    quick_failures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As by the end of its block, while a thread waits to renew it."""
    clock = Clock()
    with take(path, lambda line: None, clock.timing()) as check:
        this = next(iter(lease._held))
        renew = this._renew

        def late() -> None:
            if fault:
                gcs.inject(fault)
            this.release(lambda line: None)
            renew()

        monkeypatch.setattr(this, "_renew", late)
        clock.sleep(40)
        with pytest.raises(RunError, match=f"^the thing: this process has released {path}"):
            check()
        gcs.clear()


@pytest.mark.parametrize("moment", ["acquire", "renew", "release"])
def test_lost_answer_does_not_look_like_another_holder(
    moment: str, path: epath.Path, gcs: servers.Proxy
) -> None:
    skip = ["acquire", "renew", "release"].index(moment)
    rule = gcs.inject(servers.CutResponse(), operation="write", skip=skip, times=1)
    clock = Clock()
    with take(path, timing=clock.timing()) as check:
        clock.sleep(40)
        check()
    assert rule.applied == 1
    assert contents(path)["released"]


def test_renewal_continues_after_one_whose_answers_were_all_lost(
    path: epath.Path, gcs: servers.Proxy, quick_failures: None
) -> None:
    clock = Clock()
    with take(path, timing=clock.timing()) as check:
        gcs.inject(servers.CutResponse(), operation="write", times=1)
        gcs.inject(servers.Status(503), times=3)
        clock.sleep(40)
        with pytest.raises(buckets.BucketError, match=str(path)):
            check()
        gcs.clear()
        assert contents(path)["renewals"] == 1
        check()
        assert contents(path)["renewals"] == 2


def test_loser_stops_and_leaves_the_lease_to_the_winner(path: epath.Path) -> None:
    clock, lines = Clock(), list[str]()
    with take(path, timing=clock.timing()) as check:
        with take(path, lines.append) as other_check:
            clock.sleep(100)
            winner = contents(path)
            for _ in range(2):
                with pytest.raises(RunError) as raised:
                    check()
            other_check()
            assert str(raised.value).startswith(
                f"the thing: process {winner['process']} on {winner['host']}, since "
                f"{winner['since']}, took over because this process did not renew {path} for 60 s"
            )
        # Also after the other one has finished.
        with pytest.raises(RunError):
            check()
    assert contents(path) == winner | {"released": True, "renewals": 1}


def test_loser_does_not_take_the_lease_back(
    path: epath.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may notice the loss while this one waits to renew."""
    clock = Clock()
    with take(path, lambda line: None, clock.timing()) as check:
        this = next(iter(lease._held))
        renew = this._renew
        winner = contents(path) | {"holder": "another", "process": 123}
        buckets.write_bytes(path, json.dumps(winner).encode())

        def late() -> None:
            monkeypatch.setattr(this, "_renew", renew)
            with pytest.raises(RunError):
                renew()
            renew()

        monkeypatch.setattr(this, "_renew", late)
        clock.sleep(40)
        with pytest.raises(RunError, match="took over because this process did not renew"):
            check()
        assert contents(path) == winner


def test_loser_that_did_not_notice_does_not_release_the_lease(path: epath.Path) -> None:
    first_lines: list[str] = []
    with contextlib.ExitStack() as winner:
        with take(path, first_lines.append):
            winner.enter_context(take(path, lambda line: None))
            values = contents(path)
        assert contents(path) == values
        (line,) = first_lines
        assert "took over because this process did not renew" in line


def test_suspended_holder_notices_before_its_next_write(path: epath.Path) -> None:
    with holder(path, seconds=1.0) as process:
        process.send_signal(signal.SIGSTOP)
        with take(path, lambda line: None, lease.Timing(1.0)):
            process.send_signal(signal.SIGCONT)
            while (answer := ask(process)) == "valid":
                pass
            assert "took over because this process did not renew" in answer


def test_holder_renews_in_the_background(path: epath.Path) -> None:
    with take(path, timing=lease.Timing(2.0)):
        generation = buckets.stat(path)
        while buckets.stat(path) == generation:
            time.sleep(0.05)
        assert contents(path)["renewals"] >= 1


def test_holder_continues_after_a_failure_of_the_network(
    path: epath.Path, gcs: servers.Proxy, quick_failures: None
) -> None:
    clock, lines = Clock(), list[str]()
    timing = lease.Timing(0.4, clock.now)
    with take(path, lines.append, timing) as check:
        gcs.inject(servers.Status(503))
        while not lines:
            time.sleep(0.01)
        clock.sleep(1)
        with pytest.raises(buckets.BucketError, match="did not answer"):
            check()
        gcs.clear()
        check()
    assert len(lines) == 1 and str(path) in lines[0]
    assert contents(path)["released"]


def test_failing_release_does_not_hide_the_error_of_the_block(
    path: epath.Path, gcs: servers.Proxy, quick_failures: None
) -> None:
    lines: list[str] = []
    with pytest.raises(ZeroDivisionError), take(path, lines.append):
        gcs.inject(servers.Status(403))
        raise ZeroDivisionError
    (line,) = lines
    assert line.startswith(f"{path}: cannot be released") and "permission denied" in line


def test_lease_removed_by_hand_is_created_again(path: epath.Path) -> None:
    clock = Clock()
    with take(path, timing=clock.timing()) as check:
        buckets.delete(path)
        clock.sleep(40)
        check()
        assert contents(path)["renewals"] == 1


def test_patient_process_waits_for_the_release(path: epath.Path) -> None:
    lines: list[str] = []
    waiting, events = threading.Event(), list[str]()

    def wait() -> None:
        def log(line: str) -> None:
            lines.append(line)
            waiting.set()

        with take(path, log, lease.Timing(4.0, sleep=lambda _: time.sleep(0.01)), wait=True):
            events.append("second")

    thread = threading.Thread(target=wait)
    with take(path, timing=lease.Timing(2.0)):
        thread.start()
        waiting.wait()
        generation = buckets.stat(path)
        # A renewal does not end the wait.
        while buckets.stat(path) == generation:
            time.sleep(0.05)
        events.append("first")
    thread.join()
    assert events == ["first", "second"]
    (line,) = lines
    assert line.startswith("the thing: waiting for another process that is at work (process ")


def test_patient_process_stops_waiting_if_the_work_is_done(path: epath.Path) -> None:
    leave_behind(path)
    before, answers = buckets.read_bytes(path), iter([False, False, True])
    clock = Clock()
    with take(
        path, lambda line: None, clock.timing(), wait=True, unneeded=lambda: next(answers)
    ) as check:
        clock.sleep(100)
        check()
        assert buckets.read_bytes(path) == before
    assert buckets.read_bytes(path) == before


def test_second_trainer_of_a_run_in_a_bucket_is_refused(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = functools.partial(lease.lease, timing=lease.Timing(2.0))
    monkeypatch.setattr(lock, "lease", quick)
    location = epath.Path(bucket) / "run"
    with lock.lock_workdir(location, quiet) as check:
        check()
        before = set(buckets.list_files(location))
        message = (
            rf"--workdir={location}: another process is training in this folder \(process \d+ on "
            r".*, since .* UTC\)\. Wait for it to finish, stop it, or use another --workdir"
        )
        with (
            pytest.raises(UserError, match=message),
            lock.lock_workdir(location, lambda line: None),
        ):
            pass
        assert before == set(buckets.list_files(location)) == {workdir.LOCK_FILE}


EXIT_IMMEDIATELY = """
import sys, time
from etils import epath
from inception_jax.runtime import preemption
from inception_jax.storage import lock
preemption.Preemption()
with lock.lock_workdir(epath.Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_signal_before_the_first_step_releases_the_lease(bucket: str) -> None:
    location = epath.Path(bucket) / "run"
    command = [sys.executable, "-c", EXIT_IMMEDIATELY, str(location)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        process.terminate()
        assert process.wait() == 75
    assert contents(location / workdir.LOCK_FILE)["released"]
