"""JAX settings in environment variables, in subprocesses."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

DRAWS = """
import hashlib, json
from inception_jax.runtime import devices
lines = []
devices.initialize(platform="cpu", log=lines.append)
import jax, jax.numpy as jnp, numpy as np
from inception_jax.input import augment
images = jnp.asarray(np.arange(2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3))
cropped = jax.jit(lambda key: augment.pad_crop(key, images, 2))(jax.random.key(3))
digest = hashlib.sha256(np.asarray(cropped).tobytes()).hexdigest()
print(json.dumps([lines, str(cropped.dtype), digest]))
"""


def draw(**environment: str) -> list:
    done = subprocess.run(
        [sys.executable, "-c", DRAWS],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def usual() -> list:
    return draw()


def test_settings_that_would_change_a_run_are_ignored_and_logged(usual: list) -> None:
    values = {
        "JAX_ENABLE_X64": "1",
        "JAX_DISABLE_JIT": "1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "JAX_THREEFRY_PARTITIONABLE": "0",
        "JAX_TRANSFER_GUARD": "disallow",
    }
    lines, *result = draw(**values)
    assert usual[0] == [] and result == usual[1:]
    assert all(": ignored; " in line for line in lines)
    assert sorted(line.partition("=")[0] for line in lines) == sorted(values)


def test_debugging_settings_stay_on(usual: list) -> None:
    assert draw(JAX_DEBUG_NANS="1", JAX_DEBUG_INFS="1", JAX_CHECK_TRACER_LEAKS="1") == usual
