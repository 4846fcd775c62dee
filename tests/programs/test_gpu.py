"""What the compiler for NVIDIA GPUs makes of the training step, where JAX's plugin is installed."""

import importlib.util

import jax
import pytest

from inception_jax.config import Model
from inception_jax.errors import UserError
from inception_jax.programs import compile as programs
from inception_jax.programs import targets
from inception_jax.programs.compile import Program
from inception_jax.training import state as states
from inception_jax.training.run import Run
from tests.programs import narrow

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, PLUGINS)), reason="needs the extra cuda"
    ),
]


@pytest.fixture(scope="module")
def compiled() -> tuple[Run, Program]:
    """The run of a narrow MiniGoogLeNet on one GPU, and its training step."""
    target = targets.get("h100")
    settings = narrow.config(model=Model(name="mini_googlenet", width=0.125, dtype="bfloat16"))
    run = programs.assemble(settings, target)
    return run, programs.compile_train_step(run, target, 16)


def test_every_convolution_multiplies_bfloat16(compiled: tuple[Run, Program]) -> None:
    assert set(compiled[1].audit.convolutions) == {"bf16"}


def test_the_state_is_donated_and_updated_in_place(compiled: tuple[Run, Program]) -> None:
    run, program = compiled
    leaves = jax.tree.leaves(states.abstract_state(run))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert program.audit.donated_bytes == program.audit.state_bytes == size
    # Without the layout of the gradients, three copies for each kernel.
    copied = sum(each.bytes for each in program.audit.operations if each.opcode == "copy")
    assert copied < size / 20


def test_pools_scatter_nothing(compiled: tuple[Run, Program]) -> None:
    operations = compiled[1].audit.operations
    names = [each.name for each in operations]
    assert not [name for name in names if "scatter" in name or "reduce_window" in name]
    assert "pooling" in {each.kind for each in operations}


def test_a_text_that_xla_cannot_read_is_one_message() -> None:
    text = "device_memory_size: 85899345920\nmemory_bandwidth: 2000000000000\n{"
    with pytest.raises(
        UserError, match=r"^target = 'GPU': the compiler does not accept it .*Proto"
    ):
        targets.make_mesh(targets.from_target_config(text, 1, "own.pbtxt"))


def test_nothing_waits_for_the_host_and_all_shapes_are_known(compiled: tuple[Run, Program]) -> None:
    assert not compiled[1].audit.host_transfers
    assert not compiled[1].audit.dynamic_shapes
