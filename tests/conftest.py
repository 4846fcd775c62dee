"""Settings of every test: eight simulated CPU devices, strict promotion, one compilation cache.

They are environment variables, set before anything imports JAX, so that a command that a test
starts as a process of its own inherits them.
"""

import os
import pathlib
import platform

import pytest

_CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / f"jax-{platform.python_version()}"

os.environ.update(
    JAX_PLATFORMS="cpu",
    JAX_NUM_CPU_DEVICES="8",
    # Simulated devices wait for each other, by default too short a time for a busy machine.
    # And most of the time goes into compiling: LLVM leaves out what only speeds up programs.
    XLA_FLAGS="--xla_cpu_collective_call_terminate_timeout_seconds=300 "
    "--xla_cpu_collective_timeout_seconds=300 "
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    JAX_NUMPY_RANK_PROMOTION="raise",
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    # A step compiled by one test, or by a former run of the tests, is not compiled again.
    JAX_COMPILATION_CACHE_DIR=str(_CACHE),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
)

from absl import flags  # noqa: E402  (after the environment that its importers read)

# Grain's workers read absl flags, which only an absl command line parses (fixed after 0.2.18).
flags.FLAGS.mark_as_parsed()

# Those that take longest, the longest first: what is left for the end is short, so that no process
# waits long for another. A file that is missing here costs time and nothing else.
_LONGEST = (
    "tests/integration/test_command_line.py",
    "tests/training/test_loop.py",
    "tests/test_extending.py",
    "tests/integration/test_hosts.py",
    "tests/test_notebook.py",
    "tests/integration/test_faults.py",
    "tests/reporting/test_diagnosed_runs.py",
    "tests/training/test_forty_pictures.py",
    "tests/training/test_norm.py",
    "tests/input/test_augment.py",
    "tests/models/test_networks.py",
    "tests/models/test_torch_reference.py",
    "tests/training/test_step.py",
    "tests/training/test_gradients.py",
    "tests/training/test_optimizers.py",
    "tests/tools/test_predict.py",
    "tests/tools/test_find_lr.py",
    "tests/test_cli.py",
    "tests/runtime/test_compilation_cache.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition("::")[0]
        return _LONGEST.index(file) if file in _LONGEST else len(_LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Where the embedded digits are prepared, once for all tests of a process."""
    return tmp_path_factory.mktemp("digits")
