import pathlib

import pytest


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the embedded digits are prepared, once for all tests."""
    return tmp_path_factory.mktemp("data")
