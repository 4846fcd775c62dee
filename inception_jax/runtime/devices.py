"""Initialization of JAX: processes, devices, settings and the compilation cache."""

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_compilation_cache

from inception_jax import advice
from inception_jax.errors import UserError, nearest
from inception_jax.runtime import _jax_private, compilation_cache, hosts, tpu_vm

PLATFORMS = ("cpu", "gpu", "tpu")
# Environment variables in which MPI launchers set the process count and the process index.
_LAUNCHER_ENV_VARS = (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("PMI_SIZE", "PMI_RANK"))
# Settings that random bits, and so resumed runs, depend on, and that the code assumes.
_FIXED_SETTINGS = {
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
    """Selects the devices and connects to the other processes. Call before any other use of JAX.

    Args:
      platform: "cpu", "gpu" or "tpu": use this one or fail; empty: the best available.
      distributed: join the other processes of a TPU pod slice or a SLURM or Open MPI job, which
        JAX detects automatically.
      cluster: the only detection method to use, such as "mpi4py"; empty: the first that applies.
      coordinator_address: host:port of process 0, for processes that JAX cannot detect.
      process_count: number of processes, with `coordinator_address`; 0: from an MPI launcher's
        environment variables.
      process_index: index of this process, with `coordinator_address`; -1: from the same variables.
      heartbeat_timeout: seconds without a heartbeat after which JAX considers another process dead
        and terminates this one.
      fingerprint: returns JSON values, by name, that must be equal in all processes.
      log: called with a line if the compilation cache is disabled, another process is slow, or
        this machine is a TPU VM with a known problem.

    Returns:
      A function that tells JAX's preemption service, and so all processes, that this process must
      exit; None without such a service, as in a single process.

    Raises:
      UserError: if the platform is not available, the processes cannot connect, or they are
        inconsistent.
    """
    if platform and platform not in PLATFORMS:
        raise UserError(
            f"--platform={platform}: no such platform.{nearest(platform, PLATFORMS)} Use cpu, gpu "
            "or tpu"
        )
    _fix_settings(log)
    if platform == "cpu":
        jax.config.update("jax_platforms", platform)
    elif os.environ.get("JAX_PLATFORMS") != "cpu":
        for line in tpu_vm.warnings_of(os.environ):
            log(f"warning: {line}")
    compilation_cache.enable(log)
    before = _jax_private.sigterm_handler()
    if coordinator_address:
        count, index = _process_count_and_index(process_count, process_index)
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
    # Before the devices are initialized, which other versions of JAX might do differently.
    hosts.check_consistent("startup settings", fingerprint)
    _check_platform(platform)
    _check_joined()
    hosts.check_consistent("devices", _device_info)
    return None if handler == before else _jax_private.preemption_notifier(handler)


def _fix_settings(log: Callable[[str], None]) -> None:
    """Resets what environment variables such as JAX_ENABLE_X64 may have changed."""
    for name, value in _FIXED_SETTINGS.items():
        # None means JAX's default, which is the same value.
        if (current := getattr(jax.config, name)) not in (None, value):
            log(f"{name.upper()}={current}: ignored; this program always uses {value}")
            jax.config.update(name, value)


@contextlib.contextmanager
def run_settings(log: Callable[[str], None]) -> Iterator[None]:
    """Applies the JAX settings that a run depends on, and the cache, within the block only.

    Args:
      log: called with a line if a setting is overridden or the compilation cache is disabled.
    """
    cache = "jax_compilation_cache_dir"
    before = {name: getattr(jax.config, name) for name in (*_FIXED_SETTINGS, cache)}
    with compilation_cache.log_cache_errors(log):
        _fix_settings(log)
        # The calling program may have set another folder.
        if before[cache] in (None, os.environ.get(compilation_cache.VARIABLE)):
            compilation_cache.enable(log)
        is_changed = getattr(jax.config, cache) != before[cache]
        if is_changed:
            jax_compilation_cache.reset_cache()
        try:
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            if is_changed:
                jax_compilation_cache.reset_cache()


def _process_count_and_index(count: int, index: int) -> tuple[int, int]:
    """Returns the process count and index as given, or as set by an MPI launcher."""
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
    """Connects to the other processes, which JAX monitors from then on; it detects what is None."""
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
    process, count = _jax_private.process_index_and_count()
    if count > 1:
        store = _jax_private.KeyValueStore()
        hosts.join(hosts.Hosts(store, process, count, heartbeat_timeout, log), socket.gethostname())


def _device_info() -> dict[str, Any]:
    """Returns the kind and number of local devices, which must be equal in all processes."""
    return {
        "device": jax.local_devices()[0].device_kind,
        "devices per process": jax.local_device_count(),
    }


def _check_platform(platform: str) -> None:
    """Checks that JAX uses the platform requested by the argument or by JAX_PLATFORMS."""
    try:
        backend, reason = jax.default_backend(), ""
    # With JAX_PLATFORMS=cuda and no NVIDIA device, JAX fails by an assertion.
    except (RuntimeError, AssertionError) as error:
        if message := advice.device_in_use(str(error)):
            raise UserError(message) from error
        backend, reason = "none", f" ({str(error).splitlines()[0]})" if str(error) else ""
        platform = platform or os.environ.get("JAX_PLATFORMS", "")
    if backend not in ("none", platform) and platform and (message := _device_in_use(platform)):
        raise UserError(message)
    if backend == "none" or platform not in ("", backend):
        raise UserError(
            f"platform {platform!r}: not available; JAX found {backend}{reason}. Check the driver, "
            "install the package with its extra (pip install -e '.[cuda]' or '.[tpu]'), or use "
            "--platform=cpu"
        )


def _check_joined() -> None:
    """Checks that this process is not one of several that know nothing of each other.

    The TPUs of a slice connect by themselves, so JAX counts their hosts even if none has joined.
    """
    if (count := jax.process_count()) > 1 and not hosts.is_multi_process():
        raise UserError(
            f"this machine is one of {count} hosts of a TPU slice, and has not joined the others. "
            "Run the same command with --distributed on all of them at the same time; commands "
            "without that flag need --platform=cpu"
        )


def _device_in_use(platform: str) -> str | None:
    """Returns advice if JAX skipped a platform because another process uses its devices."""
    try:
        jax.devices(platform)
    except (RuntimeError, AssertionError) as error:
        return advice.device_in_use(str(error))
    return None
