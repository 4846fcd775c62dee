"""CLU's metric writers without TensorFlow.

Importing `clu.metric_writers` imports TensorFlow, which costs 680 MB of memory and 5 seconds at the
start of every process, through one file: `clu/metric_writers/summary_writer.py`
(google/CommonLoopUtils#358 asks for a lazy import, and is open). This module puts a module of its
own in that one's place before the first import. Everything else takes CLU's writers from here.
"""

import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

# Exact in pyproject.toml, too.
TESTED_WITH = {"clu": ("0.0.12",)}


# What makes a writer of event files in a folder; `clu_writers` sets it.
make_summary_writer: Callable[[pathlib.Path], Any] | None = None


def _summary_writer(logdir: str) -> Any:
    """What CLU's create_default_writer finds as `SummaryWriter`."""
    assert make_summary_writer is not None
    return make_summary_writer(pathlib.Path(logdir))


_replacement = types.ModuleType("clu.metric_writers.summary_writer", "TensorBoard by tensorboardX.")
vars(_replacement)["SummaryWriter"] = _summary_writer
sys.modules.setdefault(_replacement.__name__, _replacement)

# "as": exported, since it must not be imported before this module.
from clu import metric_writers as metric_writers  # noqa: E402
