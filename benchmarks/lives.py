"""A small run of the training command, whose process can be killed in a phase of one's choice.

Which phase a process is in is read from outside: from the files that it writes anyway, and from
JAX's debug log on its stderr. So what the files say after a kill is the phase that the kill met.
"""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import MEASURED
from inception_jax.training import run as runs
from inception_jax.training import state as states
from inception_jax.training import workdir as workdirs
from inception_jax.training.checkpoints import Checkpoints

PHASES = {
    "start": "interpreter, imports, flags, devices",
    "preparation": "of the data set",
    "compile": "tracing, compiled programs, restoring the state",
    "steps": "training steps, between what follows",
    "evaluation": "from the step that it is due at to its line in metrics.jsonl",
    "save": "from its step on, until the checkpoint has its name",
    "report": "after an evaluation: predictions.npz, report.html",
    "end": "after the last checkpoint: result.json, plots",
}
SAVE_EVERY, EVALUATE_EVERY = 4, 10

# Of a run of seconds, but for its length and its folders.
FLAGS = (
    "--config=experiments/digits.py",
    "--config.data.image_size=8",
    "--config.model.width=0.125",
    "--config.augment.mixup=0.2",
    "--config.train.batch_size=64",
    "--config.train.duration=",
    "--config.train.ema=5 steps",
    "--config.schedule.warmup=3 steps",
    "--config.evaluation.batch_size=100",
    f"--config.evaluation.every={EVALUATE_EVERY} steps",
    f"--config.checkpoint.every={SAVE_EVERY} steps",
    "--config.log.every=1 step",
)
# One device, and no program too small for the cache: a restart should cost little.
_ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    "JAX_DEBUG_LOG_MODULES": "jax._src.dispatch",
}
_TRACED = re.compile(rb"Finished tracing")
# Seconds; a tenth of the shortest phase.
_POLL = 0.002


class LifeError(measure.BenchmarkError):
    """A process that failed by itself; the message has the end of what it printed."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a process works.

    Attributes:
      workdir: of the run.
      data: directory of the prepared data.
      cache: of compiled programs.
      steps: length of the run.
    """

    workdir: pathlib.Path
    data: pathlib.Path
    cache: pathlib.Path
    steps: int


