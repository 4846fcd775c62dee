"""Starts a small training run whose process can be killed in a chosen phase.

The phase of a process is determined from outside, from the files that it writes anyway and JAX's
debug log on its stderr. The files left by a kill therefore show the phase that was hit. The small
files of a run in a bucket are read where the process keeps them before it uploads them. Each of its
processes has its own folder for temporary files, as on a new machine.
"""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from inception_jax.storage import buckets, integrity, paths
from inception_jax.storage.paths import is_local
from inception_jax.storage.workdir import Workdir
from inception_jax.telemetry.writers import NONDETERMINISTIC_FIELDS
from inception_jax.training import run as runs
from inception_jax.training import state as states
from inception_jax.training import workdir as workdirs
from inception_jax.training.checkpoints import Checkpoints
from inception_jax.training.run import Run

PHASES = {
    "start": "interpreter, imports, flags, devices",
    "preparation": "preparing the dataset",
    "compile": "tracing, compiling or loading programs, restoring the state",
    "steps": "training steps, between the phases below",
    "evaluation": "from the step at which it is due to its line in metrics.jsonl",
    "save": "from the step saved until the checkpoint has its final name",
    "report": "after an evaluation: predictions.npz, report.html",
    "end": "after the last checkpoint: result.json, plots",
}
SAVE_EVERY, EVALUATE_EVERY = 4, 10

# Flags of a run that takes seconds, without its duration and paths.
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
# One device and a cache of all programs, to make restarts cheap.
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
# A save to a bucket takes longer, and so does each look at it.
_POLL_BUCKET = 0.02


class ProcessError(measure.BenchmarkError):
    """A process that failed without a kill; the message contains the end of its output."""


@dataclasses.dataclass(frozen=True)
class Paths:
    """The directories of a run, and its duration.

    Attributes:
      workdir: the workdir, local or in a bucket.
      data: directory of the prepared data.
      cache: directory of the compilation cache; other files are written next to it.
      steps: duration of the run.
    """

    workdir: paths.Path
    data: pathlib.Path
    cache: pathlib.Path
    steps: int


