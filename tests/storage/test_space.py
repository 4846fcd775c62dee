import errno
import os
import pathlib
import shutil

import pytest

from inception_jax.errors import DataError, WriteError
from inception_jax.storage import space


def test_insufficient_space_is_reported_with_its_purpose(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3_000_000))
    space.check_space(tmp_path, 3_000_000, "a checkpoint")
    with pytest.raises(WriteError) as error:
        space.check_space(tmp_path, 3_000_001, "a checkpoint")
    assert str(error.value) == (
        f"{tmp_path}: a checkpoint needs up to 3.0 MB, but only 3.0 MB is free. Free disk space, "
        "or use a folder on another disk"
    )
    with pytest.raises(DataError, match=r"the data set needs up to 2\.50 GB"):
        space.check_space(tmp_path, 2_500_000_000, "the data set", error=DataError)


def test_disk_failure_is_recognized_by_its_text() -> None:
    full = os.strerror(errno.ENOSPC)
    assert space.disk_failure(ValueError(f"UNKNOWN: {full} [x=1]")) == full
    assert space.disk_failure(OSError(errno.EROFS, os.strerror(errno.EROFS))) != ""
    assert space.disk_failure(ValueError("another")) == space.disk_failure(None) == ""
