"""The only uses of JAX's private interface in the package.

- The key-value store of the coordination service (`jax._src.distributed.global_state.client`).
- JAX's preemption service installs a C function for SIGTERM. Calling it is the only way to tell the
  service that this process must exit.

Before raising a pin to a version that is not in `TESTED_WITH`, run the multi-process tests
(tests/integration/test_hosts.py, test_faults.py), then add the version here.
"""

import ctypes
import signal
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

TESTED_WITH = {"jax": ("0.10.2", "0.12.0.1")}


class KeyValueStore:
    """The key-value store of JAX's coordination service."""

    def __init__(self) -> None:
        self._client: Any = distributed.global_state.client

    def set(self, key: str, text: str) -> None:
        """Sets the text of a key, replacing any earlier one."""
        self._client.key_value_set(key, text, allow_overwrite=True)

    def wait_for(self, key: str, seconds: float) -> str | None:
        """Returns the text of a key once it is set, or None after a timeout in seconds."""
        try:
            return self._client.blocking_key_value_get(key, round(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def get_all(self, prefix: str) -> dict[str, str]:
        """Returns the texts of all keys that start with `prefix`, by the last part of the key."""
        entries = self._client.key_value_dir_get(prefix)
        return {key.rpartition("/")[2]: text for key, text in entries}


def process_index_and_count() -> tuple[int, int]:
    """Returns the index of this process and the process count, without initializing devices."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def sigterm_handler() -> int:
    """Returns the address of the C function that handles SIGTERM; 0: the default action.

    JAX's preemption service replaces Python's handler with its own, so a handler installed later
    has to forward the signal.
    """
    getsig = ctypes.pythonapi.PyOS_getsig
    getsig.argtypes, getsig.restype = [ctypes.c_int], ctypes.c_void_p
    return getsig(signal.SIGTERM) or 0


def preemption_notifier(handler: int) -> Callable[[], None]:
    """Returns a function that calls the handler at an address, as SIGTERM would."""
    call = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    return lambda: call(signal.SIGTERM)
