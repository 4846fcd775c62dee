"""The storage server of the tests, and the faults that its proxy injects."""

import pytest
from google.api_core import exceptions
from google.cloud import storage

from tests import gcs as gcs_server


def client_bucket(bucket: str) -> storage.Bucket:
    return storage.Client().bucket(bucket.removeprefix("gs://"))


def test_an_object_is_created_once(bucket: str) -> None:
    blob = client_bucket(bucket).blob("folder/object")
    blob.upload_from_string(b"first", if_generation_match=0)
    with pytest.raises(exceptions.PreconditionFailed):
        blob.upload_from_string(b"second", if_generation_match=0)
    assert blob.download_as_bytes() == b"first"


def test_a_fault_hits_the_chosen_requests(bucket: str, gcs: gcs_server.Proxy) -> None:
    rule = gcs.inject(gcs_server.Status(403), operation="write", name="a*", skip=1, times=1)
    files = client_bucket(bucket)
    files.blob("a1").upload_from_string(b"1")
    files.blob("b1").upload_from_string(b"1")
    with pytest.raises(exceptions.Forbidden):
        files.blob("a2").upload_from_string(b"1")
    files.blob("a3").upload_from_string(b"1")
    assert (rule.seen, rule.applied) == (3, 1)
