"""Encodes TensorBoard's event messages with tensorboardX's internals.

Its SummaryWriter is not used, because an error in its thread is lost, and ten writes later the run
would wait for that thread forever. The package itself is not imported, because its __init__.py
imports PyTorch if installed, which takes 1.2 s and 150 MB.
"""

import contextlib
import importlib.util
import struct
import sys
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

TESTED_WITH = {"tensorboardX": ("2.6.5",)}


@contextlib.contextmanager
def _bare_package(package: str) -> Iterator[None]:
    """Allows importing modules of a package without running its __init__.py."""
    spec = importlib.util.find_spec(package)
    if package in sys.modules or spec is None:
        yield
        return
    bare = types.ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package] = bare
    try:
        yield
    finally:
        del sys.modules[package]


def event_encoder() -> Callable[..., bytes]:
    """Returns a function that encodes an event with the current time, framed as a TFRecord.

    It takes the fields of tensorboardX's Event as keywords. `scalars`, numbers by tag, adds a
    summary of them; `starts` marks the start of a session.
    """
    with _bare_package("tensorboardX"):
        from tensorboardX.proto import event_pb2, summary_pb2
        from tensorboardX.record_writer import masked_crc32c

    def encode(
        *, scalars: Mapping[str, float] | None = None, starts: bool = False, **fields: Any
    ) -> bytes:
        if scalars is not None:
            value = summary_pb2.Summary.Value
            values = [value(tag=tag, simple_value=number) for tag, number in scalars.items()]
            fields["summary"] = summary_pb2.Summary(value=values)
        if starts:
            fields["session_log"] = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
        # Length, its checksum, data, its checksum.
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        return length + checksums[0] + data + checksums[1]

    return encode
