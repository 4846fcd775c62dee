"""Runs commands as a user does, in a separate process with a given number of devices."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 600


def start(*arguments: str, devices: int = 1) -> subprocess.Popen:
    """Starts `python -m inception_jax.<arguments>` with both output streams as text pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", f"inception_jax.{arguments[0]}", *arguments[1:]],
        cwd=ROOT,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(*arguments: str, devices: int = 1) -> subprocess.CompletedProcess:
    """Runs a command and returns its exit code, output and messages."""
    return finish(start(*arguments, devices=devices))


def finish(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Waits for a command, and kills it after TIMEOUT seconds."""
    try:
        output, messages = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, messages)


def check(*arguments: str, devices: int = 1) -> str:
    """Runs a command that must succeed and returns its output."""
    done = run(*arguments, devices=devices)
    assert done.returncode == 0, done.stderr
    return done.stdout
