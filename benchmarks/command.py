"""Runs the training command as a child process and reads metrics.jsonl as it grows."""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import measure

# Seconds; fine enough for a start-up of seconds, coarse enough not to slow it down.
_POLL = 0.02


class CommandError(measure.BenchmarkError):
    """A failed training command; the message contains the end of its output."""


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for settings of the experiment, which `overrides` turns into flags."""
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="PATH=VALUE",
        help="settings, as in --config.PATH=VALUE",
    )


def overrides(arguments: Sequence[str]) -> list[str]:
    """Returns flags of the training command for settings given as PATH=VALUE.

    The last of several settings with the same path wins; ml_collections would join the tuples of
    repeated flags.
    """
    last = {argument.partition("=")[0]: argument for argument in arguments}
    return [f"--config.{argument}" for argument in last.values()]


def train(name: str, flags: Sequence[str]) -> None:
    """Runs the training command to its end; if this process is stopped, so is it, once it saved.

    Args:
      name: of the run, for errors.
      flags: all flags.

    Raises:
      CommandError: if the command fails.
    """
    called = [sys.executable, "-m", "inception_jax.main", *flags]
    process = subprocess.Popen(called, cwd=measure.ROOT, stdout=subprocess.DEVNULL)
    try:
        code = process.wait()
    except (KeyboardInterrupt, SystemExit):
        # Ctrl-C has reached it, too; two signals within a second count as one.
        process.terminate()
        process.wait()
        raise
    if code:
        raise CommandError(f"{name}: the training command exited with code {code}")


@contextlib.contextmanager
def training(
    experiment: str,
    flags: Sequence[str],
    *,
    environment: Mapping[str, str] | None = None,
    interpreter: Sequence[str] = (),
) -> Iterator["Training"]:
    """Starts the training command in a temporary workdir, and kills it on exit.

    Args:
      experiment: file of the experiment.
      flags: flags other than --config and --workdir.
      environment: environment variables that differ from this process's.
      interpreter: flags of the Python interpreter.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-run-") as workdir:
        run = Training(experiment, flags, workdir, environment or {}, interpreter)
        try:
            yield run
        finally:
            run.close()


class Training:
    """A running training command, created by `training`.

    Attributes:
      messages: time in seconds since the start, and text, of each line printed to stderr.
    """

    def __init__(
        self,
        experiment: str,
        flags: Sequence[str],
        workdir: str,
        environment: Mapping[str, str],
        interpreter: Sequence[str],
    ) -> None:
        self._metrics = pathlib.Path(workdir) / "metrics.jsonl"
        self.messages: list[tuple[float, str]] = []
        self._started = time.perf_counter()
        self._process = subprocess.Popen(
            [
                sys.executable,
                *interpreter,
                "-m",
                "inception_jax.main",
                f"--config={experiment}",
                f"--workdir={workdir}",
                *flags,
            ],
            cwd=measure.ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read_messages)
        self._reader.start()

    def reports(self) -> Iterator[tuple[float, dict[str, Any]]]:
        """Yields the seconds since the start and the row of each training report as it is written.

        Raises:
          CommandError: if the command fails.
        """
        seen = 0
        while True:
            ended = self._process.poll() is not None
            lines = self._lines()
            elapsed = time.perf_counter() - self._started
            for line in lines[seen:]:
                report = json.loads(line)
                if report["split"] == "train":
                    yield elapsed, report
            seen = len(lines)
            if ended:
                if self._process.returncode:
                    raise CommandError(
                        f"the training command exited with code {self._process.returncode}\n"
                        + "".join(text for _, text in self.messages[-20:])
                    )
                return
            time.sleep(_POLL)

    def close(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    def _read_messages(self) -> None:
        assert self._process.stderr
        with self._process.stderr as lines:
            for line in lines:
                self.messages.append((time.perf_counter() - self._started, line))

    def _lines(self) -> list[str]:
        """Returns the complete lines of metrics.jsonl."""
        if not self._metrics.exists():
            return []
        return self._metrics.read_text(encoding="utf-8").split("\n")[:-1]
