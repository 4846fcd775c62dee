"""Files of a run in a bucket."""

import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from google.cloud import storage

from inception_jax.errors import RunError
from inception_jax.storage import atomic, buckets, paths
from inception_jax.storage.workdir import Workdir
from tests.gcs import Call, Proxy, Status


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


def test_file_that_disappears_during_an_upload_is_skipped(run: paths.Path, gcs: Proxy) -> None:
    """As a custom writer may rotate its files."""
    workdir = Workdir(run)
    for name in ("a", "b", "c"):
        (workdir.path / name).write_text(name)
    gcs.inject(Call((workdir.path / "b").unlink), operation="write", name="*/a", times=1)
    workdir.upload()
    assert sorted(buckets.list_files(run)) == ["a", "c"]


def test_lock_is_checked_before_each_attempt_to_upload(run: paths.Path, gcs: Proxy) -> None:
    """While a request is repeated, another process may take over."""
    checks = []

    def check() -> None:
        checks.append(len(gcs.find("write")))
        if len(checks) > 1:
            raise RunError("taken over")

    workdir = Workdir(run)
    workdir.metrics.write_text("1\n")
    gcs.inject(Status(503), operation="write", times=1)
    with pytest.raises(RunError, match="taken over"), workdir.uploading(check, print):
        pass
    assert checks == [0, 1] and not buckets.list_files(run)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["//x"], "/x: is not a usable file name; rename it"),
        (["/plots", "/plots/x"], "plots: is both a file and a folder; rename one of them"),
    ],
)
def test_objects_that_cannot_be_files_are_named(
    names: list[str], message: str, run: paths.Path
) -> None:
    put(run, *names)
    with pytest.raises(buckets.BucketError, match=f"^{run}/{message}"):
        Workdir(run).download()


def test_objects_that_stand_for_folders_are_ignored(run: paths.Path) -> None:
    put(run, "/plots/", "/plots/x", "/")
    workdir = Workdir(run)
    workdir.download()
    assert [path.name for path in workdir.plots.iterdir()] == ["x"]


def put(folder: paths.Path, *names: str) -> None:
    """Writes objects whose names begin with that of a folder; paths would normalize them."""
    bucket, _, start = str(folder).removeprefix("gs://").partition("/")
    client = storage.Client(project="unused")
    for name in names:
        client.bucket(bucket).blob(start + name).upload_from_string(b"")


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
    # Other runs, or prepared data, may be in the same folder.
    names = ("checkpoints/1/data", "run.lock", "b/checkpoints/1/data", "inception_jax/8px/x")
    for name in names:
        buckets.write_bytes(run / name, b"x")
    workdir = Workdir(run)
    workdir.download()
    assert not any(workdir.path.iterdir())


def test_second_download_reads_only_what_has_changed(run: paths.Path, gcs: Proxy) -> None:
    for name in ("a", "b", "c"):
        buckets.write_bytes(run / name, b"1")
    workdir = Workdir(run)
    workdir.download()
    buckets.write_bytes(run / "b", b"2")
    buckets.delete(run / "c")
    gcs.clear()
    workdir.download()
    assert {path.name: path.read_bytes() for path in workdir.path.iterdir()} == {
        "a": b"1",
        "b": b"2",
    }
    assert [request.names for request in gcs.find("read")] == [["runs/a/b"]]
    workdir.upload()
    assert not gcs.find("write")


OPEN_AND_WAIT = """
import sys
from inception_jax.storage import paths
from inception_jax.storage.workdir import Workdir
from tests.gcs import Proxy
workdir = Workdir(paths.user_path("gs://bkt/runs/a", "--workdir"))
workdir.metrics.write_text("1")
print(workdir.path, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def process(temporary: pathlib.Path) -> Iterator[tuple["subprocess.Popen[str]", pathlib.Path]]:
    """Yields a process with a run in a bucket, and the run's local folder."""
    with subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_WAIT],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as started:
        assert started.stdout is not None
        yield started, pathlib.Path(started.stdout.readline().rstrip())


def test_local_folders_end_with_their_processes(tmp_path: pathlib.Path) -> None:
    with process(tmp_path) as (first, folder), process(tmp_path) as (second, other):
        assert folder != other and (folder / "metrics.jsonl").exists()
        assert folder.parent.parent == other.parent.parent == tmp_path
        first.kill()
        first.wait()
        assert folder.exists()
        with process(tmp_path) as (third, _):
            # Of the killed process, but not that of the running one.
            assert not folder.exists() and other.exists()
            third.communicate("")
        second.communicate("")
    assert not any(tmp_path.iterdir())


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
