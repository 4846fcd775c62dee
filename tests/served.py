"""Runs the command serve, as a user does."""

import contextlib
import pathlib
import re
import signal
import subprocess
from collections.abc import Iterator

from inception_jax.models import weights
from tests import command, small


@contextlib.contextmanager
def running(folder: pathlib.Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Serves a small network; yields the address and the process, which is killed on exit."""
    path = folder / "network.safetensors"
    weights.save(path, small.weights())
    process = command.start("tools.serve", f"--weights={path}", "--port=0", *flags)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"ready: (http://127\.0\.0\.1:\d+) \(press Ctrl-C to stop\)\n", line)
        assert match, line or process.communicate()[1]
        yield match[1], process
    finally:
        process.kill()
        process.communicate()


def interrupt(process: subprocess.Popen) -> tuple[int, str]:
    """Interrupts a command as Ctrl-C does; returns its exit code and output."""
    process.send_signal(signal.SIGINT)
    output, messages = process.communicate(timeout=command.TIMEOUT)
    return process.returncode, output + messages
