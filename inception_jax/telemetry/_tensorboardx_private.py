"""TensorBoard's event messages, from inside tensorboardX.

Not by its SummaryWriter: an error in that one's thread is lost, and ten writes later the run would
wait for the thread for ever. And not by importing the package: its __init__.py imports PyTorch
where there is one, which takes 1.2 s and 150 MB.
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
def _without_its_init(package: str) -> Iterator[None]:
    """Lets modules of a package be imported without what its __init__.py imports."""
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
    """Returns what makes an event of its fields, framed as a TFRecord, with the present time.

    The function returned takes the fields of tensorboardX's Event by name; `scalars`, numbers by
    their tags, stands for a summary of these, and `starts` for the start of a session.
    """
    with _without_its_init("tensorboardX"):
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
        # Length, its checksum, data, their checksum.
        length = struct.pack("<Q", len(data))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
        return length + checksums[0] + data + checksums[1]

    return encode
