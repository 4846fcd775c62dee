"""Several processes on this machine: layouts, inconsistent starts and failures."""

import dataclasses
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from types import MappingProxyType

import jax
import pytest

from inception_jax.evaluation.evaluate import Evaluator
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import read_metrics
from tests import command, small, worker

HOST = socket.gethostname()
# Seconds without a heartbeat after which a process counts as dead, as few as busy cores allow.
SILENCE = 10
# Seconds; far more than the other processes need to exit after a failure.
BOUND = 90


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("data")


def launched(launcher: str, count: int, index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Returns the flags and the environment that a launcher gives process `index`."""
    coordinator = f"--coordinator_address=127.0.0.1:{port}"
    number = {"OMPI_COMM_WORLD_SIZE": str(count), "OMPI_COMM_WORLD_RANK": str(index)}
    if launcher == "flags":
        return [coordinator, f"--process_count={count}", f"--process_index={index}"], {}
    if launcher == "Open MPI's numbers":
        return [coordinator], number
    environment = {"JAX_COORDINATOR_PORT": str(port)}
    if launcher == "Open MPI 4":
        environment |= number | {
            "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        }
    elif launcher == "SLURM":
        environment |= {
            "SLURM_JOB_ID": "77",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": str(count),
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
        }
    return ["--distributed"], environment


def start(
    count: int,
    *arguments: str,
    devices: int = 1,
    module: str = "tests.worker",
    launcher: str = "flags",
    each: Mapping[int, list[str] | dict[str, str]] = MappingProxyType({}),
) -> list[subprocess.Popen]:
    """Starts the processes of one run.

    Args:
      each: additional flags or environment variables of single processes, by index.
    """
    port = free_port()
    processes = []
    for index in range(count):
        flags, environment = launched(launcher, count, index, port)
        extra = each.get(index, [])
        flags, environment = (
            (flags, environment | extra)
            if isinstance(extra, dict)
            else (flags + extra, environment)
        )
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *arguments, *flags],
                cwd=command.ROOT,
                env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)} | environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Returns the exit code and the messages of each process."""
    try:
        outputs = [process.communicate(timeout=command.TIMEOUT) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        (process.returncode, messages)
        for process, (_, messages) in zip(processes, outputs, strict=True)
    ]


def train(count: int, devices: int, steps: int, data: pathlib.Path, workdir: pathlib.Path) -> None:
    settings = (f"--data={data}", f"--workdir={workdir}", f"--steps={steps}")
    for code, messages in finish(start(count, *settings, devices=devices)):
        assert code == 0, messages


@pytest.mark.slow
def test_other_process_layouts_give_the_same_curve(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    # A directory name with characters that are special in globs.
    one, several = tmp_path / "one", tmp_path / "lr=[0.1,0.2]"
    this = worker.build(data_directory, 8)
    four = jax.sharding.Mesh(jax.devices()[:4], ("data",))
    this = dataclasses.replace(this, mesh=four)
    small.train(this, Workdir(one), Evaluator(this), changed=[])
    # Four processes with one device each start; two with two devices each resume.
    train(4, 1, 4, data_directory, several)
    train(2, 2, 8, data_directory, several)

    expected, measured = (read_metrics(folder / "metrics.jsonl") for folder in (one, several))
    # Each line occurs once, although several processes reported.
    places = [[(line["step"], line["split"]) for line in lines] for lines in (expected, measured)]
    assert places[0] == places[1] and len(places[0]) == 8
    for line, other in zip(expected, measured, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-4)
        if line["split"] != "train":
            assert other["count"] == 360
            for name in ("top1", "worker_macro"):
                assert other[name] == pytest.approx(line[name], abs=0.35)  # One of 360 images.


# A bug; a kill; a process that is alive but stopped; a kill of the coordinator.
@pytest.mark.parametrize(
    ("what", "gone", "launcher"),
    [
        ("bug", 1, "flags"),
        ("kill", 2, "SLURM"),
        pytest.param("stop", 1, "Open MPI 4", marks=pytest.mark.slow),
        pytest.param("kill", 0, "Open MPI's numbers", marks=pytest.mark.slow),
    ],
)
def test_peers_stop_and_name_the_failed_process(what: str, gone: int, launcher: str) -> None:
    bug = [f"--fail={gone}"] if what == "bug" else []
    processes = start(3, f"--silence={SILENCE}", *bug, launcher=launcher)
    try:
        for process in processes:
            assert process.stdout is not None
            while "adding" not in (line := process.stdout.readline()):
                assert line, process.communicate()[1]
        if what != "bug":
            processes[gone].send_signal(signal.SIGKILL if what == "kill" else signal.SIGSTOP)
        others = [process for process in processes if process is not processes[gone]]
        messages = [process.communicate(timeout=BOUND)[1] for process in others]
    finally:
        for process in processes:
            process.kill()
        own = processes[gone].communicate()[1]
    if what == "bug":
        reason = "KeyError: 'a bug'. Unexpected error"
        assert processes[gone].returncode == 1 and f"error: {reason}" in own
        for process, log in zip(others, messages, strict=True):
            assert process.returncode == 1, log
            assert f"error: process {gone} (host {HOST}) failed: {reason}" in log
            # No other error is reported.
            assert log.count("error: ") == 1 and "Traceback" not in log
        return
    # JAX aborts them from C++; process 0 runs the service, so its clients know nothing more.
    named = rf"tasks are unhealthy .*\n{gone}\n|Task {gone} heartbeat timeout"
    if gone == 0:
        named = "the leader task was preempted/died"
    else:
        assert f"{gone} on {HOST}" in messages[0]
    for process, log in zip(others, messages, strict=True):
        assert process.returncode == -signal.SIGABRT, log
        assert re.search(named, log), log
        assert "error: " not in log


def test_inconsistent_start_is_rejected(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    processes = start(
        2,
        "--config=experiments/digits.py",
        f"--config.data.directory={data_directory}",
        f"--workdir={tmp_path / 'run'}",
        module="inception_jax.main",
        each={
            0: {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_cpu_enable_fast_math=false"},
            1: ["--config.seed=3", "--config.data.workers=1", "--mode=eval"],
        },
    )
    for code, log in finish(processes):
        assert code == 2, log
        assert f"config.seed: 0 on process 0 (host {HOST}); 3 on process 1 (host {HOST})" in log
        assert '--mode: "train" on process 0' in log
        assert "$XLA_FLAGS: " in log and "fast_math" in log
        assert "config.data.workers" not in log
        assert "config.data.directory" not in log
    assert not (tmp_path / "run" / "config.json").exists()
