"""Settings of all tests: eight simulated CPU devices, strict promotion, one compilation cache.

They are environment variables, set before anything imports JAX, so that commands started by tests
inherit them.
"""

import gc
import os
import pathlib
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import version

import pytest

from inception_jax.runtime import huge_pages
from tests import gcs as gcs_server

# Shared by all Pythons with one version of jaxlib, which alone decides what a program compiles to.
_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / f"jax-{version('jaxlib')}"

# Otherwise each of the commands that tests start would compile all files of the package.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

os.environ.update(
    # Commands would start themselves again to get them.
    GLIBC_TUNABLES=huge_pages.HUGE_PAGES,
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    # Simulated devices wait for each other; the default timeout is too short on a busy machine.
    # Most of the time goes into compilation, so LLVM skips expensive optimizations.
    XLA_FLAGS="--xla_cpu_collective_call_terminate_timeout_seconds=300 "
    "--xla_cpu_collective_timeout_seconds=300 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    # A step compiled by one test, or in an earlier test session, is not compiled again.
    JAX_COMPILATION_CACHE_DIR=str(_CACHE),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
)

# Tracing creates many objects that stay, which are searched in vain: a seventh of the time.
gc.set_threshold(200_000, 20, 100)

from absl import flags  # noqa: E402  (after setting the environment)

# Grain's workers read absl flags, which only an absl app parses (fixed after 0.2.18).
flags.FLAGS.mark_as_parsed()

# The slowest test files, slowest first. Running them first leaves short tests for the end, so no
# process waits long for another. Files missing here only cost time.
_LONGEST = (
    "tests/integration/test_command_line.py",
    "tests/test_cli.py",
    "tests/integration/test_old_files.py",
    "tests/tools/test_predict.py",
    "tests/training/test_bucket_checkpoints.py",
    "tests/integration/test_bucket_runs.py",
    "tests/runtime/test_preemption.py",
    "tests/tools/test_find_lr.py",
    "tests/runtime/test_compilation_cache.py",
    "tests/training/test_loop.py",
    "tests/inspection/test_structure.py",
    "tests/training/test_step.py",
    "tests/models/test_networks.py",
    "tests/input/test_augment.py",
    "tests/extension/test_own_parts.py",
    "tests/tools/test_buckets.py",
    "tests/integration/test_hosts.py",
    "tests/integration/test_faults.py",
    "tests/reporting/test_diagnosed_runs.py",
    "tests/test_documentation.py",
    "tests/test_notebook.py",
    "tests/test_extending.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return _LONGEST.index(file) if file in _LONGEST else len(_LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="module", autouse=True)
def _release_programs() -> Iterator[None]:
    """Frees the compiled programs of a file, which tests of other files hardly use."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The directory of the embedded digits, prepared once for all tests of a process."""
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="session")
def _gcs(
    pytestconfig: pytest.Config,
) -> Iterator[tuple[gcs_server.Server, gcs_server.Proxy]]:
    with gcs_server.serving() as (server, proxy):
        # A connection that the proxy cuts is left to the garbage collector by some clients: it is
        # closed late, maybe during another test.
        port = proxy.url.rpartition(":")[2]
        pytestconfig.addinivalue_line(
            "filterwarnings", rf"ignore:unclosed <socket.*, {port}\)>:ResourceWarning"
        )
        yield server, proxy


@pytest.fixture
def gcs(_gcs: tuple[gcs_server.Server, gcs_server.Proxy]) -> Iterator[gcs_server.Proxy]:
    """The proxy in front of the storage server, without rules and recorded requests."""
    proxy = _gcs[1]
    proxy.clear()
    yield proxy
    proxy.clear()


@pytest.fixture
def bucket(_gcs: tuple[gcs_server.Server, gcs_server.Proxy], gcs: gcs_server.Proxy) -> str:
    """The URL of a new, empty bucket: "gs://NAME"."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    _gcs[0].create_bucket(name)
    return f"gs://{name}"
