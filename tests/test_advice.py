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
        ("train", "Reduce config.train.batch_size (currently 4096), or split each batch with"),
        ("compile", "config.train.grad_accum_steps (currently 1) = 2, 4, …"),
        ("evaluate", "while evaluating: "),
        ("evaluate", "Reduce config.evaluation.batch_size (currently 3000). "),
        ("predict", "Pass fewer images at a time"),
        ("export", "reduce --calibration"),
        ("serve", "Reduce --max_megapixels"),
        ("summarize", "Reduce config.data.image_size"),
        ("prepare", "while preparing data: "),
        ("find_lr", "config.train.batch_size"),
        ("other", "In training, reduce config.train.batch_size (currently 4096)"),
        ("other", "in evaluation, reduce config.evaluation.batch_size"),
    ],
)
def test_out_of_memory_advice_names_the_setting(doing: str, words: str) -> None:
    message = advice.explain(RuntimeError(GPU), [doing], SETTINGS)
    assert message is not None
    assert words in message
    assert "6727663616 bytes (6.7 GB). " in message
    assert "nvidia-smi" in message


def test_advice_for_evaluation_omits_training() -> None:
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
def test_host_out_of_memory(error: Exception) -> None:
    message = advice.explain(error, ["train"], {})
    assert message is not None and message.startswith("out of memory while training: ")
    assert "nvidia-smi" not in message and "Other programs or a limit" in message


@pytest.mark.parametrize(
    "text",
    [
        "INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory",
        "Failed to allocate 1.5GiB (1610612736 bytes) from device: RESOURCE_EXHAUSTED",
        "XLA:TPU compile permanent error. Ran out of memory in memory space hbm.",
        "CUBLAS_STATUS_ALLOC_FAILED",
    ],
)
def test_device_out_of_memory_wordings(text: str) -> None:
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
def test_device_in_use_by_another_process(text: str) -> None:
    message = advice.explain(RuntimeError(text), ["train"], {})
    assert message is not None
    assert "another process is using it" in message and text[:40] in message
    assert "batch_size" not in message


def test_known_fault_of_a_compiler() -> None:
    text = "INTERNAL: LLO_CHECK failure (llo_instruction.h:1) scheduled_bundleno_.valid()"
    message = advice.explain(RuntimeError(text), ["compile"], {})
    assert message is not None and text in message and "try a newer libtpu" in message
    assert "batch_size" not in message


def test_causes_of_an_error_are_checked() -> None:
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


def test_notes_are_not_part_of_the_text() -> None:
    with pytest.raises(TypeError) as raised:
        jax.jit(lambda x: jnp.dot(x, jnp.ones((3, 4))))(jnp.ones((2, 2)))
    raised.value.add_note("For simplicity, JAX has removed its internal frames")
    assert advice.first_line(raised.value).startswith("TypeError: dot_general requires contracting")
    error = RuntimeError(GPU)
    error.add_note("For simplicity, JAX has removed its internal frames")
    message = advice.explain(error, ["train"], {})
    assert message is not None and "For simplicity" not in message and "6.7 GB" in message


def test_innermost_phase_is_recorded() -> None:
    clock = Clock()
    with pytest.raises(RuntimeError) as raised, clock.phase("other"), clock.phase("evaluate"):
        raise RuntimeError(GPU)
    assert phase_of(raised.value) == "evaluate"
