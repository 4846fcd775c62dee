import jax
import jax.numpy as jnp
import pytest

from inception_jax import advice
from inception_jax.errors import phase_of
from inception_jax.telemetry.clock import Clock

GPU = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6727663616 bytes."
SETTINGS = {"train.batch_size": 4096, "train.grad_accum_steps": 1, "evaluation.batch_size": 3000}


@pytest.mark.parametrize(
    ("doing", "words"),
    [
        ("train", "while training: "),
        ("train", "Give a smaller config.train.batch_size (now 4096), or compute it in parts by"),
        ("compile", "config.train.grad_accum_steps (now 1) (2, 4, …)"),
        ("evaluate", "while evaluating: "),
        ("evaluate", "Give a smaller config.evaluation.batch_size (now 3000). "),
        ("predict", "Give fewer pictures at a time"),
        ("export", "a smaller --calibration"),
        ("serve", "a smaller --max_megapixels"),
        ("prepare", "while preparing data: "),
        ("find_lr", "config.train.batch_size"),
        ("other", "In training, give a smaller config.train.batch_size (now 4096)"),
        ("other", "in evaluation, give a smaller config.evaluation.batch_size"),
    ],
)
def test_the_advice_names_the_setting_that_matters(doing: str, words: str) -> None:
    message = advice.explain(RuntimeError(GPU), [doing], SETTINGS)
    assert message is not None
    assert words in message
    assert "6727663616 bytes (6.7 GB). " in message
    assert "nvidia-smi" in message


def test_evaluation_is_not_advised_on_training() -> None:
    message = advice.explain(RuntimeError(GPU), ["evaluate", "main"], {})
    assert message is not None and "train.batch_size" not in message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        MemoryError("std::bad_alloc"),
        RuntimeError("std::bad_alloc"),
        MemoryError("Unable to allocate 3.2 GiB for an array with shape (9,) and type uint8"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 120984000080 bytes."),
    ],
)
def test_the_machines_own_memory_is_not_the_devices(error: Exception) -> None:
    message = advice.explain(error, ["train"], {})
    assert message is not None and message.startswith("out of memory while training: ")
    assert "nvidia-smi" not in message and "Other programs, or a limit" in message


@pytest.mark.parametrize(
    "text",
    [
        "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "Failed to allocate 1.5GiB (1610612736 bytes) from device: RESOURCE_EXHAUSTED",
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm.",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_every_wording_of_the_drivers_is_known(text: str) -> None:
    message = advice.explain(RuntimeError(text), ["train"], {})
    assert message is not None and "config.train.batch_size" in message


@pytest.mark.parametrize(
    "text",
    [
        "ABORTED: The TPU is already in use by process with pid 4711. Not attempting to load it",
        "ABORTED: Internal error when accessing libtpu multi-process lockfile. Run "
        '"$ sudo rm /tmp/libtpu_lockfile".',
        "FAILED_PRECONDITION: DNN library initialization failed. Look at the errors above",
        "Could not create cudnn handle: CUDNN_STATUS_NOT_INITIALIZED",
        "libtpu.so already in use by another process probably owned by another user. Run lsof",
        "UNKNOWN: TPU initialization failed: open(/dev/accel0): Device or resource busy",
    ],
)
def test_a_device_that_another_process_uses_is_said_to_be(text: str) -> None:
    message = advice.explain(RuntimeError(text), ["train"], {})
    assert message is not None
    assert "another process is using it" in message and text[:40] in message
    assert "batch_size" not in message


def test_the_cause_of_an_error_counts() -> None:
    try:
        try:
            raise RuntimeError(GPU)
        except RuntimeError as error:
            raise ValueError("the step failed") from error
    except ValueError as error:
        assert "6.7 GB" in str(advice.explain(error, ["train"], {}))


def test_other_errors_get_no_advice() -> None:
    assert advice.explain(ValueError("no memory of that"), ["train"], {}) is None
    assert advice.explain(RuntimeError("INTERNAL: Failed to execute"), ["train"], {}) is None


def test_a_note_is_no_errors_text() -> None:
    with pytest.raises(TypeError) as raised:
        jax.jit(lambda x: jnp.dot(x, jnp.ones((3, 4))))(jnp.ones((2, 2)))
    raised.value.add_note("For simplicity, JAX has removed its internal frames")
    assert advice.first_line(raised.value).startswith("TypeError: dot_general requires contracting")
    error = RuntimeError(GPU)
    error.add_note("For simplicity, JAX has removed its internal frames")
    message = advice.explain(error, ["train"], {})
    assert message is not None and "For simplicity" not in message and "6.7 GB" in message


def test_an_error_knows_its_innermost_phase() -> None:
    clock = Clock()
    with pytest.raises(RuntimeError) as raised, clock.phase("other"), clock.phase("evaluate"):
        raise RuntimeError(GPU)
    assert phase_of(raised.value) == "evaluate"
