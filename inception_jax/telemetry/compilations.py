"""How long programs take to compile, and whether the compilation cache had them.

What a compilation took is kept beside the cache, so that the next of the same kind can be said to
take about as long: most changes of settings make another program, which is compiled as long.
"""

import collections
import contextlib
import functools
import json
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import jax

from inception_jax.errors import WriteError
from inception_jax.storage import atomic

_HIT = "/jax/compilation_cache/cache_hits"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FILE = "inception_jax-compile-seconds.json"

_hits: collections.Counter[int] = collections.Counter()
_seconds: dict[int, float] = collections.defaultdict(float)


def seconds() -> float:
    """Returns how long the calling thread has been compiling, or loading what was compiled."""
    _listen()
    return _seconds[threading.get_ident()]


def compile_and_say(
    lowered: jax.stages.Lowered, what: str, kind: str, log: Callable[[str], None]
) -> jax.stages.Compiled:
    """Compiles a program, or loads it from the cache, and logs which of them and how long it took.

    Args:
      lowered: the program.
      what: its name for the user.
      kind: what programs that take as long to compile have in common.
      log: takes a line.
    """
    _listen()
    thread, start = threading.get_ident(), time.monotonic()
    hits = _hits[thread]
    compiled = lowered.compile()
    took = time.monotonic() - start
    if _hits[thread] > hits:
        log(f"{what}: loaded from the compilation cache in {took:.1f} s")
    else:
        log(f"{what}: compiled in {took:.1f} s")
        with contextlib.suppress(OSError, WriteError):
            _remember(kind, took)
    return compiled


def expected(kind: str) -> float | None:
    """Returns how long it took to compile such a program last; None where it is not known."""
    with contextlib.suppress(OSError, ValueError):
        found = _remembered().get(kind)
        return found if isinstance(found, int | float) else None
    return None


@functools.cache
def _listen() -> None:
    """Starts to count, once."""

    def on_event(event: str, **_: Any) -> None:
        if event == _HIT:
            _hits[threading.get_ident()] += 1

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            _seconds[threading.get_ident()] += duration_secs

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)


def _file() -> pathlib.Path | None:
    # Not every version of JAX declares the types of its settings.
    folder = cast(Any, jax.config).jax_compilation_cache_dir
    return pathlib.Path(folder) / _FILE if folder else None


def _remembered() -> dict[str, Any]:
    path = _file()
    values = json.loads(path.read_text(encoding="utf-8")) if path and path.is_file() else {}
    return values if isinstance(values, dict) else {}


def _remember(kind: str, took: float) -> None:
    """Keeps how long a compilation took."""
    if path := _file():
        try:
            values = _remembered()
        except ValueError:
            values = {}
        with atomic.replacing(path) as temporary:
            temporary.write_text(json.dumps(values | {kind: round(took, 1)}, indent=1))
