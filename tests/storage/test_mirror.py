"""Files of a run in a bucket."""

import pathlib

import pytest

from inception_jax.storage import atomic, buckets, paths
from inception_jax.storage.workdir import Workdir


@pytest.fixture
def run(bucket: str) -> paths.Path:
    return paths.user_path(f"{bucket}/runs/a", "--workdir")


def test_files_appear_in_the_bucket_and_on_another_machine(run: paths.Path) -> None:
    first = Workdir(run)
    first.download()
    first.config.write_text("{}")
    first.plots.mkdir()
    (first.plots / "curves.png").write_bytes(b"\x89PNG")
    (first.path / ".metrics.jsonl.123").write_text("unfinished")
    first.upload()
    assert sorted(buckets.list_files(run)) == ["config.json", "plots/curves.png"]

    second = Workdir(run)
    assert second.path != first.path and second.path.name == "a"
    second.download()
    assert second.config.read_text() == "{}"
    assert (second.plots / "curves.png").read_bytes() == b"\x89PNG"


def test_only_changed_files_are_uploaded(run: paths.Path) -> None:
    workdir = Workdir(run)
    workdir.metrics.write_text("1\n")
    workdir.config.write_text("{}")
    workdir.upload()
    before = buckets.list_files(run)
    with workdir.metrics.open("a") as file:
        file.write("2\n")
    workdir.upload()
    after = buckets.list_files(run)
    assert after["config.json"] == before["config.json"]
    assert after["metrics.jsonl"].size == 4
    again = Workdir(run)
    again.download()
    again.upload()
    assert buckets.list_files(run) == after


def test_checkpoints_and_lock_are_left_to_others(run: paths.Path) -> None:
    for name in ("checkpoints/1/data", "run.lock"):
        buckets.write_bytes(run / name, b"x")
    workdir = Workdir(run)
    workdir.download()
    assert not any(workdir.path.iterdir())


def test_local_run_has_no_copies(tmp_path: pathlib.Path) -> None:
    workdir = Workdir(tmp_path)
    workdir.download()
    workdir.upload()
    assert workdir.path == tmp_path and workdir.checkpoints == tmp_path / "checkpoints"
    assert not any(tmp_path.iterdir())


def test_output_in_a_bucket_appears_when_complete(run: paths.Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic.replacing(run / "x.onnx") as temporary:
        temporary.write_bytes(b"half")
        raise ZeroDivisionError
    assert not buckets.list_files(run)
    with atomic.replacing(run / "x.onnx") as temporary:
        temporary.write_bytes(b"complete")
    assert buckets.read_bytes(run / "x.onnx") == b"complete"
