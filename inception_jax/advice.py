"""What to do about failures that no module explains: too little memory, a device in other hands.

JAX, its compilers and the drivers report them as errors of many types, so it is their text that
tells them apart.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_LONGEST = 300

# Of memory, the device's or the machine's own.
_NO_MEMORY = re.compile(
    r"RESOURCE_EXHAUSTED|out of memory|bad_alloc|cannot allocate memory|unable to allocate|"
    r"failed to allocate|CUDA_ERROR_OUT_OF_MEMORY|STATUS_ALLOC_FAILED|ran out of memory",
    re.IGNORECASE,
)
_OWN_MEMORY = re.compile(
    r"out of memory allocating|bad_alloc|cannot allocate memory|unable to allocate", re.IGNORECASE
)
# cuDNN and cuBLAS fail to start where another process has left them no memory.
_IN_USE = re.compile(
    r"already in use by|libtpu_lockfile|libtpu multi-process lockfile|"
    r"Device or resource busy|CUDA_ERROR_DEVICE_UNAVAILABLE|"
    r"STATUS_NOT_INITIALIZED|CUDNN_STATUS_INTERNAL_ERROR|DNN library initialization failed|"
    r"DNN library is not found|best cudnn convolution algorithm|"
    r"(create|initialize) (cudnn|cublas|cusolver|cusparse)",
    re.IGNORECASE,
)
_BYTES = re.compile(r"\b(\d{7,}) ?bytes")

# By what was going on: a phase of training or a command.
_TRAIN = (
    "give a smaller config.train.batch_size{train.batch_size}, or compute it in parts by "
    "config.train.grad_accum_steps{train.grad_accum_steps} (2, 4, …)"
)
_EVALUATE = "give a smaller config.evaluation.batch_size{evaluation.batch_size}"
_WHAT_TO_DO = {
    "train": ("training", _TRAIN),
    "compile": ("compiling the training step", _TRAIN),
    "input": ("reading training images", f"{_TRAIN}, or fewer config.data.workers"),
    "find_lr": ("finding a learning rate", _TRAIN),
    "evaluate": ("evaluating", _EVALUATE),
    "predict": ("predicting", "give fewer pictures at a time: up to a batch is computed together"),
    "export": (
        "exporting",
        "with --quantize give a smaller --calibration; else use a machine with more memory",
    ),
    "serve": ("serving", "give a smaller --max_megapixels, or use --platform=cpu"),
    "view": ("inspecting a network", "give a smaller config.data.image_size"),
    "prepare": ("preparing data", "free memory on this machine; pictures are decoded in parallel"),
}
_ANY = (
    f"In training, {_TRAIN}; in evaluation, {_EVALUATE}; in prediction, give fewer pictures at a "
    "time"
)


def explain(error: BaseException, doing: Sequence[str], settings: Mapping[str, Any]) -> str | None:
    """Returns what an error means and what to do about it; None if it is none of those known here.

    Args:
      error: as it was raised; what it was raised from counts too.
      doing: the phase of training and the command in which it was raised; the first one that there
        is advice for counts.
      settings: the values of settings by path, as far as they are known.
    """
    for each in _chain(error):
        what = first_line(each)
        text = f"{type(each).__name__}: {each}"
        if isinstance(each, MemoryError) or _NO_MEMORY.search(text):
            known = [name for name in doing if name in _WHAT_TO_DO]
            words, todo = _WHAT_TO_DO[known[0]] if known else ("", _ANY)
            return _no_memory(each, what, words, todo, settings)
        if message := in_use(text):
            return message
    return None


def in_use(text: str) -> str | None:
    """Returns what to do where an error's text says that another process has the device."""
    if not _IN_USE.search(text):
        return None
    return (
        f"the device cannot be used, it seems because another process is using it: "
        f"{_shortened(text)}. End that process (nvidia-smi lists those on GPUs; on a TPU VM: sudo "
        "lsof -t /dev/accel* /dev/vfio/* /tmp/libtpu_lockfile; where none is left, remove "
        "/tmp/libtpu_lockfile), or give --platform=cpu. JAX reserves three quarters of a GPU's "
        "memory: with XLA_PYTHON_CLIENT_MEM_FRACTION=0.4 for each, two processes can share one"
    )


def first_line(error: BaseException) -> str:
    """Returns an error's type and the first line of its text, without the notes added to it."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    text = _shortened(str(error))
    return f"{name}: {text}" if text else name


def _no_memory(
    error: BaseException, what: str, doing: str, todo: str, settings: Mapping[str, Any]
) -> str:
    what = _BYTES.sub(lambda found: f"{found[0]} ({int(found[1]) / 1e9:,.1f} GB)", what)
    for path in ("train.batch_size", "train.grad_accum_steps", "evaluation.batch_size"):
        now = f" (now {settings[path]})" if path in settings else ""
        todo = todo.replace(f"{{{path}}}", now)
    todo = todo[0].upper() + todo[1:]
    if isinstance(error, MemoryError) or _OWN_MEMORY.search(what):
        others = "Other programs, or a limit (ulimit, a container's), may leave too little"
    else:
        others = (
            "Another process on the device may leave too little: nvidia-smi lists those on GPUs"
        )
    during = f" while {doing}" if doing else ""
    return f"out of memory{during}: {what}. {todo}. {others}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and those that it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _shortened(text: str) -> str:
    """Returns the first line that says anything, without the full stop that ends it."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return (line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…").rstrip(".")