class Life:
    """One process of the training command, from its start to its end."""

    def __init__(self, place: Place) -> None:
        self.place = place
        place.workdir.mkdir(parents=True, exist_ok=True)
        self._resumed = max(finished_steps(place.workdir), default=0)
        self._stderr = place.workdir.with_name(f"{place.workdir.name}.stderr")
        self._traced = False
        self._began = time.time_ns()
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(place.cache)
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "inception_jax.main",
                    *FLAGS,
                    f"--config.train.duration={place.steps} steps",
                    f"--config.data.directory={place.data}",
                    f"--workdir={place.workdir}",
                ],
                cwd=measure.ROOT,
                env={**os.environ, **_ENVIRONMENT, "JAX_COMPILATION_CACHE_DIR": cache},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def wait(self) -> dict[str, float]:
        """Lets the process come to its end; returns and raises as `watch` does."""
        return self.watch(lambda phase: False)

    def watch(self, until: Callable[[str], bool]) -> dict[str, float]:
        """Waits until `until`, called with the phase again and again, is true, or for the end.

        Returns:
          By phase, how long it took when it was last passed, seconds.

        Raises:
          LifeError: if the process fails.
        """
        spans: dict[str, float] = {}
        before, since = "start", time.perf_counter()
        while True:
            ended = self._process.poll()
            phase = self.phase()
            if phase != before:
                now = time.perf_counter()
                spans[before] = now - since
                before, since = phase, now
            if ended:
                lines = self.messages.splitlines()[-20:]
                raise LifeError("\n".join([f"the command ended with {ended}", *lines]))
            if ended == 0 or until(phase):
                return spans
            time.sleep(_POLL)

    def kill(self) -> str | None:
        """Kills the process, and returns the phase that this met; None if it had ended before."""
        if self.running:
            # What it started goes with it.
            os.killpg(self._process.pid, signal.SIGKILL)
        return self.phase() if self._process.wait() == -signal.SIGKILL else None

    def stop(self, number: signal.Signals) -> int:
        """Sends a signal, and returns the exit code with which the process ends then."""
        self._process.send_signal(number)
        return self._process.wait()

    @property
    def messages(self) -> str:
        """What the process has printed on stderr."""
        return self._stderr.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    @property
    def step(self) -> int:
        """The newest step in metrics.jsonl."""
        return max((line["step"] for line in metric_lines(self.place.workdir)), default=0)

    def phase(self) -> str:
        """Returns which of `PHASES` the process is in, or was in when it ended."""
        metrics = self.place.workdir / "metrics.jsonl"
        if self._touched(metrics):
            lines = metric_lines(self.place.workdir)
            if lines and lines[-1]["step"] > self._resumed:
                return self._training_phase(lines[-1])
        self._traced = self._traced or bool(_TRACED.search(self._stderr.read_bytes()))
        if self._traced:
            return "compile"
        folder = self.place.data / "inception_jax"
        locks = list(folder.glob("*.lock"))
        if any(map(self._touched, locks)) and not list(folder.glob("*px/info.json")):
            return "preparation"
        return "start"

    def _training_phase(self, last: dict[str, Any]) -> str:
        """Returns the phase by the newest line of metrics."""
        step, end = last["step"], last["step"] == self.place.steps
        saved = step in finished_steps(self.place.workdir)
        if last["split"] != "train":
            return "save" if not saved else "end" if end else "report"
        if end or step % EVALUATE_EVERY == 0:
            return "evaluation"
        if step % SAVE_EVERY == 0 and not saved:
            return "save"
        # Written in the background, while steps go on.
        checkpoints = self.place.workdir / "checkpoints"
        return "save" if list(checkpoints.glob("*.orbax-checkpoint-tmp*")) else "steps"

    def _touched(self, path: pathlib.Path) -> bool:
        """Whether this process has written a file."""
        try:
            return path.stat().st_mtime_ns >= self._began
        except FileNotFoundError:
            return False


def finished_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints that are whole."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return [int(name) for name in names if name.isdecimal()]


def metric_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the whole lines of metrics.jsonl; none where there is no file."""
    try:
        text = (workdir / "metrics.jsonl").read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a finished run has left that must not depend on what happened to it.

    Attributes:
      lines: of metrics.jsonl, without the times in them.
      arrays: the bytes of each array of the last checkpoint, by its path: parameters, BatchNorm
        statistics, their averages, the optimizer's state, the step, sums of metrics.
      result: result.json's evaluation.
    """

    lines: list[dict[str, Any]]
    arrays: dict[str, bytes]
    result: dict[str, Any]

    def differences(self, other: "Outcome") -> list[str]:
        """Returns what is not the same, to the bit."""
        found = [path for path in self.arrays if self.arrays[path] != other.arrays.get(path)]
        if self.arrays.keys() != other.arrays.keys():
            found.append("the arrays' names")
        if self.result != other.result:
            found.append("result.json")
        if self.lines != other.lines:
            found.append("metrics.jsonl")
        return found


def outcome(workdir: pathlib.Path) -> Outcome:
    """Reads what a finished run has left.

    Raises:
      BenchmarkError: if metrics.jsonl has a torn line.
    """
    metrics = workdir / "metrics.jsonl"
    if not metrics.read_bytes().endswith(b"\n"):
        raise measure.BenchmarkError(f"{metrics}: the last line is torn")
    lines = [
        {name: value for name, value in line.items() if name not in MEASURED}
        for line in metric_lines(workdir)
    ]
    result = json.loads((workdir / "result.json").read_text(encoding="utf-8"))
    same = ("name", "step", "epoch", "split", "loss", "top1", "top5", "count")
    # Of few classes there is no top5.
    return Outcome(lines, _arrays(workdir), {n: result[n] for n in same if n in result})


def _arrays(path: pathlib.Path) -> dict[str, bytes]:
    folder = Workdir(path)
    config = workdirs.recorded_run(folder).config
    like = states.abstract_state(runs.assemble(config, log=measure.say))
    with Checkpoints(folder.checkpoints, read_only=True) as saved:
        restored, _ = saved.restore(saved.resolve("last"), like)
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
