"""Atomic replacement of files."""

import errno
import os
import pathlib

import pytest

from inception_jax.errors import UserError
from inception_jax.storage import atomic


def test_file_is_replaced_at_the_end(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with atomic.replacing(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


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
