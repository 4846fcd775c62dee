"""Warnings at the start on a TPU VM, with made-up machines."""

import fcntl
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping

import pytest

from inception_jax.runtime import tpu_vm

V6E = {"vendor": "0x1ae0", "device": "0x006f", "class": "0x120000"}
NETWORK_CARD = {"vendor": "0x1ae0", "device": "0x0042", "class": "0x020000"}
LOCAL_SSD = {"vendor": "0x1ae0", "device": "0x001f", "class": "0x010802"}
GPU = {"vendor": "0x10de", "device": "0x2330", "class": "0x030200"}


def machine(root: pathlib.Path, *devices: Mapping[str, str], huge_pages: str = "always") -> None:
    """Writes the files of a machine that tell its hardware and its use of memory pages."""
    for number, device in enumerate(devices):
        folder = root / f"sys/bus/pci/devices/0000:00:0{number}.0"
        folder.mkdir(parents=True)
        for name, value in device.items():
            (folder / name).write_text(f"{value}\n")
    mode = root / "sys/kernel/mm/transparent_hugepage/enabled"
    mode.parent.mkdir(parents=True)
    modes = ("always", "madvise", "never")
    mode.write_text(" ".join(f"[{each}]" if each == huge_pages else each for each in modes) + "\n")
    (root / "tmp").mkdir()
    (root / "proc").mkdir()


def process(root: pathlib.Path, number: int, command: str) -> None:
    folder = root / "proc" / str(number)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(command.replace(" ", "\0").encode() + b"\0")


def lock_file(root: pathlib.Path, holder: int | None) -> pathlib.Path:
    """Writes the lock file, and the locks of the system: one of another file, and a holder's."""
    path = root / "tmp/libtpu_lockfile"
    path.touch()
    inode = path.stat().st_ino
    locks = [f"1: POSIX  ADVISORY  WRITE 9 08:01:{inode + 1} 0 EOF"]
    if holder is not None:
        locks.append(f"2: POSIX  ADVISORY  WRITE {holder} 00:2f:{inode} 0 EOF")
        locks.append(f"2: -> POSIX  ADVISORY  WRITE 8 00:2f:{inode} 0 EOF")
    (root / "proc/locks").write_text("\n".join(locks) + "\n")
    return path


@pytest.mark.parametrize("devices", [(), (GPU,), (NETWORK_CARD, LOCAL_SSD)])
def test_other_machines_have_no_warnings(
    devices: tuple[Mapping[str, str], ...], tmp_path: pathlib.Path
) -> None:
    machine(tmp_path, *devices, huge_pages="never")
    lock_file(tmp_path, None)
    assert not tpu_vm.is_tpu_vm(tmp_path)
    assert tpu_vm.warnings_of({"MEGASCALE_NUM_SLICES": "2"}, tmp_path) == []


def test_the_machine_of_this_test_is_not_a_tpu_vm() -> None:
    assert not tpu_vm.is_tpu_vm()


def test_a_healthy_tpu_vm_has_no_warnings(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, NETWORK_CARD, V6E, LOCAL_SSD)
    assert tpu_vm.is_tpu_vm(tmp_path)
    assert tpu_vm.warnings_of({"TPU_SKIP_MDS_QUERY": "1", "PATH": "/bin"}, tmp_path) == []


@pytest.mark.parametrize("mode", ["madvise", "never"])
def test_huge_pages_that_are_off_are_named_with_the_command_that_turns_them_on(
    mode: str, tmp_path: pathlib.Path
) -> None:
    machine(tmp_path, V6E, huge_pages=mode)
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert f"[{mode}]" in line
    assert line.endswith("echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled")


def test_a_system_that_does_not_tell_about_huge_pages_has_no_warning(
    tmp_path: pathlib.Path,
) -> None:
    machine(tmp_path, V6E)
    (tmp_path / "sys/kernel/mm/transparent_hugepage/enabled").unlink()
    assert tpu_vm.warnings_of({}, tmp_path) == []


def test_a_lock_file_that_no_process_holds_is_to_be_removed(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, V6E)
    lock_file(tmp_path, None)
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert "left behind by a process that was killed" in line
    assert line.endswith("Remove it: rm /tmp/libtpu_lockfile")


def test_the_lock_file_of_another_user_is_removed_as_root(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, V6E)
    lock_file(tmp_path, None)
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert line.endswith("Remove it: sudo rm /tmp/libtpu_lockfile")


