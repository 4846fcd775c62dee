"""Training that is told to end: by each signal, at one process and at two."""

import pathlib
import re
import signal
import socket
import subprocess
import time

from benchmarks import lives
from inception_jax.errors import EXIT_PREEMPTED
from tests import command

SETTINGS = [
    "--config=experiments/digits.py",
    "--config.data.image_size=8",
    "--config.model.width=0.125",
    "--config.train.batch_size=64",
    "--config.train.length.epochs=0",
    "--config.schedule.warmup.epochs=0",
    "--config.evaluation.batch_size=100",
    "--config.evaluation.every.epochs=0",
    "--config.evaluation.every.steps=15",
    "--config.checkpoint.every.epochs=0",
    "--config.checkpoint.every.steps=7",
    "--config.log.every.steps=1",
]


def wait_for_step(step: int, workdir: pathlib.Path, *processes: subprocess.Popen) -> None:
    """Returns once a process has written the metrics of a step, or a later one."""
    deadline = time.monotonic() + command.TIMEOUT
    while not any(line["step"] >= step for line in lives.metric_lines(workdir)):
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def saved_step(messages: str) -> int:
    """Returns the step that a stopped process says it has saved."""
    found = re.findall(
        r"^stopped as a signal asked, after step ([\d,]+) of [\d,]+, which is saved; "
        r"the same command goes on from it$",
        messages,
        re.MULTILINE,
    )
    assert len(found) == 1, messages
    return int(found[0].replace(",", ""))


def test_a_run_that_is_stopped_again_and_again_ends_with_the_same_bits(
    tmp_path: pathlib.Path,
) -> None:
    settings = [
        *SETTINGS,
        # Long enough to be signalled within, with few saves, which take the most time.
        "--config.train.length.steps=100",
        "--config.evaluation.every.steps=50",
        "--config.checkpoint.every.steps=40",
        "--config.train.ema.steps=5",
        f"--config.data.directory={tmp_path / 'data'}",
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command.check("main", *settings, f"--workdir={whole}")

    process = command.start("main", *settings, f"--workdir={parts}")
    wait_for_step(3, parts, process)
    process.send_signal(signal.SIGTERM)
    done = command.finish(process)
    assert done.returncode == EXIT_PREEMPTED, done.stderr
    assert "SIGTERM: ends once this step is saved" in done.stderr
    assert done.stdout == ""
    step = saved_step(done.stderr)
    assert 3 <= step == max(lives.finished_steps(parts))
    assert lives.metric_lines(parts)[-1]["step"] == step

    # Held still, so that the second signal is sure to come while it is busy with the first.
    with command.start("main", *settings, f"--workdir={parts}") as process:
        wait_for_step(10, parts, process)
        process.send_signal(signal.SIGINT)
        assert process.stderr
        messages = iter(process.stderr.readline, "")
        assert any("SIGINT: ends once this step is saved" in line for line in messages)
        process.send_signal(signal.SIGSTOP)
        time.sleep(1.1)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)
        assert "SIGTERM again: ended at once." in process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM

    command.check("main", *settings, f"--workdir={parts}")
    assert lives.outcome(parts).differences(lives.outcome(whole)) == []


def test_two_processes_save_the_same_step(tmp_path: pathlib.Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [*SETTINGS, f"--config.data.directory={tmp_path / 'data'}"]
    settings += [f"--workdir={tmp_path / 'run'}", "--config.train.length.steps=1000000"]
    joined = [f"--coordinator_address=127.0.0.1:{port}", "--process_count=2"]
    processes = [
        command.start("main", *settings, *joined, f"--process_index={index}") for index in range(2)
    ]
    try:
        wait_for_step(3, tmp_path / "run", *processes)
        processes[1].send_signal(signal.SIGTERM)
        done = [command.finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for each in done:
        assert each.returncode == EXIT_PREEMPTED, each.stderr
    steps = [saved_step(each.stderr) for each in done]
    assert steps[0] == steps[1] == max(lives.finished_steps(tmp_path / "run"))
    assert lives.metric_lines(tmp_path / "run")[-1]["step"] == steps[0]
    # One of them alone speaks of the training. (The collectives' library prints lines of its own.)
    assert ["mini_googlenet on digits" in each.stderr for each in done] == [True, False]
    # The signal came to the other.
    said = ["SIGTERM: ends once this step is saved" in each.stderr for each in done]
    assert said == [False, True]
