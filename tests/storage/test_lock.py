import errno
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest

from inception_jax.errors import UserError
from inception_jax.storage import lock, workdir

HOLD = """
import pathlib, sys, time
from inception_jax.storage import lock, workdir
with lock.lock_workdir(pathlib.Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def quiet(line: str) -> None:
    raise AssertionError(line)


def test_second_process_is_rejected_until_the_first_is_killed(tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            message = rf"{tmp_path}: another process is training .*\(process {process.pid} on "
            for _ in range(2):
                with pytest.raises(UserError, match=message), lock.lock_workdir(tmp_path, quiet):
                    pass
        finally:
            os.kill(process.pid, signal.SIGKILL)
    # It left an unlocked file.
    assert (tmp_path / workdir.LOCK_FILE).exists()
    for _ in range(2):
        with lock.lock_workdir(tmp_path, quiet):
            assert str(os.getpid()) in (tmp_path / workdir.LOCK_FILE).read_text()


def test_exception_releases_the_lock(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ZeroDivisionError), lock.lock_workdir(tmp_path, quiet):
        raise ZeroDivisionError
    with lock.lock_workdir(tmp_path, quiet):
        pass


@pytest.mark.parametrize(
    "answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EIO]
)
def test_file_system_without_locks_is_logged(
    answer: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", fail)
    lines: list[str] = []
    with lock.lock_workdir(tmp_path, lines.append):
        pass
    (line,) = lines
    assert str(tmp_path) in line and os.strerror(answer) in line
