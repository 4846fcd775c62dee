"""JAX's processes, devices and caches, set up before anything is computed."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_compilation_cache

from inception_jax import advice
from inception_jax.errors import UserError, nearest
from inception_jax.runtime import _jax_private, compilation_cache, hosts

PLATFORMS = ("cpu", "gpu", "tpu")
# Of launchers that number their processes: what holds their count, and the number of each.
_LAUNCHER_ENV_VARS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
# What random bits, and so a resumed run, depend on, and what the programs are written for.
_FIXED = {
    "jax_enable_x64": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_disable_jit": False,
    "jax_transfer_guard": "allow",
}


def initialize(
    *,
    platform: str = "",
    distributed: bool = False,
    cluster: str = "",
    coordinator_address: str = "",
    process_count: int = 0,
    process_index: int = -1,
    heartbeat_timeout: float = 60.0,
    fingerprint: Callable[[], Mapping[str, Any]] = dict,
    log: Callable[[str], None] = print,
) -> Callable[[], None] | None:
    """Chooses the devices and joins the other processes. Call before any other use of JAX.

    Args:
      platform: "cpu", "gpu" or "tpu": use this one or fail; empty: the best there is.
      distributed: join the other processes of a TPU pod slice, a SLURM or an Open MPI job, which
        JAX finds by itself.
      cluster: the only one of JAX's ways of finding them to use, such as "mpi4py"; empty: the first
        that fits.
      coordinator_address: host:port of process 0, where the processes are not found by themselves.
      process_count: how many processes there are, with `coordinator_address`; 0: an MPI launcher's
        variables say it.
      process_index: which of them this one is, with `coordinator_address`; -1: as the count.
      heartbeat_timeout: seconds without a heartbeat after which JAX takes another process for dead,
        and ends this one.
      fingerprint: returns what must be the same in all processes, by what it is, for JSON.
      log: takes a line where compiled programs cannot be kept, or others are waited for.

    Returns:
      What tells JAX's preemption service, and so all processes, that this one must end; None where
      there is no such service, as in a process of its own.

    Raises:
      UserError: if the platform is not there, the processes cannot be joined or do not agree.
    """
    if platform and platform not in PLATFORMS:
        raise UserError(
            f"--platform={platform}: no such platform.{nearest(platform, PLATFORMS)} Use cpu, gpu "
            "or tpu"
        )
    _fix_settings(log)
    if platform == "cpu":
        jax.config.update("jax_platforms", platform)
    compilation_cache.use(log)
    before = _jax_private.sigterm_handler()
    if coordinator_address:
        count, index = _numbered(process_count, process_index)
        if not (count > 0 and 0 <= index < count):
            raise UserError(
                f"--coordinator_address={coordinator_address}: requires --process_count ≥ 1 (got "
                f"{process_count}) and --process_index from 0 to --process_count − 1 (got "
                f"{process_index})"
            )
        _join(heartbeat_timeout, log, address=coordinator_address, count=count, index=index)
    elif distributed:
        _join(heartbeat_timeout, log, cluster=cluster or None)
    handler = _jax_private.sigterm_handler()
    # Before the devices are looked for, which other versions might do in another way.
    hosts.check_consistent("startup settings", fingerprint)
    _check_platform(platform)
    hosts.check_consistent("devices", _devices)
    return None if handler == before else _jax_private.preemption_notifier(handler)


def _fix_settings(log: Callable[[str], None]) -> None:
    """Sets what the environment, such as JAX_ENABLE_X64, may have set to something else."""
    for name, value in _FIXED.items():
        # None stands for JAX's own default, which is the same.
        if (found := getattr(jax.config, name)) not in (None, value):
            log(f"{name.upper()}={found}: ignored; this program always uses {value}")
            jax.config.update(name, value)


@contextlib.contextmanager
def settings_of_a_run(log: Callable[[str], None]) -> Iterator[None]:
    """Gives JAX the settings that a run depends on, and its cache, in the block alone.

    Args:
      log: takes a line where a setting was another, or compiled programs cannot be kept.
    """
    cache = "jax_compilation_cache_dir"
    before = {name: getattr(jax.config, name) for name in (*_FIXED, cache)}
    with compilation_cache.explained_problems(log):
        _fix_settings(log)
        if not before[cache]:
            compilation_cache.use(log)
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            if not before[cache]:
                jax_compilation_cache.reset_cache()


def _numbered(count: int, index: int) -> tuple[int, int]:
    """Returns how many processes there are and which this one is, as given or by the launcher."""
    for count_name, index_name in _LAUNCHER_ENV_VARS:
        if count == 0 and index == -1 and {count_name, index_name} <= os.environ.keys():
            return int(os.environ[count_name]), int(os.environ[index_name])
    return count, index


def _join(
    heartbeat_timeout: float,
    log: Callable[[str], None],
    *,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    cluster: str | None = None,
) -> None:
    """Joins the other processes, over which JAX watches from then on; it finds what is None."""
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            cluster_detection_method=cluster,
            heartbeat_timeout_seconds=max(1, round(heartbeat_timeout)),
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"cannot connect to the other processes: {error}. Check that all of them were "
            "started. On a TPU pod slice, SLURM or Open MPI, use --distributed (with Open MPI 5 "
            "and mpi4py, also --cluster=mpi4py); elsewhere, use --coordinator_address, "
            "--process_count and --process_index; for a single process, use none of these"
        ) from error
    process, count = _jax_private.process_place()
    if count > 1:
        store = _jax_private.KeyValueStore()
        hosts.join(hosts.Hosts(store, process, count, heartbeat_timeout, log), socket.gethostname())


def _devices() -> dict[str, Any]:
    """Returns which devices this process has, and in what way it is to use them."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices per process": jax.local_device_count(),
    }


def _check_platform(platform: str) -> None:
    """Checks that JAX found the devices that were asked for, here or by JAX_PLATFORMS."""
    try:
        found, reason = jax.default_backend(), ""
    # With JAX_PLATFORMS=cuda and no NVIDIA device, JAX fails by an assertion.
    except (RuntimeError, AssertionError) as error:
        if message := advice.in_use(str(error)):
            raise UserError(message) from error
        found, reason = "none", f" ({str(error).splitlines()[0]})" if str(error) else ""
        platform = platform or os.environ.get("JAX_PLATFORMS", "")
    if found not in ("none", platform) and platform and (message := _in_use(platform)):
        raise UserError(message)
    if found == "none" or platform not in ("", found):
        raise UserError(
            f"platform {platform!r}: not available; JAX found {found}{reason}. Check the driver, "
            "install the package with its extra (pip install -e '.[cuda]' or '.[tpu]'), or use "
            "--platform=cpu"
        )


def _in_use(platform: str) -> str | None:
    """Returns what to do where JAX passed a platform over because others use its devices."""
    try:
        jax.devices(platform)
    except (RuntimeError, AssertionError) as error:
        return advice.in_use(str(error))
    return None