class TrainingProcess:
    """A process of the training command."""

    def __init__(self, run: Paths) -> None:
        self.paths = run
        self._local = run.workdir if is_local(run.workdir) else None
        environment = {**os.environ, **_ENVIRONMENT}
        if self._local:
            self._local.mkdir(parents=True, exist_ok=True)
        else:
            self._temporary = pathlib.Path(tempfile.mkdtemp(dir=run.cache.parent))
            environment["TMPDIR"] = str(self._temporary)
        self._resumed = max(finished_steps(run.workdir), default=0)
        self._stderr = run.cache.with_name(f"{run.workdir.name}.stderr")
        self._traced = False
        self._began = time.time_ns()
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(run.cache)
        with self._stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "inception_jax.main",
                    *FLAGS,
                    f"--config.train.duration={run.steps} steps",
                    f"--config.data.directory={run.data}",
                    f"--workdir={run.workdir}",
                ],
                cwd=measure.ROOT,
                env={**environment, "JAX_COMPILATION_CACHE_DIR": cache},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )

    def wait(self) -> dict[str, float]:
        """Waits until the process exits; returns and raises as `watch` does."""
        return self.watch(lambda phase: False)

    def watch(self, until: Callable[[str], bool]) -> dict[str, float]:
        """Polls the phase until `until(phase)` is true or the process exits.

        Returns:
          By phase, its duration when it was last completed, seconds.

        Raises:
          ProcessError: if the process fails.
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
                raise ProcessError(
                    "\n".join([f"the training command exited with code {ended}", *lines])
                )
            if ended == 0 or until(phase):
                return spans
            time.sleep(_POLL if self._local else _POLL_BUCKET)

    def kill(self) -> str | None:
        """Kills the process and returns the phase that was hit; None if it had already exited."""
        if self.running:
            # The session includes its child processes.
            os.killpg(self._process.pid, signal.SIGKILL)
        return self.phase() if self._process.wait() == -signal.SIGKILL else None

    def stop(self, number: signal.Signals) -> int:
        """Sends a signal and returns the exit code of the process."""
        self._process.send_signal(number)
        return self._process.wait()

    @property
    def messages(self) -> str:
        """The output of the process on stderr."""
        return self._stderr.read_text(errors="replace")

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    @property
    def step(self) -> int:
        """The newest step in metrics.jsonl."""
        return max((line["step"] for line in self._metric_lines()), default=0)

    def _metric_lines(self) -> list[dict[str, Any]]:
        return metric_lines(path) if (path := self._metrics()) else []

    def _metrics(self) -> pathlib.Path | None:
        if self._local:
            return self._local / "metrics.jsonl"
        return next(self._temporary.glob(f"*/{self.paths.workdir.name}/metrics.jsonl"), None)

    def phase(self) -> str:
        """Returns the phase, a key of `PHASES`, that the process is in or was in when it exited."""
        metrics = self._metrics()
        if metrics and self._touched(metrics):
            lines = metric_lines(metrics)
            if lines and lines[-1]["step"] > self._resumed:
                return self._training_phase(lines[-1])
        self._traced = self._traced or bool(_TRACED.search(self._stderr.read_bytes()))
        if self._traced:
            return "compile"
        folder = self.paths.data / "inception_jax"
        locks = list(folder.glob("*.lock"))
        if any(map(self._touched, locks)) and not list(folder.glob("*px/info.json")):
            return "preparation"
        return "start"

    def _training_phase(self, last: dict[str, Any]) -> str:
        """Returns the phase according to the newest line of metrics."""
        step, end = last["step"], last["step"] == self.paths.steps
        saved = step in finished_steps(self.paths.workdir)
        if last["split"] != "train":
            return "save" if not saved else "end" if end else "report"
        if end or step % EVALUATE_EVERY == 0:
            return "evaluation"
        if step % SAVE_EVERY == 0 and not saved:
            return "save"
        # Written in the background, while steps go on.
        return "save" if self._has_unfinished_checkpoint() else "steps"

    def _has_unfinished_checkpoint(self) -> bool:
        if self._local:
            return bool(list((self._local / "checkpoints").glob("*.orbax-checkpoint-tmp*")))
        folder = self.paths.workdir / "checkpoints"
        assert not is_local(folder)
        begun = {name.partition("/")[0] for name in buckets.list_files(folder)}
        return bool(begun - set(map(str, integrity.list_steps(folder))))

    def _touched(self, path: pathlib.Path) -> bool:
        """Returns whether this process has written a file."""
        try:
            return path.stat().st_mtime_ns >= self._began
        except FileNotFoundError:
            return False


def finished_steps(workdir: paths.Path) -> list[int]:
    """Returns the steps of the finished checkpoints."""
    return integrity.list_steps(workdir / "checkpoints")


def metric_lines(metrics: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a metrics.jsonl; none if it does not exist."""
    try:
        text = metrics.read_bytes()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split(b"\n")[:-1]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The final state of a run that must not depend on interruptions.

    Attributes:
      lines: lines of metrics.jsonl without measurements.
      arrays: bytes of each array of the last checkpoint, by path: parameters, BatchNorm statistics,
        their averages, optimizer state, step, sums of metrics.
      result: the evaluation in result.json.
    """

    lines: list[dict[str, Any]]
    arrays: dict[str, bytes]
    result: dict[str, Any]

    def differences(self, other: "Outcome") -> list[str]:
        """Returns the names of all parts that are not bit-identical."""
        different = [path for path in self.arrays if self.arrays[path] != other.arrays.get(path)]
        if self.arrays.keys() != other.arrays.keys():
            different.append("names of arrays")
        if self.result != other.result:
            different.append("result.json")
        if self.lines != other.lines:
            different.append("metrics.jsonl")
        return different


def outcome(location: paths.Path) -> Outcome:
    """Reads the final state of a run.

    Raises:
      BenchmarkError: if the last line of metrics.jsonl is incomplete.
    """
    workdir = Workdir(location)
    workdir.download()
    if not workdir.metrics.read_bytes().endswith(b"\n"):
        raise measure.BenchmarkError(f"{location / 'metrics.jsonl'}: the last line is incomplete")
    lines = [
        {name: value for name, value in line.items() if name not in NONDETERMINISTIC_FIELDS}
        for line in metric_lines(workdir.metrics)
    ]
    result = json.loads(workdir.result.read_text(encoding="utf-8"))
    same = ("name", "step", "epoch", "split", "loss", "top1", "top5", "count")
    # With few classes there is no top5.
    config = workdirs.require_record(workdir).config
    arrays = saved_arrays(runs.assemble(config, log=measure.log), workdir)
    return Outcome(lines, arrays, {n: result[n] for n in same if n in result})


def saved_arrays(run: Run, workdir: Workdir) -> dict[str, bytes]:
    """Returns the bytes of each array of a run's last checkpoint, by path."""
    abstract_state = states.abstract_state(run)
    with Checkpoints(workdir.checkpoints, read_only=True) as saved:
        restored, _ = saved.restore(saved.resolve("last"), abstract_state)
    leaves = jax.tree_util.tree_leaves_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
