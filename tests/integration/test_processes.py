"""Two real processes, four simulated devices each, against one process."""

import pathlib
import socket
import subprocess

import pytest

from inception_jax.telemetry.writers import read_lines
from tests import command

SETTINGS = [
    "--config=experiments/digits.py",
    "--config.data.image_size=8",
    "--config.model.width=0.125",
    "--config.train.batch_size=64",
    "--config.train.length.epochs=0",
    "--config.schedule.warmup.epochs=0",
    "--config.evaluation.batch_size=100",
    "--config.checkpoint.every.epochs=0",
    "--config.checkpoint.every.steps=4",
    "--config.log.every.steps=2",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(*arguments: str) -> list[subprocess.CompletedProcess]:
    address = f"127.0.0.1:{free_port()}"
    processes = [
        command.start(
            "main",
            *arguments,
            f"--coordinator_address={address}",
            "--process_count=2",
            f"--process_index={index}",
            devices=4,
        )
        for index in range(2)
    ]
    try:
        return [command.finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_train_as_one_and_one_goes_on(
    data_directory: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    settings = [*SETTINGS, f"--config.data.directory={data_directory}"]
    one, two = tmp_path / "one", tmp_path / "two"
    command.check("main", *settings, "--config.train.length.steps=12", f"--workdir={one}")

    both = run_two(*settings, "--config.train.length.steps=8", f"--workdir={two}")
    for done in both:
        assert done.returncode == 0, done.stderr
    # The lead process alone speaks.
    # (The collectives' library prints lines of its own, on stdout.)
    assert '{"name": "digits"' in both[0].stdout and "digits" not in both[1].stdout
    assert "step 8/8" in both[0].stderr and "step 8" not in both[1].stderr

    # On one device, for which the step is compiled already.
    command.check("main", *settings, "--config.train.length.steps=12", f"--workdir={two}")
    expected, found = read_lines(one / "metrics.jsonl"), read_lines(two / "metrics.jsonl")
    # The shorter first part ended with a report and an evaluation of its own.
    extra = [line for line in found if line["step"] == 8 and line["split"] == "test"]
    assert len(extra) == 1
    found.remove(extra[0])
    for left, right in zip(expected, found, strict=True):
        assert (left["step"], left["split"]) == (right["step"], right["split"])
        if left["split"] == "train" and left["step"] <= 4:
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-3)
