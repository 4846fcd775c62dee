"""Advice on errors of the hardware and its compilers: out of memory, a device in use, a fault.

JAX, its compilers and the drivers raise exceptions of many types for these, so the errors are
recognized by their text.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_MAX_LENGTH = 300

# Out of memory, on the device or the host.
_OUT_OF_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|bad_alloc|cannot allocate memory|unable to allocate|"
    r"failed to allocate|CUDA_ERROR_OUT_OF_MEMORY|STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
_HOST_MEMORY = re.compile(
    r"out of memory allocating|bad_alloc|cannot allocate memory|unable to allocate", re.IGNORECASE
)
# cuDNN and cuBLAS fail to initialize if another process has left them no memory.
_IN_USE = re.compile(
    r"already in use by|libtpu_lockfile|libtpu multi-process lockfile|"
    r"Device or resource busy|CUDA_ERROR_DEVICE_UNAVAILABLE|"
    r"STATUS_NOT_INITIALIZED|CUDNN_STATUS_INTERNAL_ERROR|DNN library initialization failed|"
    r"DNN library is not found|best cudnn convolution algorithm|"
    r"(create|initialize) (cudnn|cublas|cusolver|cusparse)",
    re.IGNORECASE,
)
# An internal check of the compiler for TPUs.
_COMPILER_FAULT = re.compile(r"LLO_CHECK failure")
_BYTES = re.compile(r"\b(\d{7,}) ?bytes")

# By phase of training or name of the command: what was being done, and the remedy.
_TRAIN = (
    "reduce config.train.batch_size{train.batch_size}, or split each batch with "
    "config.train.grad_accum_steps{train.grad_accum_steps} = 2, 4, …"
)
_EVALUATE = "reduce config.evaluation.batch_size{evaluation.batch_size}"
_REMEDIES = {
    "train": ("training", _TRAIN),
    "compile": ("compiling the training step", _TRAIN),
    "input": ("reading training images", f"{_TRAIN}, or use fewer config.data.workers"),
    "find_lr": ("finding a learning rate", _TRAIN),
    "evaluate": ("evaluating", _EVALUATE),
    "predict": ("predicting", "pass fewer images at a time; up to a batch is computed together"),
    "export": (
        "exporting",
        "with --quantize, reduce --calibration; otherwise use a machine with more memory",
    ),
    "serve": ("serving", "reduce --max_megapixels, or use --platform=cpu"),
    "summarize": ("inspecting a network", "reduce config.data.image_size"),
    "prepare": ("preparing data", "free memory on this machine; images are decoded in parallel"),
}
_DEFAULT_REMEDY = (
    f"In training, {_TRAIN}; in evaluation, {_EVALUATE}; in prediction, pass fewer images at a time"
)


def explain(
    error: BaseException, contexts: Sequence[str], settings: Mapping[str, Any]
) -> str | None:
    """Returns what an error means and what to do about it; None for any other error.

    Args:
      error: the exception; its causes are checked, too.
      contexts: training phase and command in which it was raised; the first known one is used.
      settings: known values of settings, by path.
    """
    for each in _exception_chain(error):
        what = first_line(each)
        text = f"{type(each).__name__}: {each}"
        if isinstance(each, MemoryError) or _OUT_OF_MEMORY.search(text):
            known = [name for name in contexts if name in _REMEDIES]
            activity, remedy = _REMEDIES[known[0]] if known else ("", _DEFAULT_REMEDY)
            return _out_of_memory_advice(each, what, activity, remedy, settings)
        if message := device_in_use(text) or compiler_fault(text):
            return message
    return None


def device_in_use(text: str) -> str | None:
    """Returns advice if an error's text says that another process uses the device, else None."""
    if not _IN_USE.search(text):
        return None
    return (
        "the device is unavailable, probably because another process is using it: "
        f"{_truncated_first_line(text)}. Stop that process (on GPUs, nvidia-smi lists them; on a "
        "TPU VM, run sudo lsof -t /dev/accel* /dev/vfio/* /tmp/libtpu_lockfile, and if none is "
        "left, remove /tmp/libtpu_lockfile), or use --platform=cpu. JAX reserves 75% of a GPU's "
        "memory; to run two processes on one GPU, set XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 for each"
    )


def compiler_fault(text: str) -> str | None:
    """Returns advice if an error's text shows a known fault of the compiler for TPUs, else None."""
    if not _COMPILER_FAULT.search(text):
        return None
    return (
        f"the compiler failed, which is a fault of the compiler: {_truncated_first_line(text)}. "
        "libtpu 0.0.50.1 and 0.0.51 are known to fail on some operations that 0.0.52 compiles; "
        "try a newer libtpu (docs/tpu.md)"
    )


def first_line(error: BaseException) -> str:
    """Returns the type and first line of an exception, without its notes."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    text = _truncated_first_line(str(error))
    return f"{name}: {text}" if text else name


def _out_of_memory_advice(
    error: BaseException, what: str, activity: str, remedy: str, settings: Mapping[str, Any]
) -> str:
    what = _BYTES.sub(lambda match: f"{match[0]} ({int(match[1]) / 1e9:,.1f} GB)", what)
    for path in ("train.batch_size", "train.grad_accum_steps", "evaluation.batch_size"):
        current = f" (currently {settings[path]})" if path in settings else ""
        remedy = remedy.replace(f"{{{path}}}", current)
    remedy = remedy[0].upper() + remedy[1:]
    if isinstance(error, MemoryError) or _HOST_MEMORY.search(what):
        cause = "Other programs or a limit (ulimit, container) may also be the cause"
    else:
        cause = "Another process may be using the device's memory; on GPUs, nvidia-smi lists them"
    during = f" while {activity}" if activity else ""
    return f"out of memory{during}: {what}. {remedy}. {cause}"


def _exception_chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an exception and its causes."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _truncated_first_line(text: str) -> str:
    """Returns the first nonempty line, truncated, without a final full stop."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (line if len(line) <= _MAX_LENGTH else f"{line[:_MAX_LENGTH]}…").rstrip(".")
