import pathlib
import subprocess
import sys

import numpy as np
import pytest

from inception_jax.telemetry import clu_writers

_CHILD = """
import sys
from inception_jax.telemetry import clu_writers
from clu import metric_writers, periodic_actions
writer = metric_writers.create_default_writer(sys.argv[1])
assert isinstance(writer, metric_writers.AsyncMultiWriter), type(writer)
report = periodic_actions.ReportProgress(num_train_steps=4, every_steps=2, writer=writer)
for step in range(1, 5):
    metric_writers.write_values(writer, step, {"loss": 1 / step})
    report(step)
writer.flush()
writer.close()
imported = sorted(name for name in sys.modules if name.partition(".")[0] == "tensorflow")
assert not imported, imported
"""


def test_clu_default_writer_works_without_tensorflow(
    tmp_path: pathlib.Path,
) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    events = accumulators.EventAccumulator(str(tmp_path)).Reload()
    # Written as simple values, not as tensors, so that TensorBoard's "Scalars" has them.
    assert {"loss", "steps_per_sec"} <= set(events.Tags()["scalars"])
    points = [(point.step, point.value) for point in events.Scalars("loss")]
    assert points == [(step, np.float32(1 / step)) for step in range(1, 5)]


def test_unsupported_values_are_rejected(tmp_path: pathlib.Path) -> None:
    writer = clu_writers.JsonLinesWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(NotImplementedError, match="JsonLinesWriter writes scalars only"):
        writer.write_images(1, {"train/image": np.zeros([2, 2, 3])})
    writer.close()
