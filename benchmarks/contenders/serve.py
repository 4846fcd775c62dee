"""Runs a worker process: creates a contender, then measures on command.

    python -m benchmarks.contenders.serve MODULE SETTINGS

MODULE is the dotted name of a module with a function make(settings) that returns a `Contender`;
SETTINGS is JSON. Messages are lines of JSON. When the worker is ready, it answers

    {"ready": {facts}}     or {"missing": "torch"}     or {"error": "what went wrong"}

and then to each line {"mode": "train", ...} on stdin with the numbers that the mode returned, plus
"idle_wall" and "idle_cpu": wall seconds and CPU seconds of this process since the last answer,
which show whether it was idle while others were measured. It exits when stdin is closed.
"""

import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from inception_jax.runtime import huge_pages

Numbers = dict[str, Any]


class Contender(NamedTuple):
    """The measurements that a worker offers.

    Attributes:
      facts: versions, device, parameter count.
      modes: functions by name; called with the rest of the command as keywords.
    """

    facts: Numbers
    modes: Mapping[str, Callable[..., Numbers]]


def serve(module: str, settings: Numbers) -> None:
    """Runs a worker.

    Args:
      module: dotted name; a missing package is reported as such.
      settings: settings of the contender.
    """
    # Libraries may print to stdout, which is reserved for the protocol.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        try:
            contender = importlib.import_module(module).make(settings)
        except ModuleNotFoundError as error:
            if str(error.name).split(".")[0] in (module.split(".")[0], "inception_jax"):
                raise
            answer(missing=error.name)
            return
        answer(ready={**contender.facts, "modes": list(contender.modes)})
        _answer_commands(contender, answer)
    except Exception as error:
        traceback.print_exc()
        answer(error=f"{type(error).__name__}: {error}")
        sys.exit(1)


def _answer_commands(contender: Contender, answer: Callable[..., None]) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        command = json.loads(line)
        idle = {
            "idle_wall": time.perf_counter() - wall,
            "idle_cpu": time.process_time() - cpu,
        }
        answer(**contender.modes[command.pop("mode")](**command), **idle)
        wall, cpu = time.perf_counter(), time.process_time()


class TimedOperation:
    """Times an operation that may be dispatched asynchronously.

    Args:
      operation: starts the operation once.
      wait: blocks until all started operations are done.
    """

    def __init__(self, operation: Callable[[], None], wait: Callable[[], None]) -> None:
        self._operation = operation
        self._wait = wait
        self._estimate = 0.0

    def warm_up(self, times: int = 3) -> "TimedOperation":
        """Runs the operation to compile it and to estimate its time."""
        for _ in range(times):
            self._estimate = self.timed(1)
        return self

    def __call__(self, seconds: float) -> Numbers:
        """Repeats the operation for about `seconds`, at least twice, after an untimed one."""
        self.timed(1)
        count = max(2, math.ceil(seconds / self._estimate))
        self._estimate = self.timed(count)
        return {"seconds": self._estimate, "count": count}

    def timed(self, count: int) -> float:
        """Repeats the operation `count` times and returns the seconds per repetition."""
        start = time.perf_counter()
        for _ in range(count):
            self._operation()
        self._wait()
        return (time.perf_counter() - start) / count


if __name__ == "__main__":
    # As in our command; the peers benefit too.
    huge_pages.use_huge_pages()
    # As the contenders know this module, not as __main__.
    from benchmarks.contenders import serve as this

    this.serve(sys.argv[1], json.loads(sys.argv[2]))
