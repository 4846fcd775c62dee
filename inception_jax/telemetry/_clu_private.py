"""Imports CLU's metric writers without TensorFlow.

Importing `clu.metric_writers` imports TensorFlow, which costs 680 MB of memory and 5 seconds at the
start of every process, through one file: `clu/metric_writers/summary_writer.py`
(google/CommonLoopUtils#358 asks for a lazy import and is open). This module replaces that file by
its own before the first import; all other modules import CLU's writers from here.
"""

import pathlib
import sys
import types
from collections.abc import Callable
from typing import Any

# Also pinned in pyproject.toml.
TESTED_WITH = {"clu": ("0.0.12",)}


# Creates a writer of event files in a directory; set by `clu_writers`.
make_summary_writer: Callable[[pathlib.Path], Any] | None = None


def _summary_writer(logdir: str) -> Any:
    """Creates the writer that CLU's create_default_writer uses as `SummaryWriter`."""
    assert make_summary_writer is not None
    return make_summary_writer(pathlib.Path(logdir))


_replacement = types.ModuleType("clu.metric_writers.summary_writer", "TensorBoard by tensorboardX.")
vars(_replacement)["SummaryWriter"] = _summary_writer
sys.modules.setdefault(_replacement.__name__, _replacement)

# "as" exports it, because it must not be imported before this module.
from clu import metric_writers as metric_writers  # noqa: E402
