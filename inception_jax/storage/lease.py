"""A lease on something in a bucket: at most one process holds it, and a dead one loses it.

Buckets have no locks. But an object can be written on the condition that it still has a certain
generation, the number that the service gives to each write. The lease is a small JSON object:

- To take it, a process replaces a missing, released or expired object on that condition, so only
  one of several can succeed.
- The holder replaces it several times per `DURATION_SECONDS`, and marks it as released at the end.
- Another process watches its generation. If that stays the same for the holder's duration, measured
  by the other process's own clock, the lease has expired. Clocks of hosts are never compared.
- Before each write of what the lease guards, the holder checks that at least half of the duration
  is left. So it notices that it was suspended, or that the network was down.
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from inception_jax.errors import RunError, UserError
from inception_jax.storage import buckets

if TYPE_CHECKING:
    from etils import epath

DURATION_SECONDS = 60.0
_RENEWALS = 4  # Per duration; a process that must not wait is refused at the first one.
_POLL_SECONDS = 1.0
_RELEASE_SECONDS = 5.0

Log = Callable[[str], None]


def _now() -> float:
    """Returns seconds of a clock that also counts while the machine is suspended."""
    # Linux only; on macOS, the monotonic clock stops then.
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Timing(NamedTuple):
    """Duration of a lease in seconds, and the clock that measures it; tests replace them."""

    seconds: float = DURATION_SECONDS
    now: Callable[[], float] = _now
    sleep: Callable[[float], None] = time.sleep


_DEFAULT_TIMING = Timing()


@contextlib.contextmanager
def lease(
    path: "epath.Path",
    log: Log,
    *,
    what: str,
    doing: str,
    remedy: str = "",
    wait: bool = False,
    unneeded: Callable[[], bool] = lambda: False,
    timing: Timing = _DEFAULT_TIMING,
) -> Iterator[Callable[[], None]]:
    """Holds a lease during the block.

    If a process holds it that may be dead, this waits up to the duration of that process's lease to
    find out. A process of the same machine that has ended is recognized immediately.

    Args:
      path: the object of the lease; created if missing, and never deleted.
      log: called with a line about waiting for or replacing another holder, and if the lease is
        lost or cannot be released.
      what: the thing that the lease guards, for messages, such as "--workdir=gs://b/run".
      doing: what its holder does, such as "training in this folder".
      remedy: what to do if another process holds it.
      wait: whether to wait until another holder releases the lease, instead of an error.
      unneeded: called while waiting; if it returns True, the block runs without the lease, and must
        not write what the lease guards.
      timing: duration of the lease, and clock.

    Yields:
      A function to call before each write of what the lease guards. It usually returns immediately,
      and otherwise renews the lease first. It raises a RunError if another process has taken over
      or the block has ended, and a BucketError if the lease cannot be renewed.

    Raises:
      UserError: if another process holds the lease, unless `wait`.
      BucketError: if the object cannot be read or written.
    """
    this = _Lease(path, log, what=what, doing=doing, timing=timing)
    if not this.acquire(None if wait else remedy, unneeded):
        yield lambda: None
        return
    _held.add(this)
    threading.Thread(target=this.keep, name="lease", daemon=True).start()
    try:
        yield this.check
    finally:
        _held.discard(this)
        this.release(log)


def release_all(log: Log) -> None:
    """Releases the leases of this process, which is about to exit without ending their blocks.

    Takes a few seconds at most, even if the network is down.

    Args:
      log: called with a line if a lease cannot be released.
    """
    held = list(_held)  # Other threads may change it.
    threads = [threading.Thread(target=each.release, args=(log,), daemon=True) for each in held]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _RELEASE_SECONDS
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))


class _Record(NamedTuple):
    """The contents of a lease's object.

    Attributes:
      holder: random name of the lease's holder; '' if unknown.
      host: its host, for messages.
      process: its process ID.
      process_start: when that process started, in the kernel's unit; 0 if unknown.
      machine: identifies where the process ID is valid; '' if unknown.
      since: when it took the lease, by its wall clock, for messages.
      renewals: how often the holder has written the object.
      seconds: duration of the lease.
      released: whether the holder no longer needs it.
    """

    holder: str = ""
    host: str = "an unknown host"
    process: int = 0
    process_start: int = 0
    machine: str = ""
    since: str = "an unknown time"
    renewals: int = 0
    seconds: float = DURATION_SECONDS
    released: bool = False

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}, since {self.since}"

    def has_ended(self) -> bool:
        """Whether the holder is a process of this machine that no longer runs."""
        if not self.machine or self.machine != _machine():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # A process of another user.
        # Its number may have been given to a new process; 0: hidden from this user.
        return _process_start(self.process) not in (0, self.process_start)


_held: set["_Lease"] = set()


class _Lease:
    """The lease of this process; see `lease` for the arguments."""

    def __init__(
        self, path: "epath.Path", log: Log, *, what: str, doing: str, timing: Timing
    ) -> None:
        self._path, self._log, self._what, self._doing = path, log, what, doing
        self._timing = timing
        self._record = _Record(
            holder=secrets.token_hex(16),
            host=socket.gethostname(),
            process=os.getpid(),
            process_start=max(0, _process_start(os.getpid())),
            machine=_machine(),
            since=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC",
            seconds=timing.seconds,
        )
        self._lock = threading.Lock()  # For all below.
        self._generation = 0
        self._renewed = 0.0  # The lease is certainly valid for its duration from then on.
        self._new_holder: _Record | None = None
        self._ended = threading.Event()

    def acquire(self, remedy: str | None, unneeded: Callable[[], bool]) -> bool:
        """Takes the lease.

        Args:
          remedy: what to do if another process holds it; None: wait for that process.
          unneeded: whether to stop waiting.

        Returns:
          False if it was not taken, because `unneeded` returned True.

        Raises:
          UserError: if another process holds it, unless `remedy` is None.
        """
        watched: int | None = None
        watched_since, announced = 0.0, ""
        while not unneeded():
            found, generation = self._read()
            now = self._timing.now()
            is_new, is_first = generation != watched, watched is None
            watched, watched_since = generation, now if is_new else watched_since
            if reason := self._reason_to_take(found, now - watched_since):
                # Otherwise another process was faster; its generation is a new one.
                if self._write(generation) is None:
                    if found and not found.released:
                        self._log(f"{self._what}: {found}, {reason}; taking over")
                    return True
                continue
            assert found is not None, "held"
            if is_new and not is_first and remedy is not None:
                raise UserError(
                    f"{self._what}: another process is {self._doing} ({found}). {remedy}"
                )
            if found.holder != announced:
                self._log(self._waiting_line(found, is_patient=remedy is None))
            announced = found.holder
            self._timing.sleep(min(_POLL_SECONDS, found.seconds / 20))
        return False

    def _reason_to_take(self, found: _Record | None, unchanged: float) -> str:
        """Returns why the lease can be taken; '' if it cannot.

        Args:
          found: the contents of its object, if any.
          unchanged: for how many seconds they have not changed.
        """
        if found is None or found.released:
            return "released it"
        if found.has_ended():
            return "has ended"
        is_expired = unchanged >= found.seconds
        return f"did not renew {self._path} for {found.seconds:g} s" if is_expired else ""

    def keep(self) -> None:
        """Renews the lease until it is released or lost."""
        pause = self._timing.seconds / _RENEWALS
        logged = False
        while not self._ended.wait(pause):
            try:
                # A request without an answer must not delay the next one for long.
                with buckets.time_limit(pause):
                    self._renew()
                logged = False
            except RunError as error:
                self._log(str(error))
                return
            except buckets.BucketError as error:
                # Perhaps the next one succeeds. Otherwise `check` raises an error.
                if not logged:
                    self._log(f"{error}\nTrying again to renew it; the work continues until then")
                logged = True

    def check(self) -> None:
        """Returns if the lease is valid for at least half of its duration, or renews it.

        Raises:
          RunError: if another process has taken over, or this one has released it.
          BucketError: if the lease cannot be renewed.
        """
        if self._new_holder:
            raise self._lost_error(self._new_holder)
        while True:
            if self._ended.is_set():
                raise RunError(
                    f"{self._what}: this process has released {self._path} and writes nothing more"
                )
            # A renewal counts from its start. After retries, another one is necessary.
            if self._timing.now() - self._renewed <= self._timing.seconds / 2:
                return
            self._renew()

    def release(self, log: Log) -> None:
        """Makes the lease free for others, unless one of them has it already.

        Args:
          log: called with a line if that is not possible.
        """
        self._ended.set()
        try:
            with self._locked(_RELEASE_SECONDS), buckets.time_limit(_RELEASE_SECONDS):
                if not self._new_holder and not self._record.released:
                    self._replace(released=True)
        except RunError as error:
            log(str(error))
        except (buckets.BucketError, TimeoutError) as error:
            log(
                f"{self._path}: cannot be released ({error}). On other hosts, a start within "
                f"{self._timing.seconds:g} s will wait for that long"
            )

    def _renew(self) -> None:
        with self._locked():
            if self._new_holder:  # Found by another thread.
                raise self._lost_error(self._new_holder)
            if not self._record.released:
                self._replace(released=False)

    @contextlib.contextmanager
    def _locked(self, timeout: float = -1) -> Iterator[None]:
        if not self._lock.acquire(timeout=timeout):
            raise TimeoutError("a renewal has not ended")
        try:
            yield
        finally:
            self._lock.release()

    def _replace(self, *, released: bool) -> None:
        """Writes the object again.

        Raises:
          RunError: if another process has taken over.
          BucketError: if it cannot be written.
        """
        self._record = self._record._replace(renewals=self._record.renewals + 1, released=released)
        while (changed := self._write(self._generation)) is not None:
            # Written by an earlier renewal whose answer was lost, removed by hand, or taken.
            found, self._generation = changed
            if found and found.holder != self._record.holder:
                self._new_holder = found
                raise self._lost_error(found)

    def _write(self, generation: int) -> tuple[_Record | None, int] | None:
        """Replaces a generation of the object.

        Args:
          generation: the generation; 0: the object does not exist.

        Returns:
          None; if it has another generation, that one's contents and number.
        """
        start = self._timing.now()
        try:
            generation = buckets.write_bytes(
                self._path, _to_json(self._record), if_generation=generation
            )
        except buckets.ChangedError:
            found, generation = self._read()
            if found != self._record:
                return found, generation
            # An earlier attempt wrote it, and its answer was lost.
        self._generation, self._renewed = generation, start
        return None

    def _read(self) -> tuple[_Record | None, int]:
        """Returns contents and generation of the object; None if not a lease, 0 if missing."""
        while (stat := buckets.stat(self._path)) is not None:
            # Contents of public objects may come from a cache, but not those of a generation.
            with contextlib.suppress(FileNotFoundError):  # Replaced in between.
                data = buckets.read_bytes(self._path, generation=stat.generation)
                return _from_json(data), stat.generation
        return None, 0

    def _waiting_line(self, other: _Record, *, is_patient: bool) -> str:
        if is_patient:
            return f"{self._what}: waiting for another process that is {self._doing} ({other})"
        return (
            f"{self._what}: waiting up to {other.seconds:g} s to find out whether another process "
            f"is still {self._doing} ({other})"
        )

    def _lost_error(self, other: _Record) -> RunError:
        return RunError(
            f"{self._what}: {other}, took over because this process did not renew {self._path} for "
            f"{self._timing.seconds:g} s, for example because it was suspended or had no network. "
            "This process stops and writes nothing more there"
        )


def _to_json(record: _Record) -> bytes:
    return json.dumps(record._asdict(), indent=2).encode()


def _from_json(data: bytes) -> _Record | None:
    """Returns the contents of a lease's object; None if it is not from a lease.

    For example, a local run that was copied to a bucket contains a lock file with other text.
    """
    try:
        values: Any = json.loads(data)
    except ValueError:
        return None
    if not isinstance(values, dict) or not values.get("holder"):
        return None
    defaults = _Record()._asdict()
    known = {
        name: value
        for name, value in values.items()
        if name in defaults and isinstance(value, type(defaults[name]))
    }
    return _Record(**known)


def _machine() -> str:
    """Returns an identifier of the space of process IDs: boot and container; '' if unknown."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _process_start(process: int) -> int:
    """Returns when a process started, in clock ticks; 0 if unknown; -1 if it has ended."""
    try:
        text = pathlib.Path(f"/proc/{process}/stat").read_text(errors="replace")
    except OSError:
        return 0
    # The command's name may contain spaces and parentheses.
    state, *fields = text.rpartition(")")[2].split()
    # Ended, but its parent has not noticed.
    return -1 if state in "ZX" else int(fields[18])
