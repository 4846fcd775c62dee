"""JAX's processes, devices and caches, set up before anything is computed."""

import os
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
) -> None:
    """Chooses the devices and joins the other processes. Call before any other use of JAX.

    Args:
      platform: "cpu", "gpu" or "tpu": use this one or fail; empty: the best there is.
      distributed: join the other processes of a TPU pod slice, a SLURM or an Open MPI job, which
        JAX finds by itself.
      coordinator_address: host:port of process 0, where the processes are not found by themselves.
      process_count: how many processes there are, with `coordinator_address`.
      process_index: which of them this one is, with `coordinator_address`.
      log: takes a line where compiled programs cannot be kept.

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
    _check_platform(platform)


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
