"""Files that take their place whole or not at all."""

import errno
import os
import pathlib

import pytest

from inception_jax.errors import UserError
from inception_jax.storage import atomic


def test_a_file_takes_its_place_at_the_end(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with atomic.replacing(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_what_was_there(tmp_path: pathlib.Path) -> None:
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


def test_a_folder_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    with (
        pytest.raises(UserError, match="none/file: cannot be written: No such file"),
        atomic.replacing(tmp_path / "none/file") as temporary,
    ):
        temporary.write_text("")


def test_an_error_of_another_file_is_not_taken_for_its_own(tmp_path: pathlib.Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match="other"),
        atomic.replacing(tmp_path / "file"),
    ):
        (tmp_path / "other").read_text()
    assert not list(tmp_path.iterdir())
