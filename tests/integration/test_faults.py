"""Training that is killed or preempted, with one process and with two."""

import pathlib
import re
import signal
import socket
import time

import pytest

from benchmarks import fault_injection, killable_run
from inception_jax.errors import EXIT_PREEMPTED
from tests import command

pytestmark = pytest.mark.slow

STEPS = 12


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> fault_injection.Campaign:
    """A campaign with an undisturbed run."""
    return fault_injection.Campaign(tmp_path_factory.mktemp("campaign"), steps=STEPS, seed=0)


def saved_step(messages: str) -> int:
    """Returns the step that a stopped process reports as saved."""
    matches = re.findall(
        r"^stopped by a signal after step ([\d,]+) of [\d,]+; the state is saved. Rerun the same "
        r"command to resume$",
        messages,
        re.MULTILINE,
    )
    assert len(matches) == 1, messages
    return int(matches[0].replace(",", ""))


def test_killed_run_ends_bit_identical(campaign: fault_injection.Campaign) -> None:
    results = fault_injection.kill(campaign, 3)
    assert results["kills"] == len(results["samples"]) == 3
    assert sum(phase["met"] for phase in results["phases"].values()) == 3
    assert results["runs"] >= 1
    # 12 steps, evaluations at 10 and 12.
    assert results["lines"] == 14
    assert results["arrays"] > 100
    table = fault_injection.report(results)
    assert "killed in" in table and "14 lines of metrics" in table


def test_preempted_run_saves_and_resumes_bit_identically(
    campaign: fault_injection.Campaign,
) -> None:
    # Shells make background processes ignore Ctrl-C, which child processes would inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    paths = campaign.paths("stopped")
    before = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        process = killable_run.TrainingProcess(paths)
        process.watch(lambda phase: phase in ("steps", "save"))
        assert process.stop(number) == EXIT_PREEMPTED, process.messages
        assert f"{number.name}: saving after the current step" in process.messages
        step = saved_step(process.messages)
        assert before < step < STEPS
        assert step == max(killable_run.finished_steps(paths.workdir)) == process.step
        before = step
    killable_run.TrainingProcess(paths).wait()
    assert killable_run.outcome(paths.workdir).differences(campaign.expected) == []


def test_two_processes_save_the_same_step(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [
        *killable_run.FLAGS,
        "--config.train.duration=1000000 steps",
        f"--config.data.directory={tmp_path / 'data'}",
        f"--workdir={workdir}",
        f"--coordinator_address=127.0.0.1:{port}",
        "--process_count=2",
    ]
    processes = [command.start("main", *settings, f"--process_index={index}") for index in range(2)]
    try:
        deadline = time.monotonic() + command.TIMEOUT
        metrics = workdir / "metrics.jsonl"
        while not any(line["step"] >= 3 for line in killable_run.metric_lines(metrics)):
            assert time.monotonic() < deadline
            for process in processes:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        # A signal that JAX does not handle, so it must be passed on to the other process.
        processes[1].send_signal(signal.SIGUSR1)
        done = [command.finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for each in done:
        assert each.returncode == EXIT_PREEMPTED, each.stderr
    steps = [saved_step(each.stderr) for each in done]
    assert steps[0] == steps[1] == max(killable_run.finished_steps(workdir))
    assert killable_run.metric_lines(metrics)[-1]["step"] == steps[0]
    # Only one of them logs the training (the collectives' library also prints lines).
    assert ["mini_googlenet on digits" in each.stderr for each in done] == [True, False]
    # The other one received the signal.
    logged = ["SIGUSR1: saving after the current step" in each.stderr for each in done]
    assert logged == [False, True]
