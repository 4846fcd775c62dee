"""Small disks to fill: in-memory file systems, if tests are allowed to mount them."""

import contextlib
import pathlib
import subprocess
from collections.abc import Iterator

import pytest


@contextlib.contextmanager
def mounted(path: pathlib.Path, *, kilobytes: int) -> Iterator[pathlib.Path]:
    """Mounts an empty file system of a given size; skips the test if that is not allowed."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("mount command not found")
    if done.returncode:
        pytest.skip(f"not allowed to mount: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def make_read_only(path: pathlib.Path) -> None:
    """Makes a mounted file system read-only, like a failing disk, until `make_writable`."""
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)


def make_writable(path: pathlib.Path) -> None:
    """Undoes `make_read_only`."""
    subprocess.run(["mount", "-o", "remount,rw", str(path)], check=True)
