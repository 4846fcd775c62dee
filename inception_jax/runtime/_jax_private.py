"""What the package takes of JAX's private interface, and of it alone.

- The key-value store of the coordination service (`jax._src.distributed.global_state.client`).
- That JAX's preemption service installs a C function for SIGTERM: the only way to tell it that this
  process must end is to call that.

Whoever raises a pin to a version that is not in `TESTED_WITH` runs the tests of several processes
(tests/integration/test_hosts.py, test_faults.py), and then adds it here.
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

    def put(self, key: str, text: str) -> None:
        """Writes a text, over an earlier one."""
        self._client.key_value_set(key, text, allow_overwrite=True)

    def wait(self, key: str, seconds: float) -> str | None:
        """Returns a text as soon as it is there, or None if it is not there in time."""
        try:
            return self._client.blocking_key_value_get(key, round(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise

    def under(self, prefix: str) -> dict[str, str]:
        """Returns all texts whose keys begin so, by the rest of their keys."""
        found = self._client.key_value_dir_get(prefix)
        return {key.rpartition("/")[2]: text for key, text in found}


def process_place() -> tuple[int, int]:
    """Returns the number of this process and how many there are; asks for no device."""
    return distributed.global_state.process_id, distributed.global_state.num_processes


def sigterm_handler() -> int:
    """Returns the address of the C function that SIGTERM calls; 0: the default.

    JAX's preemption service puts its own in the place of Python's, so whoever takes the signal
    after that has to hand it on.
    """
    getsig = ctypes.pythonapi.PyOS_getsig
    getsig.argtypes, getsig.restype = [ctypes.c_int], ctypes.c_void_p
    return getsig(signal.SIGTERM) or 0


def preemption_notifier(handler: int) -> Callable[[], None]:
    """Returns what calls a function that `sigterm_handler` gave, as SIGTERM would."""
    call = ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)
    return lambda: call(signal.SIGTERM)
