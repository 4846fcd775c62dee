"""Training that is killed, and training that is told to end: at one process and at two."""

import pathlib
import re
import signal
import socket
import time

import pytest

from benchmarks import fault_injection, lives
from inception_jax.errors import EXIT_PREEMPTED
from tests import command

pytestmark = pytest.mark.slow

STEPS = 12


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> fault_injection.Campaign:
    """With a run that nobody disturbed."""
    return fault_injection.Campaign(tmp_path_factory.mktemp("campaign"), steps=STEPS, seed=0)


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


def test_a_run_that_is_killed_ends_with_the_same_bits(campaign: fault_injection.Campaign) -> None:
    results = fault_injection.kill(campaign, 3)
    assert results["kills"] == len(results["samples"]) == 3
    assert sum(phase["met"] for phase in results["phases"].values()) == 3
    assert results["runs"] >= 1
    # 12 steps, evaluations at 10 and 12.
    assert results["lines"] == 14
    assert results["arrays"] > 100
    table = fault_injection.report(results)
    assert "killed in" in table and "14 lines of metrics" in table


def test_a_run_that_is_told_to_end_saves_its_step_and_goes_on_to_the_same_bits(
    campaign: fault_injection.Campaign,
) -> None:
    # A shell has what it runs in the background ignore Ctrl-C, and that would be handed on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    place = campaign.place("stopped")
    before = 0
    for number in (signal.SIGTERM, signal.SIGINT):
        life = lives.Life(place)
        life.watch(lambda phase: phase in ("steps", "save"))
        assert life.stop(number) == EXIT_PREEMPTED, life.messages
        assert f"{number.name}: ends once this step is saved" in life.messages
        step = saved_step(life.messages)
        assert before < step < STEPS
        assert step == max(lives.finished_steps(place.workdir)) == life.step
        before = step
    lives.Life(place).wait()
    assert lives.outcome(place.workdir).differences(campaign.expected) == []


def test_two_processes_save_the_same_step(tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [
        *lives.FLAGS,
        "--config.train.duration=1000000 steps",
        f"--config.data.directory={tmp_path / 'data'}",
        f"--workdir={workdir}",
        f"--coordinator_address=127.0.0.1:{port}",
        "--process_count=2",
    ]
    processes = [command.start("main", *settings, f"--process_index={index}") for index in range(2)]
    try:
        deadline = time.monotonic() + command.TIMEOUT
        while not any(line["step"] >= 3 for line in lives.metric_lines(workdir)):
            assert time.monotonic() < deadline
            for process in processes:
                assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        # Not JAX's own signal: it has to be handed on.
        processes[1].send_signal(signal.SIGUSR1)
        done = [command.finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for each in done:
        assert each.returncode == EXIT_PREEMPTED, each.stderr
    steps = [saved_step(each.stderr) for each in done]
    assert steps[0] == steps[1] == max(lives.finished_steps(workdir))
    assert lives.metric_lines(workdir)[-1]["step"] == steps[0]
    # One of them alone speaks of the training. (The collectives' library prints lines of its own.)
    assert ["mini_googlenet on digits" in each.stderr for each in done] == [True, False]
    # The signal came to the other.
    said = ["SIGUSR1: ends once this step is saved" in each.stderr for each in done]
    assert said == [False, True]
