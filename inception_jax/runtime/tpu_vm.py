"""Warnings about the machine, at the start of a command on a TPU VM.

What is known to go wrong there ends in errors that do not tell the cause, or in a process that
waits forever. Everything is read from files and environment variables: no network, no root.
"""

import os
import pathlib
import pwd
from collections.abc import Iterator, Mapping

# The vendor of TPUs on the PCI bus. Its other devices, network cards and disks, are found on
# ordinary machines of Google Cloud, too.
_GOOGLE = "0x1ae0"
_STORAGE_OR_NETWORK = ("0x01", "0x02")
_HUGE_PAGES = "sys/kernel/mm/transparent_hugepage/enabled"
# libtpu locks it with lockf and removes it when its process ends normally:
# https://github.com/jax-ml/jax/issues/10192 and tpu_initializer_util.cc of XLA (2026-11-26).
_LOCK = "tmp/libtpu_lockfile"
# Variables with which several processes may each use some of the chips; libtpu then uses no lock.
_SEVERAL_PROCESSES = ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_CHIPS_PER_PROCESS_BOUNDS")
# What JAX reads to find the slices of a run. A platform may leave them on the machine that replaces
# a preempted one: https://github.com/ray-project/ray/pull/62893 (2026-11-26).
_SLICES = "MEGASCALE_NUM_SLICES"
_SLICE_VARIABLES = ("MEGASCALE_COORDINATOR_ADDRESS", _SLICES, "MEGASCALE_SLICE_ID")


def is_tpu_vm(root: pathlib.Path = pathlib.Path("/")) -> bool:
    """Whether this machine has TPU chips, as far as its PCI bus tells.

    Device files (/dev/vfio, /dev/accel) are not a sign: they also belong to other hardware.

    Args:
      root: the root of the file system.
    """
    for vendor in root.glob("sys/bus/pci/devices/*/vendor"):
        if _read(vendor) == _GOOGLE:
            kind = _read(vendor.with_name("class"))
            if kind and not kind.startswith(_STORAGE_OR_NETWORK):
                return True
    return False


def warnings_of(environ: Mapping[str, str], root: pathlib.Path = pathlib.Path("/")) -> list[str]:
    """Returns a line for each known problem of a TPU VM, with its remedy; [] on other machines.

    Call before JAX initializes its devices.

    Args:
      environ: environment variables.
      root: the root of the file system.
    """
    if not is_tpu_vm(root):
        return []
    return [*_huge_pages(root), *_lock_file(environ, root), *_slices(environ)]


def _huge_pages(root: pathlib.Path) -> Iterator[str]:
    mode = _read(root / _HUGE_PAGES)
    if mode and "[always]" not in mode:
        yield (
            f"/{_HUGE_PAGES} = {mode!r}: transparent huge pages are not always on, so TPUs take "
            f"longer to start and stop. Turn them on: echo always | sudo tee /{_HUGE_PAGES}"
        )


def _lock_file(environ: Mapping[str, str], root: pathlib.Path) -> Iterator[str]:
    if any(environ.get(name) for name in _SEVERAL_PROCESSES):
        return
    try:
        status = (root / _LOCK).stat()
    except OSError:
        return
    holders = _lock_holders(root, status.st_ino)
    known = [number for number in holders if number > 0]
    sudo = "sudo "
    if known:
        processes = " and ".join(_describe(root, number) for number in known)
        if all(_owner(root, number) == os.geteuid() for number in known):
            sudo = ""
        yield (
            f"/{_LOCK}: the TPU is in use by {processes}. Wait for that, or stop it: {sudo}kill "
            f"{' '.join(map(str, known))}"
        )
    elif holders:
        yield (
            f"/{_LOCK}: the TPU is in use by a process that is not visible here, for example in "
            f"another container. To find it, run on the machine itself: sudo lsof /{_LOCK}"
        )
    else:
        if status.st_uid == os.geteuid():
            sudo = ""
        yield (
            f"/{_LOCK}: left behind by a process that was killed; because of it, JAX may report "
            f"that the TPU is in use. Remove it: {sudo}rm /{_LOCK}"
        )


def _slices(environ: Mapping[str, str]) -> Iterator[str]:
    found = {name: environ[name] for name in _SLICE_VARIABLES if environ.get(name)}
    # Where a platform sets them correctly, a run on one slice has this number.
    if found and found.get(_SLICES) != "1":
        values = ", ".join(f"{name} = {value!r}" for name, value in found.items())
        yield (
            f"{values}: JAX will wait for the other slices of a run on several slices. If this run "
            f"has only one, they are left over: unset {' '.join(found)}"
        )


def _lock_holders(root: pathlib.Path, inode: int) -> list[int]:
    """Returns the process numbers of those that hold a lock on a file.

    A number is 0 or less if the process is in another container. The device of the file is not
    compared, because overlay file systems report another one.
    """
    holders = []
    for line in _read(root / "proc/locks").splitlines():
        # 1: POSIX  ADVISORY  WRITE 4711 08:01:262147 0 EOF; one that waits has "->" after "1:".
        fields = line.split()
        if len(fields) >= 6 and fields[5].rpartition(":")[2] == str(inode):
            holders.append(int(fields[4]))
    return sorted(set(holders))


def _describe(root: pathlib.Path, number: int) -> str:
    command = _read(root / "proc" / str(number) / "cmdline").replace("\0", " ").strip()
    user = _owner(root, number)
    try:
        name = pwd.getpwuid(user).pw_name if user is not None else "unknown"
    except KeyError:
        name = str(user)
    shown = f"{command[:117]}…" if len(command) > 118 else command
    return f"process {number} of user {name} ({shown or 'unknown command'})"


def _owner(root: pathlib.Path, number: int) -> int | None:
    try:
        return (root / "proc" / str(number)).stat().st_uid
    except OSError:
        return None


def _read(path: pathlib.Path) -> str:
    """Returns the text of a file without surrounding white space; '' if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