def test_the_process_that_holds_the_lock_file_is_named(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(tmp_path, V6E)
    lock_file(tmp_path, 4711)
    process(tmp_path, 4711, "python -m inception_jax.main --workdir gs://b/run")
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert "in use by process 4711 of user " in line
    assert "(python -m inception_jax.main --workdir gs://b/run)" in line
    assert line.endswith("stop it: kill 4711")

    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert line.endswith("stop it: sudo kill 4711")


def test_a_long_command_of_the_holder_is_shortened(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, V6E)
    lock_file(tmp_path, 4711)
    process(tmp_path, 4711, "python " + "x" * 1000)
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert "xxx…)" in line and len(line) < 300


def test_a_holder_in_another_container_is_to_be_looked_for_outside(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, V6E)
    lock_file(tmp_path, 0)
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert "not visible here" in line and "sudo lsof /tmp/libtpu_lockfile" in line


@pytest.mark.parametrize("name", ["ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_CHIPS_PER_PROCESS_BOUNDS"])
def test_the_lock_file_does_not_matter_where_several_processes_share_the_chips(
    name: str, tmp_path: pathlib.Path
) -> None:
    machine(tmp_path, V6E)
    lock_file(tmp_path, 4711)
    assert tpu_vm.warnings_of({name: "1,1,1"}, tmp_path) == []


def test_locks_are_found_in_the_list_of_this_system(tmp_path: pathlib.Path) -> None:
    """The kernel's own list, not a made-up one."""
    machine(tmp_path, V6E)
    path = lock_file(tmp_path, None)
    (tmp_path / "proc").rename(tmp_path / "old")
    (tmp_path / "proc").symlink_to("/proc")
    with path.open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert f"process {os.getpid()} of user " in line and "python" in line
    (line,) = tpu_vm.warnings_of({}, tmp_path)
    assert "left behind" in line


def test_variables_of_a_run_on_several_slices_are_named(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, V6E)
    environ = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_COORDINATOR_ADDRESS": "old-w-0", "A": "b"}
    (line,) = tpu_vm.warnings_of(environ, tmp_path)
    assert "MEGASCALE_COORDINATOR_ADDRESS = 'old-w-0', MEGASCALE_NUM_SLICES = '2': " in line
    assert line.endswith("unset MEGASCALE_COORDINATOR_ADDRESS MEGASCALE_NUM_SLICES")


def test_variables_that_count_one_slice_are_fine(tmp_path: pathlib.Path) -> None:
    machine(tmp_path, V6E)
    environ = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_COORDINATOR_ADDRESS": "run-0-0.run"}
    assert tpu_vm.warnings_of(environ, tmp_path) == []


STARTED = """
import sys
import jax
from inception_jax.runtime import devices, tpu_vm
tpu_vm.warnings_of = lambda environ: [f"a problem ({environ['MEGASCALE_NUM_SLICES']})"]
jax.process_count = lambda: int(sys.argv[2])
try:
    devices.initialize(platform=sys.argv[1], log=print)
except Exception as error:
    print(type(error).__name__, error)
"""


def start(platform: str, process_count: int = 1) -> str:
    """Returns what a command logs on a TPU VM with a problem, of which it finds no TPU here."""
    done = subprocess.run(
        [sys.executable, "-c", STARTED, platform, str(process_count)],
        env=os.environ | {"MEGASCALE_NUM_SLICES": "2", "JAX_PLATFORMS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_command_that_may_use_the_tpu_logs_the_warnings() -> None:
    for platform in ("tpu", ""):
        assert start(platform).startswith("warning: a problem (2)\n")
    assert start("cpu") == ""


def test_a_host_that_did_not_join_the_others_of_its_slice_stops() -> None:
    """The TPUs of a slice find each other; without --distributed the processes do not."""
    output = start("cpu", process_count=4)
    assert output.startswith("UserError this machine is one of 4 hosts of a TPU slice")
    assert "--distributed on all of them" in output


# As JAX does when it is imported on a TPU VM, which this machine is not.
JAX_WARNING = """
import sys, warnings
from jax._src import cloud_tpu_init, hardware_utils
from inception_jax import cli
hardware_utils.num_available_tpu_chips_and_device_id = (
    lambda: (4, hardware_utils.TpuVersion.v6e)
)
hardware_utils.transparent_hugepages_enabled = lambda: False
sys.argv = ["command"]
cli.run(lambda rest: cloud_tpu_init.cloud_tpu_init(), "")
"""


def test_jax_does_not_warn_of_huge_pages_a_second_time() -> None:
    done = subprocess.run(
        [sys.executable, "-c", JAX_WARNING], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
