"""JAX's processes, devices and caches, set up before anything is computed."""

import ctypes
import os
import signal
from collections.abc import Callable

import jax

from inception_jax import compilation_cache
from inception_jax.errors import UserError, nearest

PLATFORMS = ("cpu", "gpu", "tpu")


def initialize(
    *,
    platform: str = "",
    distributed: bool = False,
    coordinator_address: str = "",
    process_count: int = 0,
    process_index: int = -1,
    log: Callable[[str], None] = print,
) -> Callable[[], None] | None:
    """Chooses the devices and joins the other processes. Call before any other use of JAX.

    Args:
      platform: "cpu", "gpu" or "tpu": use this one or fail; empty: the best there is.
      distributed: join the other processes of a TPU pod slice, a SLURM or an Open MPI job, which
        JAX finds by itself.
      coordinator_address: host:port of process 0, where the processes are not found by themselves.
      process_count: how many processes there are, with `coordinator_address`.
      process_index: which of them this one is, with `coordinator_address`.
      log: takes a line where compiled programs cannot be kept.

    Returns:
      What tells JAX's preemption service, and so all processes, that this one must end; None where
      there is no such service, as in a process of its own.

    Raises:
      UserError: if the platform is not there, or the processes cannot be joined.
    """
    if platform and platform not in PLATFORMS:
        raise UserError(
            f"--platform={platform}: must be one of {', '.join(PLATFORMS)}."
            f"{nearest(platform, PLATFORMS)}"
        )
    if platform == "cpu":
        jax.config.update("jax_platforms", platform)
    compilation_cache.use(log)
    if coordinator_address and not (process_count > 0 and 0 <= process_index < process_count):
        raise UserError(
            f"--coordinator_address={coordinator_address}: needs --process_count (found "
            f"{process_count}) and --process_index from 0 to it (found {process_index})"
        )
    handler = _sigterm_handler()
    try:
        if coordinator_address:
            jax.distributed.initialize(coordinator_address, process_count, process_index)
        elif distributed:
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes could not be joined: {error}. Give --coordinator_address, "
            "--process_count and --process_index, or leave --distributed out for one process"
        ) from error
    tell_all = _sigterm_handler()
    _check_platform(platform)
    return None if tell_all == handler else lambda: _call(tell_all)


def _sigterm_handler() -> int:
    """Returns the address of the C function that SIGTERM calls.

    JAX's preemption service learns of a preemption by SIGTERM alone. It puts a handler in C in the
    place of Python's, so whoever takes the signal after that has to hand it on.
    """
    getsig = ctypes.pythonapi.PyOS_getsig
    getsig.argtypes, getsig.restype = [ctypes.c_int], ctypes.c_void_p
    # None stands for the address 0, which is the default handler.
    return getsig(signal.SIGTERM) or 0


def _call(handler: int) -> None:
    ctypes.CFUNCTYPE(None, ctypes.c_int)(handler)(signal.SIGTERM)


def _check_platform(platform: str) -> None:
    """Checks that JAX found the devices that were asked for, here or by JAX_PLATFORMS."""
    try:
        found, reason = jax.default_backend(), ""
    # With JAX_PLATFORMS=cuda and no NVIDIA device, JAX fails by an assertion.
    except (RuntimeError, AssertionError) as error:
        found, reason = "none", f" ({str(error).splitlines()[0]})" if str(error) else ""
        platform = platform or os.environ.get("JAX_PLATFORMS", "")
    if found == "none" or platform not in ("", found):
        raise UserError(
            f"no device of the platform {platform!r} can be used; found: {found}{reason}. Check "
            "its driver and that its extra is installed (pip install -e '.[cuda]' or '.[tpu]'), "
            "or use --platform=cpu"
        )
