"""The inside of a worker process: makes one contender, then measures when told to.

    python -m benchmarks.contenders.serve MODULE SETTINGS

MODULE is a dotted name; it has a function make(settings) that returns a `Contender`; SETTINGS is
JSON. The protocol is a line of JSON each way. The worker answers, once it is ready:

    {"ready": {facts}}     or {"missing": "torch"}     or {"error": "what went wrong"}

and then to each line {"mode": "train", ...} on stdin the numbers that the mode returned, with
"idle_wall" and "idle_cpu": seconds since the last answer, of the clock and of all of this process's
threads, which show whether it kept still while others were measured. It ends with its stdin.
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
    """What a worker measures.

    Attributes:
      facts: what it is: versions, device, parameter count.
      modes: by name, what is measured; called with the rest of the command as keywords.
    """

    facts: Numbers
    modes: Mapping[str, Callable[..., Numbers]]


def serve(module: str, settings: Numbers) -> None:
    """Runs a worker.

    Args:
      module: dotted name; one that needs a package which is not there is reported as missing.
      settings: of the contender.
    """
    # Libraries print to stdout what they please; the protocol keeps it to itself.
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


class Repeated:
    """Times an operation that may be dispatched ahead of the device.

    Args:
      operation: starts one piece of work.
      wait: returns when all that was started is done.
    """

    def __init__(self, operation: Callable[[], None], wait: Callable[[], None]) -> None:
        self._operation = operation
        self._wait = wait
        self._estimate = 0.0

    def warm_up(self, times: int = 3) -> "Repeated":
        """Runs the operation, so that it is compiled, and estimates its time."""
        for _ in range(times):
            self._estimate = self.timed(1)
        return self

    def __call__(self, seconds: float) -> Numbers:
        """Repeats the operation for about `seconds`, at least twice, after once untimed."""
        self.timed(1)
        count = max(2, math.ceil(seconds / self._estimate))
        self._estimate = self.timed(count)
        return {"seconds": self._estimate, "count": count}

    def timed(self, count: int) -> float:
        """Repeats the operation `count` times, and returns the seconds of one."""
        start = time.perf_counter()
        for _ in range(count):
            self._operation()
        self._wait()
        return (time.perf_counter() - start) / count


if __name__ == "__main__":
    # As our command does; the peers gain from it as well.
    huge_pages.use_huge_pages()
    # As the contenders know this module, not as __main__.
    from benchmarks.contenders import serve as this

    this.serve(sys.argv[1], json.loads(sys.argv[2]))
