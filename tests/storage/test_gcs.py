"""The storage server of the tests and its proxy, seen by the libraries that use buckets."""

import concurrent.futures
import contextlib
import http.client
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from etils import epath
from google.api_core import exceptions, retry
from google.cloud import storage

from inception_jax.storage import buckets
from tests import gcs as servers
from tests import gcs_http
from tests.gcs import Call, CutRequest, CutResponse, Delay, FlipBit, Status

ROOT = pathlib.Path(__file__).parents[2]
QUICKLY = retry.Retry(initial=0.01, maximum=0.1, timeout=60, predicate=storage.retry._should_retry)


@pytest.fixture
def files(bucket: str) -> storage.Bucket:
    """The new bucket, in Google's client library."""
    return storage.Client().bucket(bucket.removeprefix("gs://"))


# ---- The service.


def test_an_object_is_created_once(files: storage.Bucket) -> None:
    blob = files.blob("folder/object")
    blob.upload_from_string(b"first", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        blob.upload_from_string(b"second", if_generation_match=0)
    assert blob.download_as_bytes() == b"first"


def test_of_many_that_create_an_object_one_succeeds(files: storage.Bucket) -> None:
    def create(name: str) -> str:
        with contextlib.suppress(exceptions.PreconditionFailed):
            files.blob("lock").upload_from_string(name, if_generation_match=0)
            return name
        return ""

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        winners = [name for name in threads.map(create, "abcdefgh") if name]
    assert winners == [files.blob("lock").download_as_bytes().decode()]


@pytest.mark.parametrize("size", [10, 9 << 20], ids=["multipart", "resumable"])
def test_only_the_expected_generation_is_replaced(files: storage.Bucket, size: int) -> None:
    first, second, other = (letter * size for letter in (b"1", b"2", b"3"))
    blob = files.blob("object")
    blob.upload_from_string(first, if_generation_match=0)
    generation = blob.generation
    blob.upload_from_string(second, if_generation_match=generation)
    with pytest.raises(exceptions.PreconditionFailed):
        blob.upload_from_string(other, if_generation_match=generation)
    assert blob.download_as_bytes() == second


def test_only_the_expected_generation_is_deleted(files: storage.Bucket) -> None:
    blob = files.blob("object")
    blob.upload_from_string(b"first")
    stale = blob.generation
    blob.upload_from_string(b"second")
    with pytest.raises(exceptions.PreconditionFailed):
        blob.delete(if_generation_match=stale)
    blob.delete(if_generation_match=blob.generation)
    with pytest.raises(exceptions.NotFound):
        blob.delete()


def test_media_uploads_check_generations(bucket: str) -> None:
    """TensorStore uploads in this way."""
    store = tensorstore.KvStore.open(f"{bucket}/folder/").result()
    first = store.write("object", b"first").result()
    store.write("object", b"second", if_equal=first.generation).result()
    store.write("object", b"third", if_equal=first.generation).result()
    assert store["object"] == b"second"


def test_ranges_are_read(files: storage.Bucket) -> None:
    files.blob("object").upload_from_string(bytes(range(100)))
    assert files.blob("object").download_as_bytes(start=10, end=12) == b"\x0a\x0b\x0c"


def test_objects_below_a_prefix_are_listed(files: storage.Bucket) -> None:
    for name in ("a/1", "a/b/2", "c"):
        files.blob(name).upload_from_string(name)
    assert [blob.name for blob in files.list_blobs(prefix="a/")] == ["a/1", "a/b/2"]
    iterator = files.list_blobs(prefix="a/", delimiter="/")
    assert ([blob.name for blob in iterator], iterator.prefixes) == (["a/1"], {"a/b/"})


@pytest.mark.parametrize("fault", [CutRequest(after=300_000), CutResponse(), Status(503)])
@pytest.mark.parametrize("part", [1, 2, 3])
def test_an_interrupted_resumable_upload_is_whole(
    part: int, fault: servers.Action, files: storage.Bucket, gcs: servers.Proxy
) -> None:
    contents = np.random.default_rng(0).bytes(9 << 20)
    blob = files.blob("object", chunk_size=3 << 20)
    rule = gcs.inject(fault, operation="write", name="object", skip=part, times=1)
    blob.upload_from_string(contents, if_generation_match=0, retry=QUICKLY)
    assert rule.applied == 1
    assert blob.download_as_bytes() == contents


def test_large_objects_pass(files: storage.Bucket, gcs: servers.Proxy) -> None:
    contents = np.random.default_rng(0).bytes(50 << 20)
    files.blob("object").upload_from_string(contents)
    assert files.blob("object").download_as_bytes() == contents
    assert sum(request.received for request in gcs.find("write")) >= len(contents)
    assert [request.sent for request in gcs.find("read")] == [len(contents)]


# ---- Libraries.


def test_epath_sees_what_others_write(bucket: str, files: storage.Bucket) -> None:
    buckets.configure_epath()
    folder = epath.Path(bucket) / "run"
    assert not folder.exists()
    (folder / "a.txt").write_text("a")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    files.blob("run/b/c.txt").upload_from_string(b"c")
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b"]
    assert [path.name for path in folder.glob("*.txt")] == ["a.txt"]
    assert (folder / "b/c.txt").read_bytes() == b"c"
    folder.rmtree()
    assert list(files.list_blobs()) == []


def test_arrays_are_written_and_read(bucket: str) -> None:
    values = np.arange(1_000_000, dtype=np.int32).reshape(1000, 1000)
    store = {"driver": "ocdbt", "base": f"{bucket}/arrays/"}
    spec = {"driver": "zarr", "kvstore": store}
    array = tensorstore.open(spec, create=True, dtype=values.dtype, shape=values.shape).result()
    array.write(values).result()
    np.testing.assert_array_equal(tensorstore.open(spec).result().read().result(), values)


def test_checkpoints_are_committed_by_a_file(bucket: str, files: storage.Bucket) -> None:
    buckets.configure_epath()
    state = {"weights": jax.numpy.arange(100.0), "step": jax.numpy.array(1)}
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    with ocp.CheckpointManager(epath.Path(bucket) / "checkpoints", options=options) as manager:
        for step in (1, 2, 3):
            manager.save(step, args=ocp.args.StandardSave(state))
        restored = manager.restore(3, args=ocp.args.StandardRestore(state))
    np.testing.assert_array_equal(restored["weights"], state["weights"])
    names = {blob.name for blob in files.list_blobs()}
    assert {f"checkpoints/{step}/commit_success.txt" for step in (1, 2, 3)} <= names


def test_other_processes_find_the_server_quietly(bucket: str, gcs: servers.Proxy) -> None:
    script = (
        "import sys; from google.cloud import storage; from etils import epath\n"
        "url = sys.argv[1]\n"
        "storage.Client().bucket(url[5:]).blob('a').upload_from_string(b'1')\n"
        "(epath.Path(url) / 'b').write_bytes(b'2')\n"
        "import tensorstore\n"
        "tensorstore.KvStore.open(url + '/').result().write('c', b'3').result()\n"
    )
    command = [sys.executable, "-c", script, bucket]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert {name for request in gcs.find("write") for name in request.names} == {"a", "b", "c"}
    assert [line for line in done.stderr.splitlines() if "FOR_TESTING" not in line] == []


# ---- Faults.


def fetch(
    gcs: servers.Proxy, target: str, method: str = "GET", body: bytes | None = None
) -> tuple[int, bytes]:
    """Sends one request without a library that would repeat it."""
    connection = http.client.HTTPConnection(gcs.url.removeprefix("http://"), timeout=10)
    with contextlib.closing(connection):
        connection.request(method, target, body)
        response = connection.getresponse()
        return response.status, response.read()


@pytest.fixture
def target(files: storage.Bucket) -> str:
    """The path that reads an object with the contents b"0123456789"."""
    files.blob("folder/object").upload_from_string(b"0123456789")
    return f"/storage/v1/b/{files.name}/o/folder%2Fobject?alt=media"


@pytest.mark.parametrize("code", [401, 403, 404, 408, 429, 500, 503])
def test_an_error_has_the_format_of_the_service(code: int, target: str, gcs: servers.Proxy) -> None:
    gcs.inject(Status(code))
    status, body = fetch(gcs, target)
    assert (status, json.loads(body)["error"]["code"]) == (code, code)


def test_a_fault_is_given_to_the_chosen_requests(files: storage.Bucket, gcs: servers.Proxy) -> None:
    rule = gcs.inject(Status(403), operation="write", name="a*", skip=1, times=1)
    files.blob("a1").upload_from_string(b"1")
    files.blob("b1").upload_from_string(b"1")
    with pytest.raises(exceptions.Forbidden):
        files.blob("a2").upload_from_string(b"1")
    files.blob("a3").upload_from_string(b"1")
    assert (rule.seen, rule.applied) == (3, 1)
    assert [request.action is not None for request in gcs.find("write")] == [0, 0, 1, 0]


def test_random_faults_repeat_with_their_seed(target: str, gcs: servers.Proxy) -> None:
    def statuses() -> list[int]:
        gcs.clear()
        gcs.inject(Status(503), operation="read", probability=0.5, seed=3)
        return [fetch(gcs, target)[0] for _ in range(20)]

    first = statuses()
    assert set(first) == {200, 503}
    assert statuses() == first


def test_a_cut_upload_does_not_reach_the_server(files: storage.Bucket, gcs: servers.Proxy) -> None:
    gcs.inject(CutRequest(after=100_000), operation="write")
    address = f"/upload/storage/v1/b/{files.name}/o?uploadType=media&name=object"
    with pytest.raises(OSError):
        fetch(gcs, address, "POST", bytes(10_000_000))
    assert gcs.find("write")[-1].received < 1_000_000
    assert not files.blob("object").exists()


def test_an_answer_is_lost_after_the_request_was_executed(
    files: storage.Bucket, gcs: servers.Proxy
) -> None:
    gcs.inject(CutResponse(), operation="write")
    address = f"/upload/storage/v1/b/{files.name}/o?uploadType=media&name=object"
    with pytest.raises(http.client.RemoteDisconnected):
        fetch(gcs, address, "POST", b"contents")
    assert files.blob("object").download_as_bytes() == b"contents"


def test_a_download_is_cut(target: str, gcs: servers.Proxy) -> None:
    gcs.inject(CutResponse(after=4), operation="read")
    with pytest.raises(http.client.IncompleteRead) as caught:
        fetch(gcs, target)
    assert caught.value.partial == b"0123"
    assert [(request.status, request.sent) for request in gcs.find("read")] == [(0, 4)]


def test_a_bit_is_flipped(target: str, gcs: servers.Proxy) -> None:
    gcs.inject(FlipBit(at=4), operation="read")
    assert fetch(gcs, target) == (200, b"0123556789")


def test_a_delayed_request_is_executed_later(target: str, gcs: servers.Proxy) -> None:
    gcs.inject(Delay(0.2))
    assert fetch(gcs, target) == (200, b"0123456789")
    assert gcs.find("read")[-1].seconds >= 0.2


def test_clear_ends_delays(target: str, gcs: servers.Proxy) -> None:
    gcs.inject(Delay(3600))
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(fetch, gcs, target)
        while not gcs.find("read"):
            time.sleep(0.01)
        gcs.clear()
        with pytest.raises(http.client.RemoteDisconnected):
            waiting.result()


def test_a_client_that_gave_up_has_no_effect(files: storage.Bucket, gcs: servers.Proxy) -> None:
    gcs.inject(Delay(0.5), operation="write")
    with pytest.raises(Exception, match="timed out"):
        files.blob("object").upload_from_string(b"late", timeout=0.1, retry=None)
    time.sleep(1)
    assert not files.blob("object").exists()


@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_a_function_is_called_at_a_request(
    answered: bool, files: storage.Bucket, gcs: servers.Proxy
) -> None:
    seen = []
    call = Call(lambda: seen.append(files.blob("object").exists()), answered=answered)
    gcs.inject(call, operation="write", times=1)
    files.blob("object").upload_from_string(b"1")
    assert seen == [answered]


def test_a_read_only_bucket_is_read(files: storage.Bucket, target: str, gcs: servers.Proxy) -> None:
    gcs.make_read_only()
    assert fetch(gcs, target)[0] == 200
    assert len(list(files.list_blobs())) == 1
    changes: list[Callable[[], object]] = [
        lambda: files.blob("folder/object").upload_from_string(b"1"),
        lambda: files.blob("large").upload_from_string(bytes(9 << 20)),
        lambda: files.blob("folder/object").delete(),
        lambda: files.blob("copy").compose([files.blob("folder/object")]),
        lambda: files.copy_blob(files.blob("folder/object"), files, "copy"),
    ]
    for change in changes:
        with pytest.raises(exceptions.Forbidden):
            change()
    assert [blob.name for blob in files.list_blobs()] == ["folder/object"]


# ---- Records.


@pytest.mark.parametrize(
    ("method", "target", "body", "expected"),
    [
        ("GET", "/storage/v1/b/b/o/a%2Fc?alt=media", b"", ("read", "b", ["a/c"])),
        ("GET", "/download/storage/v1/b/b/o/a%2Fc?alt=media", b"", ("read", "b", ["a/c"])),
        ("GET", "/storage/v1/b/b/o/a%2Fc", b"", ("stat", "b", ["a/c"])),
        ("GET", "/storage/v1/b/b/o?prefix=a%2F", b"", ("list", "b", ["a/"])),
        ("GET", "/storage/v1/b/b/o?startOffset=a%2F", b"", ("list", "b", ["a/"])),
        ("GET", "/storage/v1/b/b?projection=noAcl", b"", ("bucket", "b", [])),
        ("POST", "/storage/v1/b?project=p", b"", ("other", "", [])),
        ("DELETE", "/storage/v1/b/b/o/a%2Fc", b"", ("delete", "b", ["a/c"])),
        ("POST", "/upload/storage/v1/b/b/o?uploadType=media&name=a", b"", ("write", "b", ["a"])),
        (
            "POST",
            "/upload/storage/v1/b/b/o?uploadType=multipart",
            b'--x\r\nContent-Type: application/json\r\n\r\n{"name": "a/c"}\r\n--x\r\n\r\n{',
            ("write", "b", ["a/c"]),
        ),
        (
            "POST",
            "/upload/storage/v1/b/b/o?uploadType=resumable",
            b'{"name": "a"}',
            ("write", "b", ["a"]),
        ),
        ("POST", "/storage/v1/b/b/o/a%2Fc/compose", b"", ("write", "b", ["a/c"])),
        ("POST", "/storage/v1/b/b/o/a/rewriteTo/b/b/o/c%2Fd", b"", ("write", "b", ["c/d"])),
    ],
)
def test_requests_are_described(
    method: str, target: str, body: bytes, expected: tuple[str, str, list[str]]
) -> None:
    assert gcs_http.describe(method, target, body) == expected


# ---- The end.


def test_the_server_ends_with_a_killed_process() -> None:
    script = (
        "import time\nfrom tests import gcs\n"
        "with gcs.serving() as (server, proxy):\n"
        "    print(server.url, server.folder, flush=True)\n"
        "    time.sleep(600)"
    )
    command = [sys.executable, "-c", script]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        url, folder = process.stdout.readline().split()
        urllib.request.urlopen(f"{url}/storage/v1/b").close()
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while os.path.exists(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(folder)
    with pytest.raises(urllib.error.URLError, match="refused"):
        urllib.request.urlopen(f"{url}/storage/v1/b")
