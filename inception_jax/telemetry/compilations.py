"""Measures how long programs take to compile, and detects hits in the compilation cache.

The seconds of a compilation are stored next to the cache to predict those of the next program of
the same kind: most changes of settings result in another program that takes about as long.
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
from inception_jax.storage import atomic, paths

_HIT = "/jax/compilation_cache/cache_hits"
_COMPILED = "/jax/core/compile/backend_compile_duration"
_FILE = "inception_jax-compile-seconds.json"

_hits: collections.Counter[int] = collections.Counter()
_seconds: dict[int, float] = collections.defaultdict(float)


def thread_seconds() -> float:
    """Returns the seconds that the calling thread has spent compiling or loading programs."""
    _listen()
    return _seconds[threading.get_ident()]


def compile_and_log(
    lowered: jax.stages.Lowered, what: str, kind: str, log: Callable[[str], None]
) -> jax.stages.Compiled:
    """Compiles a program or loads it from the cache, and logs which and how long it took.

    Args:
      lowered: the program.
      what: its name in the log.
      kind: key shared by programs that take about as long to compile.
      log: called with a line of text.
    """
    _listen()
    thread, start = threading.get_ident(), time.monotonic()
    hits = _hits[thread]
    compiled = lowered.compile()
    elapsed = time.monotonic() - start
    if _hits[thread] > hits:
        log(f"{what}: loaded from the compilation cache in {elapsed:.1f} s")
    else:
        log(f"{what}: compiled in {elapsed:.1f} s")
        with contextlib.suppress(OSError, WriteError):
            _store_seconds(kind, elapsed)
    return compiled


def last_seconds(kind: str) -> float | None:
    """Returns the seconds of the last compilation of this kind; None if unknown."""
    seconds = _load_seconds().get(kind)
    return seconds if isinstance(seconds, int | float) else None


@functools.cache
def _listen() -> None:
    """Registers the listeners, once per process."""

    def on_event(event: str, **_: Any) -> None:
        if event == _HIT:
            _hits[threading.get_ident()] += 1

    def on_duration(event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            _seconds[threading.get_ident()] += duration_secs

    jax.monitoring.register_event_listener(on_event)
    jax.monitoring.register_event_duration_secs_listener(on_duration)


def _seconds_file() -> pathlib.Path | None:
    # Not all versions of JAX declare the types of their settings.
    directory = paths.from_text(cast(Any, jax.config).jax_compilation_cache_dir or "")
    # Not worth requests to a bucket.
    return directory / _FILE if directory.name and paths.is_local(directory) else None


def _load_seconds() -> dict[str, Any]:
    values = None
    with contextlib.suppress(OSError, ValueError):
        if path := _seconds_file():
            values = json.loads(path.read_text(encoding="utf-8"))
    return values if isinstance(values, dict) else {}


def _store_seconds(kind: str, elapsed: float) -> None:
    """Stores the seconds of a compilation."""
    if path := _seconds_file():
        atomic.write_json(path, _load_seconds() | {kind: round(elapsed, 1)})
