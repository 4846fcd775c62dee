"""Runs contenders in separate processes that take turns, so that none disturbs another.

A worker (`contenders.serve`) prepares itself, then waits for commands. Rounds go A B C A B C …, so
that changes on the machine affect all contenders equally.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import measure

# Seconds between turns. Threads may spin after a turn (OpenMP's block time is 200 ms by default),
# which must not slow the next contender down.
_PAUSE = 0.5
# Above this fraction of one core, an idle contender disturbs the others.
_MAX_IDLE_CPU_FRACTION = 0.05


class ContenderError(measure.BenchmarkError):
    """A contender that failed; the message contains the end of its output."""


@dataclasses.dataclass(frozen=True)
class Contender:
    """The specification of a worker.

    Attributes:
      name: name in tables and files.
      module: dotted name of the module that the worker runs.
      settings: settings passed to it as JSON.
      python: the Python interpreter.
      environment: environment variables that differ from this process's.
    """

    name: str
    module: str
    settings: Mapping[str, Any]
    python: str = sys.executable
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


class Worker:
    """A running contender.

    Raises:
      ContenderError: if it fails to start.
    """

    def __init__(self, contender: Contender) -> None:
        self.name = contender.name
        # Closed with the worker.
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                [
                    contender.python,
                    "-m",
                    "benchmarks.contenders.serve",
                    contender.module,
                    json.dumps(contender.settings),
                ],
                cwd=measure.ROOT,
                env={**os.environ, **contender.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._messages,
                text=True,
            )
        except OSError as error:
            self._messages.close()
            raise ContenderError(
                f"{contender.name}: {contender.python}: {error.strerror}"
            ) from error
        first = self._read()
        # The package that is not installed; '' if the contender is ready.
        self.missing: str = first.get("missing", "")
        self.facts: dict[str, Any] = first.get("ready", {})

    def ask(self, mode: str, **command: Any) -> dict[str, Any]:
        """Measures once and returns the numbers.

        Raises:
          ContenderError: if the worker fails.
        """
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"mode": mode, **command}) + "\n")
            self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Closes stdin, so that the worker exits with its children, or kills it."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._messages.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "exited without an answer"}
        if "error" in answer:
            self._process.wait()
            self._messages.seek(0)
            tail = "".join(self._messages.readlines()[-20:])
            self.close()
            raise ContenderError(f"{self.name}: {answer['error']}\n{tail}")
        return answer


@contextlib.contextmanager
def running(contenders: Sequence[Contender]) -> Iterator[tuple[list[Worker], dict[str, str]]]:
    """Starts contenders one after another, and stops them on exit.

    Yields:
      The workers that are ready, and the reason for each missing one, by name. Failures are logged
      and skipped, so that hours of measuring other contenders are not lost.
    """
    with contextlib.ExitStack() as stack:
        ready, absent = [], {}
        for contender in contenders:
            start = time.perf_counter()
            try:
                worker = Worker(contender)
            except ContenderError as error:
                measure.log(str(error))
                absent[contender.name] = f"failed: {str(error).splitlines()[0]}"
                continue
            stack.callback(worker.close)
            if worker.missing:
                absent[contender.name] = f"not installed: {worker.missing}"
                measure.log(f"{contender.name}: {absent[contender.name]}")
            else:
                measure.log(f"{contender.name}: ready in {time.perf_counter() - start:.0f} s")
                ready.append(worker)
        yield ready, absent


def take_turns(
    workers: Sequence[Worker], commands: Sequence[Mapping[str, Any]], *, rounds: int
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Measures all workers in turn, round after round.

    Args:
      workers: the workers.
      commands: commands of a turn, "mode" and its keywords; modes that a worker lacks are skipped.
      rounds: number of rounds.

    Returns:
      The numbers of each round by (worker, mode).

    Raises:
      ContenderError: if a worker fails.
    """
    numbers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for index in range(rounds):
        for worker in workers:
            for command in commands:
                if command["mode"] not in worker.facts["modes"]:
                    continue
                time.sleep(_PAUSE)
                answer = worker.ask(**command)
                if index:
                    _check_idle(worker, answer)
                numbers.setdefault((worker.name, command["mode"]), []).append(answer)
        measure.log(f"round {index + 1} of {rounds} done")
    return numbers


def _check_idle(worker: Worker, answer: Mapping[str, Any]) -> None:
    if (
        answer["idle_wall"] > 2
        and answer["idle_cpu"] > _MAX_IDLE_CPU_FRACTION * answer["idle_wall"]
    ):
        measure.log(
            f"{worker.name}: used {answer['idle_cpu']:.1f} s of CPU while others were measured "
            f"({answer['idle_wall']:.1f} s); the results of this round are unreliable"
        )
