"""Atomic replacement of files."""

import errno
import os
import pathlib
import subprocess
import sys
from concurrent import futures

import pytest

from inception_jax.errors import UserError
from inception_jax.storage import access, atomic


def test_file_is_replaced_at_the_end(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with atomic.replacing(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_pipe_is_written_to_and_stays(tmp_path: pathlib.Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with futures.ThreadPoolExecutor(1) as thread:
        received = thread.submit(pipe.read_text)
        access.check_output_file(pipe, "output")
        with atomic.replacing(pipe) as temporary:
            temporary.write_text("text")
        assert received.result(60) == "text"
    assert pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]


def test_file_in_shared_memory_is_no_stream() -> None:
    assert not atomic.is_stream(pathlib.Path("/dev/shm/run/config.json"))


def test_file_behind_a_device_is_written_to(tmp_path: pathlib.Path) -> None:
    code = (
        "import os, pathlib; from inception_jax.storage import atomic\n"
        "assert atomic.is_stream(pathlib.Path('/dev/stdout'))\n"
        "atomic.write_json(pathlib.Path('/dev/stdout'), {'a': 1})"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == '{\n  "a": 1\n}\n'
    assert pathlib.Path("/dev/stdout").is_symlink()


def test_failed_write_keeps_the_old_file(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with (
        pytest.raises(UserError, match=r"file: cannot be written: No space left on device\. Use"),
        atomic.replacing(path) as temporary,
    ):
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder_is_reported(tmp_path: pathlib.Path) -> None:
    with (
        pytest.raises(UserError, match="none/file: cannot be written: No such file"),
        atomic.replacing(tmp_path / "none/file") as temporary,
    ):
        temporary.write_text("")


def test_error_about_another_file_is_not_converted(tmp_path: pathlib.Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="other"),
        atomic.replacing(tmp_path / "file"),
    ):
        (tmp_path / "other").read_text()
    assert not list(tmp_path.iterdir())
